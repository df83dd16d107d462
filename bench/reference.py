"""The step in float64, on copies of a problem's arrays: what contenders are held to."""

from __future__ import annotations

import numpy as np

from .contenders import Contender
from .memory import as_numpy
from .problem import Problem
from .rules import NORM
from .whole import whole_step


class Reference:
    """What becomes of a problem's parameters and averages by right."""

    def __init__(self, contender: Contender, problem: Problem) -> None:
        self._problem, self._rule = problem, problem.rule
        self._formula, self._constants = contender.formula(problem.rule), problem.rule.constants()
        self.params = [as_numpy(array).astype(np.float64) for array in problem.params]
        self._states = [[np.zeros_like(array) for _ in self._rule.states] for array in self.params]
        self.kept = {
            name: [as_numpy(array).astype(np.float64) for array in problem.states[name]] for name in self._rule.chain.states
        }
        self.start = [array.copy() for array in self.params] if self._rule.optimizer else [np.zeros(1)]
        self.grad_norm = 0.0

    def step(self, step: int) -> None:
        """Take step number `step` with the problem's gradients."""
        grads = [as_numpy(array).astype(np.float64) for array in self._problem.grads]
        self.grad_norm = float(NORM.formula(grads))
        if self._rule.name == NORM.name:
            self.params = [np.array([self.grad_norm])]
        else:
            whole_step(self._rule, step, self._constants(step), self.params, grads, self._states, self.kept, self._formula)

    def warm_up(self, steps: int) -> None:
        """Take the first steps, which a contender has taken already when it was prepared, each with the same gradients."""
        for step in range(1, steps + 1):
            self._problem.refill_grads()
            self.step(step)
