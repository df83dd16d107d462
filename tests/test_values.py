"""The values: the same bits as the NumPy expression, on every instruction set, for every size and any number of threads."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from gradstep import config

from .cases import CASES, Case, gradients, parameters

RUNS_ON_GPU = True

SMALL = [*range(68), 1023, 1024, 1025, 4097]
LARGE = [100_003, 1_000_003]  # several chunks; chunks get longer from 4 million elements on, see test_long_chunks
STEPS = 3

cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
dtypes = pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["float32", "float64"])


def expected(case: Case, size: int, dtype: Any) -> tuple[Any, dict[str, Any]]:
    p, states = parameters((size,), dtype), case.start((size,), dtype)
    for step in range(1, STEPS + 1):
        p = case.reference(p, gradients((size,), dtype, step), states, step, **case.settings)
    return p, states


def computed(case: Case, size: int, dtype: Any) -> tuple[Any, dict[str, Any]]:
    p, states = parameters((size,), dtype), case.start((size,), dtype)
    for step in range(1, STEPS + 1):
        case.call(p, gradients((size,), dtype, step), states, step)
    return p, states


def assert_same_bits(ours: Any, theirs: Any, what: str) -> None:
    bits = np.uint32 if ours.dtype == np.float32 else np.uint64
    differ = np.flatnonzero(np.ravel(ours).view(bits) != np.ravel(theirs).view(bits))
    assert differ.size == 0, f"{what}: {differ.size} of {ours.size} differ, the first at {differ[0]}: {ours.flat[differ[0]]!r}"


@cases
@dtypes
def test_same_bits_as_numpy(case: Case, dtype: Any, isa: str) -> None:
    for size in SMALL:
        p, states = expected(case, size, dtype)
        ours, our_states = computed(case, size, dtype)
        assert_same_bits(ours, p, f"parameter of {size}")
        for name in states:
            assert_same_bits(our_states[name], states[name], f"{name} of {size}")


@cases
@dtypes
def test_same_bits_on_any_number_of_threads(case: Case, dtype: Any) -> None:
    for size in LARGE:
        p, states = expected(case, size, dtype)
        for isa in config.isas():
            config.set_isa(isa)
            for threads in (1, 2, 3, 7):
                config.set_num_threads(threads)
                ours, our_states = computed(case, size, dtype)
                assert_same_bits(ours, p, f"parameter of {size}, {isa}, {threads} threads")
                for name in states:
                    assert_same_bits(our_states[name], states[name], f"{name} of {size}, {isa}, {threads} threads")


def test_long_chunks() -> None:
    case, size = next(case for case in CASES if case.name == "adamw"), 5_000_011
    p, states = expected(case, size, np.float32)
    for threads in (1, 3):
        config.set_num_threads(threads)
        ours, our_states = computed(case, size, np.float32)
        assert_same_bits(ours, p, f"parameter, {threads} threads")
        assert_same_bits(our_states["exp_avg_sq"], states["exp_avg_sq"], f"exp_avg_sq, {threads} threads")


@cases
def test_float32_stays_close_to_float64(case: Case) -> None:
    p, states = parameters((257,), np.float32), case.start((257,), np.float32)
    exact, exact_states = p.astype(np.float64), case.start((257,), np.float64)
    for step in range(1, 51):
        g = gradients((257,), np.float32, step)
        case.call(p, g, states, step)
        exact = case.reference(exact, g.astype(np.float64), exact_states, step, **case.settings)
    moved = np.abs(exact - parameters((257,), np.float32)).max()
    assert moved > 0.05
    assert np.abs(p - exact).max() < 1e-4 * max(1.0, moved)


@cases
@dtypes
def test_nan_and_infinity_stay_in_their_element(case: Case, dtype: Any, isa: str) -> None:
    size, bad = 133, {3: np.nan, 64: np.inf, 131: -np.inf}
    g = gradients((size,), dtype, 1)
    for at, value in bad.items():
        g[at] = value
    p, states = parameters((size,), dtype), case.start((size,), dtype)
    case.call(p, g, states, 1)
    clean = gradients((size,), dtype, 1)
    q, clean_states = parameters((size,), dtype), case.start((size,), dtype)
    case.call(q, clean, clean_states, 1)
    others = np.setdiff1d(np.arange(size), list(bad))
    assert_same_bits(p[others], q[others], "other elements")
    assert np.isnan(p[3])
    assert not np.array_equal(p[[64, 131]], q[[64, 131]])


@dtypes
def test_lion_sign_of_zero_and_nan(dtype: Any, isa: str) -> None:
    lion = next(case for case in CASES if case.name == "lion_maximize")
    p, m = np.full(35, 2, dtype), np.zeros(35, dtype)
    g = np.zeros(35, dtype)
    g[1::3], g[2::3] = -0.0, np.nan
    lion.call(p, g, {"exp_avg": m}, 1)
    assert (p[0::3] == 2).all() and (p[1::3] == 2).all() and np.isnan(p[2::3]).all()


def test_step_counts_beyond_float32(isa: str) -> None:
    """The bias correction of step 2^24 + 1 differs from that of 2^24 in double, where a float32 count would stand still."""
    case = next(case for case in CASES if case.name == "adamw")
    betas, results = (0.9, 1 - 2.0**-25), []
    for step in (2**24, 2**24 + 1, 2**53):
        p, states = np.full(5, 1.0), {"exp_avg": np.full(5, 0.5), "exp_avg_sq": np.full(5, 0.25)}
        q, theirs = p.copy(), {name: state.copy() for name, state in states.items()}
        case.call(p, np.ones(5), states, step, betas=betas)
        q = case.reference(q, np.ones(5), theirs, step, **{**case.settings, "betas": betas})
        assert_same_bits(p, q, f"step {step}")
        results.append(p[0])
    assert len(set(results)) == 3
