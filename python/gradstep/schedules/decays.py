"""Schedules that have no end: constants, steps, and decays by powers."""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass

from gradstep.schedules.base import Schedule
from gradstep.schedules.settings import flag, from_one, increasing, number, optional, positive, settle, tuple_of


@dataclass(frozen=True, kw_only=True)
class Constant(Schedule):
    """One value throughout.

    Args:
        value: the value.
        steps: its length, for another schedule to follow; None: no end. The value is the same past it.

    Raises:
        TypeError: for settings of the wrong type.
        ValueError: for settings out of range.

    Example:
        >>> from gradstep.schedules import Constant
        >>> later = Constant(value=0.01, steps=100) >> Constant(value=0.1)
        >>> later(99), later(100)
        (0.01, 0.1)

    References:
        `torch.optim.lr_scheduler.ConstantLR` is the one in the example: ``value`` there is ``lr * factor``, then ``lr``.
    """

    value: float
    steps: int | None = None

    def __post_init__(self) -> None:
        settle(self, value=number, steps=optional(from_one))

    @property
    def length(self) -> int | None:
        """`steps`."""
        return self.steps

    def at(self, step: int) -> float:  # noqa: ARG002
        """Return the value after `step` steps."""
        return self.value


@dataclass(frozen=True, kw_only=True)
class Step(Schedule):
    """Decay by a factor every so many steps. Has no end.

    .. code-block:: text

        start gamma^floor(step / every)

    Args:
        start: value of the first steps.
        gamma: factor, positive.
        every: number of steps from one decay to the next.

    Raises:
        TypeError: for settings of the wrong type.
        ValueError: for settings out of range.

    Example:
        >>> from gradstep.schedules import Step
        >>> schedule = Step(start=1.0, gamma=0.5, every=30)
        >>> schedule(29), schedule(30), schedule(60)
        (1.0, 0.5, 0.25)

    References:
        `torch.optim.lr_scheduler.StepLR`.
    """

    start: float
    every: int
    gamma: float = 0.1

    def __post_init__(self) -> None:
        settle(self, start=number, every=from_one, gamma=positive)

    def at(self, step: int) -> float:
        """Return the value after `step` steps."""
        return self.start * self.gamma ** (step // self.every)


@dataclass(frozen=True, kw_only=True)
class MultiStep(Schedule):
    """Decay by a factor at given steps. Has no end.

    .. code-block:: text

        start gamma^(number of milestones <= step)

    Args:
        start: value before the first milestone.
        milestones: steps from which the value is smaller, increasing.
        gamma: factor, positive.

    Raises:
        TypeError: for settings of the wrong type.
        ValueError: for settings out of range, or milestones out of order.

    Example:
        >>> from gradstep.schedules import MultiStep
        >>> schedule = MultiStep(start=1.0, milestones=(30, 80), gamma=0.5)
        >>> schedule(29), schedule(30), schedule(80)
        (1.0, 0.5, 0.25)

    References:
        `torch.optim.lr_scheduler.MultiStepLR`.
    """

    start: float
    milestones: tuple[int, ...]
    gamma: float = 0.1

    def __post_init__(self) -> None:
        settle(self, start=number, milestones=increasing(from_one), gamma=positive)

    def at(self, step: int) -> float:
        """Return the value after `step` steps."""
        return self.start * self.gamma ** bisect_right(self.milestones, step)


@dataclass(frozen=True, kw_only=True)
class PiecewiseConstant(Schedule):
    """Given values between given steps. Has no end.

    .. code-block:: text

        values[i]                                  milestones[i-1] <= step < milestones[i]

    Args:
        milestones: steps from which the next value holds, increasing. (Keras' ``PiecewiseConstantDecay`` changes one step later.)
        values: one more than `milestones`.

    Raises:
        TypeError: for settings of the wrong type.
        ValueError: for settings out of range, milestones out of order, or another number of values.

    Example:
        >>> from gradstep.schedules import PiecewiseConstant
        >>> schedule = PiecewiseConstant(milestones=(10, 20), values=(0.1, 0.3, 0.05))
        >>> schedule(9), schedule(10), schedule(20)
        (0.1, 0.3, 0.05)
    """

    milestones: tuple[int, ...]
    values: tuple[float, ...]

    def __post_init__(self) -> None:
        settle(self, milestones=increasing(from_one), values=tuple_of(number))
        if len(self.values) != len(self.milestones) + 1:
            raise ValueError(
                f"PiecewiseConstant: values must be one more than milestones, got {len(self.values)} and {len(self.milestones)}"
            )

    def at(self, step: int) -> float:
        """Return the value after `step` steps."""
        return self.values[bisect_right(self.milestones, step)]


@dataclass(frozen=True, kw_only=True)
class Exponential(Schedule):
    """Exponential decay. Has no end.

    .. code-block:: text

        start gamma^(step / every)                 (step / every rounded down, if staircase)

    Args:
        start: value at step 0.
        gamma: factor of `every` steps, positive; above 1 the value grows.
        every: number of steps in which the value decays by `gamma`.
        staircase: decay at multiples of `every` only, as `Step` does.

    Raises:
        TypeError: for settings of the wrong type.
        ValueError: for settings out of range.

    Example:
        >>> from gradstep.schedules import Exponential
        >>> schedule = Exponential(start=1.0, gamma=0.25, every=2)
        >>> schedule(1), schedule(2)
        (0.5, 0.25)

    References:
        `torch.optim.lr_scheduler.ExponentialLR`; Keras' ``ExponentialDecay`` (``decay_rate`` is `gamma`, ``decay_steps`` `every`).
    """

    start: float
    gamma: float
    every: int = 1
    staircase: bool = False

    def __post_init__(self) -> None:
        settle(self, start=number, gamma=positive, every=from_one, staircase=flag)

    def at(self, step: int) -> float:
        """Return the value after `step` steps."""
        return self.start * self.gamma ** (step // self.every if self.staircase else step / self.every)


@dataclass(frozen=True, kw_only=True)
class InverseTime(Schedule):
    """Decay by one over time. Has no end.

    .. code-block:: text

        start / (1 + rate step / every)            (step / every rounded down, if staircase)

    Args:
        start: value at step 0.
        rate: how fast it decays.
        every: number of steps that count as one.
        staircase: decay at multiples of `every` only.

    Raises:
        TypeError: for settings of the wrong type.
        ValueError: for settings out of range.

    Example:
        >>> from gradstep.schedules import InverseTime
        >>> InverseTime(start=1.0, rate=0.5)(2)
        0.5

    References:
        Keras' ``InverseTimeDecay`` (``decay_rate`` is `rate`, ``decay_steps`` `every`).
    """

    start: float
    rate: float
    every: int = 1
    staircase: bool = False

    def __post_init__(self) -> None:
        settle(self, start=number, rate=number, every=from_one, staircase=flag)

    def at(self, step: int) -> float:
        """Return the value after `step` steps."""
        return self.start / (1 + self.rate * (step // self.every if self.staircase else step / self.every))


@dataclass(frozen=True, kw_only=True)
class InverseScaling(Schedule):
    """Decay by a power of the step's number, which counts from 1. Has no end.

    .. code-block:: text

        start / (step + 1)^power

    Args:
        start: value of the first step; scikit-learn's ``eta0``.
        power: exponent; scikit-learn's ``power_t``, whose default is the one of ``SGDRegressor``.

    Raises:
        TypeError: for settings of the wrong type.
        ValueError: for settings out of range.

    Example:
        >>> from gradstep.schedules import InverseScaling
        >>> InverseScaling(start=1.0, power=0.5)(3)
        0.5

    References:
        ``learning_rate="invscaling"`` of `sklearn.linear_model.SGDRegressor` and `sklearn.linear_model.SGDClassifier`.
    """

    start: float
    power: float = 0.25

    def __post_init__(self) -> None:
        settle(self, start=number, power=number)

    def at(self, step: int) -> float:
        """Return the value after `step` steps."""
        return self.start / math.pow(step + 1, self.power)


@dataclass(frozen=True, kw_only=True)
class InverseSqrt(Schedule):
    """Decay by one over the root of time. Has no end.

    .. code-block:: text

        start / sqrt(1 + step / timescale)

    After a warm-up of n steps with ``timescale=n``, this is ``start sqrt(n / step)`` with all steps counted.

    Args:
        start: value at step 0.
        timescale: number of steps after which the value has fallen to 71 % (the root of a half) of `start`.

    Raises:
        TypeError: for settings of the wrong type.
        ValueError: for settings out of range.

    Example:
        >>> from gradstep.schedules import InverseSqrt, Linear
        >>> schedule = Linear(start=0.0, end=1.0, steps=100) >> InverseSqrt(start=1.0, timescale=100)
        >>> schedule(100), schedule(400)
        (1.0, 0.5)
    """

    start: float
    timescale: float = 1.0

    def __post_init__(self) -> None:
        settle(self, start=number, timescale=positive)

    def at(self, step: int) -> float:
        """Return the value after `step` steps."""
        return self.start / math.sqrt(1 + step / self.timescale)


@dataclass(frozen=True, kw_only=True)
class Noam(Schedule):
    """The Transformer's schedule: linear warm-up, then decay by one over the root of the step's number t. Has no end.

    .. code-block:: text

        model_size^-0.5 min(t^-0.5, t warmup_steps^-1.5)           t = step + 1

    Args:
        model_size: width of the model.
        warmup_steps: the number of the step whose value is the largest.

    Raises:
        TypeError: for settings of the wrong type.
        ValueError: for settings out of range.

    Example:
        >>> from gradstep.schedules import Noam
        >>> schedule = Noam(model_size=64, warmup_steps=100)
        >>> schedule(99), schedule(399)
        (0.0125, 0.00625)

    References:
        Vaswani et al., arXiv:1706.03762, equation 3.
    """

    model_size: int
    warmup_steps: int

    def __post_init__(self) -> None:
        settle(self, model_size=from_one, warmup_steps=from_one)

    def at(self, step: int) -> float:
        """Return the value after `step` steps."""
        t = step + 1
        return min(1 / math.sqrt(t), t / math.pow(self.warmup_steps, 1.5)) / math.sqrt(self.model_size)
