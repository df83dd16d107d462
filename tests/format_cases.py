"""How an optimizer and the reference of formats are taken through the same steps, and the rules that tests of formats run over."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from gradstep import config

from .cases import CASES, NORM_CASES, Case, gradients, parameters
from .format_references import FLOATS, FormatStepper, bits_of
from .stage_cases import make_optimizer, settings_of, step_arguments

THE_THREE = [case for case in NORM_CASES if case.name in ("lamb", "lars", "novograd")]
RULES = [*CASES, *THE_THREE]
SHAPES = [(33, 3), (1030,), (67,), (0, 3), (), (2, 3, 5, 5)]
LARGE = [(130, 1030), (70_001,)]  # several chunks
SHORT = ("float16", "bfloat16")
SEED = 2**40 + 12_345

rules = pytest.mark.parametrize("case", RULES, ids=lambda case: case.name)
short = pytest.mark.parametrize("fmt", SHORT)

Expected = list[tuple[list[Any], dict[int, dict[str, Any]]]]


def everywhere(threads: Sequence[int] = (1, 2, 3, 7)) -> Iterator[str]:
    """Each instruction set once, the widest with each number of threads."""
    *others, widest = config.isas()
    for isa, n in [*((isa, 3) for isa in others), *((widest, n) for n in threads)]:
        config.set_isa(isa)
        config.set_num_threads(n)
        yield f"{isa}, {n} threads"


def formats_of(**formats: Any) -> dict[str, Any]:
    """Keywords of formats, with a seed where anything is left to chance; it is refused elsewhere."""
    return formats | ({"seed": SEED} if "stochastic" in (formats.get("precision"), formats.get("state_rounding")) else {})


@np.errstate(invalid="ignore")
def assert_same(ours: Any, theirs: Any, what: str) -> None:
    """The same dtype, shape and bits; a NaN is as good as another."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape), what
    integers = ours.dtype.kind in "iu"
    differ = ours != theirs if integers else np.asarray(bits_of(ours) != bits_of(theirs))
    if differ.any() and not integers:
        differ &= ~(np.isnan(ours) & np.isnan(theirs))
    at = np.flatnonzero(differ)
    assert at.size == 0, (
        f"{what}: {at.size} of {ours.size} differ, the first at {at[0]}: {ours.flat[at[0]]!r}, not {theirs.flat[at[0]]!r}"
    )


@functools.lru_cache(maxsize=512)
def _array(shape: tuple[int, ...], dtype: str, seed: int | None, i: int) -> Any:
    return np.array(parameters(shape, FLOATS[dtype], i) if seed is None else gradients(shape, FLOATS[dtype], seed))


def _placed(a: Any, place: Any) -> Any:
    return place(a.copy()) if place and a.ndim else a.copy()


def make_params(shapes: list[Any], dtype: str, place: Any = None) -> list[Any]:
    return [_placed(_array(shape, dtype, None, i), place) for i, shape in enumerate(shapes)]


def make_sources(shapes: list[Any], dtype: str, step: int, options: dict[str, Any], place: Any = None) -> list[Any]:
    """Gradients of step `step`; two of the parameters have none at some steps."""
    sources = []
    for k, weight in enumerate(options.get("weights") or (1.0,)):
        grads: list[Any] = [_placed(_array(s, dtype, 1000 * step + 100 * k + i, 0), place) for i, s in enumerate(shapes)]
        if len(shapes) > 4:
            grads[1] = None if step == 2 else grads[1]
            grads[4] = None if step == 1 else grads[4]
        if options.get("on_nonfinite") == "zero":
            for g in grads:
                for at, value in ((step, np.nan), (11 + k, np.inf), (13, -np.inf)):
                    if g is not None and g.size > at:
                        g.flat[at] = value
        sources.append((weight, grads))
    return sources


def make_reference(case: Case, params: list[Any], formats: Any, options: dict[str, Any]) -> FormatStepper:
    own, _, _ = step_arguments(options)
    overall = {name: own.pop(name) for name in ("clip_norm", "on_nonfinite", "zero_grad") if name in own}
    return FormatStepper(case.reference, case.start, params, {**settings_of(case), **own}, formats, **overall)


class Run:
    """What the reference makes of parameters of one type and gradients of another, and the comparison with it."""

    def __init__(
        self,
        case: Case,
        param: str,
        grad: str,
        formats: dict[str, Any] | None = None,
        options: dict[str, Any] | None = None,
        shapes: list[Any] = SHAPES,
        steps: int = 2,
        place: Any = None,
        place_grads: Any = None,
    ) -> None:
        self.case, self.param, self.grad, self.shapes, self.steps = case, param, grad, shapes, steps
        self.formats, self.options, self.place, self.place_grads = formats or {}, options or {}, place, place_grads
        self.reference = make_reference(case, make_params(shapes, param, place), self.formats, self.options)
        self.history: Expected = []
        for step in range(1, steps + 1):
            assert self.reference.step(self.sources(step), self.options.get("grad_scale", 1.0))
            state = {i: dict(s) for i, s in self.reference.state.items()}
            self.history.append(([*self.reference.params], state))

    def sources(self, step: int) -> list[Any]:
        return make_sources(self.shapes, self.grad, step, self.options, self.place_grads)

    def optimizer(self) -> tuple[Any, list[Any]]:
        params = make_params(self.shapes, self.param, self.place)
        of_constructor, _, _ = step_arguments(self.options)
        return make_optimizer(self.case, params, {**of_constructor, **self.formats}), params

    def check(self, what: str = "") -> None:
        """Take the same steps with gradstep and compare all that there is after each."""
        opt, params = self.optimizer()
        for step, (theirs, states) in enumerate(self.history, 1):
            sources = self.sources(step)
            weighted = "weights" in self.options
            opt.step(sources if weighted else sources[0][1], grad_scale=self.options.get("grad_scale", 1.0))
            where = f"at step {step}, {self.case.name}, {self.param}, grads {self.grad}, {self.formats}, {what}"
            for i, q in enumerate(theirs):
                assert_same(params[i], q, f"parameter {i} {where}")
            assert opt.state.keys() == states.keys(), where
            for i, state in states.items():
                compare_states(opt.state[i], state, f"of {i} {where}")
            for (_, grads), (_, untouched) in zip(sources, self.sources(step), strict=True):
                for i, (g, h) in enumerate(zip(grads, untouched, strict=True)):
                    if h is not None:
                        assert_same(g, np.zeros_like(h) if self.options.get("zero_grad") else h, f"gradient {i} {where}")


def compare_states(ours: dict[str, Any], theirs: dict[str, Any], what: str) -> None:
    assert ours.keys() == theirs.keys(), f"states {what}"
    for name, value in theirs.items():
        if isinstance(value, np.ndarray):
            assert_same(ours[name], value, f"{name} {what}")
        else:
            assert ours[name] == value or (np.isnan(value) and np.isnan(ours[name])), f"{name} {what}"
