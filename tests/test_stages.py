"""Whole steps: every stage, every pair of stages and larger sets give the bits of the reference, for every instruction set."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

import gradstep
from gradstep import config

from .stage_cases import (
    MANY,
    RULES,
    STAGES,
    case_of,
    check,
    expect,
    make_grads,
    make_optimizer,
    make_params,
    settings_of,
    step_arguments,
    together,
)
from .stage_references import Stepper
from .test_layouts import LAYOUTS
from .test_values import assert_same_bits

RUNS_ON_GPU = True

LARGE = [
    (130, 1030),
    (1, 20_000),
    (70_001,),
    (5470, 3),
    (4, 3, 65, 33),
]  # several leaves, blocks and chunks; tiny and long rows
DTYPES = (np.float32, np.float64)
PAIRS = [pair for pair in itertools.combinations(STAGES, 2) if together(*pair) is not None]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("rule", RULES)
def test_every_stage_alone(stage: str, rule: str, isa: str) -> None:
    for dtype in DTYPES:
        check(expect(case_of(rule), dtype, STAGES[stage]), case_of(rule), dtype, STAGES[stage])


@pytest.mark.parametrize("pair", PAIRS, ids="+".join)
def test_every_pair_of_stages(pair: tuple[str, str]) -> None:
    options = together(*pair) or {}
    for dtype, rule in itertools.product(DTYPES, RULES):
        case, expected = case_of(rule), expect(case_of(rule), dtype, options, steps=3)
        for isa in config.isas():
            config.set_isa(isa)
            check(expected, case, dtype, options, what=isa)


@pytest.mark.parametrize("name", MANY)
@pytest.mark.parametrize("rule", [*RULES, "adamw_amsgrad", "rmsprop_momentum_centered", "adam"])
def test_many_stages(name: str, rule: str) -> None:
    for dtype in DTYPES:
        expected = expect(case_of(rule), dtype, MANY[name])
        for isa in config.isas():
            config.set_isa(isa)
            check(expected, case_of(rule), dtype, MANY[name], what=isa)


@pytest.mark.parametrize("rule", ["sgd", "sgd_momentum", "adagrad", "rmsprop", "adamw_maximize", "lion_maximize"])
def test_other_rules(rule: str, isa: str) -> None:
    for stage in ("clip_norm", "independent", "coupled", "trust_ratio", "group_lasso", "ema with bias"):
        check(expect(case_of(rule), np.float32, STAGES[stage], steps=2), case_of(rule), np.float32, STAGES[stage], what=stage)


KEPT = {"weights", "lookahead", "ema_decay", "ema_correction", "swa"}  # what only optimizers have


@pytest.mark.parametrize("name", [*STAGES, *MANY])
@pytest.mark.parametrize("rule", ["adamw", "sgd_nesterov"])
def test_functions_have_the_same_stages(name: str, rule: str, isa: str) -> None:
    options = {k: v for k, v in (STAGES.get(name) or MANY[name]).items() if k not in KEPT}
    case, shapes = case_of(rule), [(33, 3), (1030,), (2, 3, 5, 5), (17, 40)]
    for dtype in DTYPES:
        params, states = make_params(shapes, dtype), [case.start(shape, dtype) for shape in shapes]
        for step, (theirs, their_states) in enumerate(expect(case, dtype, options, shapes, steps=2), 1):
            grads = make_grads(shapes, dtype, step, options)[0][1]
            lists = {s: [state[s] for state in states] for s in case.states}
            case.function(params, grads, **lists, step=step, **{**settings_of(case), **options})
            for i, q in enumerate(theirs):
                assert_same_bits(params[i], q, f"parameter {i} at step {step}")
                for s in case.states:
                    assert_same_bits(states[i][s], their_states[i][s], f"{s} {i} at step {step}")
            assert not options.get("zero_grad") or not any(g.any() for g in grads)


@pytest.mark.parametrize("name", [*STAGES, *MANY])
def test_large_arrays_on_any_number_of_threads(name: str) -> None:
    options = STAGES.get(name) or MANY[name]
    for dtype in DTYPES:
        case = case_of("adamw" if dtype == np.float32 else "sgd_nesterov")
        expected = expect(case, dtype, options, LARGE, steps=2)
        for i, isa in enumerate(config.isas()):
            config.set_isa(isa)
            for threads in (1, 2, 3, 7) if i == len(config.isas()) - 1 else (3,):
                config.set_num_threads(threads)
                check(expected, case, dtype, options, LARGE, what=f"{isa}, {threads} threads")


@pytest.mark.parametrize("name", ["every stage by row", "centralize", "agc", "every norm"])
def test_short_rows(name: str) -> None:
    """Several go through the passes together: more of them than fit a tile, a block of sums, a chunk of a thread."""
    options, case, shapes = (MANY.get(name) or STAGES[name]), case_of("adamw"), [(70_001, 1), (30_001, 3), (4001, 9), (97, 600)]
    expected = expect(case, np.float32, options, shapes, steps=1)
    for isa in config.isas():
        config.set_isa(isa)
        for threads in (1, 3):
            config.set_num_threads(threads)
            check(expected, case, np.float32, options, shapes, what=f"{isa}, {threads} threads")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "only the parameter"])
@pytest.mark.parametrize(
    "name", ["every stage without norms", "every stage by row", "every norm", "every gradient stage", "zero_grad"]
)
def test_layouts(name: str, layout: str, shared: bool, isa: str) -> None:
    case, options, shapes, place = case_of("adamw"), MANY.get(name) or STAGES[name], [(5, 67, 71), (150, 131)], LAYOUTS[layout]
    expected = expect(case, np.float32, options, shapes, steps=2, place=place)
    check(expected, case, np.float32, options, shapes, place=place, place_grads=place if shared else None)


@pytest.mark.parametrize("stage", ["clip_norm", "trust_ratio", "agc", "group_lasso"])
def test_a_nan_spreads_as_far_as_norms_do(stage: str, isa: str) -> None:
    """A NaN in one gradient, an infinity in another: the factors follow from the formulas."""

    def same(ours: Any, theirs: Any, what: str) -> None:
        assert np.array_equal(np.isnan(ours), np.isnan(theirs)), what
        assert_same_bits(np.nan_to_num(ours, nan=7.0), np.nan_to_num(theirs, nan=7.0), what)

    shapes, case = [(6, 40), (4, 33), (70,)], case_of("sgd_nesterov")
    for bad in ([(0, np.nan)], [(1, np.inf)], [(1, -np.inf), (2, np.nan)]):
        params, grads = make_params(shapes, np.float64), make_grads(shapes, np.float64, 1, {})[0][1]
        for i, value in bad:
            grads[i].flat[40] = value
        of_constructor, scale, _ = step_arguments(STAGES[stage])
        overall = {name: of_constructor.pop(name) for name in ("clip_norm",) if name in of_constructor}
        reference = Stepper(case.reference, case.start, params, {**settings_of(case), **of_constructor}, **overall)
        reference.step([(1.0, grads)], scale)
        make_optimizer(case, params, STAGES[stage]).step(grads)
        for i, (p, q) in enumerate(zip(params, reference.params, strict=True)):
            same(p, q, f"parameter {i}, {bad}")


def test_groups_have_stages_of_their_own(isa: str) -> None:
    case, shapes = case_of("adamw"), [(6, 40), (33,), (5, 7), (9, 11)]
    own: list[dict[str, Any]] = [
        {"centralize": True, "ema_decay": 0.9, "l1": 20.0, "clip_norm_per_tensor": 3.0},
        {"weight_decay": 0.0, "clip_value": 0.5, "swa": (0, 1), "agc": 2.0},
        {"lookahead": (2, 0.5), "bounds": (0, None), "decay_mode": "coupled", "trust_ratio": True, "lr": 0.02},
    ]
    common = {"l2": 5.0, "max_norm": 2.0}
    of_params = [own[0], own[0], own[1], own[2]]
    params = make_params(shapes, np.float32)
    reference = Stepper(
        case.reference,
        case.start,
        params,
        [{**settings_of(case), **common, **o} for o in of_params],
        clip_norm=2.0,
        zero_grad=True,
    )
    groups = [{"params": params[:2], **own[0]}, {"params": params[2:3], **own[1]}, {"params": params[3:], **own[2]}]
    opt = make_optimizer(case, groups, {**common, "clip_norm": 2.0, "zero_grad": True})
    for step in (1, 2, 3):
        grads, theirs = (make_grads(shapes, np.float32, step, {})[0][1] for _ in range(2))
        opt.step(grads)
        reference.step([(1.0, theirs)])
        assert not any(g.any() for g in grads)
        for i, q in enumerate(reference.params):
            assert_same_bits(params[i], q, f"parameter {i} at step {step}")
            assert opt.state[i].keys() == reference.state[i].keys()
            for name in reference.state[i].keys() - {"step", "ema_count", "swa_count"}:
                assert_same_bits(opt.state[i][name], np.asarray(reference.state[i][name]), f"{name} {i} at step {step}")


def test_options_edited_between_steps(isa: str) -> None:
    case, shapes = case_of("lion"), [(6, 40), (33,)]
    params = make_params(shapes, np.float32)
    reference = Stepper(case.reference, case.start, params, settings_of(case))
    opt = make_optimizer(case, params, {})
    edits: list[tuple[float | None, str, dict[str, Any]]] = [
        (None, "propagate", {"clip_value": 0.5}),
        (1.5, "zero", {"clip_value": None, "ema_decay": 0.9, "lookahead": (2, 0.5)}),
        (None, "skip", {"l1": 20.0, "agc": 1.0, "weight_decay": 0.3}),
        (0.5, "propagate", {"l1": None, "agc": None, "decay_mode": "independent", "ema_decay": 0.5}),
    ]
    options = settings_of(case)
    for step, (clip_norm, on_nonfinite, edit) in enumerate(edits, 1):
        opt.clip_norm = reference.clip_norm = clip_norm
        opt.on_nonfinite = reference.on_nonfinite = on_nonfinite
        opt.param_groups[0].update(edit)
        options = {**options, **edit}
        reference.options = [options] * 2
        grads = make_grads(shapes, np.float32, step, {})[0][1]
        if on_nonfinite == "zero":
            grads[0].flat[3] = np.inf
        opt.step(grads)
        reference.step([(1.0, grads)])
        for i, q in enumerate(reference.params):
            assert_same_bits(params[i], q, f"parameter {i} at step {step}")
        for i, state in reference.state.items():
            assert opt.state[i].keys() == state.keys()


def test_learning_rates_that_are_callables_reach_all_stages(isa: str) -> None:
    case, shapes = case_of("sgd_nesterov"), [(6, 40), (33,)]
    options = {"l1": 30.0, "l2": 7.0, "group_lasso": 9.0, "trust_ratio": True, "decay_mode": "decoupled"}
    params = make_params(shapes, np.float32)
    reference = Stepper(case.reference, case.start, params, {**settings_of(case), **options})
    opt = make_optimizer(case, params, {**options, "lr": lambda step: 0.01 / (1 + step)})
    for step in range(3):
        grads = make_grads(shapes, np.float32, step + 1, {})[0][1]
        opt.step(grads)
        reference.options = [{**settings_of(case), **options, "lr": 0.01 / (1 + step)}] * 2
        reference.step([(1.0, grads)])
        for i, q in enumerate(reference.params):
            assert_same_bits(params[i], q, f"parameter {i} at step {step + 1}")


def test_forms_of_sources() -> None:
    """Gradients of every source come in the parameters' form; one source is its gradient times its weight."""
    results = []
    weights = (0.5, 0.25)
    for form in ("array", "list", "dict", "groups"):
        p = make_params([(40,)], np.float64)[0]
        grads = [make_grads([(40,)], np.float64, k, {})[0][1][0] for k in (1, 2)]
        params: Any = {"array": p, "list": [p], "dict": {"w": p}, "groups": [{"params": [p]}]}[form]
        formed = [{"array": g, "list": [g], "dict": {"w": g}, "groups": [[g]]}[form] for g in grads]
        gradstep.SGD(params, lr=0.1).step(list(zip(weights, formed, strict=True)))
        expected = make_params([(40,)], np.float64)[0] - 0.1 * (0.5 * grads[0] + 0.25 * grads[1])
        assert_same_bits(p, expected, form)
        results.append(p)
    p, q = (make_params([(40,)], np.float32)[0] for _ in range(2))
    g = make_grads([(40,)], np.float32, 1, {})[0][1][0]
    gradstep.SGD([p], lr=0.1).step([(0.3, [g])], grad_scale=0.7)
    gradstep.SGD([q], lr=0.1).step([g], grad_scale=0.3 * 0.7)
    assert_same_bits(p, q, "one source")
