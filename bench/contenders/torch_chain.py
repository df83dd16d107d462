"""Whole steps of torch, as its users write them: operation after operation around an optimizer's step."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..problem import Problem
from .base import UnsupportedError
from .torch_arrays import tensor

if TYPE_CHECKING:
    import torch

Step = Callable[[], object]

_KNOWN = {"grad_scale", "clip_value", "clip_norm_per_tensor", "clip_norm", "bounds", "ema_decay", "swa", "zero_grad"}


def around(step: Step, params: list[torch.Tensor], problem: Problem, *, foreach: bool) -> Step:
    """Return the step of an optimizer with the problem's chain around it.

    Args:
        step: of the optimizer.
        params: with their gradients in `grad`.
        problem: its chain says what to do, its states hold the averages.
        foreach: do it for all tensors in one call, not tensor by tensor.

    Raises:
        UnsupportedError: for a stage that torch has no operation for.
    """
    options = problem.rule.chain.active
    if unknown := sorted(options.keys() - _KNOWN):
        raise UnsupportedError(f"torch has no {', '.join(unknown)}")
    if not options:
        return step
    parts = [*_before(params, options, foreach), step, *_after(params, problem, foreach)]

    def whole() -> None:
        for part in parts:
            part()

    return whole


def _before(params: list[Any], options: dict[str, Any], foreach: bool) -> list[Step]:
    import torch

    parts: list[Step] = []
    grads = [param.grad for param in params]
    if (scale := options.get("grad_scale")) is not None:
        parts.append(lambda: torch._foreach_mul_(grads, scale) if foreach else [grad.mul_(scale) for grad in grads])
    if (value := options.get("clip_value")) is not None:
        parts.append(lambda: torch.nn.utils.clip_grad_value_(params, value, foreach=foreach))
    if (largest := options.get("clip_norm_per_tensor")) is not None:
        parts.append(lambda: [torch.nn.utils.clip_grad_norm_(param, largest, foreach=foreach) for param in params])
    if (total := options.get("clip_norm")) is not None:
        parts.append(lambda: torch.nn.utils.clip_grad_norm_(params, total, foreach=foreach))
    return parts


def _after(params: list[Any], problem: Problem, foreach: bool) -> list[Step]:
    import torch

    parts: list[Step] = []
    options = problem.rule.chain.active
    plain = [param.detach() for param in params]
    grads = [param.grad for param in params]
    if "bounds" in options:
        low, high = options["bounds"]

        def limit() -> None:
            if foreach:
                torch._foreach_clamp_min_(plain, low)
                torch._foreach_clamp_max_(plain, high)
            else:
                for param in plain:
                    param.clamp_(low, high)

        parts.append(limit)
    if (decay := options.get("ema_decay")) is not None:
        parts.append(_average(problem, "ema", plain, lambda n: 1.0 if n == 1 else 1.0 - decay, foreach))
    if "swa" in options:
        parts.append(_average(problem, "swa", plain, lambda n: 1.0 / n, foreach))
    if "zero_grad" in options:
        parts.append(lambda: torch._foreach_zero_(grads) if foreach else [grad.zero_() for grad in grads])
    return parts


def _average(problem: Problem, name: str, plain: list[Any], weight: Callable[[int], float], foreach: bool) -> Step:
    """Return what torch's AveragedModel does in `update_parameters`."""
    import torch

    averages = [tensor(array) for array in problem.states[name]]
    count = 0

    def average() -> None:
        nonlocal count
        count += 1
        if foreach:
            torch._foreach_lerp_(averages, plain, weight(count))
        else:
            for one, param in zip(averages, plain, strict=True):
                one.lerp_(param, weight(count))

    return average
