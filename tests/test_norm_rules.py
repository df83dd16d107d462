"""LAMB, LARS, NovoGrad, whose factors follow from norms of whole tensors: bits of the reference."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

import gradstep
from gradstep import config

from .cases import NORM_CASES, Case, gradients, parameters
from .norm_rule_cases import DTYPES, lists_of, norm_cases, same, the_three, torch_params, torch_step
from .stage_cases import MANY, SHAPES, STAGES, case_of, check, expect, make_optimizer, make_params, settings_of
from .stage_references import Stepper
from .test_skip import digest
from .test_values import assert_same_bits

RUNS_ON_GPU = True

LARGE = [(130, 1030), (1, 20_000), (70_001,), (5470, 3)]  # several leaves, blocks and chunks
SIZES = [(size,) for size in (1, 31, 33, 1023, 1024, 1025, 16_384, 16_385)]


@norm_cases
def test_same_bits_as_numpy(case: Case, isa: str) -> None:
    for dtype, shapes in itertools.product(DTYPES, (SHAPES, SIZES)):
        check(expect(case, dtype, {}, shapes, steps=3), case, dtype, {}, shapes, same=same)


@norm_cases
def test_same_bits_on_any_number_of_threads(case: Case) -> None:
    dtype = DTYPES[NORM_CASES.index(case) % 2]
    expected = expect(case, dtype, {}, LARGE, steps=2)
    for isa, threads in [(config.isas()[0], 2), *((config.isas()[-1], threads) for threads in (1, 2, 3, 7))]:
        config.set_isa(isa)
        config.set_num_threads(threads)
        check(expected, case, dtype, {}, LARGE, what=f"{isa}, {threads} threads", same=same)


@the_three
@pytest.mark.parametrize("name", [*STAGES, *MANY])
def test_stages_around_them(case: Case, name: str) -> None:
    options = STAGES.get(name) or MANY[name]
    for dtype in DTYPES:
        expected = expect(case, dtype, options, steps=3)
        for isa in config.isas():
            config.set_isa(isa)
            check(expected, case, dtype, options, what=f"{name}, {isa}", same=same)


@pytest.mark.parametrize("name", ["lamb that does not adapt", "lamb that adapts for its decay", "lamb with decay beside"])
@pytest.mark.parametrize("decay_mode", ["coupled", "decoupled", "independent"])
def test_forms_of_lamb_with_other_decays(name: str, decay_mode: str, isa: str) -> None:
    """Apex: `always_adapt=False` and a clipped norm; Keras: the decay beside."""
    options = {"clip_norm": 1.0, "decay_mode": decay_mode}
    check(expect(case_of(name), np.float32, options), case_of(name), np.float32, options, same=same)


@norm_cases
def test_functions_give_the_bits_of_the_classes(case: Case, isa: str) -> None:
    """Each array at a step of its own, NovoGrad's numbers in both forms of an array of one number."""
    shapes = [(33, 3), (1030,), (2, 3, 5, 5), (), (17, 40)]
    for dtype in DTYPES:
        params, lists = make_params(shapes, dtype), lists_of(case, shapes, dtype)
        for name in case.numbers:
            lists[name][2:] = [np.array(7.0) for _ in shapes[2:]]
        others = make_params(shapes, dtype)
        opt = make_optimizer(case, others, {})
        counts = [0] * len(shapes)
        for step in (1, 2, 3):
            grads = [np.array(gradients(shape, dtype, 50 * step + i)) for i, shape in enumerate(shapes)]
            here = [i for i in range(len(shapes)) if i + 1 != step]  # one array sits out, another each time
            counts = [count + (i in here) for i, count in enumerate(counts)]
            states = {name: [arrays[i] for i in here] for name, arrays in lists.items()}
            steps = [counts[i] for i in here]
            case.function([params[i] for i in here], [grads[i] for i in here], **states, step=steps, **settings_of(case))
            opt.step([g if i in here else None for i, g in enumerate(grads)])
        assert len(set(counts)) == 2
        for i, (p, q) in enumerate(zip(params, others, strict=True)):
            assert_same_bits(p, q, f"parameter {i}")
            for name in (*case.states, *case.numbers):
                same(np.ravel(lists[name][i]), np.ravel(opt.state[i][name]), f"{name} {i}")


@pytest.mark.parametrize("name", ["lars", "lars_nesterov", "novograd"])
def test_what_memory_held_before_the_first_step_does_not_matter(name: str, isa: str) -> None:
    case, results = case_of(name), []
    for value in (0.0, 7.0, np.inf, np.nan):
        p, states = parameters((40,), np.float32), {name: np.zeros(40, np.float32) for name in case.states}
        states |= {"momentum_buffer": np.full(40, value, np.float32)} if "lars" in name else {"grad_norm_sq": np.full(1, value)}
        case.function(p, gradients((40,), np.float32, 1), **states, step=1, **settings_of(case))
        results.append(digest([p, states]))
    assert len(set(results)) == 1


def test_one_array_or_a_list_of_one(isa: str) -> None:
    for case in NORM_CASES:
        results = []
        for form in (lambda a: a, lambda a: [a]):
            p, states = parameters((40,), np.float32), lists_of(case, [(40,)], np.float32)
            for step in (1, 2):
                given = {name: form(arrays[0]) for name, arrays in states.items()}
                case.function(form(p), form(gradients((40,), np.float32, step)), **given, step=step, **settings_of(case))
            results.append(digest([p, states]))
        assert results[0] == results[1], case.name


@norm_cases
def test_zero_parameters_and_zero_gradients(case: Case, isa: str) -> None:
    """Where a norm is 0 a ratio is 1; later steps follow from the states."""
    for dtype, zero_param, zero_grads in itertools.product(DTYPES, (True, False), ((), (1,), (1, 2), (2,))):
        p = np.zeros((7, 30), dtype) if zero_param else parameters((7, 30), dtype)
        reference = Stepper(case.reference, case.start, [p], settings_of(case))
        opt = make_optimizer(case, [p], {})
        for step in (1, 2, 3):
            g = np.zeros((7, 30), dtype) if step in zero_grads else gradients((7, 30), dtype, step)
            opt.step([g])
            reference.step([(1.0, [g])])
            assert np.isfinite(p).all()
            assert_same_bits(p, reference.params[0], f"step {step}, zero parameter {zero_param}, zero gradients {zero_grads}")


@the_three
def test_gradients_that_are_not_finite_pass_through(case: Case, isa: str) -> None:
    """By the formulas as they stand, at this step and later ones."""

    def same_or_nan(ours: Any, theirs: Any, what: str) -> None:
        ours, theirs = np.atleast_1d(ours), np.atleast_1d(theirs)
        assert np.array_equal(np.isnan(ours), np.isnan(theirs)), what
        assert_same_bits(np.nan_to_num(ours, nan=7.0), np.nan_to_num(theirs, nan=7.0), what)

    for dtype, value in itertools.product(DTYPES, (np.nan, np.inf)):
        p = parameters((7, 30), dtype)
        reference = Stepper(case.reference, case.start, [p], settings_of(case))
        opt = make_optimizer(case, [p], {})
        for step in (1, 2, 3):
            g = gradients((7, 30), dtype, step)
            g[1, 1] = value if step == 2 else 0.5
            opt.step([g])
            reference.step([(1.0, [g])])
            same_or_nan(p, reference.params[0], f"parameter at step {step}")
            for name in (*case.states, *case.numbers):
                same_or_nan(opt.state[0][name], reference.state[0][name], f"{name} at step {step}")


def test_norms_beyond_float32(isa: str) -> None:
    """Gradients of 1e25 have squares beyond float32; neither of the rules minds their size."""
    for case in (case_of("lars"), case_of("novograd")):
        options = {**settings_of(case), "weight_decay": 0.0, "eps": 0.0}
        ps = [parameters((50,), np.float32) for _ in range(2)]
        for p, scale in zip(ps, (1.0, 2.0**80), strict=True):
            opt = getattr(gradstep, case.optimizer)([p], **options)
            for step in (1, 2):
                opt.step([gradients((50,), np.float32, step) * np.float32(scale)])
        assert np.isfinite(ps[0]).all()
        assert not np.array_equal(ps[0], parameters((50,), np.float32))
        np.testing.assert_allclose(ps[1], ps[0], rtol=1e-6)


@norm_cases
def test_torch_gives_the_bits_of_numpy(case: Case) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    import gradstep.torch

    for dtype in DTYPES:
        params = torch_params(torch, dtype)
        opt = getattr(gradstep.torch, case.optimizer)(params, **settings_of(case))
        for step, (theirs, states) in enumerate(expect(case, dtype, {}, steps=3), 1):
            torch_step(torch, opt, params, dtype, step)
            for i, q in enumerate(theirs):
                assert_same_bits(params[i].detach().numpy(), q, f"parameter {i} at step {step}")
            for i, state in states.items():
                for name in (*case.states, *case.numbers):
                    same(opt.state[params[i]][name], np.asarray(state[name]), f"{name} {i} at step {step}")
