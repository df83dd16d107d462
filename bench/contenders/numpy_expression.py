"""The formula as a plain NumPy expression."""

from __future__ import annotations

from ..problem import Array, Problem
from .base import Contender, Run


class NumpyExpression(Contender):
    """What users of NumPy write: states are made anew each step, the parameter is updated in place."""

    name = "numpy"
    about = "the plain NumPy expression"

    def prepare(self, problem: Problem) -> Run:
        formula, constants = problem.rule.formula, problem.rule.constants()
        states: list[list[Array]] = [list(tensors) for tensors in zip(*problem.states.values(), strict=True)]
        tensors = list(zip(problem.params, problem.grads, states or [[] for _ in problem.params], strict=True))
        count = 0

        def step() -> None:
            nonlocal count
            count += 1
            values = constants(count)
            for param, grad, state in tensors:
                update, *state[:] = formula(param, grad, *state, *values)
                param -= update

        return Run(step, lambda: problem.params)

    def threads_note(self, n: int) -> str:
        return "one thread" if n > 1 else ""
