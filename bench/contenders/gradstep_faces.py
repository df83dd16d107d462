"""gradstep: the functions, the optimizers for NumPy and for torch, and the loop without math that shows the machine's limit."""

from __future__ import annotations

import functools

import gradstep
from gradstep import _core, config

from ..problem import Problem
from .base import Contender, Run
from .torch_optim import adopt


class Ours(Contender):
    """A face of gradstep, on an instruction set of its own if one is named."""

    def __init__(self, isa: str | None = None) -> None:
        self.name = f"{self.face}@{isa}" if isa else self.face
        self._isa = isa or config.isa()

    def set_threads(self, n: int) -> None:
        config.set_num_threads(n)

    def enter(self) -> None:
        config.set_isa(self._isa)
        _core.set_openmp(0)  # importing gradstep.torch has turned to torch's threads


class Function(Ours):
    """The functions."""

    face = "gradstep"
    about = "gradstep's functions on NumPy arrays: adamw_, ..."

    def prepare(self, problem: Problem) -> Run:
        function, settings, counts = problem.rule.function()
        single = len(problem.params) == 1
        params, grads = (problem.params[0], problem.grads[0]) if single else (problem.params, problem.grads)
        states = {name: arrays[0] if single else arrays for name, arrays in problem.states.items()}
        if not counts:
            return Run(functools.partial(function, params, grads, **states, **settings), lambda: problem.params)
        count = 0

        def step() -> None:
            nonlocal count
            count += 1
            function(params, grads, **states, step=count, **settings)

        return Run(step, lambda: problem.params)


class Object(Ours):
    """The optimizers for NumPy loops."""

    face = "gradstep-object"
    about = "gradstep's optimizers for NumPy: AdamW(params).step(grads), ..."

    def prepare(self, problem: Problem) -> Run:
        optimizer = getattr(gradstep, problem.rule.optimizer)(problem.params, **problem.rule.settings)
        for i in range(len(problem.params)):
            optimizer.state[i] = {"step": 0, **{name: arrays[i] for name, arrays in problem.states.items()}}
        return Run(functools.partial(optimizer.step, problem.grads), lambda: problem.params)


class TorchClass(Ours):
    """The torch classes, on torch's threads."""

    face = "gradstep-torch"
    about = "gradstep's torch classes: gradstep.torch.AdamW(...).step(), ..."
    package = "torch"

    def prepare(self, problem: Problem) -> Run:
        import gradstep.torch

        return Run(adopt(getattr(gradstep.torch, problem.rule.optimizer), problem).step, lambda: problem.params)

    def enter(self) -> None:
        from gradstep.torch.threads import share_torch_threads

        config.set_isa(self._isa)
        share_torch_threads()


class NoMath(Ours):
    """Reads and writes what the rule does and computes nothing."""

    about = "a loop over the same memory that computes nothing: the machine's limit"

    def __init__(self) -> None:
        super().__init__()
        self.name = "no math"

    def prepare(self, problem: Problem) -> Run:
        outputs = [problem.param_arena, *problem.state_arenas]
        return Run(functools.partial(_core.touch, outputs, [problem.grad_arena]), lambda: problem.params)
