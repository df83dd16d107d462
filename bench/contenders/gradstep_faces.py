"""gradstep: the functions, and the optimizers for NumPy and for torch."""

from __future__ import annotations

import functools
from typing import Any

import gradstep
from gradstep import _core, config

from ..chains import COUNTS
from ..formats import Format
from ..problem import Problem
from ..rules import NORM, Rule
from .base import Contender, Run, UnsupportedError, norm_run
from .torch_arrays import adopt, capturable_option, tensors


class Ours(Contender):
    """A face of gradstep, on an instruction set of its own if one is named."""

    stores = True

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
        settings |= _of_function(problem.form, counts)
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
        optimizer = _find(gradstep, rule)(problem.params, **rule.settings, **rule.chain.options, **problem.form.options)
        for i, arrays in enumerate(problem.state):
            numbers = {count: 0 for name, count in COUNTS.items() if name in problem.states}
            optimizer.state[i] = {"step": 0, **numbers, **arrays}
        return Run(functools.partial(optimizer.step, problem.grads, **rule.chain.call), lambda: problem.params)


class TorchClass(Ours):
    """The torch classes, on torch's threads."""

    face = "gradstep-torch"
    about = "gradstep's torch classes: gradstep.torch.AdamW(...).step(), ..."
    package = "torch"
    whole = True

    def __init__(self, isa: str | None = None, *, capturable: bool = False) -> None:
        super().__init__(isa)
        self._capturable = capturable

    def prepare(self, problem: Problem) -> Run:
        import gradstep.torch

        rule = problem.rule
        if rule.name == NORM.name:
            return norm_run(functools.partial(gradstep.global_norm, [param.grad for param in tensors(problem)]))
        kind = _find(gradstep.torch, rule)
        options = {**rule.chain.options, **problem.form.options, **capturable_option(kind, self._capturable)}
        optimizer, _ = adopt(kind, problem, **options)
        step = functools.partial(optimizer.step, **rule.chain.call) if rule.chain.call else optimizer.step
        return Run(step, lambda: problem.params)

    def enter(self) -> None:
        from gradstep.torch.threads import share_torch_threads

        config.set_isa(self._isa)
        share_torch_threads()


def _of_function(form: Format, counts: bool) -> dict[str, str]:
    """Return the keywords of a function; the formats of its states are those of the arrays that it is given."""
    if form.compressed:
        raise UnsupportedError("the functions take no compressed states")
    if form.beside:
        raise UnsupportedError("the functions keep no array beside the parameter")
    if form.precision == "stochastic" and not counts:
        raise UnsupportedError("the function is not told the step, which random numbers depend on")
    return {name: value for name, value in form.options.items() if name == "precision"}


def _find(module: Any, rule: Rule) -> Any:
    if not rule.optimizer:
        raise UnsupportedError("measured as a function")
    if not hasattr(module, rule.optimizer):
        raise UnsupportedError(f"{module.__name__} has no {rule.optimizer}")
    return getattr(module, rule.optimizer)
