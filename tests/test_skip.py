"""Gradients that are not finite: a step that is skipped or refused leaves every buffer, state and count as it was."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

import gradstep
from gradstep import config

from .cases import CASES, Case, gradients, parameters
from .stage_cases import MANY, STAGES, case_of, make_grads, make_optimizer, step_arguments
from .test_values import assert_same_bits, cases

RUNS_ON_GPU = True

SHAPES = [(33, 3), (1030,), (2, 3, 5, 5), (0, 3), (), (130, 139)]
BAD = (np.nan, np.inf, -np.inf)
CHANGING = {name: options for name, options in {**STAGES, **MANY}.items() if "on_nonfinite" not in options}


def digest(thing: Any) -> str:
    """A hash of everything in arrays, dicts, lists and numbers."""
    h = hashlib.sha256()

    def visit(x: Any) -> None:
        if isinstance(x, np.ndarray):
            h.update(f"array {x.dtype} {x.shape} ".encode() + x.tobytes())
        elif isinstance(x, Mapping):
            h.update(b"dict")
            for key in sorted(x, key=repr):
                h.update(repr(key).encode())
                visit(x[key])
        elif isinstance(x, (list, tuple)):
            h.update(f"list {len(x)}".encode())
            for item in x:
                visit(item)
        else:
            h.update(f"{type(x).__name__} {x!r};".encode())

    visit(thing)
    return h.hexdigest()


def all_of(opt: Any, params: list[Any], grads: Any = None) -> str:
    return digest([params, opt.state_dict(), opt.state, opt.steps, grads])


def make_params() -> list[Any]:
    return [np.array(parameters(shape, np.float32, i)) for i, shape in enumerate(SHAPES)]


def grads_of(step: int) -> list[Any]:
    return [np.array(gradients(shape, np.float32, 100 * step + i)) for i, shape in enumerate(SHAPES)]


def spoil(grads: list[Any], index: int, value: float) -> list[Any]:
    grads[index].flat[-1] = value
    return grads


def attempt(opt: Any, grads: Any, **more: Any) -> None:
    """A step that must not be done."""
    if opt.on_nonfinite == "raise":
        with pytest.raises(FloatingPointError):
            opt.step(grads, **more)
    else:
        opt.step(grads, **more)


@pytest.mark.parametrize("how", ["skip", "raise"])
@pytest.mark.parametrize("name", CHANGING)
def test_a_step_is_done_in_full_or_not_at_all(name: str, how: str, isa: str) -> None:
    options = {**CHANGING[name], "on_nonfinite": how}
    of_constructor, scale, weights = step_arguments(options)
    zero_grad = of_constructor.pop("zero_grad", False)
    params = make_params()
    opt = make_optimizer(case_of("adamw"), params, of_constructor)

    def sources(step: int) -> Any:
        made = make_grads(SHAPES, np.float32, step, options)
        return made if weights else made[0][1]

    def spoilt(step: int, at: int, value: float) -> Any:
        made = sources(step)
        (made[-1][1] if weights else made)[at].flat[-1] = value
        return made

    before = all_of(opt, params)
    grads = spoilt(3, 5, np.nan)
    given = digest(grads)
    attempt(opt, grads, grad_scale=scale)
    assert all_of(opt, params) == before, "the first step, which makes the states"
    assert digest(grads) == given
    assert opt.state == {}
    for step in (3, 4, 5):
        for at, value in zip((0, 1, 2), BAD, strict=True):
            before = all_of(opt, params)
            attempt(opt, spoilt(step, at, value), grad_scale=scale)
            assert all_of(opt, params) == before, f"step {step}"
        opt.step(sources(step), grad_scale=scale)
        assert all_of(opt, params) != before
        assert opt.state[0]["step"] == step - 2
    if zero_grad:
        opt.zero_grad = True
        grads = spoilt(6, 0, np.inf)
        before = all_of(opt, params)
        attempt(opt, grads, grad_scale=scale)
        assert all_of(opt, params) == before
        assert all((np.asarray(g) == 0).all() for g in grads) == (opt.on_nonfinite == "skip")


@cases
def test_every_rule_goes_on_as_if_nothing_had_been(case: Case) -> None:
    params, others = make_params(), make_params()
    opt = make_optimizer(case, params, {"on_nonfinite": "skip", "clip_norm": 1.0, "ema_decay": 0.9})
    other = make_optimizer(case, others, {"clip_norm": 1.0, "ema_decay": 0.9})
    for step in range(1, 4):
        for i, value in enumerate(BAD):
            opt.step(spoil(grads_of(step), i, value))
        opt.step(grads_of(step))
        other.step(grads_of(step))
    for i, (p, q) in enumerate(zip(params, others, strict=True)):
        assert_same_bits(p, q, f"parameter {i}")
    assert opt.state.keys() == other.state.keys()
    for i, state in opt.state.items():
        assert digest(state) == digest(other.state[i])


@pytest.mark.parametrize("how", ["skip", "raise"])
def test_wherever_the_element_is(how: str, isa: str) -> None:
    """Vectors, their tails, leaves, chunks; any number of threads."""
    size = 70_001
    p, clean = parameters((size,), np.float32), gradients((size,), np.float32, 1)
    opt = gradstep.Lion([p], on_nonfinite=how, clip_norm=1.0)
    before = all_of(opt, [p])
    for threads in (1, 3):
        config.set_num_threads(threads)
        for at in (0, 1, 31, 32, 63, 64, 1023, 1024, 16_383, 16_384, 35_000, 69_999, 70_000):
            for value in BAD:
                g = clean.copy()
                g[at] = value
                attempt(opt, [g])
                assert all_of(opt, [p]) == before, f"element {at} is {value}, {threads} threads"
    opt.step([clean])
    assert all_of(opt, [p]) != before


@pytest.mark.parametrize("case", [case for case in CASES if case.name in ("adamw", "sgd", "lion")], ids=lambda case: case.name)
def test_elements_count_not_norms(case: Case, isa: str) -> None:
    """Finite gradients whose norm overflows are no reason to skip; those that overflow when scaled are."""
    p, q = parameters((50,), np.float64), parameters((50,), np.float64)
    make_optimizer(case, [p], {"on_nonfinite": "skip"}).step([np.full(50, 1e200)])
    make_optimizer(case, [q], {}).step([np.full(50, 1e200)])
    assert not np.array_equal(p, parameters((50,), np.float64))
    assert_same_bits(p, q, "parameter")
    p = parameters((50,), np.float32)
    opt = make_optimizer(case, [p], {"on_nonfinite": "skip"})
    opt.step([np.full(50, 1e38, np.float32)], grad_scale=10.0)
    assert np.array_equal(p, parameters((50,), np.float32))
    assert opt.state == {}
    opt.step([np.full(50, np.inf, np.float32)], grad_scale=0.0)  # infinity by zero
    assert opt.state == {}
    opt.step([np.full(50, 3e38, np.float32)], grad_scale=0.5)
    assert opt.state[0]["step"] == 1
    opt.step([(0.5, [np.full(50, 3e38, np.float32)]), (-0.5, [np.full(50, 2e38, np.float32)])])
    assert opt.state[0]["step"] == 2


def test_several_groups(isa: str) -> None:
    for bad in range(3):
        params = make_params()[:3]
        opt = gradstep.AdamW(
            [
                {"params": params[:1]},
                {"params": {"b": params[1]}, "ema_decay": 0.9},
                {"params": params[2:], "lookahead": (2, 0.5)},
            ],
            on_nonfinite="skip",
            clip_norm=1.0,
        )
        for step in (1, 2):
            before = all_of(opt, params)
            grads = spoil(grads_of(step)[:3], bad, np.nan)
            opt.step([grads[:1], {"b": grads[1]}, grads[2:]])
            assert all_of(opt, params) == before
            grads = grads_of(step)
            opt.step([grads[:1], {"b": grads[1]}, grads[2:3]])
            assert all_of(opt, params) != before


def test_functions_tell_whether_they_did_the_step(isa: str) -> None:
    p, m = parameters((50,), np.float32), np.zeros(50, np.float32)
    g, before = gradients((50,), np.float32, 1), parameters((50,), np.float32)
    bad = g.copy()
    bad[49] = np.nan
    assert gradstep.lion_(p, bad, exp_avg=m, on_nonfinite="skip", clip_norm=1.0) is False
    with pytest.raises(FloatingPointError):
        gradstep.lion_(p, bad, exp_avg=m, on_nonfinite="raise")
    assert_same_bits(p, before, "parameter")
    assert not m.any()
    for how in ("skip", "raise"):
        assert gradstep.lion_(p, g, exp_avg=m, on_nonfinite=how) is True
    assert not np.array_equal(p, before)
    assert gradstep.lion_(p, g, exp_avg=m) is None


def test_gradients_that_are_missing_are_finite() -> None:
    params = make_params()
    opt = gradstep.AdamW(params, on_nonfinite="raise", clip_norm=1.0)
    opt.step([None, *grads_of(1)[1:5], None])
    assert sorted(opt.state) == [1, 2, 3, 4]


def test_raise_names_the_first_parameter() -> None:
    p, q = (parameters((40,), np.float32, i) for i in range(2))
    g = gradients((40,), np.float32, 1)
    bad = g.copy()
    bad[39] = np.nan
    opt = gradstep.AdamW({"weight": p, "bias": q}, on_nonfinite="raise")
    with pytest.raises(FloatingPointError, match="'bias'"):
        opt.step({"weight": g, "bias": bad})
    with pytest.raises(FloatingPointError, match="'weight'"):
        opt.step({"weight": bad, "bias": bad})
    listed = gradstep.AdamW([p, q], on_nonfinite="raise")
    with pytest.raises(FloatingPointError, match=r"\[1\]"):
        listed.step([g, bad])
    opt.step({"weight": g, "bias": g})


def test_zero_counts_as_zero(isa: str) -> None:
    """As if the elements were 0: in norms and means as well."""
    for name, options in {**STAGES, **MANY}.items():
        of_constructor, _, weights = step_arguments({**options, "on_nonfinite": "zero"})
        if weights:
            continue
        params, others = make_params(), make_params()
        opt, other = (
            make_optimizer(case_of("adamw"), params, of_constructor),
            make_optimizer(case_of("adamw"), others, of_constructor),
        )
        spoilt, cleaned = grads_of(1), grads_of(1)
        for i, value in ((0, np.nan), (1, np.inf), (5, -np.inf)):
            spoilt[i].flat[7], cleaned[i].flat[7] = value, 0
        opt.step(spoilt)
        other.step(cleaned)
        for i, (p, q) in enumerate(zip(params, others, strict=True)):
            assert_same_bits(p, q, f"parameter {i} with {name}")
        assert digest(copy.deepcopy(opt.state)) == digest(other.state), name
