"""What a checkpoint says beside its arrays: settings, numbers, and what the parameters and states are.

.. code-block:: text

    {"optimizer": "AdamW", "interface": "numpy", "gradstep": "0.3.0", "steps": 100,
     "of_all": {"clip_norm": 1.0, ...}, "defaults": {"lr": 0.001, ...}, "schedules": [...],
     "groups": [{"settings": {"lr": {"schedule": 0}, ...}, "more": {},
                 "params": [{"name": "weight", "shape": [3, 2], "dtype": "float32",
                             "state": {"exp_avg": {"dtype": "float32", "shape": [3, 2]}, "step": {"number": 100}, ...}}]}]}

Values are as `gradstep.checkpoint.plain` has them. ``more`` are what others than gradstep keep in a group. The array of a state is
``state.<i>.<name>`` in the file, i the position of its parameter among all.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from gradstep import _core
from gradstep.checkpoint.plain import Plain, decode, decode_schedule
from gradstep.checkpoint.tensor_file import Tensor, TensorFile, is_storable, stored_shape
from gradstep.holder import Holder
from gradstep.options import CONDITIONS, GROUP_OPTIONS
from gradstep.saved import NUMBERS, read_count


def collect(optimizer: Holder, where: str) -> tuple[dict[str, Any], list[Tensor]]:
    """Return what is to be saved of an optimizer: what is known beside the arrays, and the arrays.

    Raises:
        TypeError: for what no file can hold.
        ValueError: for a state that belongs to none of the parameters.
    """
    optimizer._check_whole(where)
    optimizer._check_states(where)
    plain = Plain()
    tensors: list[Tensor] = []

    def encode(what: str, settings: Mapping[str, Any]) -> dict[str, Any]:
        for name in settings:
            if not isinstance(name, str):
                raise TypeError(f"{where}: {what} has the key {name!r}, which is no text")
        return {name: plain.encode(f"{where}: {what}[{name!r}]", value) for name, value in settings.items()}

    groups: list[dict[str, Any]] = []
    for i, group in enumerate(optimizer.param_groups):
        known = optimizer.defaults.keys() | GROUP_OPTIONS
        settings = {name: value for name, value in group.items() if name in known}
        more = {name: value for name, value in group.items() if name not in known and name not in ("params", "param_names")}
        what = f"param_groups[{i}]"
        groups.append({"settings": encode(what, settings), "more": encode(what, more), "params": []})
    for position, (i, j, name, param) in enumerate(optimizer._params()):
        states = {
            label: _collect_state(optimizer, f"{where}: state[{name!r}][{label!r}]", label, value, plain)
            for label, value in optimizer._state_of(i, j).items()
        }
        for label, (record, data) in states.items():
            if data is not None:
                tensors.append(Tensor(f"state.{position}.{label}", record["dtype"], tuple(record["shape"]), data))
        record = {
            "name": plain.encode(f"{where}: the name {name!r}", name),
            "shape": list(optimizer._arrays.shape_of(param)),
            "dtype": optimizer._arrays.dtype_of(param),
            "state": {label: record for label, (record, _) in states.items()},
        }
        groups[i]["params"].append(record)
    contents = {
        "optimizer": type(optimizer).__name__,
        "interface": optimizer._arrays.interface,
        "gradstep": _core.__version__,
        "steps": optimizer.steps,
        "of_all": encode(type(optimizer).__name__, optimizer._of_all()),
        "defaults": encode("defaults", optimizer.defaults),
        "groups": groups,
        "schedules": plain.schedules,
    }
    return contents, tensors


def _collect_state(optimizer: Holder, what: str, name: str, value: Any, plain: Plain) -> tuple[dict[str, Any], Any]:
    """Return what is known of a state, and for an array a function that returns its bytes."""
    arrays = optimizer._arrays
    if name in NUMBERS and getattr(value, "shape", None) is not None:
        value = value.item()
    if not arrays.is_array(value):
        return {"number": plain.encode(what, value)}, None
    dtype = arrays.dtype_of(value)
    if not is_storable(dtype):
        raise TypeError(f"{what} has dtype {dtype}, which can't be saved")
    return {"dtype": dtype, "shape": list(arrays.shape_of(value))}, lambda: arrays.bytes_of(value)


class Param(NamedTuple):
    """A parameter as it was when the checkpoint was saved."""

    name: Any
    shape: tuple[int, ...]
    dtype: str
    numbers: dict[str, Any]
    arrays: dict[str, tuple[str, tuple[int, ...]]]
    """Dtype and shape of each."""
    states: list[str]
    """The names of both, in their order."""


class Saved:
    """What a checkpoint says.

    Args:
        file: the checkpoint.
        optimizer: name of the class that it should be of.
        interface: that it should be of.

    Attributes:
        steps, of_all, defaults: of the optimizer.
        groups: of each group, settings, what others keep there, and parameters.

    Raises:
        ValueError: if it is of another class, or makes no sense.
    """

    def __init__(self, file: TensorFile, optimizer: str, interface: str) -> None:
        self.file = file
        try:
            theirs = (file.contents["optimizer"], file.contents["interface"])
            if theirs == (optimizer, interface):
                self._read(file.contents)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise file.refuse(f"is damaged: its contents make no sense ({type(error).__name__}: {error})") from None
        if theirs != (optimizer, interface):
            raise file.refuse(f"is a checkpoint of {theirs[0]} for {theirs[1]}, not of {optimizer} for {interface}")

    def _read(self, contents: Mapping[str, Any]) -> None:
        schedules = [decode_schedule(schedule) for schedule in contents["schedules"]]

        def decode_all(settings: Mapping[str, Any]) -> dict[str, Any]:
            return {name: decode(value, schedules) for name, value in settings.items()}

        self.steps = read_count("steps", contents["steps"])
        self.of_all, self.defaults = decode_all(contents["of_all"]), decode_all(contents["defaults"])
        self.groups: list[tuple[dict[str, Any], dict[str, Any], list[Param]]] = []
        found: dict[str, tuple[str, tuple[int, ...]]] = {}
        position = 0
        for group in contents["groups"]:
            params = []
            for param in group["params"]:
                states = param["state"]
                numbers = {label: decode(of_it["number"], schedules) for label, of_it in states.items() if "number" in of_it}
                arrays = {
                    label: (of_it["dtype"], tuple(of_it["shape"])) for label, of_it in states.items() if label not in numbers
                }
                name, shape = decode(param["name"], schedules), tuple(param["shape"])
                params.append(Param(name, shape, param["dtype"], numbers, arrays, list(states)))
                found.update({f"state.{position}.{label}": stored_shape(*array) for label, array in arrays.items()})
                position += 1
            self.groups.append((decode_all(group["settings"]), decode_all(group["more"]), params))
        if found != {name: (entry.dtype, entry.shape) for name, entry in self.file.tensors.items()}:
            raise ValueError("other arrays than it has")

    def check_fit(self, optimizer: Holder, where: str) -> None:
        """Refuse other parameters than were saved.

        Raises:
            ValueError: if there are other groups, or parameters of other names, shapes or dtypes.
        """
        ours, arrays = optimizer.param_groups, optimizer._arrays
        if len(ours) != len(self.groups):
            raise ValueError(f"{where}: params has {len(ours)} groups, {self.file.path} has {len(self.groups)}")
        for i, (group, (_, _, params)) in enumerate(zip(ours, self.groups, strict=True)):
            if len(group["params"]) != len(params):
                count = f"param_groups[{i}] has {len(group['params'])} parameters"
                raise ValueError(f"{where}: {count}, {self.file.path} has {len(params)}")
        for i, j, name, param in optimizer._params():
            theirs = self.groups[i][2][j]
            if not optimizer._is_named(name, theirs.name):
                raise ValueError(
                    f"{where}: param_groups[{i}] has the parameter {name!r} where {self.file.path} has {theirs.name!r}"
                )
            for what, one, other in (
                ("shape", arrays.shape_of(param), theirs.shape),
                ("dtype", arrays.dtype_of(param), theirs.dtype),
            ):
                if one != other:
                    raise ValueError(f"{where}: params[{name!r}] has {what} {one}, {self.file.path} has {other}")

    def restore_settings(self, optimizer: Holder, options: Collection[str], given: list[set[str]], where: str) -> None:
        """Set what has been saved, but for what was given.

        Args:
            optimizer: that fits.
            options: names of settings that were given for all groups.
            given: names of settings that were given for each group, those of `options` among them.
            where: what messages begin with.

        Raises:
            TypeError, ValueError: for settings that the optimizer does not have, or out of range.
        """
        known = optimizer.defaults.keys() | GROUP_OPTIONS
        for what, settings, names in (
            ("", self.of_all, CONDITIONS.keys()),
            ("defaults", self.defaults, known),
            *((f"param_groups[{i}]", group[0], known) for i, group in enumerate(self.groups)),
        ):
            for name in settings.keys() - names:
                raise ValueError(f"{where}: {self.file.path} has the setting {what}[{name!r}], which the optimizer has not")
        optimizer._set_of_all({name: value for name, value in self.of_all.items() if name not in options})
        optimizer.defaults.update({name: value for name, value in self.defaults.items() if name not in options})
        for i, (group, (settings, more, _)) in enumerate(zip(optimizer.param_groups, self.groups, strict=True)):
            group.update({name: value for name, value in (more | settings).items() if name not in given[i]})
            optimizer._check_group(group, f"{where}: param_groups[{i}]")
