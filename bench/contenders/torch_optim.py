"""torch.optim: its for-loop, its multi-tensor (foreach) and its fused implementation."""

from __future__ import annotations

from typing import Any

from ..problem import Problem
from ..rules import NORM
from .base import Contender, Run, UnsupportedError, norm_run
from .torch_arrays import adopt, capturable_option, on_cuda, tensors
from .torch_chain import Step, around
from .torch_lamb import lamb_step

_FUSED = {False: ("Adagrad", "Adam", "AdamW", "SGD"), True: ("Adam", "AdamW", "SGD")}
"""On the CPU, on a GPU."""


class TorchOptim(Contender):
    """An implementation of torch.optim, and what its users write around it."""

    package = "torch"
    peer = "gradstep-torch"
    whole = True
    stores = True

    def __init__(self, kind: str, about: str, *, capturable: bool = False) -> None:
        self.name = f"torch-{kind}"
        self.about = about
        self._kind = kind
        self._capturable = capturable

    def prepare(self, problem: Problem) -> Run:
        if not problem.form.uniform:
            raise UnsupportedError("torch's states have the dtype of their parameter, and it rounds to nearest")
        if problem.rule.name == NORM.name:
            return self._norm(problem)
        step, params = self._rule(problem)
        return Run(around(step, params, problem, foreach=self._kind != "loop"), lambda: problem.params)

    def _rule(self, problem: Problem) -> tuple[Step, list[Any]]:
        import torch

        name = problem.rule.optimizer
        if name == "LAMB":
            return lamb_step(problem, self._kind)
        if not hasattr(torch.optim, name):
            raise UnsupportedError(f"torch has no {name}")
        fused = _FUSED[on_cuda(problem)]
        if self._kind == "fused" and name not in fused:
            raise UnsupportedError(f"torch has no fused {name}")
        choice = {"foreach": self._kind == "foreach"} | ({"fused": self._kind == "fused"} if name in fused else {})
        kind = getattr(torch.optim, name)
        optimizer, params = adopt(kind, problem, **choice, **capturable_option(kind, self._capturable))
        return optimizer.step, params

    def _norm(self, problem: Problem) -> Run:
        import torch

        if self._kind == "fused":
            raise UnsupportedError("torch has no fused norm")
        grads: Any = [param.grad for param in tensors(problem)]
        if self._kind == "loop" and len(grads) == 1:
            return norm_run(lambda: torch.linalg.vector_norm(grads[0]))
        return norm_run(lambda: torch.nn.utils.get_total_norm(grads, foreach=self._kind == "foreach"))

    def set_threads(self, n: int) -> None:
        import torch

        torch.set_num_threads(n)
