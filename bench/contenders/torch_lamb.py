"""LAMB, which torch has not, out of torch's operations; and pytorch_optimizer's."""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable
from typing import Any

from .. import formulas
from ..problem import Problem
from ..rules import Rule
from .base import Contender, Run, UnsupportedError
from .torch_arrays import adopt, tensor, tensors
from .torch_chain import Step


def lamb_step(problem: Problem, kind: str) -> tuple[Step, list[Any]]:
    """Return LAMB's step, and its parameters: tensor by tensor, all at once, or Adam's update by torch's fused kernel."""
    params = tensors(problem)
    return (_Fused if kind == "fused" else _Foreach if kind == "foreach" else _Loop)(problem, params), params


class _Base:
    def __init__(self, problem: Problem, params: list[Any]) -> None:
        self.params = [param.detach() for param in params]
        self.grads = [param.grad for param in params]
        self.exp_avgs, self.exp_avg_sqs = ([tensor(array) for array in arrays] for arrays in _states(problem))
        settings = problem.rule.settings
        self.lr, self.eps, self.decay = settings["lr"], settings["eps"], settings["weight_decay"]
        self.beta1, self.beta2 = settings["betas"]
        self.count = 0

    def corrections(self) -> tuple[float, float]:
        """Count the step. Return what eps and the root of the second moment are multiplied by: 1 - beta1^t is in both."""
        self.count += 1
        first = 1 - self.beta1**self.count
        return first, first / math.sqrt(1 - self.beta2**self.count)


def _states(problem: Problem) -> list[Any]:
    return [problem.states[name] for name in ("exp_avg", "exp_avg_sq")]


class _Loop(_Base):
    """Operation after operation, tensor by tensor."""

    def __call__(self) -> None:
        import torch

        correction, root_correction = self.corrections()
        for p, g, m, v in zip(self.params, self.grads, self.exp_avgs, self.exp_avg_sqs, strict=True):
            m.lerp_(g, 1 - self.beta1)
            v.mul_(self.beta2).addcmul_(g, g, value=1 - self.beta2)
            update = v.sqrt().mul_(root_correction).add_(self.eps * correction)
            torch.div(m, update, out=update)
            update.add_(p, alpha=self.decay)
            p_norm, u_norm = float(torch.linalg.vector_norm(p)), float(torch.linalg.vector_norm(update))
            p.add_(update, alpha=-self.lr * (p_norm / u_norm if p_norm > 0 and u_norm > 0 else 1.0))


class _Foreach(_Base):
    """Operation after operation, all tensors at once; nothing is read twice that torch could keep."""

    def __call__(self) -> None:
        import torch

        correction, root_correction = self.corrections()
        torch._foreach_lerp_(self.exp_avgs, self.grads, 1 - self.beta1)
        torch._foreach_mul_(self.exp_avg_sqs, self.beta2)
        torch._foreach_addcmul_(self.exp_avg_sqs, self.grads, self.grads, 1 - self.beta2)
        roots = torch._foreach_sqrt(self.exp_avg_sqs)
        torch._foreach_mul_(roots, root_correction)
        torch._foreach_add_(roots, self.eps * correction)
        updates = torch._foreach_div(self.exp_avgs, roots)
        del roots
        torch._foreach_add_(updates, self.params, alpha=self.decay)
        p_norms, u_norms = torch.stack(torch._foreach_norm(self.params)), torch.stack(torch._foreach_norm(updates))
        ratios = torch.where((p_norms > 0) & (u_norms > 0), p_norms / u_norms, 1.0).mul_(-self.lr)
        torch._foreach_mul_(updates, list(ratios.unbind()))
        torch._foreach_add_(self.params, updates)


class _Fused(_Base):
    """AdamW's fused kernel moves an array that begins as -weight_decay p, with a learning rate of 1: it becomes minus the update."""

    def __init__(self, problem: Problem, params: list[Any]) -> None:
        import torch

        super().__init__(problem, params)
        settings: dict[str, Any] = {"lr": 1.0, "betas": (self.beta1, self.beta2), "eps": self.eps, "weight_decay": 0.0}
        self.minus = [torch.nn.Parameter(torch.zeros_like(param)) for param in self.params]
        self.inner = torch.optim.AdamW(self.minus, fused=True, **settings)
        for minus, grad, m, v in zip(self.minus, self.grads, self.exp_avgs, self.exp_avg_sqs, strict=True):
            minus.grad = grad
            self.inner.state[minus] = {"step": torch.zeros((), device=minus.device), "exp_avg": m, "exp_avg_sq": v}
        self.updates = [minus.detach() for minus in self.minus]

    def __call__(self) -> None:
        import torch

        for param, update in zip(self.params, self.updates, strict=True):
            torch.mul(param, -self.decay, out=update)
        self.inner.step()
        p_norms, u_norms = (torch.stack(torch._foreach_norm(arrays)).tolist() for arrays in (self.params, self.updates))
        for param, update, p_norm, u_norm in zip(self.params, self.updates, p_norms, u_norms, strict=True):
            param.add_(update, alpha=self.lr * (p_norm / u_norm if p_norm > 0 and u_norm > 0 else 1.0))


class PytorchOptimizer(Contender):
    """The Lamb of pytorch_optimizer: foreach operations. It corrects the first moment's bias only, and limits norms to 10."""

    name = "pytorch-optimizer"
    about = "pytorch_optimizer's Lamb, which has a formula of its own; only when named"
    package = "pytorch_optimizer"
    peer = "gradstep-torch"
    on_request = True

    def installed(self) -> bool:
        return super().installed() and importlib.util.find_spec("torch") is not None

    def formula(self, rule: Rule) -> Callable[..., Any]:
        return formulas.lamb_of_pytorch_optimizer

    def prepare(self, problem: Problem) -> Run:
        if problem.rule.name != "lamb":
            raise UnsupportedError("measured for lamb only")
        optimizer, _ = adopt(importlib.import_module(self.package).Lamb, problem, weight_decouple=False)
        return Run(optimizer.step, lambda: problem.params)

    def set_threads(self, n: int) -> None:
        import torch

        torch.set_num_threads(n)

    def note(self, rule: Rule, threads: int) -> str:
        return "corrects one bias of two, limits norms to 10" if rule.name == "lamb" else ""
