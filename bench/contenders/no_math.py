"""The loop without math, which shows the machine's limit."""

from __future__ import annotations

from ..limit import loops
from ..problem import Problem
from .base import Run
from .gradstep_faces import Ours


class NoMath(Ours):
    """Reads and writes what the rule does and computes nothing."""

    about = "a loop over the same memory that computes nothing: the machine's limit"

    def __init__(self) -> None:
        super().__init__()
        self.name = "no math"

    def prepare(self, problem: Problem) -> Run:
        first, *others = loops(problem)
        if not others:
            return Run(first, lambda: problem.params)

        def step() -> None:
            first()
            for loop in others:
                loop()

        return Run(step, lambda: problem.params)
