"""Floating-point formats in any layout and with any stage."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gradstep
from gradstep import config

from .cases import CASES, Case, gradients, parameters
from .format_cases import (
    LARGE,
    SHAPES,
    SHORT,
    Run,
    assert_same,
    compare_states,
    everywhere,
    formats_of,
    make_params,
    make_reference,
    short,
)
from .format_references import FLOATS, UNSIGNED, bfloat16, draws, not_zero, rounded, rounded_by_chance
from .stage_cases import MANY, STAGES, case_of, make_optimizer, settings_of
from .test_layouts import LAYOUTS, Placed, placements
from .test_statistics import assert_stats, expected_of

RUNS_ON_GPU = True


@st.composite
def problems(draw: st.DrawFn) -> tuple[Case, tuple[int, ...], list[str], list[Any], str, int]:
    case = draw(st.sampled_from(CASES))
    shape = tuple(draw(st.lists(st.sampled_from([0, 1, 2, 3, 5, 7, 16, 33]), min_size=0, max_size=4)))
    operands = range(2 + len(case.states))
    formats = [draw(st.sampled_from([*SHORT, *FLOATS])) for _ in operands]
    return (
        case,
        shape,
        formats,
        [draw(placements(len(shape))) for _ in operands],
        draw(st.sampled_from(config.isas())),
        draw(st.sampled_from([1, 3])),
    )


@given(problems())
@settings(max_examples=150, deadline=None)
def test_every_operand_in_a_format_and_layout_of_its_own(problem: tuple[Any, ...]) -> None:
    """The functions take arrays of any of the formats."""
    case, shape, formats, places, isa, threads = problem
    config.set_isa(isa)
    config.set_num_threads(threads)
    dtypes = [FLOATS[fmt] for fmt in formats]
    t = np.float64 if "float64" in formats else np.float32
    p = parameters(shape, t).astype(dtypes[0])
    states = {name: case.start(shape, dtype)[name] for name, dtype in zip(case.states, dtypes[2:], strict=True)}
    placed = [Placed(np.asarray(p), *places[0])]
    placed += [Placed(states[name], *place) for name, place in zip(case.states, places[2:], strict=True)]
    for step in (1, 2):
        g = np.asarray(gradients(shape, dtypes[1], step))
        grad = Placed(g, *places[1])
        given_states = {name: place.array for name, place in zip(case.states, placed[1:], strict=True)}
        case.call(placed[0].array, grad.array, given_states, step)
        assert_same(grad.array, g, "gradient")
        wide = {name: state.astype(t) for name, state in states.items()}
        with np.errstate(all="ignore"):
            p = rounded(case.reference(p.astype(t), g.astype(t), wide, step, **case.settings), dtypes[0])
        states = {
            name: not_zero(rounded(wide[name], dtype), wide[name]) if name in UNSIGNED else rounded(wide[name], dtype)
            for name, dtype in zip(case.states, dtypes[2:], strict=True)
        }
    assert_same(placed[0].array, p, "parameter")
    for name, place in zip(case.states, placed[1:], strict=True):
        assert_same(place.array, states[name], name)
    for place in placed:
        place.check()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "only the parameter"])
@pytest.mark.parametrize("name", ["every norm", "every stage by row", "every stage without norms"])
def test_layouts_with_stages(name: str, layout: str, shared: bool) -> None:
    place = LAYOUTS[layout]
    run = Run(
        case_of("adamw"),
        "bfloat16",
        "float16",
        formats_of(state_dtype="bfloat16", precision="stochastic", state_rounding="stochastic"),
        MANY[name],
        [(5, 67, 71), (150, 131)],
        place=place,
        place_grads=place if shared else None,
    )
    for where in everywhere((3,)):
        run.check(where)


KINDS: list[tuple[str, str, dict[str, Any]]] = [
    ("bfloat16", "bfloat16", {}),
    ("float16", "float32", {"state_dtype": "bfloat16"}),
    ("float32", "float16", {"state_dtype": "float16"}),
    ("bfloat16", "float64", {"state_dtype": "float32"}),
]


@pytest.mark.parametrize("name", [*STAGES, *MANY])
def test_stages(name: str) -> None:
    options = STAGES.get(name) or MANY[name]
    names = ["adamw", "sgd_nesterov", "lion", "lamb", "lars", "novograd", "rmsprop_momentum_centered"]
    first = [*STAGES, *MANY].index(name)
    for i, rule in enumerate(names):
        param, grad, formats = KINDS[(first + i) % len(KINDS)]
        run = Run(case_of(rule), param, grad, formats, options, steps=3)
        for isa in config.isas()[:: 1 if rule == "adamw" else 2]:
            config.set_isa(isa)
            run.check(isa)


@pytest.mark.parametrize("name", ["a usual step", "every gradient stage", "every parameter stage", "every norm"])
def test_stages_of_large_arrays(name: str) -> None:
    for rule in ("adamw", "lars"):
        run = Run(case_of(rule), "bfloat16", "bfloat16", {}, MANY[name], LARGE)
        for where in everywhere((1, 7)):
            run.check(where)


@short
@pytest.mark.parametrize("precision", ["nearest", "stochastic"])
def test_noise_is_that_of_float32(fmt: str, precision: str, isa: str) -> None:
    """Noise has no reference: the step of float32 copies, rounded. Noise and rounding draw from one seed."""
    dtype, case, options = FLOATS[fmt], case_of("adamw"), {"noise": 0.3, "noise_decay": 0.4, "seed": 11, "clip_norm": 3.0}
    params = [parameters((33, 31), dtype, 1), parameters((1030,), dtype, 2)]
    wide = [p.astype(np.float32) for p in params]
    opt, other = make_optimizer(case, params, {**options, "precision": precision}), make_optimizer(case, wide, options)
    for step in (1, 2):
        grads = [gradients(p.shape, dtype, 10 * step + i) for i, p in enumerate(params)]
        opt.step(grads)
        other.step([g.astype(np.float32) for g in grads])
        for i, (p, w) in enumerate(zip(params, wide, strict=True)):
            by_draws = rounded_by_chance(w, dtype, draws(w.size, 11, step, i, 0))
            assert_same(p, rounded(w, dtype) if precision == "nearest" else by_draws, f"parameter {i} at step {step}")
            assert_same(opt.state[i]["exp_avg_sq"], other.state[i]["exp_avg_sq"], f"exp_avg_sq {i} at step {step}")
            w[...] = p


@pytest.mark.parametrize("which", ["ema", "swa"])
@pytest.mark.parametrize("precision", ["nearest", "kahan", "master", "split"])
def test_parameters_hold_their_averages_rounded(which: str, precision: str) -> None:
    options: dict[str, Any] = {"ema_decay": 0.9} if which == "ema" else {"swa": (0, 1)}
    params = make_params(SHAPES[:3], "bfloat16")
    opt = make_optimizer(case_of("adamw"), params, {**options, "precision": precision})
    for step in (1, 2, 3):
        opt.step([gradients(p.shape, bfloat16, 10 * step + i) for i, p in enumerate(params)])
    before, averages = copy.deepcopy(params), copy.deepcopy(getattr(opt, which))
    with opt.averaged():
        for p, average in zip(params, averages, strict=True):
            assert average.dtype == np.float32
            assert_same(p, rounded(average, bfloat16), "inside")
    for p, q in zip(params, before, strict=True):
        assert_same(p, q, "after")


@pytest.mark.parametrize("kind", KINDS[:3], ids=lambda kind: f"{kind[0]}-{kind[1]}")
@pytest.mark.parametrize("precision", ["nearest", "kahan", "master"])
def test_statistics(kind: tuple[str, str, dict[str, Any]], precision: str, isa: str) -> None:
    """Of gradients as they are, parameters with what precision keeps of them, updates before they are rounded."""
    param, grad, formats = kind
    formats = {**formats, "precision": precision}
    options = {"clip_norm": 20.0, "cautious": True, "grad_scale": 0.7}
    case, params = case_of("adamw"), make_params(SHAPES, param)
    reference = make_reference(case, params, formats, options)
    opt = make_optimizer(case, params, {"clip_norm": 20.0, "cautious": True, **formats})
    for step in (1, 2, 3):
        grads = [np.array(gradients(shape, FLOATS[grad], 10 * step + i)) for i, shape in enumerate(SHAPES)]
        reference.step([(1.0, grads)], 0.7)
        stats = opt.step(grads, grad_scale=0.7, stats=True)
        assert_stats(stats, expected_of(reference.tensors, reference.factor), f"at step {step}")
        for tensor in reference.tensors:
            assert_stats(stats.parameters[tensor.index], expected_of([tensor], tensor.factor), f"of {tensor.index}")
        for i, q in enumerate(reference.params):
            assert_same(params[i], q, f"parameter {i} at step {step}")


@pytest.mark.parametrize("mode", ["skip", "raise"])
def test_steps_that_are_left_out(mode: str, isa: str) -> None:
    formats = {"state_dtype": "bfloat16", "precision": "kahan"}
    p = parameters((1030,), bfloat16)
    opt = make_optimizer(case_of("adamw"), [p], {"on_nonfinite": mode, **formats})
    g = gradients((1030,), bfloat16, 1)
    opt.step([g])
    before = copy.deepcopy([p, opt.state])
    g[1029] = np.inf
    if mode == "raise":
        with pytest.raises(FloatingPointError):
            opt.step([g])
    else:
        opt.step([g])
    assert_same(p, before[0], "parameter")
    compare_states(opt.state[0], before[1][0], mode)


def test_functions_have_stages(isa: str) -> None:
    """clip_norm and others of a call, on arrays of 16 bits."""
    case, options = case_of("adamw"), {"clip_norm": 20.0, "cautious": True, "l1": 30.0, "zero_grad": True}
    shapes = [(33, 3), (1030,), (17, 40)]
    params = make_params(shapes, "float16")
    states = [case.start(shape, bfloat16) for shape in shapes]
    reference = make_reference(case, params, {"state_dtype": "bfloat16"}, options)
    for step in (1, 2):
        grads = [gradients(shape, bfloat16, 10 * step + i) for i, shape in enumerate(shapes)]
        reference.step([(1.0, [g.copy() for g in grads])])
        lists = {name: [state[name] for state in states] for name in case.states}
        case.function(params, grads, **lists, step=step, **{**settings_of(case), **options})
        for i, q in enumerate(reference.params):
            assert_same(params[i], q, f"parameter {i} at step {step}")
            for name in case.states:
                assert_same(states[i][name], reference.state[i][name], f"{name} {i} at step {step}")
        assert not any(g.astype(np.float32).any() for g in grads)


def test_several_gradients_of_several_types_for_parameters_of_one(isa: str) -> None:
    """What a further gradient makes of the compute type is one tensor's own affair."""
    for order in (("float64", "float32"), ("float32", "float64")):
        room = [np.ones(9000, np.float32) for _ in order]
        params = [block[3000:6000] for block in room]
        further = [np.full(3000, 0.25, FLOATS[fmt]) for fmt in order]
        gradstep.SGD(params, lr=0.1).step([(0.5, [np.full(3000, 0.5, np.float32) for _ in order]), (0.5, further)])
        for block, p in zip(room, params, strict=True):
            np.testing.assert_allclose(p, 1 - 0.1 * 0.375, rtol=1e-6)
            assert (block[:3000] == 1).all() and (block[6000:] == 1).all()
