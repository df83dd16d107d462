"""The arrays of a problem as torch's tensors, in an optimizer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..chains import COUNTS
from ..problem import Array, Problem

if TYPE_CHECKING:
    import torch

_COUNTED = ("Adagrad", "Adam", "AdamW", "LAMB", "RMSprop")


def tensor(array: Array) -> torch.Tensor:
    """Return an array as a tensor that shares its memory."""
    import torch

    if array.dtype.name == "bfloat16":  # torch knows none of NumPy's
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def tensors(problem: Problem) -> list[Any]:
    """Return the problem's parameters, with their gradients."""
    import torch

    params = [torch.nn.Parameter(tensor(array)) for array in problem.params]
    for param, grad in zip(params, problem.grads, strict=True):
        param.grad = tensor(grad)
    return params


def adopt(optimizer_class: Any, problem: Problem, **options: Any) -> tuple[Any, list[Any]]:
    """Return an optimizer whose parameters, gradients and states are the problem's arrays, and its parameters."""
    import torch

    params = tensors(problem)
    optimizer = optimizer_class(params, **problem.rule.settings, **options)
    for i, param in enumerate(params):
        state = {name: tensor(array) for name, array in problem.state[i].items()}
        counts = [count for name, count in COUNTS.items() if name in state]
        for count in [*counts, "step"] if problem.rule.optimizer in _COUNTED else counts:
            state[count] = torch.tensor(0.0)
        optimizer.state[param] = state
    return optimizer, params
