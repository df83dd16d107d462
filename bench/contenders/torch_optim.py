"""torch.optim: its for-loop, its multi-tensor (foreach) and its fused implementation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..problem import Problem
from .base import Contender, Run, UnsupportedError

if TYPE_CHECKING:
    import torch

_FUSED = ("Adagrad", "Adam", "AdamW", "SGD")
_COUNTED = ("Adagrad", "Adam", "AdamW", "RMSprop")


def adopt(optimizer_class: Any, problem: Problem, **choice: bool) -> torch.optim.Optimizer:
    """Return an optimizer whose parameters, gradients and states are the problem's arrays."""
    import torch

    params = [torch.nn.Parameter(torch.from_numpy(array)) for array in problem.params]
    optimizer: torch.optim.Optimizer = optimizer_class(params, **problem.rule.settings, **choice)
    for i, param in enumerate(params):
        param.grad = torch.from_numpy(problem.grads[i])
        state = {name: torch.from_numpy(arrays[i]) for name, arrays in problem.states.items()}
        if problem.rule.optimizer in _COUNTED:
            state["step"] = torch.tensor(0.0)
        optimizer.state[param] = state
    return optimizer


class TorchOptim(Contender):
    """An implementation of torch.optim."""

    package = "torch"
    peer = "gradstep-torch"

    def __init__(self, kind: str, about: str) -> None:
        self.name = f"torch-{kind}"
        self.about = about
        self._kind = kind

    def prepare(self, problem: Problem) -> Run:
        import torch

        name = problem.rule.optimizer
        if not hasattr(torch.optim, name):
            raise UnsupportedError(f"torch has no {name}")
        if self._kind == "fused" and name not in _FUSED:
            raise UnsupportedError(f"torch has no fused {name}")
        choice = {"foreach": self._kind == "foreach"} | ({"fused": self._kind == "fused"} if name in _FUSED else {})
        return Run(adopt(getattr(torch.optim, name), problem, **choice).step, lambda: problem.params)

    def set_threads(self, n: int) -> None:
        import torch

        torch.set_num_threads(n)
