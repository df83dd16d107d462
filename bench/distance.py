"""How far from float64 a contender is after many steps in a format: what rounding has cost until then."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .contenders import Contender
from .formats import Format
from .memory import HOST, Memory, as_numpy
from .problem import Problem
from .reference import Reference
from .rules import Rule

STEPS = 200
_ELEMENTS = 10_000


@dataclass(frozen=True)
class Distance:
    """Of a contender's parameters from those in float64."""

    contender: str
    rule: str
    dtype: str
    """The format."""
    steps: int
    elements: int
    rms: float
    """Root of the mean square of the distance."""
    way: float
    """The same of the way that the parameters have come in float64."""

    @property
    def share(self) -> float:
        """The distance in units of the way."""
        return self.rms / self.way


def measure_distance(contender: Contender, rule: Rule, form: Format, memory: Memory = HOST) -> Distance:
    """Take `STEPS` steps with a rule's usual settings, and compare.

    Parameters are normal random numbers. So are the gradients: half of each is the same at all steps, half is new. The reference
    starts from the same parameters and sees the same gradients, as the format has rounded them.
    """
    problem = Problem(rule, ((_ELEMENTS,),), form, memory)
    reference = Reference(contender, problem)
    run = contender.prepare(problem)
    reference.warm_up(contender.warm_ups)
    contender.enter()
    draw = np.random.default_rng(0)
    constant = draw.standard_normal(_ELEMENTS)
    for step in range(contender.warm_ups + 1, STEPS + 1):
        problem.set_grad(0, constant + draw.standard_normal(_ELEMENTS))
        run.refresh()
        reference.step(step)
        run.step()
        run.finish()
    got, expected = as_numpy(run.params()[0]).astype(np.float64), reference.params[0]
    rms, way = (float(np.sqrt(np.mean(np.square(array)))) for array in (got - expected, expected - reference.start[0]))
    return Distance(contender.name, rule.name, form.name, STEPS, _ELEMENTS, rms, way)
