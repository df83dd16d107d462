"""Alarms: what in the statistics of a step shows that a training goes wrong."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, fields
from statistics import median
from typing import Any

from gradstep.monitor.checks import check_count, check_positive
from gradstep.stats import Stats, StepStats


class TrainingWarning(UserWarning):
    """Base of the monitor's warnings."""


class VanishingGradientWarning(TrainingWarning):
    """Gradients are too small to move their parameters."""


class ExplodingGradientWarning(TrainingWarning):
    """A gradient is far larger than usual, or not finite."""


class DeadParameterWarning(TrainingWarning):
    """A parameter's gradient has been exactly zero for many steps."""


class DivergenceWarning(TrainingWarning):
    """The training does not converge: loss, updates or skipped steps say so."""


CATEGORIES: dict[str, type[TrainingWarning]] = {
    "vanishing": VanishingGradientWarning,
    "exploding": ExplodingGradientWarning,
    "dead": DeadParameterWarning,
    "nonfinite_loss": DivergenceWarning,
    "rising_loss": DivergenceWarning,
    "large_updates": DivergenceWarning,
    "nonfinite_updates": DivergenceWarning,
    "skipped_steps": DivergenceWarning,
}
"""Category of warning, by the kind of event. Events of other kinds are no warnings."""


@dataclass(frozen=True, slots=True)
class Event:
    """Something that the monitor noticed."""

    kind: str
    """A key of `CATEGORIES`, or "reached": a criterion's condition was met."""
    step: int
    """The step at which it was noticed."""
    message: str
    """What it is, in a sentence with numbers."""
    parameters: tuple[Hashable, ...] = ()
    """Keys of the parameters concerned, if it concerns some."""

    @property
    def category(self) -> type[TrainingWarning] | None:
        """Category of the warning; None if it is none."""
        return CATEGORIES.get(self.kind)

    def __str__(self) -> str:
        return f"step {self.step}: {self.message}"


@dataclass(frozen=True)
class Thresholds:
    """When the monitor warns. None turns an alarm off.

    Skipped steps count for `skipped_steps` alone.

    Raises:
        TypeError: if a threshold has the wrong type.
        ValueError: if a threshold is out of range.

    >>> Thresholds(exploding_factor=0.5)
    Traceback (most recent call last):
    ValueError: Thresholds: exploding_factor must be greater than 1, got 0.5
    """

    vanishing_ratio: float | None = 1e-7
    """Vanishing: a parameter's gradient has at most this part of the parameter's norm, without being all zeros. With a learning
    rate of 1 or less, the default moves no element of a float32 parameter that is of ordinary size."""
    vanishing_norm: float | None = None
    """Vanishing, as an absolute bound: the norm of a parameter's gradient is at most this."""
    vanishing_steps: int = 10
    """Vanishing: for this many steps in a row."""
    exploding_factor: float | None = 10.0
    """Exploding: the norm of the whole gradient as the rule gets it, so after clipping, is more than this many times the running
    median of the norms before clipping; or the gradient has elements that are not finite."""
    exploding_window: int = 100
    """Exploding: how many of the newest finite norms the median is taken of."""
    exploding_after: int = 10
    """Exploding: how many norms must have been seen before any is compared."""
    dead_steps: int | None = 20
    """Dead: a parameter's gradient was all zeros for this many of its steps in a row."""
    loss_rise: float | None = 1.0
    """Divergence: the running median of the loss is above its best by more than this many times max(|first|, |best|), first being
    the earliest median. A loss that is not finite is divergence whatever this is."""
    loss_window: int = 10
    """Divergence: how many of the newest losses the median is taken of."""
    update_ratio: float | None = 1.0
    """Divergence: the norm of the whole update is more than this many times the norm of all parameters. An update that is not
    finite is divergence whatever this is."""
    update_steps: int = 3
    """Divergence: for this many steps in a row; parameters that begin at zero need a few."""
    skipped_steps: int | None = 5
    """Divergence: this many steps in a row were skipped for their gradients."""
    calm_steps: int = 20
    """An alarm that has been raised is raised again only after its condition was away for this many steps in a row."""

    def __post_init__(self) -> None:
        for field in fields(self):
            where, value = f"Thresholds: {field.name}", getattr(self, field.name)
            if value is None and "None" in str(field.type):
                continue
            if type(field.default) is int:
                check_count(where, value)
            else:
                check_positive(where, value)
        if self.exploding_factor is not None and self.exploding_factor <= 1:
            raise ValueError(f"Thresholds: exploding_factor must be greater than 1, got {self.exploding_factor}")
        if self.exploding_after > self.exploding_window:
            rule = f"must be at most exploding_window, {self.exploding_window}"
            raise ValueError(f"Thresholds: exploding_after {rule}, got {self.exploding_after}")


_Condition = tuple[str, Hashable]  # kind, and the parameter that it concerns or None


class Alarms:
    """Looks at each step in turn, and tells what has begun to go wrong.

    Each alarm is raised once, and again only after it had been away for `Thresholds.calm_steps` steps.
    """

    def __init__(self, thresholds: Thresholds) -> None:
        self.thresholds = thresholds
        self._streaks: dict[_Condition, int] = {}  # for how many steps a condition has held
        self._raised: dict[_Condition, int] = {}  # for how many steps a condition that was raised has been away
        self._norms: deque[float] = deque(maxlen=thresholds.exploding_window)
        self._losses: deque[float] = deque(maxlen=thresholds.loss_window)
        self._first_loss: float | None = None
        self._best_loss: float | None = None

    @property
    def raised(self) -> frozenset[str]:
        """Kinds of the alarms that have been raised and are not gone."""
        return frozenset(kind for kind, _ in self._raised)

    def check(self, step: int, stats: StepStats | None, loss: float | None) -> list[Event]:
        """Return the alarms that this step raises."""
        events: list[Event] = []
        if loss is not None:
            events += self._check_loss(step, loss)
        if stats is not None:
            skipped = self.thresholds.skipped_steps
            if skipped and self._raise("skipped_steps", stats.skipped, steps=skipped):
                events.append(Event("skipped_steps", step, f"{skipped} steps in a row were skipped for non-finite gradients"))
            if not stats.skipped:
                events += self._check_norms(step, stats)
                events += self._check_parameters(step, stats)
        return events

    def _check_loss(self, step: int, loss: float) -> list[Event]:
        finite = math.isfinite(loss)
        if self._raise("nonfinite_loss", not finite):
            return [Event("nonfinite_loss", step, f"the loss is {loss}")]
        limit = self.thresholds.loss_rise
        if not finite or limit is None:
            return []
        self._losses.append(loss)
        if len(self._losses) < self.thresholds.loss_window:
            return []
        level = median(self._losses)
        first = self._first_loss = level if self._first_loss is None else self._first_loss
        best = self._best_loss = level if self._best_loss is None else min(self._best_loss, level)
        if self._raise("rising_loss", level - best > limit * max(abs(first), abs(best))):
            return [Event("rising_loss", step, f"the loss has risen to {level:.3g}, from {best:.3g} at its best")]
        return []

    def _check_norms(self, step: int, stats: StepStats) -> list[Event]:
        events: list[Event] = []
        if self._explodes(stats):
            bad = tuple(key for key, one in stats.parameters.items() if one.grad_nans or one.grad_infs)
            if stats.grad_nans or stats.grad_infs or not self._norms:
                what = f"the gradient has {stats.grad_nans} NaN and {stats.grad_infs} infinite elements{_names(bad)}"
            else:
                usual = median(self._norms)
                what = f"the gradient's norm is {stats.grad_norm_clipped:.3g}, its running median {usual:.3g}"
            events.append(Event("exploding", step, what, bad))
        if math.isfinite(stats.grad_norm):
            self._norms.append(stats.grad_norm)
        update, param, limit = stats.update_norm, stats.param_norm, self.thresholds.update_ratio
        finite = math.isfinite(update) and math.isfinite(param)
        if self._raise("nonfinite_updates", not finite):
            bad = tuple(k for k, one in stats.parameters.items() if not math.isfinite(one.update_norm + one.param_norm))
            what = f"the norm of the update is {update:.3g}, that of the parameters {param:.3g}{_names(bad)}"
            events.append(Event("nonfinite_updates", step, what, bad))
        if limit is not None and finite:
            steps = self.thresholds.update_steps
            if self._raise("large_updates", stats.update_ratio > limit, steps=steps):
                what = f"updates are larger than {limit:g} times the parameters for {steps} steps: {update:.3g} to {param:.3g}"
                events.append(Event("large_updates", step, what))
        return events

    def _explodes(self, stats: StepStats) -> bool:
        factor = self.thresholds.exploding_factor
        if factor is None:
            return False
        holds = not math.isfinite(stats.grad_norm)
        if not holds and len(self._norms) >= self.thresholds.exploding_after:
            holds = stats.grad_norm_clipped > factor * median(self._norms) > 0
        return self._raise("exploding", holds)

    def _check_parameters(self, step: int, stats: StepStats) -> list[Event]:
        vanishing, dead = [], []
        for key, one in (stats.parameters or {None: stats}).items():
            zeros = one.grad_zeros == one.size
            steps = self.thresholds.dead_steps
            if steps is not None and self._raise("dead", zeros and one.size > 0, key, steps):
                dead.append(key)
            if self._raise("vanishing", not zeros and self._vanishes(one), key, self.thresholds.vanishing_steps):
                vanishing.append(key)
        events = []
        if vanishing:
            what = f"gradients have almost vanished for {self.thresholds.vanishing_steps} steps{_names(vanishing)}"
            events.append(Event("vanishing", step, what, _keys(vanishing)))
        if dead:
            what = f"gradients were all zeros for {self.thresholds.dead_steps} steps{_names(dead)}"
            events.append(Event("dead", step, what, _keys(dead)))
        return events

    def _vanishes(self, stats: Stats) -> bool:
        ratio, norm = self.thresholds.vanishing_ratio, self.thresholds.vanishing_norm
        small = ratio is not None and stats.grad_norm <= ratio * stats.param_norm
        return small or (norm is not None and stats.grad_norm <= norm)

    def _raise(self, kind: str, holds: bool, key: Hashable = None, steps: int = 1) -> bool:
        """Count for how long a condition holds or is away, and return whether its alarm is raised now."""
        condition = kind, key
        if not holds:
            self._streaks.pop(condition, None)
            if condition in self._raised:
                self._raised[condition] += 1
                if self._raised[condition] >= self.thresholds.calm_steps:
                    del self._raised[condition]
            return False
        streak = self._streaks[condition] = self._streaks.get(condition, 0) + 1
        if condition in self._raised:
            self._raised[condition] = 0
            return False
        if streak < steps:
            return False
        self._raised[condition] = 0
        return True

    def state_dict(self) -> dict[str, Any]:
        """Return what a later run needs to go on, as plain lists and numbers."""
        return {
            "streaks": [[*condition, count] for condition, count in self._streaks.items()],
            "raised": [[*condition, count] for condition, count in self._raised.items()],
            "norms": list(self._norms),
            "losses": list(self._losses),
            "first_loss": self._first_loss,
            "best_loss": self._best_loss,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self._streaks = {(kind, key): count for kind, key, count in state_dict["streaks"]}
        self._raised = {(kind, key): count for kind, key, count in state_dict["raised"]}
        self._norms = deque(state_dict["norms"], self.thresholds.exploding_window)
        self._losses = deque(state_dict["losses"], self.thresholds.loss_window)
        self._first_loss, self._best_loss = state_dict["first_loss"], state_dict["best_loss"]


def _keys(keys: Sequence[Hashable]) -> tuple[Hashable, ...]:
    return tuple(key for key in keys if key is not None)


def _names(keys: Sequence[Hashable]) -> str:
    names = [repr(key) for key in _keys(keys)]
    if not names:
        return ""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f", of {', '.join(names[:3])}{more}"
