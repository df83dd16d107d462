"""Schedules that move from one value to another in a given number of steps, and hold it then."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from gradstep.schedules.base import Schedule
from gradstep.schedules.settings import flag, from_one, from_zero, increasing, number, one_of, positive, settle, tuple_of

Shape: TypeAlias = Literal["linear", "cosine", "1-sqrt"]
"""How a schedule moves from one value to another."""

SHAPES: Mapping[str, Callable[[float], float]] = {
    "linear": lambda y: y,
    "cosine": lambda y: (1 - math.cos(math.pi * y)) / 2,
    "1-sqrt": lambda y: 1 - math.sqrt(1 - y),
}
"""The share of the way that is left when a share y of the time is left: 1 at 1 and 0 at 0, both exactly."""


def between(start: float, end: float, left: float) -> float:
    """Return the value with a share `left` of the way to go: `start` at 1 and `end` at 0, both exactly."""
    return left * start + (1 - left) * end


def line(start: float, end: float, step: int, steps: int) -> float:
    """Return the value after `step` of `steps` steps on a straight line; nothing cancels if it begins or ends at 0."""
    return (steps - step) / steps * start + step / steps * end


@dataclass(frozen=True, kw_only=True)
class Linear(Schedule):
    """A straight line from one value to another: a warm-up, or a decay. Holds `end` past its end.

    .. code-block:: text

        start + (end - start) min(step, steps) / steps

    Args:
        start: value at step 0. A warm-up from 0 makes a first step that changes nothing.
        end: value at step `steps`.
        steps: its length.

    Raises:
        TypeError: for settings of the wrong type.
        ValueError: for settings out of range.

    Example:
        >>> from gradstep.schedules import Cosine, Linear
        >>> schedule = Linear(start=0.0, end=1.0, steps=10) >> Cosine(start=1.0, steps=90)
        >>> schedule(0), schedule(5), schedule(10), schedule(100)
        (0.0, 0.5, 1.0, 0.0)

    References:
        `torch.optim.lr_scheduler.LinearLR`: ``start`` is ``lr * start_factor``, ``end`` is ``lr * end_factor``.
    """

    start: float
    end: float
    steps: int

    def __post_init__(self) -> None:
        settle(self, start=number, end=number, steps=from_one)

    @property
    def length(self) -> int:
        """`steps`."""
        return self.steps

    def at(self, step: int) -> float:
        """Return the value after `step` steps."""
        return line(self.start, self.end, min(step, self.steps), self.steps)


@dataclass(frozen=True, kw_only=True)
class Cosine(Schedule):
    """Half a period of the cosine, from one value to another. Holds `end` past its end, as Keras and optax do.

    .. code-block:: text

        end + (start - end) (1 + cos(pi min(step, steps) / steps)) / 2

    Args:
        start: value at step 0.
        steps: its length.
        end: value at step `steps`.

    Raises:
        TypeError: for settings of the wrong type.
        ValueError: for settings out of range.

    Example:
        >>> from gradstep.schedules import Cosine
        >>> schedule = Cosine(start=1.0, steps=100)
        >>> [round(schedule(step), 6) for step in (0, 50, 100, 1000)]
        [1.0, 0.5, 0.0, 0.0]

    References:
        Loshchilov and Hutter, arXiv:1608.03983; `torch.optim.lr_scheduler.CosineAnnealingLR`, which rises again past its end.
    """

    start: float
    steps: int
    end: float = 0.0

    def __post_init__(self) -> None:
        settle(self, start=number, steps=from_one, end=number)

    @property
    def length(self) -> int:
        """`steps`."""
        return self.steps

    def at(self, step: int) -> float:
        """Return the value after `step` steps."""
        return between(self.start, self.end, SHAPES["cosine"](max(self.steps - step, 0) / self.steps))


@dataclass(frozen=True, kw_only=True)
class Polynomial(Schedule):
    """A power of the time that is left, from one value to another. Holds `end` past its end, unless it cycles.

    .. code-block:: text

        end + (start - end) (1 - min(step, steps) / steps)^power

    Args:
        start: value at step 0.
        steps: its length.
        end: value at step `steps`.
        power: exponent, positive.
        cycle: past the end, stretch: `steps` stands for its smallest multiple that is not below `step`. Has no end then.

    Raises:
        TypeError: for settings of the wrong type.
        ValueError: for settings out of range.

    Example:
        >>> from gradstep.schedules import Polynomial
        >>> schedule = Polynomial(start=1.0, steps=100, power=2.0)
        >>> schedule(0), schedule(50), schedule(100)
        (1.0, 0.25, 0.0)

    References:
        `torch.optim.lr_scheduler.PolynomialLR`; Keras' ``PolynomialDecay``, also for `cycle`.
    """

    start: float
    steps: int
    end: float = 0.0
    power: float = 1.0
    cycle: bool = False

    def __post_init__(self) -> None:
        settle(self, start=number, steps=from_one, end=number, power=positive, cycle=flag)

    @property
    def length(self) -> int | None:
        """`steps`, or None if it cycles."""
        return None if self.cycle else self.steps

    def at(self, step: int) -> float:
        """Return the value after `step` steps."""
        steps = self.steps * max(-(-step // self.steps), 1) if self.cycle else self.steps
        return between(self.start, self.end, (max(steps - step, 0) / steps) ** self.power)


@dataclass(frozen=True, kw_only=True)
class PiecewiseLinear(Schedule):
    """Straight lines through given points. Holds the first value before them, and the last past them.

    Args:
        milestones: the points' steps, increasing; the last is its length.
        values: the points' values, as many.

    Raises:
        TypeError: for settings of the wrong type.
        ValueError: for settings out of range, milestones out of order, or another number of values.

    Example:
        >>> from gradstep.schedules import PiecewiseLinear
        >>> schedule = PiecewiseLinear(milestones=(0, 10, 30), values=(0.0, 1.0, 0.5))
        >>> schedule(5), schedule(10), schedule(20), schedule(40)
        (0.5, 1.0, 0.75, 0.5)

    References:
        `optax.schedules.piecewise_interpolate_schedule`, whose values are given as factors.
    """

    milestones: tuple[int, ...]
    values: tuple[float, ...]

    def __post_init__(self) -> None:
        settle(self, milestones=increasing(from_zero), values=tuple_of(number))
        if not self.milestones:
            raise ValueError("PiecewiseLinear: milestones must not be empty")
        if len(self.values) != len(self.milestones):
            raise ValueError(
                f"PiecewiseLinear: values must be as many as milestones, got {len(self.values)} and {len(self.milestones)}"
            )

    @property
    def length(self) -> int:
        """The last of `milestones`."""
        return self.milestones[-1]

    def at(self, step: int) -> float:
        """Return the value after `step` steps."""
        i = bisect_right(self.milestones, step)
        if i == 0:
            return self.values[0]
        if i == len(self.values):
            return self.values[-1]
        begin, end = self.milestones[i - 1 : i + 1]
        return line(self.values[i - 1], self.values[i], step - begin, end - begin)


@dataclass(frozen=True, kw_only=True)
class WarmupStableDecay(Schedule):
    """Warm-up, a constant, and a decay at the end (WSD, or trapezoidal). Holds `end` past its end.

    .. code-block:: text

        start + (peak - start) step / warmup_steps         step < warmup_steps
        peak                                               step < steps - decay_steps
        end + (peak - end) shape(x)                        x = 1 - (steps - step) / decay_steps

        linear: 1 - x        cosine: (1 + cos(pi x)) / 2        1-sqrt: 1 - sqrt(x)

    Args:
        peak: the constant in the middle.
        steps: its length, all three phases together.
        warmup_steps: the first phase, linear; 0 for none.
        decay_steps: the last phase; 0 for none.
        start: value at step 0, if there is a warm-up.
        end: value at step `steps`.
        shape: how the value decays: "linear", "cosine" or "1-sqrt".

    Raises:
        TypeError: for settings of the wrong type.
        ValueError: for settings out of range, or a warm-up and a decay that together are longer than the whole.

    Example:
        >>> from gradstep.schedules import WarmupStableDecay
        >>> schedule = WarmupStableDecay(peak=1.0, steps=100, warmup_steps=10, decay_steps=20)
        >>> schedule(5), schedule(10), schedule(80), schedule(90), schedule(100)
        (0.5, 1.0, 1.0, 0.5, 0.0)

    References:
        Hu et al., arXiv:2404.06395; Hägele et al., arXiv:2405.18392, for 1-sqrt.
    """

    peak: float
    steps: int
    warmup_steps: int
    decay_steps: int
    start: float = 0.0
    end: float = 0.0
    shape: Shape = "linear"

    def __post_init__(self) -> None:
        settle(self, peak=number, steps=from_one, warmup_steps=from_zero, decay_steps=from_zero)
        settle(self, start=number, end=number, shape=one_of(*SHAPES))
        if self.warmup_steps + self.decay_steps > self.steps:
            raise ValueError(
                f"WarmupStableDecay: warmup_steps + decay_steps must be at most steps = {self.steps}, "
                f"got {self.warmup_steps} + {self.decay_steps}"
            )

    @property
    def length(self) -> int:
        """`steps`."""
        return self.steps

    def at(self, step: int) -> float:
        """Return the value after `step` steps."""
        if step < self.warmup_steps:
            return line(self.start, self.peak, step, self.warmup_steps)
        if step >= self.steps:
            return self.end
        if step < self.steps - self.decay_steps:
            return self.peak
        return between(self.peak, self.end, SHAPES[self.shape]((self.steps - step) / self.decay_steps))
