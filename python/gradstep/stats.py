"""What a step saw: statistics that the sweep gathers on its way."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """Statistics of one step of one parameter. Norms are Euclidean, in double."""

    grad_norm: float
    """Norm of the gradient as it came, times `grad_scale`, before anything is clipped."""
    grad_norm_clipped: float
    """Norm of the gradient as the rule got it: clipped, centralized, with noise; before coupled decay."""
    update_norm: float
    """Norm of what was subtracted from the parameter, decay included."""
    param_norm: float
    """Norm of the parameter before the step."""
    grad_max: float
    """Largest absolute value of the gradient before clipping; NaN if it has a NaN."""
    grad_nans: int
    """Elements of the gradient that are NaN."""
    grad_infs: int
    """Elements of the gradient that are infinite."""
    grad_zeros: int
    """Elements of the gradient that are zero."""
    size: int
    """Elements of the parameter; a complex one counts as two, here and in the other counts."""
    clip_factor: float
    """What `clip_norm` and `clip_norm_per_tensor` multiplied the gradient by; overall, the factor of `clip_norm`."""
    skipped: bool
    """Whether the step was left out for a non-finite gradient; then `update_norm` and `grad_norm_clipped` are 0."""

    @property
    def update_ratio(self) -> float:
        """Update norm over parameter norm; 0 where both are 0, infinite where only the parameter is 0."""
        if self.param_norm == 0:
            return float("inf") if self.update_norm > 0 else 0.0
        return self.update_norm / self.param_norm


@dataclass(frozen=True, slots=True, kw_only=True)
class StepStats(Stats):
    """Statistics of one step of all parameters together; those of each in `parameters`."""

    step: int
    """Number of the call of `step`, from 1."""
    parameters: Mapping[Hashable, Stats]
    """By key: the parameter's name, or its position; those that had a gradient."""


def make_stats(step: int, keys: Sequence[Hashable], seen: tuple[bool, float, list[Any]]) -> StepStats:
    """Return the statistics of a step.

    Args:
        step: number of the step.
        keys: of all parameters, in order.
        seen: what the plan returned.
    """
    carried_out, clip_factor, items = seen
    parameters: dict[Hashable, Stats] = {}
    came = rule = update = param = largest = 0.0
    counts = [0] * 4
    for index, size, factor, *squares, top, nans, infs, zeros in items:
        of_one = _norms(*squares)
        numbers = {"grad_nans": int(nans), "grad_infs": int(infs), "grad_zeros": int(zeros), "size": size}
        parameters[keys[index]] = Stats(**of_one, **numbers, grad_max=top, clip_factor=factor, skipped=not carried_out)
        came, rule, update, param = came + squares[0], rule + squares[1], update + squares[2], param + squares[3]
        largest = top if top > largest or math.isnan(top) else largest
        counts = [total + count for total, count in zip(counts, numbers.values(), strict=True)]
    return StepStats(
        **_norms(came, rule, update, param),
        grad_max=largest,
        grad_nans=counts[0],
        grad_infs=counts[1],
        grad_zeros=counts[2],
        size=counts[3],
        clip_factor=clip_factor,
        skipped=not carried_out,
        step=step,
        parameters=parameters,
    )


def _norms(came: float, rule: float, update: float, param: float) -> dict[str, Any]:
    """Return norms from sums of squares."""
    return {
        "grad_norm": math.sqrt(came),
        "grad_norm_clipped": math.sqrt(rule),
        "update_norm": math.sqrt(update),
        "param_norm": math.sqrt(param),
    }
