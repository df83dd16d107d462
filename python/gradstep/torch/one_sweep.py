"""What the torch classes share: a step of one sweep over memory, in the place of a subclass of `torch.optim.Optimizer`'s own."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch._compile import _disable_dynamo
from torch.optim.optimizer import Optimizer, _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from gradstep import _core
from gradstep.kernel import Kernel
from gradstep.numpy import Optimizer as Rule

Closure = Callable[[], Any]

# Choices of torch that this engine has nothing to set against: it runs no autograd and no CUDA graph.
_REFUSED = {
    "capturable": "no CUDA graph can capture a step on the CPU",
    "differentiable": "the step runs outside autograd",
}


class OneSweep(Optimizer):
    """Mixin, to stand before the torch class that it replaces: that one keeps constructor, checks, states and serialization.

    The choices `foreach` and `fused` are accepted and change nothing: they name ways to run the same update, and there is one way
    here. `capturable` and `differentiable` are refused. Gradients that are sparse are left to the torch class, whole steps with
    such a gradient at a time: its step is right, or raises its error.
    """

    rule: ClassVar[type[Rule]]
    """The NumPy optimizer of the same name, which turns settings into a kernel."""

    counts_steps: ClassVar[bool] = True
    """Whether the states of a parameter have a ``step``."""

    _plan: _core.Plan | None = None

    # torch's constructors set it for `fused=True`, meaning a kernel that unscales gradients for GradScaler. This one does not, so
    # GradScaler has to go on doing it.
    _step_supports_amp_scaling = property(lambda self: False, lambda self, value: None)  # noqa: ARG005

    def step(self, closure: Closure | None = None) -> Any:
        """Perform one step, as `torch.optim.Optimizer.step` does.

        Args:
            closure: evaluates the model again and returns the loss.

        Returns:
            What the closure returned, or None without one.

        Raises:
            TypeError, ValueError: for what can't be updated right, with the name of what is wrong. Nothing has been written then.
            RuntimeError: torch's, for sparse gradients where the torch class does not take them.
        """
        hooked = (
            self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or _global_optimizer_pre_hooks
            or _global_optimizer_post_hooks
            or torch._C._autograd._profiler_enabled()
        )
        if torch.compiler.is_compiling():  # leave it as it is: there is nothing in it for a compiler
            return _uncompiled_step(self, closure)
        return _hooked_step(self, closure) if hooked else _step(self, closure)

    # Keeps torch from wrapping `step` into its hooks and profiler range at all times: that alone costs more than a small step.
    step.hooked = True  # type: ignore[attr-defined]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, as `torch.optim.Optimizer.add_param_group` does."""
        super().add_param_group(param_group)
        try:
            _refuse_choices(self, self.param_groups[-1])
        except ValueError:
            del self.param_groups[-1]
            raise

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._plan = None

    def rule_of(self, group: dict[str, Any]) -> type[Rule]:  # noqa: ARG002
        """Return the rule that the settings of a group ask for."""
        return self.rule

    def _make_state(self, group: int, param: torch.Tensor, names: list[str]) -> dict[str, torch.Tensor]:
        fresh = {"step": torch.zeros((), dtype=torch.float64)} if "step" in names else {}
        for name in names:
            if name != "step":
                value = self.rule.initial_state(name, self.param_groups[group])
                fresh[name] = torch.full_like(param, value, requires_grad=False, memory_format=torch.preserve_format)
        return fresh


def _refuse_choices(optimizer: OneSweep, group: dict[str, Any]) -> None:
    for name, reason in _REFUSED.items():
        if group.get(name):
            raise ValueError(f"{type(optimizer).__name__}: {name}=True is not supported: {reason}")


def _kernel(optimizer: OneSweep, group: dict[str, Any]) -> Kernel:
    _refuse_choices(optimizer, group)
    return optimizer.rule_of(group).kernel(group)


def _new_plan(optimizer: OneSweep) -> _core.Plan:
    # torch's counts are float32, which ends at 2^24 steps; a double goes on to 2^53, and torch loads it as well.
    for state in optimizer.state.values():
        step = state.get("step")
        if isinstance(step, torch.Tensor) and step.dtype != torch.float64:
            state["step"] = step.to("cpu", torch.float64)
    return _core.Plan(f"{type(optimizer).__name__}.step", _core.Face.torch, optimizer.counts_steps)


def _step(optimizer: OneSweep, closure: Closure | None = None) -> Any:
    loss = None
    if closure is not None:
        with torch.enable_grad():
            loss = closure()
    if optimizer._plan is None:
        optimizer._plan = _new_plan(optimizer)
    param_groups = optimizer.param_groups
    groups = [(len(group["params"]), _kernel(optimizer, group)) for group in param_groups]
    params = param_groups[0]["params"] if len(param_groups) == 1 else [p for group in param_groups for p in group["params"]]
    try:
        optimizer._plan.step(params, None, params, optimizer.state, groups, optimizer._make_state)
    except (TypeError, ValueError):
        if not any(p.grad is not None and p.grad.layout != torch.strided for p in params):
            raise
        _torch_step(optimizer)
    return loss


_hooked_step = Optimizer.profile_hook_step(_step)
_uncompiled_step = _disable_dynamo(_hooked_step)


def _torch_step(optimizer: OneSweep) -> None:
    """Perform the step of the torch class that `optimizer` replaces."""
    theirs = next(cls for cls in type(optimizer).__mro__ if not issubclass(cls, OneSweep) and "step" in vars(cls))
    with torch.no_grad():
        inspect.unwrap(vars(theirs)["step"])(optimizer)
