"""The gate before timing: a contender has to agree with the formula in float64."""

from __future__ import annotations

from typing import Any

import numpy as np

from .contenders import Contender, UnsupportedError
from .problem import Array, Problem
from .rules import NORM, Rule
from .whole import whole_step

_SHAPES = ((257,), (31, 5), (1003,))
_STEPS = 4


def check(contender: Contender, rule: Rule, dtype: np.dtype[Any]) -> str | None:
    """Return None if the contender computes the step, else what is wrong.

    It makes some steps with settings far from the defaults and new gradients each step. Parameters and averages may then be off
    by a ten-thousandth of the longest way that one has come, and some roundings.

    Raises:
        UnsupportedError: if the contender can't make the step at all.
    """
    if rule.chain and not contender.whole:
        raise UnsupportedError("makes the rule's step alone")
    rule = rule.demanding()
    problem = Problem(rule, _SHAPES, dtype)
    reference = _Reference(contender, problem)
    start = reference.start
    run = contender.prepare(problem)
    contender.enter()
    seen: Any = None
    for step in range(1, _STEPS + 1):
        problem.fill_grads(step)
        run.refresh()
        reference.step(step)
        seen = run.step()
        run.finish()
    wrong = _off("params", run.params(), reference.params, start, dtype)
    for name in rule.chain.states:
        wrong = wrong or _off(name, problem.states[name], reference.kept[name], start, dtype)
    if not wrong and "zero_grad" in rule.chain.active and any(grad.any() for grad in problem.grads):
        wrong = "the gradients are not zeroed"
    if not wrong and "stats" in rule.chain.active and not np.isclose(seen.grad_norm, reference.grad_norm, rtol=1e-5):
        wrong = f"grad_norm is {seen.grad_norm:g}, not {reference.grad_norm:g}"
    return wrong


class _Reference:
    """The step in float64, on copies of a problem's arrays."""

    def __init__(self, contender: Contender, problem: Problem) -> None:
        self._problem, self._rule = problem, problem.rule
        self._formula, self._constants = contender.formula(problem.rule), problem.rule.constants()
        self.params = [array.astype(np.float64) for array in problem.params]
        self._states = [[np.zeros_like(array) for _ in self._rule.states] for array in self.params]
        self.kept = {name: [array.astype(np.float64) for array in problem.states[name]] for name in self._rule.chain.states}
        self.start = [array.copy() for array in self.params] if self._rule.optimizer else [np.zeros(1)]
        self.grad_norm = 0.0

    def step(self, step: int) -> None:
        grads = [array.astype(np.float64) for array in self._problem.grads]
        self.grad_norm = float(NORM.formula(grads))
        if self._rule.name == NORM.name:
            self.params = [np.array([self.grad_norm])]
        else:
            whole_step(self._rule, step, self._constants(step), self.params, grads, self._states, self.kept, self._formula)


def _off(name: str, got: list[Array], reference: list[Array], start: list[Array], dtype: np.dtype[Any]) -> str | None:
    for i, (array, expected, before) in enumerate(zip(got, reference, start, strict=True)):
        error = np.abs(array - expected).max()
        allowed = 1e-4 * np.abs(expected - before).max() + 16 * np.finfo(dtype).eps * np.abs(expected).max()
        if not error <= allowed:
            return f"{name}[{i}] is off by {error:.2g} after {_STEPS} steps, allowed is {allowed:.2g}"
    return None
