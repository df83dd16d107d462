"""What a step saw: statistics that the sweep gathers on its way."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gradstep import _core


class _Fetched:
    """Base of what may still be on a device: the first look at a field waits for it and sets all of them."""

    __slots__ = ("_fetch",)

    def __getattr__(self, name: str) -> Any:  # of a field that is not set
        if name.startswith("_") or name not in type(self).__dataclass_fields__:  # type: ignore[attr-defined]
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        for field, value in self._fetch().items():
            object.__setattr__(self, field, value)
        return object.__getattribute__(self, name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats(_Fetched):
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
    """Statistics of one step of all parameters together; those of each in `parameters`.

    Of a step on a device they are fetched by the first look at any of them, which waits for the step.
    """

    step: int
    """Number of the call of `step`, from 1."""
    parameters: Mapping[Hashable, Stats]
    """By key: the parameter's name, or its position; those that had a gradient."""


Numbers = tuple[int, int, float, float, float, float, float, float, float, float, float]
"""As a plan returns them: index, size, clip factor; squares of norms: of the gradient as it came, as the rule got it, of update and
parameter; largest absolute value; counts of NaN, infinite and zero."""

Seen = tuple[bool, Numbers, list[Numbers]]
"""Whether the step was carried out; numbers of all parameters together, and of each."""


class _EachParameter(Mapping[Hashable, Stats]):
    """The statistics of each parameter, made when they are looked at: a model has hundreds."""

    def __init__(self, numbers: dict[Hashable, Numbers], skipped: bool) -> None:
        self._numbers, self._skipped = numbers, skipped

    def __getitem__(self, key: Hashable) -> Stats:
        return Stats(**_fields(self._numbers[key], self._skipped))

    def __iter__(self) -> Iterator[Hashable]:
        return iter(self._numbers)

    def __len__(self) -> int:
        return len(self._numbers)

    def __repr__(self) -> str:
        return repr(dict(self))


def make_stats(step: Callable[[], int], keys: Sequence[Hashable], seen: Seen | _core.PendingStep) -> StepStats:
    """Return the statistics of a step.

    Args:
        step: returns the number of the step.
        keys: of all parameters, in order.
        seen: what the plan returned.
    """
    if isinstance(seen, _core.PendingStep):
        pending, stats = seen, object.__new__(StepStats)
        object.__setattr__(stats, "_fetch", lambda: _all_fields(step, keys, pending.wait()))
        return stats
    return StepStats(**_all_fields(step, keys, seen))


def _all_fields(step: Callable[[], int], keys: Sequence[Hashable], seen: Seen) -> dict[str, Any]:
    carried_out, together, each = seen
    parameters = _EachParameter({keys[numbers[0]]: numbers for numbers in each}, not carried_out)
    return {**_fields(together, not carried_out), "step": step(), "parameters": parameters}


def _fields(numbers: Numbers, skipped: bool) -> dict[str, Any]:
    _, size, clip_factor, came, rule, update, param, largest, nans, infs, zeros = numbers
    return {
        "grad_norm": math.sqrt(came),
        "grad_norm_clipped": math.sqrt(rule),
        "update_norm": math.sqrt(update),
        "param_norm": math.sqrt(param),
        "grad_max": largest,
        "grad_nans": int(nans),
        "grad_infs": int(infs),
        "grad_zeros": int(zeros),
        "size": size,
        "clip_factor": clip_factor,
        "skipped": skipped,
    }
