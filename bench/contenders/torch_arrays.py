"""The arrays of a problem as torch's tensors, in an optimizer."""

from __future__ import annotations

from typing import Any

from ..chains import COUNTS
from ..problem import Problem

_COUNTED = ("Adagrad", "Adam", "AdamW", "LAMB", "RMSprop")


def tensors(problem: Problem) -> list[Any]:
    """Return the problem's parameters, with their gradients."""
    import torch

    params = [torch.nn.Parameter(torch.from_numpy(array)) for array in problem.params]
    for param, grad in zip(params, problem.grads, strict=True):
        param.grad = torch.from_numpy(grad)
    return params


def adopt(optimizer_class: Any, problem: Problem, **options: Any) -> tuple[Any, list[Any]]:
    """Return an optimizer whose parameters, gradients and states are the problem's arrays, and its parameters."""
    import torch

    params = tensors(problem)
    optimizer = optimizer_class(params, **problem.rule.settings, **options)
    for i, param in enumerate(params):
        state = {name: torch.from_numpy(arrays[i]) for name, arrays in problem.states.items()}
        counts = [count for name, count in COUNTS.items() if name in state]
        for count in [*counts, "step"] if problem.rule.optimizer in _COUNTED else counts:
            state[count] = torch.tensor(0.0)
        optimizer.state[param] = state
    return optimizer, params
