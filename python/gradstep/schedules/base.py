"""What all schedules share: calls, lengths, composition, saving."""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, fields
from itertools import pairwise
from typing import Any, ClassVar, overload

import numpy as np
from numpy.typing import NDArray

from gradstep.schedules.settings import from_one, increasing, number, settle, tuple_of


class Schedule(ABC):
    """Base of the schedules: a value as a function of the number of steps done so far, 0 before the first.

    A subclass is a dataclass of its settings, checks them in ``__post_init__``, and has the formula in `at`. What it inherits:

    * ``schedule(step)`` for an integer is a float; for a NumPy array of integers, an array of float64 with the same values.
    * ``a >> b`` is `a` for its `length`, then `b`, whose steps count from 0 again. See `Sequence`.
    * ``schedule * number`` and ``a * b`` multiply. See `Scaled` and `Product`.
    * `to_dict` and `from_dict`, ``==``, ``copy`` and ``pickle``.
    """

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]
    __array_ufunc__: ClassVar[None] = None
    """NumPy's numbers leave ``number * schedule`` to the schedule."""

    @property
    def length(self) -> int | None:
        """The number of steps after which another schedule may follow; None for one that has no end."""
        return None

    @abstractmethod
    def at(self, step: int) -> float:
        """Return the value after `step` steps; `step` is a Python int from 0."""

    @overload
    def __call__(self, step: int | np.integer[Any]) -> float: ...
    @overload
    def __call__(self, step: NDArray[np.integer[Any]]) -> NDArray[np.float64]: ...
    def __call__(self, step: int | np.integer[Any] | NDArray[np.integer[Any]]) -> float | NDArray[np.float64]:
        """Return the value after `step` steps, or the values after all of these.

        Raises:
            TypeError: if `step` is neither an integer nor a NumPy array of integers.
            ValueError: if it is negative.
        """
        where = f"{type(self).__name__}: step"
        if isinstance(step, np.ndarray):
            if step.dtype.kind not in "iu":
                raise TypeError(f"{where} must have an integer dtype, got {step.dtype}")
            return np.array([self(n) for n in step.ravel().tolist()], np.float64).reshape(step.shape)
        try:
            n = operator.index(step)
        except TypeError:
            raise TypeError(f"{where} must be an integer or an array of integers, got {step!r}") from None
        if n < 0:
            raise ValueError(f"{where} must not be negative, got {n}")
        return self.at(n)

    def to_dict(self) -> dict[str, Any]:
        """Return the schedule as a dict of plain JSON types; `from_dict` makes an equal schedule of it."""
        return {"type": type(self).__name__} | {field.name: _plain(getattr(self, field.name)) for field in fields(self)}

    def __rshift__(self, then: Schedule) -> Sequence:
        if not isinstance(then, Schedule):
            return NotImplemented
        if self.length is None:
            raise ValueError(
                f"{type(self).__name__} has no end, so {type(then).__name__} can't follow it: Sequence takes milestones"
            )
        ours, theirs = _parts(self), _parts(then)
        milestones = (*ours.milestones, self.length, *(self.length + milestone for milestone in theirs.milestones))
        return Sequence(schedules=ours.schedules + theirs.schedules, milestones=milestones)

    def __mul__(self, factor: float | Schedule) -> Schedule:
        if isinstance(factor, Schedule):
            return Product(schedules=(self, factor))
        if isinstance(factor, (int, float, np.integer, np.floating)):
            return Scaled(schedule=self, factor=float(factor))
        return NotImplemented

    def __rmul__(self, factor: float) -> Schedule:
        return self * factor


def _plain(value: Any) -> Any:
    if isinstance(value, Schedule):
        return value.to_dict()
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def from_dict(data: Mapping[str, Any]) -> Schedule:
    """Return the schedule of which `Schedule.to_dict` made `data`.

    Args:
        data: a dict with ``type``, the name of a subclass of `Schedule`, and its settings; those that have defaults may be left
            out. In the place of a schedule stands such a dict, in the place of a tuple a list.

    Raises:
        TypeError: if `data` is no dict, or a setting is of the wrong type.
        ValueError: for an unknown type, a setting that is unknown, missing or out of range.

    Example:
        >>> from gradstep import schedules
        >>> schedules.from_dict({"type": "Cosine", "start": 0.1, "steps": 100})
        Cosine(start=0.1, steps=100, end=0.0)
    """
    if not isinstance(data, Mapping):
        raise TypeError(f"from_dict: a schedule must be a dict, got {data!r}")
    kinds: dict[Any, type[Schedule]] = {kind.__name__: kind for kind in Schedule.__subclasses__()}
    name = data.get("type")
    if not isinstance(name, str) or name not in kinds:
        raise ValueError(f"from_dict: type must be one of {', '.join(map(repr, sorted(kinds)))}, got {name!r}")
    settings = {key: _revived(value) for key, value in data.items() if key != "type"}
    known = {field.name: field for field in fields(kinds[name])}
    for key in settings:
        if key not in known:
            raise ValueError(f"from_dict: {name} has no setting {key!r}")
    for key, field in known.items():
        if key not in settings and field.default is MISSING:
            raise ValueError(f"from_dict: {name} must have the setting {key!r}")
    return kinds[name](**settings)


def _revived(value: Any) -> Any:
    if isinstance(value, Mapping):
        return from_dict(value)
    return tuple(_revived(item) for item in value) if isinstance(value, (list, tuple)) else value


def _schedule(where: str, value: Any) -> Schedule:
    if not isinstance(value, Schedule):
        raise TypeError(f"{where} must be a schedule, got {value!r}")
    return value


@dataclass(frozen=True, kw_only=True)
class Sequence(Schedule):
    """Schedules one after the other, each seeing steps counted from its own beginning. ``a >> b`` makes one.

    .. code-block:: text

        schedules[i](step - milestones[i-1])       milestones[i-1] <= step < milestones[i]; milestones[-1] is 0

    Its length is the last milestone plus the length of the last schedule; past it, the last schedule decides.

    Args:
        schedules: at least one. One that has an end may be left before it, or stay past it, as its own rule for that is.
        milestones: steps at which the second, third, ... begins, increasing; one fewer than `schedules`.

    Raises:
        TypeError: for settings of the wrong type.
        ValueError: for milestones out of order or of another number, or a `OneCycle` that would have to last too long.

    Example:
        >>> from gradstep.schedules import Constant, Exponential, Linear
        >>> warm = Linear(start=0.0, end=1.0, steps=4) >> Exponential(start=1.0, gamma=0.5)
        >>> [warm(step) for step in range(7)]
        [0.0, 0.25, 0.5, 0.75, 1.0, 0.5, 0.25]

    References:
        `torch.optim.lr_scheduler.SequentialLR`, `optax.join_schedules`.
    """

    schedules: tuple[Schedule, ...]
    milestones: tuple[int, ...]

    def __post_init__(self) -> None:
        settle(self, schedules=tuple_of(_schedule), milestones=increasing(from_one))
        if len(self.milestones) != len(self.schedules) - 1:
            raise ValueError(
                f"Sequence: milestones must be one fewer than schedules, got {len(self.milestones)} and {len(self.schedules)}"
            )
        for schedule, (begin, end) in zip(self.schedules, pairwise((0, *self.milestones)), strict=False):
            schedule.at(end - begin - 1)  # one that raises past its end does so now, not in the middle of training

    @property
    def length(self) -> int | None:
        """The last milestone plus the length of the last schedule."""
        begin, last = (0, *self.milestones)[-1], self.schedules[-1].length
        return None if last is None else begin + last

    def at(self, step: int) -> float:
        """Return the value after `step` steps."""
        i = bisect_right(self.milestones, step)
        return self.schedules[i].at(step - self.milestones[i - 1] if i else step)


def _parts(schedule: Schedule) -> Sequence:
    return schedule if isinstance(schedule, Sequence) else Sequence(schedules=(schedule,), milestones=())


@dataclass(frozen=True, kw_only=True)
class Scaled(Schedule):
    """A schedule times a number: ``schedule * factor``. As long as `schedule`.

    Args:
        schedule: any schedule.
        factor: number that its values are multiplied by.

    Raises:
        TypeError: for settings of the wrong type.
        ValueError: for a factor that is negative or not finite.

    Example:
        >>> from gradstep.schedules import Noam
        >>> (2 * Noam(model_size=64, warmup_steps=100))(99)
        0.025
    """

    schedule: Schedule
    factor: float

    def __post_init__(self) -> None:
        settle(self, schedule=_schedule, factor=number)

    @property
    def length(self) -> int | None:
        """The length of `schedule`."""
        return self.schedule.length

    def at(self, step: int) -> float:
        """Return the value after `step` steps."""
        return self.schedule.at(step) * self.factor


@dataclass(frozen=True, kw_only=True)
class Product(Schedule):
    """The product of schedules that run at the same time: ``a * b``. As long as the longest of them.

    Args:
        schedules: at least one.

    Raises:
        TypeError: for settings of the wrong type.
        ValueError: if there are none.

    Example:
        >>> from gradstep.schedules import Linear, ReduceOnPlateau
        >>> plateau = ReduceOnPlateau(start=0.1, factor=0.5, patience=0)
        >>> warm = Linear(start=0.5, end=1.0, steps=100) * plateau
        >>> plateau.update(1.0), plateau.update(2.0)  # no better: reduce
        (None, None)
        >>> warm(0), warm(100)
        (0.025, 0.05)

    References:
        `torch.optim.lr_scheduler.ChainedScheduler`.
    """

    schedules: tuple[Schedule, ...]

    def __post_init__(self) -> None:
        settle(self, schedules=tuple_of(_schedule))
        if not self.schedules:
            raise ValueError("Product: schedules must not be empty")

    @property
    def length(self) -> int | None:
        """The length of the longest of `schedules`."""
        lengths = [schedule.length for schedule in self.schedules]
        return None if None in lengths else max(length for length in lengths if length is not None)

    def at(self, step: int) -> float:
        """Return the value after `step` steps."""
        value = 1.0
        for schedule in self.schedules:
            value *= schedule.at(step)
        return value
