"""The gate before timing: a contender has to agree with the formula in float64."""

from __future__ import annotations

from typing import Any

import numpy as np

from .contenders import Contender
from .problem import Problem
from .rules import Rule

_SHAPES = ((257,), (31, 5), (1003,))
_STEPS = 4


def check(contender: Contender, rule: Rule, dtype: np.dtype[Any]) -> str | None:
    """Return None if the contender computes the rule, else what is wrong.

    It makes some steps with settings far from the defaults and new gradients each step. Its parameters may then be off by a
    ten-thousandth of the longest way that one has come, and some roundings.

    Raises:
        UnsupportedError: if the contender can't run the rule at all.
    """
    rule = rule.demanding()
    problem = Problem(rule, _SHAPES, dtype)
    start = [array.astype(np.float64) for array in problem.params]
    params = [array.copy() for array in start]
    states = [[np.zeros_like(array) for _ in rule.states] for array in start]
    constants = rule.constants()
    run = contender.prepare(problem)
    contender.enter()
    for step in range(1, _STEPS + 1):
        problem.fill_grads(step)
        run.refresh()
        run.step()
        run.finish()
        for param, grad, state in zip(params, problem.grads, states, strict=True):
            update, *state[:] = rule.formula(param, grad.astype(np.float64), *state, *constants(step))
            param -= update
    for i, (got, expected, before) in enumerate(zip(run.params(), params, start, strict=True)):
        error = np.abs(got - expected).max()
        allowed = 1e-4 * np.abs(expected - before).max() + 16 * np.finfo(dtype).eps * np.abs(expected).max()
        if not error <= allowed:
            return f"params[{i}] is off by {error:.2g} after {_STEPS} steps, allowed is {allowed:.2g}"
    return None
