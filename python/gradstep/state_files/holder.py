"""The methods of the optimizers that keep states in a folder.

A step changes files in place, so between two flushes they belong to no step in particular. Before the first step after a flush the
manifest says so, on the disk; a folder that is found like that is refused.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from gradstep import _core
from gradstep.checkpoint.plain import Plain, decode
from gradstep.checkpoint.tensor_file import is_storable, itemsize
from gradstep.files import PathLike
from gradstep.holder import Holder
from gradstep.saved import NUMBERS
from gradstep.state_files.folder import Folder, MappedFile, read_ahead


class _Placed(NamedTuple):
    """An array that lies in a file."""

    file: MappedFile
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Work:
    """A folder that an optimizer works in."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        self.clean = not folder.is_new  # the manifest on the disk tells what the files hold
        self.placed: dict[int, _Placed] = {}  # by address
        self.cold: list[list[MappedFile]] = []  # by parameter: not read yet

    def __reduce__(self) -> tuple[Any, ...]:
        """Leave copies of an optimizer, whose states are copies too, without the folder."""
        return type(None), ()


class HoldsStateFiles(Holder):
    """Mixin of the optimizers: `state_dir`, `flush` and `close`."""

    _work: _Work | None = None

    def flush(self) -> None:
        """Bring the states in `state_dir` to the disk, with the numbers that belong to them.

        A process that opens the folder later goes on from the last flush, unless steps have been taken since: then the files belong
        to no step in particular, and it is refused. Whoever writes into states otherwise than by a step calls this after it.

        Raises:
            RuntimeError: if there is no `state_dir`, or it is closed.
            TypeError: for a name or a state that can't be written.
            ValueError: for a state that belongs to none of the parameters.
            OSError: if something can't be written. The folder can't be gone on with then, until a flush succeeds.
        """
        work = self._need_work("flush")
        work.folder.check_mine()
        self._check_states(f"{type(self).__name__}.flush")
        params = [self._record_param(work, *param) for param in self._params()]
        used = {record["file"] for param in params for record in param["state"].values() if "file" in record}
        for placed in work.placed.values():
            if placed.file.name in used:
                placed.file.memory.flush()
        of_class = {"optimizer": type(self).__name__, "interface": self._arrays.interface}
        work.folder.write_manifest({"clean": True, **of_class, "steps": self.steps, "params": params})
        work.clean = True
        for address, placed in list(work.placed.items()):
            if placed.file.name not in used:
                del work.placed[address]
                work.folder.remove(placed.file.name)

    def close(self) -> None:
        """Flush, and let others have `state_dir`. The optimizer takes no steps after that.

        Raises:
            RuntimeError, TypeError, ValueError, OSError: see `flush`.
        """
        work = self._need_work("close")
        self.flush()
        work.folder.close()

    def _need_work(self, function: str) -> _Work:
        if self._work is None:
            raise RuntimeError(f"{type(self).__name__}.{function}: there is no state_dir; save(path) writes a checkpoint")
        return self._work

    # ---- opening ----------------------------------------------------------------------------------------------------------

    def _open_state_dir(self, folder: PathLike, where: str, *, new: bool = False) -> None:
        """Keep states in files in `folder` from now on, beginning with those that are there.

        Args:
            folder: path of the folder.
            where: what messages begin with.
            new: whether there may be no states in it.

        Raises:
            OSError: if something can't be read or written.
            RuntimeError: if another optimizer has the folder.
            ValueError: if something else lies there, or states that do not fit.
        """
        for _, _, name, param in self._params():
            self._check_place(f"{where}: params[{name!r}]", param)
        opened = Folder(folder, where)
        try:
            if new and not opened.is_new:
                raise opened.refuse("holds states already: it must be empty, or not there yet")
            contents = {} if opened.is_new else self._read_manifest(opened)
            self._work = work = _Work(opened)
            if opened.is_new:
                self.flush()
            else:
                for (i, j), state in self._read_states(work, contents).items():
                    self.state[self._key_of(i, j)] = state
                self.steps = contents["steps"]
        except BaseException:
            self._work = None
            (opened.delete if opened.is_new else opened.close)()
            raise

    def _check_place(self, what: str, param: Any) -> None:
        if hasattr(param, "to_local"):
            raise ValueError(f"{what} is a DTensor: state_dir is for tensors that are whole")
        device = _core.device_of(param)
        if device >= 0:
            raise ValueError(
                f"{what} is on cuda:{device}: state_dir keeps states in files, which are for parameters in CPU memory"
            )

    def _discard_state_dir(self) -> None:
        if self._work is not None:
            self._work.folder.delete()
            self._work = None

    def _read_manifest(self, folder: Folder) -> dict[str, Any]:
        """Return what is known of the states, all of it checked."""
        contents = folder.read_manifest()
        if not contents["clean"]:
            raise folder.refuse(
                "was left in the middle: steps were taken since the last flush(), so its files belong to no step; "
                "delete it to start over, or to load a checkpoint into it"
            )
        theirs, ours = (contents["optimizer"], contents["interface"]), (type(self).__name__, self._arrays.interface)
        if theirs != ours:
            raise folder.refuse(f"has states of {theirs[0]} for {theirs[1]}, not of {ours[0]} for {ours[1]}")
        params = list(self._params())
        if len(params) != len(contents["params"]):
            raise folder.refuse(f"has states of {len(contents['params'])} parameters, there are {len(params)}")
        for (_, _, name, param), record in zip(params, contents["params"], strict=True):
            saved_name = decode(record["name"], [])
            if not self._is_named(name, saved_name):
                raise folder.refuse(f"has states of a parameter {saved_name!r} in the place of {name!r}")
            for what, one, other in (
                ("shape", self._arrays.shape_of(param), tuple(record["shape"])),
                ("dtype", self._arrays.dtype_of(param), record["dtype"]),
            ):
                if one != other:
                    raise folder.refuse(f"has states for {what} {other} of params[{name!r}], which has {one}")
            for state in record["state"].values():
                if "file" in state:
                    folder.check_file(state["file"], math.prod(state["shape"]) * itemsize(state["dtype"]))
        return contents

    def _read_states(self, work: _Work, contents: dict[str, Any]) -> dict[tuple[int, int], dict[str, Any]]:
        states: dict[tuple[int, int], dict[str, Any]] = {}
        for (i, j, name, param), record in zip(self._params(), contents["params"], strict=True):
            state, files = {}, []
            for label, of_it in record["state"].items():
                if "number" in of_it:
                    what = f"{type(self).__name__}: state[{name!r}][{label!r}]"
                    state[label] = self._arrays.number(what, label, decode(of_it["number"], []), param)
                elif "file" not in of_it:
                    state[label] = self._empty(tuple(of_it["shape"]), of_it["dtype"], param)
                else:
                    file = work.folder.open(of_it["file"])
                    files.append(file)
                    placed = _Placed(file, of_it["dtype"], tuple(of_it["shape"]), tuple(of_it["strides"]))
                    state[label] = self._array_in(work, placed)
            if state:
                states[i, j] = state
                work.cold.append(files)
        return states

    # ---- working ----------------------------------------------------------------------------------------------------------

    def _begin_writing(self) -> None:
        """Take note, on the disk, that the files are going to change.

        Raises:
            OSError: if that can't be written.
            RuntimeError: if the folder is closed, or belongs to another process.
        """
        work = self._work
        if work is None:
            return
        work.folder.check_mine()
        if work.clean:
            work.folder.write_manifest({"clean": False})
            work.clean = False
        if work.cold:
            read_ahead(work.cold)
            work.cold = []

    def _place(self, array: Any) -> Any:
        """Return an array like `array`, which holds nothing yet: in a file, if there is a folder."""
        work, arrays = self._work, self._arrays
        dtype, shape = arrays.dtype_of(array), arrays.shape_of(array)
        if work is None or math.prod(shape) == 0:
            return array
        self._check_place(f"{type(self).__name__}: a parameter", array)
        file = work.folder.create(math.prod(shape) * itemsize(dtype))
        return self._array_in(work, _Placed(file, dtype, shape, arrays.strides_of(array)))

    def _array_in(self, work: _Work, placed: _Placed) -> Any:
        array = self._arrays.over(placed.file.memory, placed.dtype, placed.shape, placed.strides)
        work.placed[self._arrays.address_of(array)] = placed
        return array

    def _placed_at(self, work: _Work, array: Any) -> _Placed | None:
        """Return where an array lies, if it is all of a file."""
        arrays = self._arrays
        placed = work.placed.get(arrays.address_of(array))
        found = (arrays.dtype_of(array), arrays.shape_of(array), arrays.strides_of(array))
        return placed if placed is not None and placed[1:] == found else None

    def _record_param(self, work: _Work, i: int, j: int, name: Any, param: Any) -> dict[str, Any]:
        """Return what is to be known of a parameter and its states; arrays that are in no file yet are put into files."""
        arrays = self._arrays
        state: Any = self._state_of(i, j)
        records: dict[str, Any] = {}
        for label, value in list(state.items()):
            what = f"{type(self).__name__}.flush: state[{name!r}][{label!r}]"
            if label in NUMBERS or not arrays.is_array(value):
                records[label] = {"number": Plain().encode(what, value.item() if hasattr(value, "item") else value)}
                continue
            dtype, shape = arrays.dtype_of(value), arrays.shape_of(value)
            if not is_storable(dtype):
                raise TypeError(f"{what} has dtype {dtype}, which can't be written")
            placed = self._placed_at(work, value)
            if placed is None and math.prod(shape) > 0:
                state[label] = self._empty(shape, dtype, param)
                arrays.copy(state[label], value)
                placed = self._placed_at(work, state[label])
            in_file = {} if placed is None else {"file": placed.file.name, "strides": list(placed.strides)}
            records[label] = {"dtype": dtype, "shape": list(shape), **in_file}
        of_param = {"shape": list(arrays.shape_of(param)), "dtype": arrays.dtype_of(param)}
        return {"name": Plain().encode(f"{type(self).__name__}.flush: the name {name!r}", name), **of_param, "state": records}
