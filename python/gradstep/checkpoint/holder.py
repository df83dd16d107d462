"""The methods of the optimizers that write and read checkpoints."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gradstep.checkpoint.contents import Saved, collect
from gradstep.checkpoint.states import read_states
from gradstep.checkpoint.tensor_file import TensorFile, write
from gradstep.files import PathLike
from gradstep.holder import Holder
from gradstep.options import OPTIONS

if TYPE_CHECKING:
    from typing_extensions import Self


class HoldsCheckpoints(Holder):
    """Mixin of the optimizers: `save` and `load`."""

    def save(self, path: PathLike) -> None:
        """Write a checkpoint: states, step counts and settings, all that `load` needs to go on. Parameters are not in it.

        It is a file in the layout of safetensors, with every byte under a checksum. It takes the place of what is at `path` when
        all of it is on the disk: if anything fails, or the process or the machine ends meanwhile, the old file is there, whole.

        Args:
            path: where the file is to be.

        Raises:
            TypeError: for a setting that no file can hold, as a function, where one of `gradstep.schedules` can be saved.
            ValueError: for a state that belongs to none of the parameters.
            OSError: if the file can't be written, of a full disk or missing permission.
            RuntimeError: on a big-endian machine: files are little-endian.
        """
        contents, tensors = collect(self, f"{type(self).__name__}.save")
        write(path, contents, tensors)

    @classmethod
    def load(cls, path: PathLike, params: Any, **options: Any) -> Self:
        """Return an optimizer that goes on from a checkpoint with the same bits as the one that was saved.

        Args:
            path: of a file that `save` of this class has written.
            params: as for the constructor: groups and parameters as they were saved, of the same names, shapes and dtypes. Their
                values are yours to restore.
            options: settings in the place of the saved ones, in all groups; those in the groups of `params` are in theirs. With
                `state_dtype` among them, states are converted to what new ones would be made of. With `state_dir`, a folder
                that is empty or not there yet, they are put there.

        Raises:
            OSError: if the file can't be read.
            RuntimeError: on a big-endian machine.
            TypeError: for options that the class does not have, or of the wrong type.
            ValueError: if the file is cut short, damaged, of another class or format; if it does not fit `params`; for options
                out of range. Nothing has changed then.
        """
        where = f"{cls.__name__}.load"
        folder = options.pop("state_dir", None)
        with TensorFile(path, where) as file:
            saved = Saved(file, cls.__name__, cls._arrays.interface)
            params, own = _settings_in(params)
            taken = _keywords_of(cls)
            settings = {name: value for name, value in (saved.defaults | saved.of_all).items() if name in taken}
            make: Any = cls
            optimizer: Self = make(params, **{**settings, **options})
            optimizer._check_whole(where)
            saved.check_fit(optimizer, where)
            given = [names | options.keys() for names in own]
            saved.restore_settings(optimizer, options.keys(), given, where)
            if folder is None:
                states = read_states(optimizer, saved, given, where)
            else:
                file.check()
                optimizer._open_state_dir(folder, where, new=True)
                try:
                    states = read_states(optimizer, saved, given, where)
                except BaseException:
                    optimizer._discard_state_dir()
                    raise
        for (i, j), state in states.items():
            optimizer.state[optimizer._key_of(i, j)] = state
        optimizer.steps = saved.steps
        if folder is not None:
            optimizer.flush()
        return optimizer


def _settings_in(params: Any) -> tuple[Any, list[set[str]]]:
    """Return the parameters, and the names of the settings that each of their groups has."""
    if isinstance(params, Iterable) and not isinstance(params, (Sequence, Mapping, str)) and not hasattr(params, "shape"):
        params = list(params)
    if isinstance(params, Sequence) and len(params) > 0 and isinstance(params[0], Mapping):
        groups = [dict(group) for group in params]  # torch writes into them
        return groups, [set(group) - {"params"} for group in groups]
    return params, [set()]


def _keywords_of(cls: type) -> set[str]:
    """Return the keywords that the constructor takes."""
    parameters = inspect.signature(cls).parameters.values()
    names = {parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD}
    return names | OPTIONS if len(names) < len(parameters) else names
