"""The arrays of a problem as torch's tensors, in an optimizer."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import numpy as np

from ..chains import COUNTS
from ..problem import Problem

if TYPE_CHECKING:
    import torch

_COUNTED = ("Adagrad", "Adam", "AdamW", "LAMB", "RMSprop")


def tensor(array: Any) -> torch.Tensor:
    """Return an array as a tensor that shares its memory, and a tensor as it is."""
    import torch

    if isinstance(array, torch.Tensor):
        return array
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


def on_cuda(problem: Problem) -> bool:
    """Return whether the problem's arrays lie on a GPU."""
    return bool(getattr(problem.params[0], "is_cuda", False))


def adopt(optimizer_class: Any, problem: Problem, **options: Any) -> tuple[Any, list[Any]]:
    """Return an optimizer whose parameters, gradients and states are the problem's arrays, and its parameters.

    As torch does it, the number of steps lies on the device if the optimizer is `capturable` or `fused`.
    """
    import torch

    params = tensors(problem)
    optimizer = optimizer_class(params, **problem.rule.settings, **options)
    place = params[0].device if options.get("capturable") or options.get("fused") else "cpu"
    for i, param in enumerate(params):
        state = {name: tensor(array) for name, array in problem.state[i].items()}
        counts = [count for name, count in COUNTS.items() if name in state]
        for count in [*counts, "step"] if problem.rule.optimizer in _COUNTED else counts:
            state[count] = torch.zeros((), device=place)
        optimizer.state[param] = state
    return optimizer, params


def capturable_option(optimizer_class: Any, wanted: bool) -> dict[str, bool]:
    """Return the keyword that lets a step be captured in a graph. Classes that have none keep no number on the host."""
    return {"capturable": True} if wanted and "capturable" in inspect.signature(optimizer_class).parameters else {}
