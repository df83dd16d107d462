"""The formula as a plain NumPy expression."""

from __future__ import annotations

from ..memory import Array
from ..problem import Problem
from ..rules import NORM, Rule
from ..whole import whole_step
from .base import Contender, Run, UnsupportedError, norm_run


class NumpyExpression(Contender):
    """What users of NumPy write: states are made anew each step, the parameter is updated in place."""

    name = "numpy"
    about = "the plain NumPy expression"

    whole = True

    def prepare(self, problem: Problem) -> Run:
        rule = problem.rule
        if rule.name == NORM.name:
            return norm_run(lambda: rule.formula(problem.grads))
        if "stats" in rule.chain.active:
            raise UnsupportedError("gathers no statistics")
        formula, constants = rule.formula, rule.constants()
        states: list[list[Array]] = [[problem.states[name][i] for name in rule.states] for i in range(len(problem.params))]
        tensors = list(zip(problem.params, problem.grads, states, strict=True))
        kept = {name: problem.states[name] for name in rule.chain.states}
        count = 0

        def whole() -> None:
            nonlocal count
            count += 1
            whole_step(rule, count, constants(count), problem.params, problem.grads, states, kept)

        def step() -> None:
            nonlocal count
            count += 1
            values = constants(count)
            for param, grad, state in tensors:
                update, *state[:] = formula(param, grad, *state, *values)
                param -= update

        return Run(whole if rule.chain else step, lambda: problem.params)

    def note(self, rule: Rule, threads: int) -> str:
        return "one thread" if threads > 1 else ""
