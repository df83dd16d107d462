"""Settings as plain JSON types, and back: what a file can hold of an optimizer beside its arrays."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from typing import Any

import numpy as np

from gradstep.schedules import Schedule, from_dict


class Plain:
    """Turns settings into plain JSON types. What JSON has stands for itself, and dicts of one key for the rest.

    .. code-block:: text

        {"tuple": [...]}  {"dict": {...}}  {"float": "inf"}                  what JSON has no form for
        {"schedule": i}                                                      number i of `schedules`
        {"tensor": {"dtype": "float32", "shape": [], "value": 0.1}}          a tensor of one number

    Attributes:
        schedules: all schedules so far, each once, as `gradstep.schedules.Schedule.to_dict` has them. One that several settings
            share is shared again when it is read.
    """

    def __init__(self) -> None:
        self.schedules: list[Any] = []
        self._seen: list[Schedule] = []

    def encode(self, what: str, value: Any) -> Any:
        """Return `value` as plain JSON types.

        Raises:
            TypeError: for what can't be, named by `what`.
        """
        if value is None or isinstance(value, (str, bool, np.bool_)):
            return bool(value) if isinstance(value, np.bool_) else value
        if isinstance(value, (int, np.integer)):
            return operator.index(value)
        if isinstance(value, (float, np.floating)):
            return self._float(what, value)
        if isinstance(value, list):
            return [self.encode(f"{what}[{i}]", item) for i, item in enumerate(value)]
        if isinstance(value, tuple):
            return {"tuple": self.encode(what, list(value))}
        if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
            return {"dict": {key: self.encode(f"{what}[{key!r}]", item) for key, item in value.items()}}
        if isinstance(value, Schedule):
            return {"schedule": self._schedule(what, value)}
        if callable(value):
            raise TypeError(
                f"{what} is {value!r}, a function, which can't be saved: schedules of gradstep.schedules can, or a number"
            )
        return self._number(what, value)

    def _float(self, what: str, value: Any) -> Any:
        number = float(value)
        if math.isfinite(number):
            if number != value:
                raise TypeError(f"{what} is {value!r}, which no float64 can hold")
            return number
        return {"float": str(number)}

    def _schedule(self, what: str, schedule: Schedule) -> int:
        for i, seen in enumerate(self._seen):
            if seen is schedule:
                return i
        try:
            fields = schedule.to_dict()
            same = from_dict(fields) == schedule
        except (TypeError, ValueError, AttributeError) as error:
            raise TypeError(f"{what} is {schedule!r}, a schedule that can't be saved: {error}") from None
        if not same:
            raise TypeError(f"{what} is {schedule!r}, a schedule that can't be saved: its dict makes another one")
        self._seen.append(schedule)
        self.schedules.append(self.encode(what, fields))
        return len(self._seen) - 1

    def _number(self, what: str, value: Any) -> Any:
        """Return an array or tensor of one number."""
        shape = getattr(value, "shape", None)
        if not isinstance(shape, tuple) or math.prod(shape) != 1:
            raise TypeError(f"{what} is {value!r}, of type {type(value).__name__}, which can't be saved")
        number = self.encode(what, value.item())
        if isinstance(value, np.ndarray):
            return number
        return {"tensor": {"dtype": str(value.dtype).removeprefix("torch."), "shape": list(shape), "value": number}}


def decode(value: Any, schedules: list[Schedule]) -> Any:
    """Return what `Plain.encode` was given.

    Args:
        value: what it returned.
        schedules: those of `Plain.schedules`, each made by `decode_schedule`.

    Raises:
        KeyError, IndexError, TypeError, ValueError: if `value` is nothing of the kind.
    """
    if isinstance(value, list):
        return [decode(item, schedules) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    if kind == "tuple":
        return tuple(decode(inner, schedules))
    if kind == "dict":
        return {key: decode(item, schedules) for key, item in inner.items()}
    if kind == "float":
        return float(inner)
    if kind == "schedule":
        return schedules[inner]
    if kind == "tensor":
        import torch  # noqa: PLC0415 - there is one in the file

        number = decode(inner["value"], schedules)
        return torch.full(inner["shape"], number, dtype=getattr(torch, inner["dtype"]))
    raise KeyError(kind)


def decode_schedule(value: Any) -> Schedule:
    """Return the schedule that stands in `Plain.schedules` as `value`.

    Raises:
        KeyError, TypeError, ValueError: if there is none.
    """
    return from_dict(decode(value, []))
