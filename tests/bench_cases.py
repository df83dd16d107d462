"""What tests of the benchmarks share: the command, contenders that are wrong, sessions of short blocks."""

from __future__ import annotations

import dataclasses
import math

import pytest

from gradstep.__main__ import main
from gradstep.bench import machine, measure, plan, session
from gradstep.bench.contenders import Contender, Run, contenders
from gradstep.bench.options import Order
from gradstep.bench.report import PlainReporter
from gradstep.bench.rules import RULES, whole_steps

FLOAT32, FLOAT64 = plan.DTYPES.values()

faces = pytest.mark.parametrize(
    "name", ["gradstep", "gradstep-object", "gradstep-torch", "numpy", "torch-loop", "torch-foreach", "torch-fused"]
)


def run(*arguments):
    """Run the command, as if no other programs ran; return its exit status, as a shell sees it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine, "busy_cores", lambda: 0.0)
        try:
            return main([str(argument) for argument in arguments])
        except SystemExit as end:
            return end.code


def whole(name, rule="adamw"):
    """Return the whole step of that name."""
    (step,) = whole_steps(name, [RULES[rule]])
    return step


def installed(name):
    """Return the contender of that name, or skip."""
    contender = contenders()[name]
    if not contender.installed():
        pytest.skip(f"{contender.package} is not installed")
    return contender


def measured(tasks, picked, longest=math.inf):
    """Return the session in which the contenders were measured, in short blocks."""
    made = session.Session(Order(tasks, picked, True, measure.Effort(0.001, 2, 2), longest), PlainReporter())
    made.measure()
    return made


class Wrong(Contender):
    """gradstep with settings that are not the rule's."""

    name = about = "wrong"
    stores = True
    face = "gradstep"

    def __init__(self, **settings):
        self.settings = settings

    def prepare(self, problem):
        problem.rule = dataclasses.replace(problem.rule, settings={**problem.rule.settings, **self.settings})
        return contenders()[self.face].prepare(problem)


class Idle(Contender):
    """Does nothing, or leaves NaN."""

    name = about = "idle"
    stores = True

    def __init__(self, value=None):
        self.value = value

    def prepare(self, problem):
        def step():
            if self.value is not None:
                problem.params[1][...] = self.value

        return Run(step, lambda: problem.params)
