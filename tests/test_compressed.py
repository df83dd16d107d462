"""States of 8 and 4 bits: the codes of the reference, their errors, and steps between them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import gradstep
from gradstep import config
from gradstep.formats import dequantize, quantize

from .cases import gradients, parameters
from .format_cases import RULES, Run, assert_same, everywhere, formats_of, make_reference
from .format_references import FLOATS, UNSIGNED, bfloat16, code_of, decoded, encoded
from .stage_cases import MANY, STAGES, case_of, make_optimizer
from .test_layouts import LAYOUTS
from .test_statistics import assert_stats, expected_of

RUNS_ON_GPU = True

CODES = [("q8", False), ("q8", True), ("q4", False), ("q4", True)]
codes = pytest.mark.parametrize(("fmt", "unsigned"), CODES, ids=["q8 signed", "q8 unsigned", "q4 signed", "q4 unsigned"])
SIZES = [*range(35), 63, 64, 65, 127, 128, 129, 255, 256, 257, 383, 511, 513, 1000, 4096, 4097, 40_003]
STATE_SHAPES = [(4097,), (33, 3), (64, 65), (3, 1365), (4095,), (9001,)]  # the second and the fifth are too small


def check_codes(x: Any, fmt: str, unsigned: bool, what: str) -> Any:
    """Quantize and dequantize as the reference does; returns the decoded numbers."""
    ours, scale = quantize(x, fmt, unsigned=unsigned)
    theirs, their_scale = encoded(x, fmt, unsigned)
    assert_same(scale, their_scale, f"scales of {what}")
    assert_same(ours, theirs, f"codes of {what}")
    y = dequantize(ours, scale, x.shape, fmt, unsigned=unsigned)
    assert_same(y, decoded(theirs, their_scale, x.shape, fmt, unsigned), f"numbers of {what}")
    return y


def wide_range(size: int, unsigned: bool, seed: int, low: float = -12, high: float = 0) -> Any:
    rng = np.random.default_rng(seed)
    x = 10.0 ** rng.uniform(low, high, size) * (1 if unsigned else rng.choice([-1, 1], size))
    return np.where(rng.random(size) < 0.03, 0, x).astype(np.float32)


# ---- codes --------------------------------------------------------------------------------------------------------------------


@codes
@pytest.mark.on_the_host
def test_codes_of_every_size(fmt: str, unsigned: bool, isa: str) -> None:
    for size in SIZES[2 if fmt == "q4" else 1 :]:
        x = gradients((size,), np.float32, size)
        check_codes(np.abs(x) if unsigned else x, fmt, unsigned, f"{size}")
        check_codes(wide_range(size, unsigned, size), fmt, unsigned, f"{size}, 12 decades")


@codes
@pytest.mark.on_the_host
def test_every_code_comes_back(fmt: str, unsigned: bool, isa: str) -> None:
    c = code_of(fmt, unsigned)
    for scale in (1.0, 0.7, 1e-20, 3e38):
        values = c.F if unsigned else np.concatenate([c.F, -c.F[1:]])
        x = values[::-1] * np.float32(scale)
        y = check_codes(x, fmt, unsigned, f"all codes times {scale}")
        assert_same(y, x, f"all codes times {scale}")
    assert c.F.size == 2 ** (c.bits - (not unsigned))


@codes
@pytest.mark.on_the_host
def test_ties_and_what_lies_beside_them(fmt: str, unsigned: bool, isa: str) -> None:
    c = code_of(fmt, unsigned)
    middles = (c.F[1:] + c.F[:-1]) / 2  # exact in float32
    points = np.concatenate([middles, np.nextafter(middles, np.float32(0)), np.nextafter(middles, np.float32(1))])
    step = c.block - 1
    for start in range(0, points.size, step):
        for sign in (1,) if unsigned else (1, -1):
            x = np.append(sign * points[start : start + step], np.float32(1))
            check_codes(x, fmt, unsigned, f"points from {start}")


@codes
@pytest.mark.on_the_host
def test_errors_over_twelve_decades(fmt: str, unsigned: bool, isa: str) -> None:
    c, size = code_of(fmt, unsigned), 40_003
    for spread in (12, 1):
        for decade in range(-12, 1):
            x = wide_range(size, unsigned, decade + 20, decade - spread, decade)
            y = check_codes(x, fmt, unsigned, f"from 10^{decade - spread} to 10^{decade}")
            scale = np.repeat(encoded(x, fmt, unsigned)[1], c.block)[:size].astype(np.float64)
            error, a = np.abs(y.astype(np.float64) - x), np.abs(x.astype(np.float64))
            bound = np.where(a >= c.F[1] * scale, a / (16 if fmt == "q8" else 4), c.F[1] * scale)
            assert (error <= bound * (1 + 1e-6)).all(), f"from 10^{decade - spread}"
            assert (np.sign(y) * np.sign(x) >= 0).all()
            assert not unsigned or ((y > 0) == (x > 0)).all(), "a second moment was rounded to zero"
            assert (a[y == 0] <= c.F[1] * scale[y == 0]).all()


@codes
@pytest.mark.on_the_host
def test_a_blocks_largest_element_is_exact(fmt: str, unsigned: bool, isa: str) -> None:
    c = code_of(fmt, unsigned)
    x = np.abs(gradients((10 * c.block + 5,), np.float32, 3)) * (1 if unsigned else -1)
    y = check_codes(x, fmt, unsigned, "numbers")
    for start in range(0, x.size, c.block):
        at = start + np.argmax(np.abs(x[start : start + c.block]))
        assert x[at] == y[at]


@codes
@pytest.mark.on_the_host
def test_blocks_of_zeros(fmt: str, unsigned: bool, isa: str) -> None:
    block = code_of(fmt, unsigned).block
    x = np.zeros(5 * block + 3, np.float32)
    ours, scale = quantize(x, fmt, unsigned=unsigned)
    assert not ours.any()
    assert not scale.any()
    x[2 * block + 7] = 0.3
    x[5 * block + 2] = 5
    y = check_codes(x, fmt, unsigned, "two numbers")
    assert_same(y, x, "two numbers")


@codes
@pytest.mark.parametrize("scale", [3.4e38, 2.0**127, 2.0**125, 2.0**125 * (1 - 2.0**-24), 1e30, 1e-30, 2.0**-110, 2.0**-126])
@pytest.mark.on_the_host
def test_scales_of_any_size(fmt: str, unsigned: bool, scale: float, isa: str) -> None:
    """From the least normal number to the largest."""
    block = code_of(fmt, unsigned).block
    for smallest in (2.0**-4, 2.0**-20, 2.0**-60):
        x = 2.0 ** np.random.default_rng(8).uniform(np.log2(smallest), 0, 3 * block + 1) * (1 if unsigned else -1)
        x[:: block // 2] = 1
        x = (x * scale).astype(np.float32)
        x = np.where(np.abs(x) < np.float32(2.0**-126), np.float32(0), x)
        expected = decoded(*encoded(x, fmt, unsigned), x.shape, fmt, unsigned)
        ours, theirs = quantize(x, fmt, unsigned=unsigned), encoded(x, fmt, unsigned)
        assert_same(ours[1], theirs[1], "scales")
        assert_same(ours[0], theirs[0], "codes")
        y = dequantize(*ours, x.shape, fmt, unsigned=unsigned)
        normal = np.abs(expected) >= np.float32(2.0**-126)
        assert_same(y[normal], expected[normal], "numbers")
        assert (np.abs(y[~normal]) < np.float32(2.0**-126)).all()


@codes
@pytest.mark.on_the_host
def test_scales_under_the_least_normal_number_count_as_zero(fmt: str, unsigned: bool, isa: str) -> None:
    for denormals in ("flush", "keep"):
        config.denormals = denormals
        ours, scale = quantize(np.full(300, 2.0**-127, np.float32), fmt, unsigned=unsigned)
        assert not ours.any()
        assert not scale.any()


@codes
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf], ids=str)
@pytest.mark.on_the_host
def test_blocks_with_what_is_not_finite(fmt: str, unsigned: bool, bad: float, isa: str) -> None:
    """All of the block is NaN, and no other."""
    block = code_of(fmt, unsigned).block
    bad = abs(bad) if unsigned else bad
    for at in (0, 1, 17, block - 1, 3 * block, 3 * block + 4):
        x = np.abs(gradients((3 * block + 5,), np.float32, 3)) * (1 if unsigned else -1)
        clean = dequantize(*quantize(x, fmt, unsigned=unsigned), x.shape, fmt, unsigned=unsigned)
        x[at] = bad
        pair = quantize(x, fmt, unsigned=unsigned)
        y = dequantize(*pair, x.shape, fmt, unsigned=unsigned)
        inside = np.arange(x.size) // block == at // block
        assert np.isnan(y[inside]).all()
        assert_same(y[~inside], clean[~inside], "other blocks")
        assert np.isfinite(pair[1]).tolist() == [b != at // block for b in range(4)]


@pytest.mark.on_the_host
def test_arrays_of_any_layout_are_read_in_the_order_of_c(isa: str) -> None:
    x = gradients((5, 67, 71), np.float32, 3)
    for name, place in LAYOUTS.items():
        for fmt, unsigned in (("q8", False), ("q4", False)):
            ours, scale = quantize(place(x), fmt, unsigned=unsigned)
            theirs, their_scale = encoded(x, fmt, unsigned)
            assert_same(ours, theirs, f"codes, {name}")
            assert_same(scale, their_scale, f"scales, {name}")
            y = dequantize(ours, scale, x.shape, fmt, unsigned=unsigned)
            assert_same(y, decoded(theirs, their_scale, x.shape, fmt, unsigned), name)


# ---- steps --------------------------------------------------------------------------------------------------------------------

PARAMS = [*FLOATS]
WITH_MOMENTS = [case for case in RULES if case.states and not case.settings.get("centered")]


@pytest.mark.parametrize("case", WITH_MOMENTS, ids=lambda case: case.name)
@pytest.mark.parametrize("fmt", ["q8", "q4"])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_same_bits_as_the_reference(case: Any, fmt: str, rounding: str) -> None:
    param = PARAMS[(RULES.index(case) + (fmt == "q4")) % len(PARAMS)]
    formats = formats_of(state_dtype=fmt, state_rounding=rounding)
    run = Run(case, param, "float32", formats, shapes=STATE_SHAPES, steps=3)
    for where in everywhere((1, 7)):
        run.check(where)


@pytest.mark.parametrize("fmt", ["q8", "q4"])
@pytest.mark.parametrize("param", FLOATS)
def test_parameters_and_gradients_of_any_format(fmt: str, param: str) -> None:
    for grad in FLOATS:
        formats = {"state_dtype": fmt, "precision": "kahan"}
        run = Run(case_of("adam_amsgrad"), param, grad, formats, shapes=[(4097,), (64, 65)])
        for where in everywhere((3,)):
            run.check(where)


MIXED: list[dict[str, Any]] = [
    {"exp_avg": "q8", "exp_avg_sq": "float32"},
    {"exp_avg": "q4", "exp_avg_sq": "q8", "max_exp_avg_sq": "bfloat16", "ema": "bfloat16"},
    {"exp_avg": "bfloat16", "max_exp_avg_sq": "q4", "swa": "float16"},
    {"exp_avg": "float64", "exp_avg_sq": "q4", "max_exp_avg_sq": "q8"},
]


@pytest.mark.parametrize("named", MIXED, ids=lambda named: "-".join(named.values()))
@pytest.mark.parametrize("precision", ["stochastic", "master", "split"])
def test_states_by_name(named: dict[str, Any], precision: str) -> None:
    formats = formats_of(state_dtype=named, state_rounding="stochastic", precision=precision)
    options = {"ema_decay": 0.9, "swa": (1, 2)}
    run = Run(case_of("adam_amsgrad"), "bfloat16", "bfloat16", formats, options, [(4097,), (64, 65), (50,)], steps=4)
    for where in everywhere((1, 3)):
        run.check(where)


def test_small_tensors_keep_states_of_the_computing_type(isa: str) -> None:
    params = [parameters((size,), bfloat16, size) for size in (4095, 4096)]
    opt = make_optimizer(case_of("adamw"), params, {"state_dtype": "q8"})
    opt.step([gradients(p.shape, np.float32, 1) for p in params])
    assert opt.state[0].keys() == {"step", "exp_avg", "exp_avg_sq"}
    assert opt.state[0]["exp_avg"].dtype == np.float32
    assert opt.state[1].keys() == {"step", "exp_avg", "exp_avg_sq", "exp_avg_scale", "exp_avg_sq_scale"}
    assert (opt.state[1]["exp_avg"].dtype, opt.state[1]["exp_avg"].shape) == (np.uint8, (4096,))
    assert (opt.state[1]["exp_avg_scale"].dtype, opt.state[1]["exp_avg_scale"].shape) == (np.float32, (16,))


ROWS = ("agc", "centralize", "group_lasso", "max_norm", "every stage by row", "everything", "every parameter stage")
WITHOUT_ROWS = [
    name
    for name in (*STAGES, *MANY)
    if not {"agc", "centralize", "group_lasso", "max_norm"} & (STAGES.get(name) or MANY[name]).keys()
]


@pytest.mark.parametrize("name", WITHOUT_ROWS)
def test_stages(name: str) -> None:
    options = STAGES.get(name) or MANY[name]
    for rule, fmt, param in (("adamw", "q8", "bfloat16"), ("sgd_nesterov", "q4", "float32"), ("lamb", "q8", "float16")):
        run = Run(case_of(rule), param, param, {"state_dtype": fmt}, options, [(4097,), (64, 65), (33, 3)])
        for where in everywhere((3,)):
            run.check(where)


@pytest.mark.parametrize("name", ROWS)
def test_stages_by_row(name: str) -> None:
    """Rows of whole blocks, as they must be."""
    options = STAGES.get(name) or MANY[name]
    for rule, fmt, shapes in (
        ("adamw", "q8", [(20, 256), (9, 512), (33, 3), (5, 2, 2, 256)]),
        ("lars", "q4", [(40, 128), (13, 384), (70, 256)]),
    ):
        run = Run(case_of(rule), "bfloat16", "float32", {"state_dtype": fmt}, options, shapes)
        for where in everywhere((1, 3)):
            run.check(where)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "only the parameter"])
def test_layouts(layout: str, shared: bool) -> None:
    place, shapes = LAYOUTS[layout], [(5, 33, 31), (150, 131)]
    for fmt, options in (("q8", {}), ("q4", {"clip_norm": 20.0, "trust_ratio": True})):
        for param in ("float32", "bfloat16"):
            formats = formats_of(state_dtype=fmt, state_rounding="stochastic", precision="stochastic")
            run = Run(
                case_of("adamw"), param, param, formats, options, shapes, place=place, place_grads=place if shared else None
            )
            for where in everywhere((3,)):
                run.check(where)


def test_large_arrays_on_any_number_of_threads() -> None:
    for fmt in ("q8", "q4"):
        formats = formats_of(state_dtype=fmt, state_rounding="stochastic")
        run = Run(case_of("adamw"), "bfloat16", "bfloat16", formats, {"clip_norm": 20.0}, [(130, 1030), (300_001,)])
        for where in everywhere():
            run.check(where)


def test_statistics(isa: str) -> None:
    case, formats, shapes = case_of("adamw"), {"state_dtype": "q8"}, [(4097,), (130, 139)]
    params = [parameters(shape, bfloat16, i) for i, shape in enumerate(shapes)]
    reference = make_reference(case, params, formats, {"clip_norm": 20.0})
    opt = make_optimizer(case, params, {"clip_norm": 20.0, **formats})
    for step in (1, 2):
        grads = [gradients(shape, bfloat16, 10 * step + i) for i, shape in enumerate(shapes)]
        reference.step([(1.0, grads)])
        stats = opt.step(grads, stats=True)
        assert_stats(stats, expected_of(reference.tensors, reference.factor), f"at step {step}")


@pytest.mark.parametrize("fmt", ["q8", "q4"])
def test_a_nan_spoils_its_block_and_no_other(fmt: str, isa: str) -> None:
    p, block = parameters((4 * 1111,), np.float32), code_of(fmt, False).block
    opt = make_optimizer(case_of("sgd_momentum"), [p], {"state_dtype": fmt})
    g = gradients(p.shape, np.float32, 1)
    g[7 * block + 3] = np.nan
    opt.step([g])
    assert np.flatnonzero(np.isnan(p)).tolist() == [7 * block + 3]
    opt.step([gradients(p.shape, np.float32, 2)])
    assert np.flatnonzero(np.isnan(p)).tolist() == [*range(7 * block, 8 * block)]


@pytest.mark.parametrize("fmt", ["q8", "q4"])
def test_rounding_by_chance_is_right_on_average(fmt: str) -> None:
    """A momentum_buffer begins as the gradient: its codes are those of known numbers."""
    c, size = code_of(fmt, False), 100_000
    blocks = np.arange(size) % c.block == 0
    for x in (0.3, 0.7123, 0.011 if fmt == "q8" else 0.2):
        g = np.where(blocks, 1, x).astype(np.float32)
        opt = gradstep.SGD([np.zeros(size, np.float32)], lr=1.0, momentum=0.9, state_dtype=fmt, state_rounding="stochastic")
        opt.step([g])
        y = dequantize(opt.state[0]["momentum_buffer"], opt.state[0]["momentum_buffer_scale"], (size,), fmt)
        assert (y[blocks] == 1).all()
        near = np.unique(y[~blocks])
        above = np.searchsorted(c.F, np.float32(x))
        assert near.tolist() == [c.F[above - 1], c.F[above]]
        deviation = (near[1] - near[0]) / 2 / np.sqrt(size)
        assert abs(y[~blocks].astype(np.float64).mean() - g[1]) < 4 * deviation


@pytest.mark.parametrize("fmt", ["bfloat16", "float16", "q8", "q4"])
def test_a_second_moment_decays_by_chance(fmt: str) -> None:
    """By a thousandth a step, where to nearest it would stay."""
    size, means = 8192, {}
    for rounding in ("nearest", "stochastic"):
        p = np.zeros(size, np.float32)
        opt = gradstep.RMSprop([p], lr=0.0, alpha=0.999, **formats_of(state_dtype=fmt, state_rounding=rounding))
        opt.step([np.full(size, 20, np.float32)])
        keep_scale = np.where(np.arange(size) % 128 == 0, np.float32(0.4**0.5), np.float32(0))  # each block's largest stays
        for _ in range(300):
            opt.step([keep_scale])
        state = opt.state[0]
        v = state["square_avg"]
        if fmt in ("q8", "q4"):
            v = dequantize(v, state["square_avg_scale"], (size,), fmt, unsigned="square_avg" in UNSIGNED)
        means[rounding] = v[keep_scale == 0].astype(np.float64).mean()
    exact = 0.4 * 0.999**300
    assert means["stochastic"] == pytest.approx(exact, rel=0.03)
    assert abs(means["nearest"] - exact) > 3 * abs(means["stochastic"] - exact)


@pytest.mark.parametrize("fmt", ["q8", "q4"])
def test_fifty_steps_stay_close_to_those_of_float32(fmt: str) -> None:
    p, q = (parameters((9001,), np.float32) for _ in range(2))
    opts = [
        make_optimizer(case_of("adamw"), [array], {**formats, "lr": 1e-3})
        for array, formats in ((p, {"state_dtype": fmt}), (q, {}))
    ]
    for step in range(1, 51):
        g = gradients((9001,), np.float32, step % 7)
        for opt in opts:
            opt.step([g])
    moved = np.sqrt(np.mean(np.square(q - parameters((9001,), np.float32))))
    assert np.sqrt(np.mean(np.square(p - q))) < (0.1 if fmt == "q8" else 0.7) * moved
