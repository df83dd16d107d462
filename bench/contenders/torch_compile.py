"""Steps that torch.compile turns into loops of C++, or kernels: one written for it, and torch.optim's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ..cases import Case
from ..problem import Problem
from ..rules import Rule
from .base import Contender, Run, UnsupportedError
from .torch_arrays import tensor, tensors
from .torch_chain import Step
from .torch_optim import TorchOptim

if TYPE_CHECKING:
    import torch

_KNOWN = {"grad_scale", "clip_norm", "ema_decay", "zero_grad"}
_MOST_TENSORS = 8  # more are compiled for minutes


class TorchCompile(Contender):
    """AdamW and LAMB, with scaling, clipping, averaging and zeroing around them."""

    name = "torch-compile"
    package = "torch"
    peer = "gradstep-torch"
    whole = True

    def __init__(self, *, on_request: bool = True) -> None:
        self.about = "the whole step in a function compiled by torch (adamw and lamb)" + "; only when named" * on_request
        self.on_request = on_request

    def prepare(self, problem: Problem) -> Run:
        import torch

        rule = problem.rule
        if rule.name not in ("adamw", "lamb"):
            raise UnsupportedError("measured for adamw and lamb only")
        if unknown := sorted(rule.chain.active.keys() - _KNOWN):
            raise UnsupportedError(f"torch has no {', '.join(unknown)}")
        if len(problem.params) > _MOST_TENSORS:
            raise UnsupportedError(f"compiles for minutes: measured for up to {_MOST_TENSORS} tensors")
        params = tensors(problem)
        plain, grads = [param.detach() for param in params], [param.grad for param in params]
        states = {name: [tensor(array) for array in arrays] for name, arrays in problem.states.items()}
        torch._dynamo.reset()  # of other shapes, for which one function is not compiled over and over
        compiled = torch.compile(_make_step(rule.name, rule.settings, rule.chain.active), dynamic=False)
        beta1, beta2 = rule.settings["betas"]
        count = 0

        def step() -> None:
            nonlocal count
            count += 1
            weight = 1.0 if count == 1 else 1 - rule.chain.active.get("ema_decay", 0.0)
            # Tensors, as numbers would be compiled in.
            changing = [torch.tensor(x, dtype=plain[0].dtype) for x in (1 - beta1**count, 1 - beta2**count, weight)]
            with torch.no_grad():
                compiled(plain, grads, states, *changing)

        return Run(step, lambda: problem.params)

    def set_threads(self, n: int) -> None:
        import torch

        torch.set_num_threads(n)


class TorchCompileStep(TorchOptim):
    """torch.optim's foreach step as it is, compiled; what stands around it is not."""

    def __init__(self) -> None:
        super().__init__("foreach", "torch.optim's foreach step, compiled by torch")
        self.name = "torch-compile-step"

    def slow_start(self, rule: Rule, case: Case) -> bool:
        return len(case.shapes) > _MOST_TENSORS

    def _rule(self, problem: Problem) -> tuple[Step, list[Any]]:
        import torch

        if not hasattr(torch.optim, problem.rule.optimizer):
            raise UnsupportedError(f"torch has no {problem.rule.optimizer}")
        step, params = super()._rule(problem)
        torch._dynamo.reset()
        return torch.compile(step, dynamic=False), params

    def _norm(self, problem: Problem) -> Run:
        raise UnsupportedError("torch has no optimizer that takes norms alone")


def _make_step(rule: str, settings: Mapping[str, Any], options: Mapping[str, Any]) -> Callable[..., None]:
    import torch

    lr, eps, decay = settings["lr"], settings["eps"], settings["weight_decay"]
    beta1, beta2 = settings["betas"]

    def step(
        params: list[torch.Tensor],
        grads: list[torch.Tensor],
        states: Mapping[str, list[torch.Tensor]],
        correction1: torch.Tensor,
        correction2: torch.Tensor,
        weight: torch.Tensor,
    ) -> None:
        now = [options.get("grad_scale", 1.0) * grad for grad in grads]
        if "clip_norm" in options:
            norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(grad) for grad in now]))
            factor = torch.clamp(options["clip_norm"] / (norm + 1e-6), max=1.0)
            now = [grad * factor for grad in now]
        for i, (p, g) in enumerate(zip(params, now, strict=True)):
            m, v = states["exp_avg"][i], states["exp_avg_sq"][i]
            m.lerp_(g, 1 - beta1)
            v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
            update = m / correction1 / ((v / correction2).sqrt() + eps) + decay * p
            if rule == "lamb":
                p_norm, u_norm = torch.linalg.vector_norm(p), torch.linalg.vector_norm(update)
                update = update * torch.where((p_norm > 0) & (u_norm > 0), p_norm / u_norm, 1.0)
            p.sub_(lr * update)
            if "ema_decay" in options:
                states["ema"][i].lerp_(p, weight)
            if "zero_grad" in options:
                grads[i].zero_()

    return step
