"""Floating-point formats: every number of 16 bits, every rule on every triple of formats."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

import gradstep
from gradstep import config
from gradstep.formats import convert_

from .cases import CASES, NORM_CASES, Case, gradients, parameters
from .format_cases import LARGE, RULES, Run, assert_same, everywhere, formats_of, make_params, make_reference, rules, short
from .format_references import FLOATS, bfloat16, rounded
from .stage_cases import case_of, make_optimizer
from .stage_references import Stepper
from .test_layouts import LAYOUTS

RUNS_ON_GPU = True

TRIPLES = list(itertools.product(FLOATS, FLOATS, FLOATS))


def every_number(fmt: str) -> Any:
    return np.arange(65_536, dtype=np.uint16).view(FLOATS[fmt])


@short
@pytest.mark.parametrize("wide", ["float32", "float64"])
@pytest.mark.on_the_host
def test_every_number_is_decoded_exactly(fmt: str, wide: str, isa: str) -> None:
    for denormals in ("flush", "keep") if fmt == "float16" else ("keep",):
        config.denormals = denormals
        target = np.full(65_536, 7, FLOATS[wide])
        convert_(target, every_number(fmt))
        assert_same(target, rounded(every_number(fmt), FLOATS[wide]), denormals)


@short
@pytest.mark.parametrize("wide", ["float32", "float64"])
@pytest.mark.on_the_host
def test_every_number_and_all_between_are_encoded(fmt: str, wide: str, isa: str) -> None:
    """Numbers of 16 bits, the middles between neighbours, and what lies next to both."""
    numbers = rounded(every_number(fmt), np.float64)
    finite = np.sort(numbers[np.isfinite(numbers)])
    first_beyond = 2.0**16 if fmt == "float16" else 2.0**128
    ends = np.concatenate([[-first_beyond], finite, [first_beyond]])
    middles = (ends[1:] + ends[:-1]) / 2
    points = np.concatenate([numbers, middles, [first_beyond, -first_beyond]])
    points = rounded(points, FLOATS[wide])
    t = points.dtype.type
    with np.errstate(invalid="ignore"):
        beside = [np.nextafter(points, t(-np.inf)), np.nextafter(points, t(np.inf))]
        if wide == "float64":  # would be ties once rounded to float32
            beside += [points * (1 - 2.0**-30), points * (1 + 2.0**-30)]
    points = np.concatenate([points, *beside, [t(np.finfo(t).max), t(np.finfo(t).min), t(0), t(-0.0)]])
    for denormals in ("flush", "keep") if fmt == "float16" else ("keep",):
        config.denormals = denormals
        source = points if denormals == "keep" else np.where(np.abs(points) < np.float64(2.0**-126), t(0), points)
        target = np.full(points.shape, 7, FLOATS[fmt])
        convert_(target, source)
        assert_same(target, rounded(source, FLOATS[fmt]), denormals)
    assert np.isinf(target).sum() > 8
    assert np.isnan(target).sum() > 100


@pytest.mark.on_the_host
def test_ties_go_to_even_and_what_is_too_large_to_infinity(isa: str) -> None:
    """The same in numbers that one can check by hand."""
    by_hand = {
        "bfloat16": [
            (1 + 2**-8, 1.0),
            (1 + 3 * 2**-8, 1 + 2**-6),
            (1 + 2**-8 + 2**-40, 1 + 2**-7),
            (3.3895313892515355e38, np.float64(2.0**128 - 2.0**120)),
            (2.0**128 - 2.0**119, np.inf),
            (1e300, np.inf),
        ],
        "float16": [
            (1 + 2**-11, 1.0),
            (1 + 3 * 2**-11, 1 + 2**-9),
            (1 + 2**-11 + 2**-40, 1 + 2**-10),
            (2**-25, 0.0),
            (2**-25 + 2**-60, 2**-24),
            (3 * 2**-25, 2**-23),
            (65_519.999, 65_504.0),
            (65_520.0, np.inf),
            (1e300, np.inf),
        ],
    }
    for fmt, pairs in by_hand.items():
        source = np.array([x for x, _ in pairs])
        target = np.zeros(len(pairs), FLOATS[fmt])
        for sign in (1, -1):
            convert_(target, sign * source)
            assert (sign * target.astype(np.float64)).tolist() == [float(y) for _, y in pairs], fmt


@pytest.mark.parametrize("source", FLOATS)
@pytest.mark.parametrize("target", FLOATS)
@pytest.mark.on_the_host
def test_conversion_of_any_layout(source: str, target: str, isa: str) -> None:
    for size in (*range(68), 1025, 40_003):
        x = gradients((size,), FLOATS[source], size)
        y = np.zeros(size, FLOATS[target])
        convert_(y, x)
        assert_same(y, rounded(x, FLOATS[target]), f"{size}")
    x = gradients((5, 67, 71), FLOATS[source], 1)
    for a, b in itertools.product(LAYOUTS, LAYOUTS):
        y = LAYOUTS[b](np.zeros_like(x, FLOATS[target], order="C"))
        convert_(y, LAYOUTS[a](x))
        assert_same(y, rounded(x, FLOATS[target]), f"{a} to {b}")
    y = np.zeros((), FLOATS[target])
    convert_(y, np.array(-1.25, FLOATS[source]))
    assert y.astype(np.float64) == -1.25


def tame(g: Any, limit: float) -> Any:
    """Zeros in the place of what is beyond 1 / limit and limit."""
    a = np.abs(rounded(g, np.float64))
    return np.where((a >= 1 / limit) & (a <= limit), g, g.dtype.type(0))


@short
@pytest.mark.parametrize("case", [*CASES, *NORM_CASES], ids=lambda case: case.name)
def test_one_step_on_every_gradient(case: Case, fmt: str) -> None:
    """Half a unit in the last place of 16 bits away from the exact step, and a few of float32."""
    g = every_number(fmt)
    if case in NORM_CASES or fmt == "bfloat16":
        g = tame(g, 1e15)
    own = {**case.settings, "lr": 1.0} if "novograd" in case.name else case.settings  # whose steps are short
    ours_of: dict[str, Any] = {}
    for param in (fmt, "float32"):
        # With the sign of the gradient, so that coupled decay cancels nothing.
        sign = -1 if case.settings.get("maximize") else 1
        p = np.random.default_rng(3).uniform(0.5, 2, g.shape) * np.where(np.signbit(g), -1, 1) * sign
        p = p.astype(FLOATS[param])
        exact = Stepper(case.reference, case.start, [p.astype(np.longdouble)], own)
        with np.errstate(all="ignore"):
            exact.step([(1.0, [rounded(g, np.longdouble)])])
        for isa in config.isas():
            config.set_isa(isa)
            q = p.copy()
            opt = make_optimizer(case, [q], own)
            opt.step([g])
            assert_same(q, ours_of.setdefault(param, q), isa)
        finite = np.isfinite(rounded(g, np.float64))
        moved, size = exact.params[0][finite], (np.abs(p) + np.abs(p - exact.params[0])).astype(np.float64)[finite]
        assert np.array_equal(np.isnan(q), np.isnan(exact.params[0]))
        assert np.abs(moved - p[finite]).max() > 1e-3
        ulp = np.float64(0) if param == "float32" else spacing(moved, fmt)
        error = np.abs(q[finite].astype(np.longdouble) - moved).astype(np.float64)
        assert (error <= ulp / 2 + 4 * 2.0**-24 * size).all(), f"{param}: {error.max()}"
        for name in case.states:
            theirs = exact.state[0][name][finite]
            error = np.abs(opt.state[0][name][finite] - theirs)
            assert (error <= 6 * 2.0**-24 * np.abs(theirs) + 1e-37).all(), name


def spacing(x: Any, fmt: str) -> Any:
    """The distance of neighbours of 16 bits at each x, the farther one at powers of two."""
    _, exponent = np.frexp(x.astype(np.float64))
    return np.ldexp(1.0, exponent - (10 if fmt == "float16" else 7))


@short
@rules
def test_one_step_on_every_gradient_has_the_bits_of_the_reference(case: Case, fmt: str) -> None:
    """NaN, infinities, subnormal numbers and what overflows in between as well."""
    config.denormals = "keep"
    g, p = every_number(fmt), parameters((65_536,), FLOATS[fmt])
    if case not in CASES:
        g = tame(g, 1e15)
    for states in ("float32", fmt):
        reference = make_reference(case, [p], {"state_dtype": states}, {})
        with np.errstate(all="ignore"):
            reference.step([(1.0, [g])])
        for isa in config.isas():
            config.set_isa(isa)
            q = p.copy()
            opt = make_optimizer(case, [q], {"state_dtype": states})
            opt.step([g])
            assert_same(q, reference.params[0], f"parameter, {isa}, states {states}")
            for name in case.states:
                assert_same(opt.state[0][name], reference.state[0][name], f"{name}, {isa}, states {states}")


def test_subnormal_numbers_of_float16_count_while_denormals_are_flushed(isa: str) -> None:
    config.denormals = "flush"
    case = case_of("sgd_momentum")
    g = np.arange(1, 1024, dtype=np.uint16).view(np.float16)
    for formats in ({}, {"state_dtype": "float16"}):
        p = np.zeros(g.shape, np.float32)
        reference = make_reference(case, [p], formats, {})
        opt = make_optimizer(case, [p], formats)
        for _ in range(2):
            opt.step([g])
            reference.step([(1.0, [g])])
        assert_same(p, reference.params[0], "parameter")
        assert_same(opt.state[0]["momentum_buffer"], reference.state[0]["momentum_buffer"], "momentum_buffer")
        assert (p != 0).all()


@pytest.mark.on_the_host
def test_subnormal_numbers_of_bfloat16_are_those_of_float32(isa: str) -> None:
    """Nothing while denormals are flushed, themselves while they are kept."""
    g = np.arange(1, 128, dtype=np.uint16).view(bfloat16)
    for denormals in ("flush", "keep"):
        config.denormals = denormals
        for dtype in (bfloat16, np.float32):
            p = np.zeros(g.shape, dtype)
            gradstep.SGD([p], lr=1.0).step([g])
            assert_same(p + dtype(0), (-g if denormals == "keep" else np.zeros_like(g)).astype(dtype), denormals)


@rules
def test_every_triple_of_formats(case: Case) -> None:
    for param, grad, state in TRIPLES if case.states else [(p, g, None) for p in FLOATS for g in FLOATS]:
        run = Run(case, param, grad, {"state_dtype": state} if state else {})
        for isa in config.isas():
            config.set_isa(isa)
            run.check(isa)


@rules
def test_large_arrays_on_any_number_of_threads(case: Case) -> None:
    some = [("bfloat16", "bfloat16", None), ("float16", "float32", "bfloat16"), ("float64", "bfloat16", "float16")]
    for param, grad, state in some[RULES.index(case) % 2 :: 2]:
        run = Run(case, param, grad, {"state_dtype": state} if state and case.states else {}, shapes=LARGE)
        for where in everywhere():
            run.check(where)


@pytest.mark.parametrize("param", FLOATS)
@pytest.mark.parametrize("grad", FLOATS)
def test_new_states_have_float32_or_the_parameters_float64(param: str, grad: str) -> None:
    p = parameters((9,), FLOATS[param])
    opt = make_optimizer(case_of("adamw"), [p], {"ema_decay": 0.9})
    opt.step([gradients((9,), FLOATS[grad], 1)])
    expected = np.float64 if param == "float64" else np.float32
    assert [opt.state[0][name].dtype for name in ("exp_avg", "exp_avg_sq", "ema")] == [expected] * 3
    assert p.dtype == FLOATS[param]


NAMED: list[dict[str, Any]] = [
    {"exp_avg": "bfloat16"},
    {"exp_avg_sq": "float16", "max_exp_avg_sq": "bfloat16"},
    {"exp_avg": "float64"},
    {"exp_avg": "float16", "exp_avg_sq": "float32", "max_exp_avg_sq": "bfloat16", "ema": "float16", "slow": "bfloat16"},
    {"ema": "float64", "swa": "bfloat16"},
    {"swa": "float16", "slow": "float64"},
]


@pytest.mark.parametrize("named", NAMED, ids="-".join)
@pytest.mark.parametrize("param", FLOATS)
def test_states_by_name(named: dict[str, Any], param: str) -> None:
    options = {"lookahead": (2, 0.4), "ema_decay": 0.9, "swa": (1, 2)}
    run = Run(case_of("adam_amsgrad"), param, "bfloat16", {"state_dtype": named}, options, steps=4)
    for isa in config.isas():
        config.set_isa(isa)
        run.check(isa)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_states_that_are_there_stay_what_they_are(rounding: str, isa: str) -> None:
    """Formats edited between steps are those of states that are made later."""
    p = [parameters((77,), bfloat16), parameters((31, 3), np.float32)]
    formats = formats_of(state_dtype="bfloat16", state_rounding=rounding)
    case = case_of("adamw")
    reference, opt = make_reference(case, p, formats, {}), make_optimizer(case, p, formats)
    for step in (1, 2, 3):
        grads = [gradients((77,), bfloat16, step), gradients((31, 3), np.float32, step) if step > 1 else None]
        if step == 2:
            opt.param_groups[0]["state_dtype"] = "float16"
            reference.formats = [{**formats, "state_dtype": "float16"}] * 2
        opt.step(grads)
        reference.step([(1.0, grads)])
    for i in (0, 1):
        assert_same(p[i], reference.params[i], f"parameter {i}")
        for name in case.states:
            assert_same(opt.state[i][name], reference.state[i][name], f"{name} of {i}")
    assert [opt.state[i]["exp_avg"].dtype for i in (0, 1)] == [bfloat16, np.float16]


def test_groups_have_formats_of_their_own(isa: str) -> None:
    case = case_of("adamw")
    own: list[dict[str, Any]] = [
        {"state_dtype": "bfloat16", "precision": "kahan"},
        {"state_dtype": {"exp_avg_sq": "float16"}, "state_rounding": "stochastic", "seed": 9},
        {"precision": "split"},
    ]
    params = make_params([(45,), (7, 9), (1030,)], "bfloat16")
    reference = make_reference(case, params, own, {})
    opt = make_optimizer(case, [{"params": [p], **o} for p, o in zip(params, own, strict=True)], {})
    for step in (1, 2, 3):
        grads = [gradients(p.shape, np.float16, 10 * step + i) for i, p in enumerate(params)]
        opt.step([[g] for g in grads])
        reference.step([(1.0, grads)])
    for i, q in enumerate(reference.params):
        assert_same(params[i], q, f"parameter {i}")
        assert opt.state[i].keys() == reference.state[i].keys()
        for name in reference.state[i].keys() - {"step"}:
            assert_same(opt.state[i][name], reference.state[i][name], f"{name} of {i}")


def test_second_moments_in_float16_are_not_zero(isa: str) -> None:
    p = np.ones(5000, np.float32)
    opt = gradstep.AdamW([p], lr=1e-3, state_dtype="float16", weight_decay=0)
    for step in range(60):
        opt.step([np.full(5000, 1e-4 if step < 50 else 0, np.float32)])
    assert (opt.state[0]["exp_avg_sq"] > 0).all()
    assert (abs(1 - p) < 0.07).all()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"state_dtype": "bfloat16", "ema_decay": 0.9},
        {"state_dtype": "q8", "precision": "split"},
        {"state_dtype": "q4", "precision": "master"},
        {"state_dtype": {"exp_avg": "q8", "exp_avg_sq": "float16"}, "precision": "kahan", "lookahead": (2, 0.5)},
    ],
    ids=repr,
)
@pytest.mark.parametrize("param", ["bfloat16", "float32"])
def test_state_dicts_carry_every_format(options: dict[str, Any], param: str) -> None:
    def make() -> tuple[Any, Any]:
        params = {"w": parameters((5003,), FLOATS[param]), "b": parameters((7,), FLOATS[param], 1)}
        return params, gradstep.AdamW(params, lr=0.1, **options)

    def step(opt: Any, i: int) -> None:
        opt.step({"w": gradients((5003,), FLOATS[param], i), "b": gradients((7,), FLOATS[param], 10 + i)})

    params, opt = make()
    for i in (1, 2, 3):
        step(opt, i)
    others, other = make()
    for name, q in others.items():
        q[...] = params[name]
    other.load_state_dict(opt.state_dict())
    for i in (4, 5):
        step(opt, i)
        step(other, i)
    for name, q in others.items():
        assert_same(q, params[name], name)
        for key, value in opt.state[name].items():
            assert_same(np.asarray(other.state[name][key]), np.asarray(value), f"{name} {key}")
