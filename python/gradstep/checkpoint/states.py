"""Reading the states of a checkpoint: into the memory that they stay in, and into other formats where that is asked for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from gradstep import _core
from gradstep.checkpoint.contents import Param, Saved
from gradstep.files import Bytes
from gradstep.formats import AVERAGES, arrays_of_state, is_unsigned, scale_name
from gradstep.holder import Holder

Parts = dict[str, tuple[str, tuple[int, ...]]]
"""The arrays of a state, one or codes and scales: dtypes and shapes by name."""

_CONVERTIBLE = frozenset(AVERAGES).union(*(rule.states for rule in _core.rules.values()))
_OF_PRECISION = {"kahan": "compensation", "master": "master", "split": "remainder"}


class _Reading:
    """A state on its way from the file into the optimizer.

    Args:
        optimizer: which it is for.
        param: its parameter.
        name: of the state.
        saved: what it is made of in the file.
        wanted: what it is to be made of; None: it is read to be checked, and not kept.
    """

    def __init__(self, optimizer: Holder, param: Any, name: str, saved: Parts, wanted: Parts | None) -> None:
        self.made: dict[str, Any] = {}
        self._optimizer, self._param, self._name = optimizer, param, name
        self._saved, self._wanted = saved, wanted
        self._sources: dict[str, Any] = {}
        self._left = len(saved)

    def room(self, part: str) -> Bytes:
        """Return where the bytes of a part go: into its own memory if they can stay there."""
        arrays = self._optimizer._arrays
        dtype, shape = self._saved[part]
        if self._wanted == self._saved:
            made = self.made[part] = self._optimizer._empty(shape, dtype, self._param)
            room = arrays.room_in(made)
            if room is not None:
                return room
        source = self._sources[part] = arrays.flat(dtype, math.prod(shape))
        return arrays.bytes_of(source)

    def arrived(self) -> None:
        """Note that a part has been read; after the last one, bring the state into its form."""
        self._left -= 1
        if self._left > 0:
            return
        if self._wanted == self._saved:
            for part, source in self._sources.items():
                self._optimizer._arrays.copy(self.made[part], source)
        elif self._wanted is not None:
            self._convert(self._wanted)
        self._sources.clear()

    def _convert(self, wanted: Parts) -> None:
        """Make the state of another format; decoding is exact, so it is rounded once."""
        self.made = {part: self._optimizer._empty(shape, dtype, self._param) for part, (dtype, shape) in wanted.items()}
        arrays = self._optimizer._arrays
        shape = arrays.shape_of(self._param)
        if math.prod(shape) == 0:
            return
        where, unsigned = f"{type(self._optimizer).__name__}.load", is_unsigned(self._name)
        numbers, *scales = self._sources.values() if len(self._sources) == 1 else self._in_order(self._sources)
        if scales:
            codes, numbers = numbers, arrays.flat("float32", math.prod(shape))
            _core.convert((numbers,), (codes, *scales), unsigned, where)
        targets = self.made
        on_device = _core.device_of(self._param) >= 0
        if on_device:  # converted here, and brought there
            targets = {part: arrays.flat(dtype, math.prod(of_it)) for part, (dtype, of_it) in wanted.items()}
        if len(targets) == 1:
            target = targets[self._name]
            _core.convert((target,), (numbers.reshape(target.shape),), False, where)
        else:
            _core.convert(self._in_order(targets), (numbers,), unsigned, where)
        for part, target in targets.items() if on_device else ():
            arrays.copy(self.made[part], target)

    def _in_order(self, parts: Mapping[str, Any]) -> tuple[Any, Any]:
        return parts[self._name], parts[scale_name(self._name)]


def read_states(optimizer: Holder, saved: Saved, given: list[set[str]], where: str) -> dict[tuple[int, int], dict[str, Any]]:
    """Return the states of each parameter, by group and place in it, read and checked.

    Args:
        optimizer: whose parameters and settings fit.
        saved: the checkpoint.
        given: names of the settings that were given for each group: `state_dtype` has states converted.
        where: what messages begin with.

    Raises:
        OSError: if the file can't be read.
        ValueError: if it is damaged; for a `precision` that can't go on from what was saved.
    """
    states: dict[tuple[int, int], dict[str, Any]] = {}
    readings: dict[str, tuple[_Reading, str]] = {}
    for position, (i, j, name, param) in enumerate(optimizer._params()):
        theirs, settings = saved.groups[i][2][j], optimizer.param_groups[i]
        left_out = _left_out(theirs, settings, f"{where}: params[{name!r}]") if "precision" in given[i] else set()
        state: dict[str, Any] = {}
        for label in theirs.states:
            if label in theirs.numbers:
                number = theirs.numbers[label]
                state[label] = optimizer._arrays.number(f"{where}: state[{name!r}][{label!r}]", label, number, param)
            elif label.removesuffix("_scale") == label or label.removesuffix("_scale") not in theirs.arrays:
                parts = {part: theirs.arrays[part] for part in (label, scale_name(label)) if part in theirs.arrays}
                wanted: Parts | None = parts
                if label in left_out:
                    wanted = None
                elif "state_dtype" in given[i] and label in _CONVERTIBLE:
                    made = arrays_of_state(label, settings, theirs.dtype, theirs.shape, 0.0)
                    wanted = {part: (array.dtype, array.shape) for part, array in made.items()}
                reading = _Reading(optimizer, param, label, parts, wanted)
                readings.update({f"state.{position}.{part}": (reading, part) for part in parts})
                if wanted is not None:
                    state[label] = reading
        if state:
            states[i, j] = state
    _read(saved, readings)
    for (i, j), state in states.items():
        found: dict[str, Any] = {}
        for label, value in state.items():
            found.update(value.made if isinstance(value, _Reading) else {label: value})
        order = [label for label in saved.groups[i][2][j].states if label in found]
        states[i, j] = {label: found[label] for label in dict.fromkeys([*order, *found])}
    return states


def _read(saved: Saved, readings: Mapping[str, tuple[_Reading, str]]) -> None:
    last: list[_Reading] = []

    def room(name: str) -> Bytes:
        if last:
            last.pop().arrived()
        reading, part = readings[name]
        last.append(reading)
        return reading.room(part)

    saved.file.read(room)
    if last:
        last.pop().arrived()


def _left_out(theirs: Param, settings: Mapping[str, Any], what: str) -> set[str]:
    """Return the arrays that another precision has no use for."""
    precision = settings.get("precision") or "nearest"
    kept = _OF_PRECISION.get(precision)
    others = {label for label in theirs.arrays if label in _OF_PRECISION.values() and label != kept}
    if others and kept is not None:
        (other,) = others
        raise ValueError(f"{what} was saved with its {other!r}, which precision={precision!r} can't go on from")
    return others
