"""The gate before timing: a contender has to agree with the formula in float64."""

from __future__ import annotations

from typing import Any

import numpy as np

from .contenders import Contender, UnsupportedError
from .formats import Format
from .memory import HOST, Array, Memory, as_numpy
from .problem import Problem
from .reference import Reference
from .rules import Rule

_SHAPES = ((257,), (31, 5), (1003,))
_STORED_SHAPES = (
    *_SHAPES[:2],
    (4099,),
    (66, 65),
    (64, 64),
)  # smaller tensors have no compressed states, torchao's only whole blocks
_STEPS = 4
_LONG = 0.5  # learning rate: against such steps the rounding of parameters is small

# The errors that a format may make on average, of absolute values: in units of the way, by the format of the states, and in units
# of the parameters, by their dtype. Twice as large as those of the worst rule.
_OF_WAY = {"": 1e-3, "bfloat16": 0.01, "q8": 0.04, "q4": 0.2}
_OF_PARAMS = {"float32": 2.0**-20, "bfloat16": 2.0**-7, "float16": 2.0**-10}


def check(contender: Contender, rule: Rule, form: Format, memory: Memory = HOST) -> str | None:
    """Return None if the contender computes the step, else what is wrong.

    It makes some steps with settings far from the defaults and new gradients each step. Parameters and averages may then be off
    by a ten-thousandth of the longest way that one has come, and some roundings; with other formats than float32 and float64
    throughout, parameters may be off by what such a format costs, on average.

    Raises:
        UnsupportedError: if the contender can't make the step at all.
    """
    if rule.chain and not contender.whole:
        raise UnsupportedError("makes the rule's step alone")
    if not form.plain and not contender.stores:
        raise UnsupportedError("measured in float32 and float64 only")
    rule = rule.demanding() if form.plain else rule.demanding(_LONG)
    problem = Problem(rule, _SHAPES if form.plain else _STORED_SHAPES, form, memory)
    reference = Reference(contender, problem)
    start = reference.start
    run = contender.prepare(problem)
    reference.warm_up(contender.warm_ups)
    contender.enter()
    seen: Any = None
    for step in range(contender.warm_ups + 1, contender.warm_ups + _STEPS + 1):
        problem.fill_grads(step)
        run.refresh()
        reference.step(step)
        seen = run.step()
        run.finish()
    if not form.plain:
        return _off_on_average(run.params(), reference, form)
    wrong = _off("params", run.params(), reference.params, start, form)
    for name in rule.chain.states:
        wrong = wrong or _off(name, problem.states[name], reference.kept[name], start, form)
    if not wrong and "zero_grad" in rule.chain.active and any(grad.any() for grad in problem.grads):
        wrong = "the gradients are not zeroed"
    if not wrong and "stats" in rule.chain.active and not np.isclose(float(seen.grad_norm), reference.grad_norm, rtol=1e-5):
        wrong = f"grad_norm is {seen.grad_norm:g}, not {reference.grad_norm:g}"
    return wrong


def _off(name: str, got: list[Any], reference: list[Array], start: list[Array], form: Format) -> str | None:
    for i, (array, expected, before) in enumerate(zip(got, reference, start, strict=True)):
        error = np.abs(as_numpy(array) - expected).max()
        allowed = 1e-4 * np.abs(expected - before).max() + 16 * np.finfo(form.dtype).eps * np.abs(expected).max()
        if not error <= allowed:
            return f"{name}[{i}] is off by {error:.2g} after {_STEPS} steps, allowed is {allowed:.2g}"
    return None


def _off_on_average(got: list[Any], reference: Reference, form: Format) -> str | None:
    for i, (array, expected, before) in enumerate(zip(got, reference.params, reference.start, strict=True)):
        error = np.abs(as_numpy(array).astype(np.float64) - expected).mean()
        way = _OF_WAY[form.state_dtype]
        allowed = way * np.abs(expected - before).mean() + _OF_PARAMS[form.dtype] * np.abs(expected).mean()
        if not error <= allowed:
            return f"params[{i}] is off by {error:.2g} on average after {_STEPS} steps, allowed is {allowed:.2g}"
    return None
