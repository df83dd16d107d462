"""The formula as a loop that numba compiles, with ``fastmath=True, parallel=True``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from ..cases import Case
from ..problem import Problem
from ..rules import NORM, Rule
from .base import Contender, Run, UnsupportedError

_NO_LOOPS = ("lamb", NORM.name)


def _bodies(f: Any, prange: Any) -> tuple[Callable[..., None], ...]:
    # One for each number of states: numba takes no loop over arguments.
    def none(p: Any, g: Any, constants: Any) -> None:
        for i in prange(p.size):
            (update,) = f(p[i], g[i], *constants)
            p[i] -= update

    def one(p: Any, g: Any, a: Any, constants: Any) -> None:
        for i in prange(p.size):
            update, a[i] = f(p[i], g[i], a[i], *constants)
            p[i] -= update

    def two(p: Any, g: Any, a: Any, b: Any, constants: Any) -> None:
        for i in prange(p.size):
            update, a[i], b[i] = f(p[i], g[i], a[i], b[i], *constants)
            p[i] -= update

    def three(p: Any, g: Any, a: Any, b: Any, c: Any, constants: Any) -> None:
        for i in prange(p.size):
            update, a[i], b[i], c[i] = f(p[i], g[i], a[i], b[i], c[i], *constants)
            p[i] -= update

    return none, one, two, three


@functools.cache
def _compiled(formula: Callable[..., Any], n_states: int) -> Any:
    import numba

    # Without the NumPy error model, the formula's divisions check for zero, and the loop is not vectorized.
    inner = numba.njit(fastmath=True, error_model="numpy")(formula)
    return numba.njit(fastmath=True, parallel=True, error_model="numpy")(_bodies(inner, numba.prange)[n_states])


class NumbaLoop(Contender):
    """One compiled loop a tensor; as fast as one written out by hand."""

    name = "numba"
    about = "a loop compiled by numba, fastmath and parallel"
    package = "numba"

    def slow_start(self, rule: Rule, case: Case) -> bool:
        return rule.name != "adamw" and rule.name not in _NO_LOOPS

    def prepare(self, problem: Problem) -> Run:
        if problem.rule.name in _NO_LOOPS:
            raise UnsupportedError(f"{problem.rule.name} is no loop over elements")
        loop = _compiled(problem.rule.formula, len(problem.states))
        constants = problem.rule.constants(problem.form.numpy.type)
        streams = (problem.params, problem.grads, *problem.states.values())
        tensors = list(zip(*([array.reshape(-1) for array in stream] for stream in streams), strict=True))
        count = 0

        def step() -> None:
            nonlocal count
            count += 1
            values = constants(count)
            for arrays in tensors:
                loop(*arrays, values)

        return Run(step, lambda: problem.params)

    def set_threads(self, n: int) -> None:
        import numba

        try:
            numba.set_num_threads(n)
        except ValueError as error:
            raise UnsupportedError(f"numba: {error} (NUMBA_NUM_THREADS)") from None
