"""A schedule that is told how training goes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from gradstep.schedules.base import Schedule
from gradstep.schedules.settings import from_zero, number, one_of, optional, settle


def _metric(where: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{where} must be a number or None, got {value!r}")
    if math.isnan(value):
        raise ValueError(f"{where} must not be NaN")
    return float(value)


@dataclass(kw_only=True)
class ReduceOnPlateau(Schedule):
    """Reduce the value when a metric has stopped improving. Has no end.

    `update` is told the metric, once an epoch, say; calls return the value as it stands, whatever the step. A metric improves on
    the best so far by the rule

    .. code-block:: text

        mode             "min"                             "max"
        rel              metric < best (1 - threshold)     metric > best (1 + threshold)
        abs              metric < best - threshold         metric > best + threshold

    and NaN never does. After more than `patience` updates in a row without improvement, the value becomes
    ``max(value factor, floor)``, if that makes it smaller by more than `eps`; during the next `cooldown` updates, none counts.

    An optimizer's ``load_state_dict`` makes a copy of the schedule in the states: update the one in its `param_groups` then.

    Args:
        start: value at the beginning.
        mode: "min" for metrics that should fall, "max" for those that should rise.
        factor: what the value is multiplied by, in [0, 1).
        patience: number of updates without improvement to put up with.
        threshold: by how much a metric must be better to count as improvement.
        threshold_mode: "rel" or "abs".
        cooldown: number of updates after a reduction in which none counts.
        floor: the smallest value; torch's ``min_lr``.
        eps: reductions by no more than this are left out.
        reduced, best, bad_updates, cooldown_left: what the updates so far have led to: the reduced value and the best metric
            (None: not yet), the updates in a row without improvement, those left of the cooldown. Only `from_dict` needs them.

    Raises:
        TypeError: for settings of the wrong type.
        ValueError: for settings out of range.

    Example:
        >>> from gradstep.schedules import ReduceOnPlateau
        >>> schedule = ReduceOnPlateau(start=0.1, factor=0.5, patience=1)
        >>> for loss in (1.0, 0.9, 0.95, 0.95):
        ...     schedule.update(loss)
        >>> schedule(0)
        0.05

    References:
        `torch.optim.lr_scheduler.ReduceLROnPlateau`.
    """

    start: float
    mode: Literal["min", "max"] = "min"
    factor: float = 0.1
    patience: int = 10
    threshold: float = 1e-4
    threshold_mode: Literal["rel", "abs"] = "rel"
    cooldown: int = 0
    floor: float = 0.0
    eps: float = 1e-8
    reduced: float | None = None
    best: float | None = None
    bad_updates: int = 0
    cooldown_left: int = 0

    def __post_init__(self) -> None:
        settle(self, start=number, mode=one_of("min", "max"), factor=number, patience=from_zero, threshold=number)
        settle(self, threshold_mode=one_of("rel", "abs"), cooldown=from_zero, floor=number, eps=number)
        settle(self, reduced=optional(number), best=optional(_metric), bad_updates=from_zero, cooldown_left=from_zero)
        if self.factor >= 1:
            raise ValueError(f"ReduceOnPlateau: factor must be in [0, 1), got {self.factor}")
        if self.floor > self.start:
            raise ValueError(f"ReduceOnPlateau: floor must be at most start = {self.start}, got {self.floor}")

    def at(self, step: int) -> float:  # noqa: ARG002
        """Return the value as it stands."""
        return self.start if self.reduced is None else self.reduced

    def update(self, metric: float) -> None:
        """Take note of the metric, and reduce the value if it is time.

        Args:
            metric: a number, or an array or tensor of one.
        """
        metric = float(metric)
        if self._improves(metric):
            self.best, self.bad_updates = metric, 0
        else:
            self.bad_updates += 1
        if self.cooldown_left > 0:
            self.cooldown_left -= 1
            self.bad_updates = 0
        if self.bad_updates > self.patience:
            value = max(self.at(0) * self.factor, self.floor)
            if self.at(0) - value > self.eps:
                self.reduced = value
            self.cooldown_left, self.bad_updates = self.cooldown, 0

    def _improves(self, metric: float) -> bool:
        sign = 1 if self.mode == "min" else -1
        best = sign * math.inf if self.best is None else self.best
        margin = sign * self.threshold
        limit = best * (1 - margin) if self.threshold_mode == "rel" else best - margin
        return sign * metric < sign * limit
