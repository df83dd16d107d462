"""The loop without math, which shows the machine's limit."""

from __future__ import annotations

from ..formats import Format
from ..limit import limit_bytes, loops
from ..models import Shapes
from ..problem import Problem
from ..rules import Rule
from .base import Run
from .gradstep_faces import Ours


class NoMath(Ours):
    """Reads and writes what the rule does and computes nothing."""

    about = "a loop over the same memory that computes nothing: the machine's limit"
    is_limit = True

    def __init__(self) -> None:
        super().__init__()
        self.name = "no math"

    def moved_bytes(self, rule: Rule, shapes: Shapes, form: Format) -> int:
        return limit_bytes(rule, shapes, form)

    def prepare(self, problem: Problem) -> Run:
        first, *others = loops(problem)
        if not others:
            return Run(first, lambda: problem.params)

        def step() -> None:
            first()
            for loop in others:
                loop()

        return Run(step, lambda: problem.params)
