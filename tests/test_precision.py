"""What `precision` keeps of parameters of 16 bits: bits of the reference, and what each mode is for."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

import gradstep

from .cases import gradients, parameters
from .format_cases import LARGE, SEED, SHAPES, Run, assert_same, everywhere, formats_of, make_params, make_reference, rules
from .format_references import FLOATS, bfloat16, bits_of, draws, philox, rounded
from .stage_cases import MANY, STAGES, case_of, make_optimizer
from .test_layouts import LAYOUTS

RUNS_ON_GPU = True

MODES = [
    *itertools.product(("bfloat16",), ("stochastic", "kahan", "master", "split")),
    *itertools.product(("float16",), ("stochastic", "kahan", "master")),
]
modes = pytest.mark.parametrize(("fmt", "precision"), MODES, ids=lambda value: value)

# ---- random numbers -----------------------------------------------------------------------------------------------------------


def test_the_generator_gives_its_published_numbers() -> None:
    """The known answers of Random123 for philox4x32-10."""
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)
    known = [
        ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (*pi, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ]
    for counter, key, words in known:
        assert tuple(int(word) for word in philox(counter, key)) == words


def test_draws_stand_where_the_specification_says() -> None:
    for e in (0, 1, 15, 16, 63, 64, 127, 128, 1000, 4095):
        c = 16 * (e // 128) + e % 16
        words = philox((c % 2**32, c // 2**32 + 2**24 * 4, 5, 7), (SEED % 2**32, SEED // 2**32))
        word = int(words[e // 16 % 4])
        assert draws(4096, SEED, 7, 5, 3)[e] == (word >> 16 if e // 64 % 2 else word & 0xFFFF)


# ---- bits ---------------------------------------------------------------------------------------------------------------------


@modes
@rules
def test_same_bits_as_the_reference(case: Any, fmt: str, precision: str) -> None:
    formats = formats_of(precision=precision)
    for grad in (fmt, "float64"):
        run = Run(case, fmt, grad, formats, steps=3)
        for where in everywhere((1,)):
            run.check(where)


@modes
@pytest.mark.parametrize("state", ["float64", "float16", "bfloat16"])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_with_states_of_any_format(fmt: str, precision: str, state: str, rounding: str) -> None:
    formats = formats_of(precision=precision, state_dtype=state, state_rounding=rounding)
    for rule in ("adam_amsgrad", "rmsprop_momentum_centered", "lion", "novograd"):
        run = Run(case_of(rule), fmt, "float32", formats, steps=3)
        for where in everywhere((1,)):
            run.check(where)


@pytest.mark.parametrize("state", ["float16", "bfloat16"])
def test_states_rounded_by_chance(state: str) -> None:
    """States and averages have draws of their own, of parameters of any format."""
    named = dict.fromkeys(["exp_avg", "exp_avg_sq", "max_exp_avg_sq", "slow", "ema", "swa"], state)
    stages = {"lookahead": (2, 0.4), "ema_decay": 0.9, "swa": (1, 2)}
    for param, options in itertools.product(FLOATS, ({}, stages, {"ema_decay": 0.9}, {"swa": (0, 1), "lookahead": (2, 0.3)})):
        formats = formats_of(state_dtype=named, state_rounding="stochastic")
        run = Run(case_of("adam_amsgrad"), param, "bfloat16", formats, options, steps=4)
        for where in everywhere((1,)):
            run.check(where)


@modes
def test_large_arrays_on_any_number_of_threads(fmt: str, precision: str) -> None:
    formats = formats_of(precision=precision, state_dtype="bfloat16", state_rounding="stochastic")
    for options in ({}, {"clip_norm": 20.0, "ema_decay": 0.9}):
        run = Run(case_of("adamw"), fmt, fmt, formats, options, LARGE)
        for where in everywhere():
            run.check(where)


@modes
@pytest.mark.parametrize("name", [*MANY, "lookahead", "bounds", "max_norm", "trust_ratio", "ema", "coupled"])
def test_stages_see_what_precision_keeps(fmt: str, precision: str, name: str) -> None:
    options = STAGES.get(name) or MANY[name]
    for rule in ("adamw", "lamb"):
        run = Run(case_of(rule), fmt, fmt, formats_of(precision=precision), options, steps=4)
        for where in everywhere((1,)) if rule == "adamw" else ("",):
            run.check(where)


@modes
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(fmt: str, precision: str, layout: str) -> None:
    place = LAYOUTS[layout]
    formats = formats_of(precision=precision, state_dtype="float16", state_rounding="stochastic")
    for options in ({}, {"clip_norm": 20.0}):
        run = Run(case_of("sgd_nesterov"), fmt, fmt, formats, options, [(5, 33, 31), (150, 131)], place=place)
        for where in everywhere((3,)):
            run.check(where)


@pytest.mark.parametrize("precision", ["stochastic", "kahan", "master"])
@pytest.mark.parametrize("param", ["float32", "float64"])
def test_other_parameters_are_stored_as_ever(precision: str, param: str, isa: str) -> None:
    Run(case_of("adamw"), param, param, {"precision": precision}, steps=3).check()
    params, others = make_params(SHAPES, param), make_params(SHAPES, param)
    opt, other = (make_optimizer(case_of("adamw"), p, o) for p, o in ((params, {"precision": precision}), (others, {})))
    for step in (1, 2):
        grads = [np.array(gradients(shape, np.float32, 10 * step + i)) for i, shape in enumerate(SHAPES)]
        opt.step(grads)
        other.step(grads)
    for i, (p, q) in enumerate(zip(params, others, strict=True)):
        assert_same(p, q, f"parameter {i}")
        assert opt.state[i].keys() == other.state[i].keys() == {"step", "exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize("precision", ["kahan", "master"])
def test_one_setting_serves_parameters_of_all_formats(precision: str, isa: str) -> None:
    params = [parameters((1030,), dtype, i) for i, dtype in enumerate(FLOATS.values())]
    formats = {"precision": precision}
    reference = make_reference(case_of("adamw"), params, formats, {})
    opt = make_optimizer(case_of("adamw"), params, formats)
    for step in (1, 2, 3):
        grads = [gradients((1030,), p.dtype, 10 * step + i) for i, p in enumerate(params)]
        opt.step(grads)
        reference.step([(1.0, grads)])
    extra = "compensation" if precision == "kahan" else "master"
    for i, p in enumerate(params):
        assert_same(p, reference.params[i], f"parameter {i}")
        assert (extra in opt.state[i]) == (p.dtype.itemsize == 2)
    assert [opt.state[i][extra].dtype for i in (2, 3)] == [
        *([np.float16, bfloat16] if precision == "kahan" else [np.float32] * 2)
    ]


# ---- chance -------------------------------------------------------------------------------------------------------------------


def by_chance(p: Any, g: Any, seed: int, steps: int = 1, **more: Any) -> Any:
    q = p.copy()
    opt = gradstep.SGD([q], lr=1.0, precision="stochastic", seed=seed, **more)
    for _ in range(steps):
        opt.step([g])
    return q


@pytest.mark.parametrize("fmt", ["float16", "bfloat16"])
def test_rounding_by_chance_is_right_on_average(fmt: str) -> None:
    """The bias of 100,000 draws, for weights of about 1 that each lie at a place of their own between their neighbours."""
    rng, size = np.random.default_rng(5), 100_000
    p = rounded(rng.uniform(0.75, 0.99, size), FLOATS[fmt])
    g = rng.uniform(-(2.0**-8), 2.0**-8, size).astype(np.float32)
    exact = (p.astype(np.float32) - g).astype(np.float64)
    for seed in (0, 1, SEED):
        moved = by_chance(p, g, seed).astype(np.float64)
        spacing = 2.0**-11 if fmt == "float16" else 2.0**-8
        assert np.abs(moved - exact).max() < spacing
        assert np.abs(moved - exact).max() > 0.9 * spacing
        assert abs((moved - exact).mean()) < 3e-5
    one = np.full(size, 1, FLOATS[fmt])
    for fraction in (0.1, 0.25, 0.7):
        moved = by_chance(one, np.full(size, fraction * spacing, np.float32), 7).astype(np.float64)
        assert set(np.unique(moved)) == {1 - spacing, 1.0}
        assert abs(moved.mean() - (1 - fraction * spacing)) < 3e-5
        assert abs((moved < 1).mean() - fraction) < 0.006


def test_rounding_by_chance_down_to_subnormal_numbers(isa: str) -> None:
    p = np.zeros(100_000, np.float16)
    for x in (2.0**-15 * 1.2345, 3.3 * 2.0**-24, 0.25 * 2.0**-24):
        moved = by_chance(p, np.full(p.shape, -x, np.float32), 3).astype(np.float64) / 2.0**-24
        assert set(np.unique(moved)) == {np.floor(x * 2.0**24), np.ceil(x * 2.0**24)}
        assert abs(moved.mean() - x * 2.0**24) < 0.006


def test_what_fits_stays_and_what_is_not_finite_is_stored_as_it_is(isa: str) -> None:
    for dtype in (np.float16, bfloat16):
        p = np.arange(65_536, dtype=np.uint16).view(dtype)
        a = np.abs(p.astype(np.float32))
        p = np.where((a > 0) & (a < 2.0**-126), dtype(0), p)
        assert_same(by_chance(p, np.zeros(p.shape, dtype), 3), p, str(dtype))
        p = np.zeros(300, dtype)
        g = np.resize(np.array([np.nan, np.inf, -np.inf], np.float32), 300)
        assert_same(by_chance(p, g, 3), (-g).astype(dtype), str(dtype))


def test_draws_follow_from_the_seed_alone() -> None:
    p, g = parameters((70_000,), bfloat16), gradients((70_000,), bfloat16, 1)
    results = {seed: by_chance(p, g, seed, steps=3) for seed in (0, 1, 2**32, 2**53 - 1)}
    for a, b in itertools.combinations(results.values(), 2):
        assert (bits_of(a) != bits_of(b)).mean() > 0.1
    for where in everywhere():
        for seed, result in results.items():
            assert_same(by_chance(p, g, seed, steps=3), result, where)
    assert_same(
        by_chance(p.reshape(-1, 7)[:, ::-1], g.reshape(-1, 7)[:, ::-1], 1),
        np.ascontiguousarray(
            by_chance(np.ascontiguousarray(p.reshape(-1, 7)[:, ::-1]), np.ascontiguousarray(g.reshape(-1, 7)[:, ::-1]), 1)
        ),
        "reversed",
    )


def test_parameters_of_one_optimizer_have_draws_of_their_own(isa: str) -> None:
    p = [parameters((4000,), bfloat16) for _ in range(3)]
    opt = gradstep.SGD(p, lr=1.0, precision="stochastic")
    opt.step([None, *[np.full(4000, 1e-3, np.float32)] * 2])
    before = parameters((4000,), bfloat16)
    assert_same(p[0], before, "no gradient")
    assert (bits_of(p[1]) != bits_of(p[2])).mean() > 0.05
    q = before.copy()
    opt = gradstep.SGD([before.copy(), q], lr=1.0, precision="stochastic")
    opt.step([None, np.full(4000, 1e-3, np.float32)])
    assert_same(p[1], q, "at the same position")


# ---- what the modes are for ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["nearest", "stochastic", "kahan", "master", "split"])
def test_a_weight_of_one_decays(precision: str) -> None:
    """By 1e-5 a step, of which nothing would be left of a step to nearest."""
    p, steps = np.ones(8192, bfloat16), 2000
    opt = gradstep.AdamW([p], lr=1e-3, weight_decay=1e-2, **formats_of(precision=precision))
    g = np.zeros(8192, bfloat16)
    for _ in range(steps):
        opt.step([g])
    mean, state = p.astype(np.float64).mean(), opt.state[0]
    exact = (1 - 1e-5) ** steps
    if precision == "nearest":
        assert (p == 1).all()
    elif precision == "stochastic":
        assert abs(mean - exact) < 6e-4
    elif precision == "kahan":  # 16 bits hold 1e-5 to a quarter
        held = p.astype(np.float64) + state["compensation"].astype(np.float64)
        assert 0.7 * (1 - exact) < (1 - held).mean() < 1.3 * (1 - exact)
    else:
        assert abs(mean - exact) <= 2.0**-9
        held = state["master"] if precision == "master" else joined(p, state["remainder"])
        assert np.abs(held.astype(np.float64) - exact).max() < 1e-4


def joined(p: Any, r: Any) -> Any:
    """The float32 that a parameter and its remainder hold."""
    return ((bits_of(p).astype(np.int64) << 16) + r).astype(np.uint32).view(np.float32)


def test_split_holds_what_master_holds() -> None:
    """Over 1,000 steps, every bit; the parameters differ in ties alone."""
    size, ties = 4111, 0
    for grad in ("bfloat16", "float32"):
        p, q = (parameters((size,), bfloat16) for _ in range(2))
        q_opt = make_optimizer(case_of("adamw"), [q], {"precision": "split", "lr": 1e-4})
        p_opt = make_optimizer(case_of("adamw"), [p], {"precision": "master", "lr": 1e-4})
        for step in range(1000):
            g = gradients((size,), FLOATS[grad], step % 20)
            p_opt.step([g])
            q_opt.step([g])
            master = p_opt.state[0]["master"]
            assert_same(joined(q, q_opt.state[0]["remainder"]), master, f"step {step}")
            differ = bits_of(p) != bits_of(q)
            assert (bits_of(master)[differ] & np.uint32(0xFFFF) == 0x8000).all()
            assert_same(p, rounded(master, bfloat16), f"step {step}")
            ties += np.count_nonzero(differ)
        assert np.abs(p.astype(np.float64) - parameters((size,), np.float64)).max() > 0.01
    assert ties > 0


def test_split_at_ties_and_ends(isa: str) -> None:
    x = np.array(
        [1 + 2**-8, 1 - 2**-9, -1 - 2**-8, 1 + 3 * 2**-8, 3.4e38, -3.4028235e38, np.inf, -np.inf, np.nan, 0], np.float32
    )
    x = np.tile(x, 7)
    p = np.zeros(x.shape, bfloat16)
    opt = gradstep.SGD([p], lr=1.0, precision="split")
    opt.step([-x])
    upper, rest = bits_of(p), opt.state[0]["remainder"]
    held = joined(p, rest)
    assert_same(held, x, "held")
    assert rest[:4].tolist() == [-(2**15)] * 4
    assert (upper[:4] == (bits_of(x)[:4] >> 16) + 1).all()
    assert np.isinf(p[4:8].astype(np.float32)).all()
    assert np.isnan(p[8])
    assert (rest[6:10] == 0).all()
    opt.step([np.zeros_like(x)])
    assert_same(joined(p, opt.state[0]["remainder"]), x, "held on")


@pytest.mark.parametrize("fmt", ["float16", "bfloat16"])
def test_master_goes_on_from_what_was_written_by_hand(fmt: str) -> None:
    p = parameters((1030,), FLOATS[fmt])
    for where in everywhere((1,)):
        q = p.copy()
        reference = make_reference(case_of("adamw"), [q], {"precision": "master"}, {})
        opt = make_optimizer(case_of("adamw"), [q], {"precision": "master"})
        for step in range(1, 6):
            if step == 3:
                for array in (q, reference.params[0]):
                    array[::3] = 0.5
                    array[1::3] = np.clip(array[1::3], -1, 1)
                    array[-2] = -2
            g = gradients((1030,), FLOATS[fmt], step)
            opt.step([g])
            reference.step([(1.0, [g])])
            assert_same(q, reference.params[0], f"step {step}, {where}")
            assert_same(opt.state[0]["master"], reference.state[0]["master"], f"master at step {step}, {where}")
        assert np.abs(q[::3].astype(np.float64) - 0.5).max() < 0.1


@pytest.mark.parametrize("fmt", ["float16", "bfloat16"])
def test_kahan_holds_more_bits(fmt: str) -> None:
    """Closer to the float32 parameter than the rounded one is."""
    p, exact = (parameters((4000,), FLOATS[fmt]).astype(dtype) for dtype in (FLOATS[fmt], np.float32))
    q = p.copy()
    runs = [(p, {"precision": "kahan"}), (q, {}), (exact, {})]
    opts = [make_optimizer(case_of("sgd_momentum"), [array], {**formats, "lr": 1e-3}) for array, formats in runs]
    for step in range(200):
        g = gradients((4000,), np.float32, step) / np.float32(30)
        for opt in opts:
            opt.step([g])
    held = p.astype(np.float64) + opts[0].state[0]["compensation"].astype(np.float64)
    scale = np.abs(exact.astype(np.float64)) + 1e-3
    errors = [np.sqrt(np.mean(np.square((x.astype(np.float64) - exact) / scale))) for x in (held, q)]
    assert errors[0] < errors[1] / 50


def test_averages_see_the_parameter_before_it_is_rounded(isa: str) -> None:
    p = np.ones(1030, bfloat16)
    opt = gradstep.SGD([p], lr=1e-4, ema_decay=0.5, swa=(0, 1), precision="nearest")
    opt.step([np.ones(1030, bfloat16)])
    assert (p == 1).all()
    for average in (opt.ema[0], opt.swa[0]):
        assert average.dtype == np.float32
        assert (average == np.float32(1) - np.float32(1e-4)).all()


@pytest.mark.parametrize("fmt", ["bfloat16", "float16"])
@pytest.mark.parametrize("precision", ["kahan", "master", "split"])
def test_the_step_goes_on_from_what_was_written_by_hand(fmt: str, precision: str, isa: str) -> None:
    """Masked, clamped, set: nothing that was kept beside the old number comes back."""
    if (fmt, precision) == ("float16", "split"):
        return
    p, g = parameters((2000,), FLOATS[fmt]), gradients((2000,), FLOATS[fmt], 1)
    opt = gradstep.SGD([p], lr=1e-2, precision=precision)
    opt.step([g])
    zero = np.zeros_like(g)
    np.maximum(p, 0, out=p)
    p[::7] *= 3
    p[5:9] = (np.inf, -np.inf, 0.0, -0.0)
    written = p.copy()
    opt.step([zero])
    changed = np.flatnonzero(p != written)
    assert changed.size == 0, (changed[:5], p[changed[:5]], written[changed[:5]])
