"""Gradient noise: normal numbers of the right size that depend on seed, step, parameter and element alone."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

import gradstep
from gradstep import config

from .cases import gradients
from .test_layouts import LAYOUTS
from .test_values import assert_same_bits, dtypes

RUNS_ON_GPU = True

SIZE = 100_003


def noise(shapes: Any, dtype: Any = np.float64, steps: int = 1, place: Any = None, **options: Any) -> list[Any]:
    """The noise of the last of some steps, divided by its standard deviation: gradients are 0, and SGD subtracts them."""
    params = [np.zeros(shape, dtype) for shape in shapes]
    params = [place(p) for p in params] if place else params
    settings = {"noise": 0.3, "noise_decay": 0.7, "seed": 5, **options}
    opt = gradstep.SGD(params, lr=1.0, **settings)
    for _ in range(steps):
        for p in params:
            p[...] = 0
        opt.step([np.zeros_like(p) for p in params])
    return [-p / math.sqrt(settings["noise"] / (1 + steps) ** settings["noise_decay"]) for p in params]


def correlation(a: Any, b: Any) -> float:
    return float(np.corrcoef(a, b)[0, 1])


@dtypes
@pytest.mark.parametrize("steps", [1, 2, 30])
def test_noise_is_standard_normal_after_scaling(dtype: Any, steps: int) -> None:
    stats = pytest.importorskip("scipy.stats", reason="scipy is not installed")
    z = noise([(SIZE,)], dtype, steps)[0].astype(np.float64)
    assert abs(z.mean()) < 4 / math.sqrt(SIZE)
    assert abs(z.var() - 1) < 4 * math.sqrt(2 / SIZE)
    assert abs(stats.skew(z)) < 4 * math.sqrt(6 / SIZE)
    assert abs(stats.kurtosis(z)) < 4 * math.sqrt(24 / SIZE)
    assert stats.kstest(z, "norm").pvalue > 1e-3
    assert 4 < np.abs(z).max() < 7
    for lag in (1, 2, 3, 4, 8, 16, 32, 1024):
        assert abs(correlation(z[lag:], z[:-lag])) < 5 / math.sqrt(SIZE), lag
        assert abs(correlation(z[lag:] ** 2, z[:-lag] ** 2)) < 5 / math.sqrt(SIZE), lag


@dtypes
def test_the_same_for_every_instruction_set_and_number_of_threads(dtype: Any) -> None:
    expected = None
    for isa in config.isas():
        config.set_isa(isa)
        for threads in (1, 2, 3, 7):
            config.set_num_threads(threads)
            z = noise([(7,), (SIZE,), (130, 139), ()], dtype, 2)
            expected = expected or z
            for i, (a, b) in enumerate(zip(z, expected, strict=True)):
                assert_same_bits(np.asarray(a), np.asarray(b), f"parameter {i}, {isa}, {threads} threads")
    assert expected is not None
    assert expected[0].any()


def test_seed_step_and_parameter_each_make_a_difference() -> None:
    others = [
        noise([(SIZE,)])[0],
        noise([(SIZE,)], seed=6)[0],
        noise([(SIZE,)], seed=5 + 2**32)[0],
        noise([(SIZE,)], steps=2)[0],
        noise([(SIZE,)], steps=3)[0],
        *noise([(3,), (SIZE,), (SIZE,)])[1:],
    ]
    for i, a in enumerate(others):
        for b in others[:i]:
            assert abs(correlation(a, b)) < 5 / math.sqrt(SIZE)
            assert not (a == b).any()
    assert np.array_equal(others[0], noise([(SIZE,)])[0])


def test_an_element_has_its_noise_whatever_is_around_it() -> None:
    """Not the array's length or shape, nor other parameters, nor the layout in memory."""
    long = noise([(SIZE,)])[0]
    assert_same_bits(noise([(1000,)])[0], long[:1000], "shorter")
    assert_same_bits(noise([(40, 25)])[0].ravel(), long[:1000], "another shape")
    assert_same_bits(noise([(1000,), (7,)])[0], long[:1000], "with another parameter")
    assert_same_bits(noise([(1000,)], noise=0.3, centralize=True, clip_norm=1.0)[0], long[:1000], "with other stages")
    for layout, place in LAYOUTS.items():
        assert_same_bits(np.ascontiguousarray(noise([(5, 8, 25)], place=place)[0]).ravel(), long[:1000], layout)


def test_float32_has_the_noise_of_float64() -> None:
    np.testing.assert_allclose(noise([(SIZE,)], np.float32)[0], noise([(SIZE,)])[0], rtol=1e-5, atol=1e-6)


def test_noise_is_added_after_clipping(isa: str) -> None:
    """And before the rule: with a gradient, SGD moves by both."""
    results, g = [], gradients((500,), np.float64, 1)
    for options in ({}, {"noise": 0.3, "seed": 5}):
        p = np.zeros(500)
        gradstep.SGD([p], lr=1.0, clip_norm=2.0, clip_value=50.0, **options).step([g])
        results.append(-p)
    assert np.linalg.norm(results[0]) == pytest.approx(2.0, rel=1e-6)
    z = noise([(500,)], noise_decay=0.55)[0]
    np.testing.assert_allclose(results[1] - results[0], z * math.sqrt(0.3 / 2**0.55), rtol=1e-12, atol=1e-13)


def test_skipped_steps_and_missing_gradients_draw_nothing() -> None:
    """The number of the step is the parameter's own."""
    p = np.zeros(50)
    opt = gradstep.SGD([p], lr=1.0, noise=0.3, noise_decay=0.7, seed=5, on_nonfinite="skip")
    opt.step([np.full(50, np.nan)])
    opt.step([None])
    opt.step([np.zeros(50)])
    np.testing.assert_array_equal(-p / math.sqrt(0.3 / 2**0.7), noise([(50,)])[0])


def test_groups_have_noise_of_their_own() -> None:
    p, q = np.zeros(50), np.zeros(50)
    gradstep.SGD([{"params": [p], "noise": 0.3}, {"params": [q]}], lr=1.0).step([[np.zeros(50)], [np.zeros(50)]])
    assert p.all()
    assert not q.any()
