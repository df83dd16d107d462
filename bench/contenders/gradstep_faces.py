"""gradstep: the functions, the optimizers for NumPy and for torch, and the loop without math that shows the machine's limit."""

from __future__ import annotations

import functools
from typing import Any

import gradstep
from gradstep import _core, config

from ..chains import COUNTS
from ..problem import Problem
from ..rules import NORM, Rule
from .base import Contender, Run, UnsupportedError, norm_run
from .torch_arrays import adopt, tensors


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
        if problem.rule.name == NORM.name:
            return norm_run(functools.partial(gradstep.global_norm, problem.grads))
        _find(gradstep, problem.rule)
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
    whole = True

    def prepare(self, problem: Problem) -> Run:
        rule = problem.rule
        optimizer = _find(gradstep, rule)(problem.params, **rule.settings, **rule.chain.options)
        for i in range(len(problem.params)):
            numbers = {count: 0 for name, count in COUNTS.items() if name in problem.states}
            optimizer.state[i] = {"step": 0, **numbers, **{name: arrays[i] for name, arrays in problem.states.items()}}
        return Run(functools.partial(optimizer.step, problem.grads, **rule.chain.call), lambda: problem.params)


class TorchClass(Ours):
    """The torch classes, on torch's threads."""

    face = "gradstep-torch"
    about = "gradstep's torch classes: gradstep.torch.AdamW(...).step(), ..."
    package = "torch"
    whole = True

    def prepare(self, problem: Problem) -> Run:
        import gradstep.torch

        rule = problem.rule
        if rule.name == NORM.name:
            return norm_run(functools.partial(gradstep.global_norm, [param.grad for param in tensors(problem)]))
        optimizer, _ = adopt(_find(gradstep.torch, rule), problem, **rule.chain.options)
        step = functools.partial(optimizer.step, **rule.chain.call) if rule.chain.call else optimizer.step
        return Run(step, lambda: problem.params)

    def enter(self) -> None:
        from gradstep.torch.threads import share_torch_threads

        config.set_isa(self._isa)
        share_torch_threads()


class Off(Contender):
    """A face of gradstep that makes the rule's step alone: what the stages cost."""

    def __init__(self, face: Contender) -> None:
        self.name = f"{face.name} off"
        self.about = f"{face.name}, the rule alone"
        self.peer = face.name
        self._face = face

    def prepare(self, problem: Problem) -> Run:
        return self._face.prepare(problem.alone())

    def set_threads(self, n: int) -> None:
        self._face.set_threads(n)

    def enter(self) -> None:
        self._face.enter()


def _find(module: Any, rule: Rule) -> Any:
    if not rule.optimizer:
        raise UnsupportedError("measured as a function")
    if not hasattr(module, rule.optimizer):
        raise UnsupportedError(f"{module.__name__} has no {rule.optimizer}")
    return getattr(module, rule.optimizer)


class NoMath(Ours):
    """Reads and writes what the rule does and computes nothing."""

    about = "a loop over the same memory that computes nothing: the machine's limit"

    def __init__(self) -> None:
        super().__init__()
        self.name = "no math"

    def prepare(self, problem: Problem) -> Run:
        outputs = [problem.param_arena, *problem.state_arenas[: len(problem.rule.states)]]
        return Run(functools.partial(_core.touch, outputs, [problem.grad_arena]), lambda: problem.params)
