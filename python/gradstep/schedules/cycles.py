"""Schedules that go up and down: restarts, the one-cycle policy, cyclical rates."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from gradstep.schedules.anneals import SHAPES, Shape, between
from gradstep.schedules.base import Schedule
from gradstep.schedules.settings import flag, from_one, number, one_of, optional, positive, settle, share


@dataclass(frozen=True, kw_only=True)
class CosineRestarts(Schedule):
    """Cosine decay with warm restarts (SGDR). With `cycles`, holds `end` past them; otherwise has no end.

    .. code-block:: text

        end + (start - end) gamma^i (1 + cos(pi t / T_i)) / 2,     T_i = steps t_mult^i

    in cycle i, from 0, of which t steps are done; t < T_i.

    Args:
        start: value at step 0, and after each restart but for `gamma`.
        steps: length of the first cycle.
        end: value that a cycle ends with, just before the restart.
        t_mult: each cycle is so many times as long as the one before.
        gamma: the range of each cycle is so many times that of the one before, positive; Keras' ``m_mul``.
        cycles: how many; None: no end.

    Raises:
        TypeError: for settings of the wrong type.
        ValueError: for settings out of range.

    Example:
        >>> from gradstep.schedules import CosineRestarts
        >>> schedule = CosineRestarts(start=1.0, steps=100, t_mult=2, cycles=2)
        >>> [round(schedule(step), 6) for step in (0, 50, 100, 200, 300)]
        [1.0, 0.5, 1.0, 0.5, 0.0]
        >>> schedule.length
        300

    References:
        Loshchilov and Hutter, arXiv:1608.03983; `torch.optim.lr_scheduler.CosineAnnealingWarmRestarts`; Keras'
        ``CosineDecayRestarts``.
    """

    start: float
    steps: int
    end: float = 0.0
    t_mult: int = 1
    gamma: float = 1.0
    cycles: int | None = None

    def __post_init__(self) -> None:
        settle(self, start=number, steps=from_one, end=number, t_mult=from_one, gamma=positive, cycles=optional(from_one))

    @property
    def length(self) -> int | None:
        """The steps of all cycles, or None."""
        if self.cycles is None:
            return None
        if self.t_mult == 1:
            return self.steps * self.cycles
        growth: int = self.t_mult**self.cycles
        return self.steps * (growth - 1) // (self.t_mult - 1)

    def at(self, step: int) -> float:
        """Return the value after `step` steps."""
        cycle, span = 0, self.steps
        if self.t_mult == 1:
            cycle, step = divmod(step, span)
        while step >= span:
            cycle, step, span = cycle + 1, step - span, span * self.t_mult
        if self.cycles is not None and cycle >= self.cycles:
            return self.end
        return between(self.start, self.end, self.gamma**cycle * SHAPES["cosine"]((span - step) / span))


@dataclass(frozen=True, kw_only=True)
class OneCycle(Schedule):
    """The one-cycle policy: up to a peak, and down again to (almost) nothing. Raises past its end.

    In two phases, or three; each follows `shape` from one value to the next:

    .. code-block:: text

        step         0 ... a ... steps - 1                 a = pct_start steps - 1
        value    start   peak   end

        step         0 ... a ... 2a ... steps - 1          three_phase
        value    start   peak   start   end

    `momentum` is the schedule that goes with it: down where the learning rate goes up.

    Args:
        peak: the largest value.
        steps: its length.
        start: value at step 0. (torch: ``max_lr / div_factor``, a 25th of the peak.)
        end: value at step `steps - 1`, the last. (torch: ``start / final_div_factor``, a 10,000th of the start.)
        pct_start: share of the steps on the way up, in [0, 1].
        shape: "cosine", "linear" or "1-sqrt".
        three_phase: come back to `start` as fast as up, then go to `end`; `pct_start` is at most 0.5 then.

    Raises:
        TypeError: for settings of the wrong type.
        ValueError: for settings out of range; from a call, for a step from `steps` on. (torch raises one step later.)

    Example:
        >>> from gradstep.schedules import OneCycle
        >>> cycle = OneCycle(start=0.1, peak=1.0, steps=10, pct_start=0.5, shape="linear")
        >>> cycle(0), cycle(2), cycle(4), cycle(9)
        (0.1, 0.55, 1.0, 0.0)
        >>> momentum = cycle.momentum(low=0.8, high=0.9)
        >>> momentum(0), momentum(4), momentum(9)
        (0.9, 0.8, 0.9)

    References:
        Smith and Topin, arXiv:1708.07120; `torch.optim.lr_scheduler.OneCycleLR`.
    """

    peak: float
    steps: int
    start: float = 0.0
    end: float = 0.0
    pct_start: float = 0.3
    shape: Shape = "cosine"
    three_phase: bool = False

    def __post_init__(self) -> None:
        settle(self, peak=number, steps=from_one, start=number, end=number)
        settle(self, pct_start=share, shape=one_of(*SHAPES), three_phase=flag)
        if self.three_phase and self.pct_start > 0.5:
            raise ValueError(f"OneCycle: pct_start must be in [0, 0.5] with three_phase, got {self.pct_start}")

    @property
    def length(self) -> int:
        """`steps`."""
        return self.steps

    def momentum(self, *, low: float = 0.85, high: float = 0.95) -> OneCycle:
        """Return the momentum of this cycle: from `high` to `low` at the peak, and back to `high`."""
        return replace(self, start=high, peak=low, end=high)

    def at(self, step: int) -> float:
        """Return the value after `step` steps."""
        if step >= self.steps:
            raise ValueError(f"OneCycle: step must be less than steps = {self.steps}, got {step}")
        up = self.pct_start * self.steps - 1
        points = [(0.0, self.start), (up, self.peak), (self.steps - 1, self.end)]
        if self.three_phase:
            points.insert(2, (2 * up, self.start))
        i = next(i for i in range(1, len(points)) if step <= points[i][0] or i == len(points) - 1)
        (begin, first), (end, last) = points[i - 1 : i + 1]
        return between(first, last, SHAPES[self.shape]((end - step) / (end - begin) if end > begin else 0))


@dataclass(frozen=True, kw_only=True)
class Cyclic(Schedule):
    """Cyclical rates: straight up to a peak and straight down, again and again. Has no end.

    .. code-block:: text

        start + (peak - start) height scale        height: from 0 up to 1 in steps_up, down to 0 in steps_down

        triangular: scale = 1        triangular2: scale = 2^-i, in cycle i from 0        exp_range: scale = gamma^step

    `momentum` is the schedule that goes with it: down where the learning rate goes up.

    Args:
        start: value at the foot of each cycle; torch's ``base_lr``.
        peak: value at the top of a cycle, where scale is 1; torch's ``max_lr``.
        steps_up: steps from foot to top; torch's ``step_size_up``.
        steps_down: steps from top to foot; None: as many.
        mode: "triangular", "triangular2" or "exp_range".
        gamma: of "exp_range", positive.

    Raises:
        TypeError: for settings of the wrong type.
        ValueError: for settings out of range.

    Example:
        >>> from gradstep.schedules import Cyclic
        >>> schedule = Cyclic(start=0.0, peak=1.0, steps_up=10, mode="triangular2")
        >>> schedule(5), schedule(10), schedule(20), schedule(30)
        (0.5, 1.0, 0.0, 0.5)

    References:
        Smith, arXiv:1506.01186; `torch.optim.lr_scheduler.CyclicLR`.
    """

    start: float
    peak: float
    steps_up: int
    steps_down: int | None = None
    mode: Literal["triangular", "triangular2", "exp_range"] = "triangular"
    gamma: float = 1.0

    def __post_init__(self) -> None:
        settle(self, start=number, peak=number, steps_up=from_one, steps_down=optional(from_one))
        settle(self, mode=one_of("triangular", "triangular2", "exp_range"), gamma=positive)

    def momentum(self, *, low: float = 0.8, high: float = 0.9) -> Cyclic:
        """Return the momentum of these cycles: `high` at the foot, `low` at the top."""
        return replace(self, start=high, peak=low)

    def at(self, step: int) -> float:
        """Return the value after `step` steps."""
        up, down = self.steps_up, self.steps_down or self.steps_up
        cycle, t = divmod(step, up + down)
        height = t / up if t <= up else (up + down - t) / down
        if self.mode == "triangular2":
            height *= 0.5**cycle
        elif self.mode == "exp_range":
            height *= self.gamma**step
        return between(self.peak, self.start, height)
