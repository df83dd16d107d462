"""The values of schedules: those of torch, Keras and scikit-learn where they have the same one, and of papers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import gradstep
from gradstep import schedules
from gradstep.schedules import (
    Constant,
    Cosine,
    CosineRestarts,
    Cyclic,
    Exponential,
    InverseScaling,
    InverseSqrt,
    InverseTime,
    Linear,
    OneCycle,
    PiecewiseConstant,
    Polynomial,
    ReduceOnPlateau,
    Schedule,
    Step,
    WarmupStableDecay,
)

from .schedule_cases import CASES, N, assert_equal


def torch_values(make: Callable[[Any, Any], Any], lr: float = 0.3, n: int = N) -> tuple[list[float], list[float]]:
    """Learning rates and momenta of the first n steps under a scheduler of torch."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    opt = torch.optim.SGD([torch.zeros(1)], lr=lr, momentum=0.77)
    scheduler = make(torch.optim.lr_scheduler, opt)
    rates, momenta = [], []
    for _ in range(n):
        rates.append(float(opt.param_groups[0]["lr"]))
        momenta.append(opt.param_groups[0]["momentum"])
        opt.step()
        scheduler.step()
    return rates, momenta


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (Step(start=0.3, every=31, gamma=0.7), lambda lib, opt: lib.StepLR(opt, 31, gamma=0.7)),
        (CASES["MultiStep"], lambda lib, opt: lib.MultiStepLR(opt, [7, 50, 311], gamma=0.4)),
        (Exponential(start=0.3, gamma=0.993), lambda lib, opt: lib.ExponentialLR(opt, 0.993)),
        (Polynomial(start=0.3, steps=317, power=1.7), lambda lib, opt: lib.PolynomialLR(opt, 317, power=1.7)),
        (Linear(start=0.03, end=0.27, steps=317), lambda lib, opt: lib.LinearLR(opt, 0.1, 0.9, 317)),
        (
            Constant(value=0.06, steps=41) >> Constant(value=0.3),
            lambda lib, opt: lib.ConstantLR(opt, 0.2, 41),
        ),
        (
            Linear(start=0.03, end=0.3, steps=41) >> Cosine(start=0.3, steps=459, end=0.002),
            lambda lib, opt: lib.SequentialLR(
                opt, [lib.LinearLR(opt, 0.1, 1.0, 41), lib.CosineAnnealingLR(opt, 459, 0.002)], [41]
            ),
        ),
        (Cosine(start=0.3, steps=N, end=0.002), lambda lib, opt: lib.CosineAnnealingLR(opt, N, 0.002)),
        (
            CosineRestarts(start=0.3, steps=17, end=0.002, t_mult=3),
            lambda lib, opt: lib.CosineAnnealingWarmRestarts(opt, 17, 3, 0.002),
        ),
        (CosineRestarts(start=0.3, steps=17, end=0.002), lambda lib, opt: lib.CosineAnnealingWarmRestarts(opt, 17, 1, 0.002)),
        (
            Linear(start=0.5, end=1.0, steps=90) * Exponential(start=0.3, gamma=0.99),
            lambda lib, opt: lib.ChainedScheduler([lib.LinearLR(opt, 0.5, 1.0, 90), lib.ExponentialLR(opt, 0.99)], opt),
        ),
    ],
    ids=[
        "StepLR",
        "MultiStepLR",
        "ExponentialLR",
        "PolynomialLR",
        "LinearLR",
        "ConstantLR",
        "SequentialLR",
        "CosineAnnealingLR",
        "CosineAnnealingWarmRestarts",
        "CosineAnnealingWarmRestarts, equal cycles",
        "ChainedScheduler",
    ],
)
def test_torch(ours: Schedule, theirs: Callable[[Any, Any], Any]) -> None:
    assert_equal(ours, torch_values(theirs)[0])


@pytest.mark.parametrize("power", [1.0, 1.7])
def test_torch_closed_forms(power: float) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    lib, opt = torch.optim.lr_scheduler, torch.optim.SGD([torch.zeros(1)], lr=0.3)
    pairs = [
        (Cosine(start=0.3, steps=N, end=0.002), lib.CosineAnnealingLR(opt, N, 0.002)),
        (Polynomial(start=0.3, steps=317, power=power), lib.PolynomialLR(opt, 317, power)),
        (Exponential(start=0.3, gamma=0.97), lib.ExponentialLR(opt, 0.97)),
    ]
    for ours, theirs in pairs:
        theirs.base_lrs, expected = [0.3], []
        for theirs.last_epoch in range(N + 1):
            expected += theirs._get_closed_form_lr()
        assert_equal(ours, expected)


@pytest.mark.parametrize("three_phase", [False, True])
@pytest.mark.parametrize(("shape", "strategy"), [("cosine", "cos"), ("linear", "linear")])
@pytest.mark.parametrize(("steps", "pct_start"), [(N, 0.21), (N, 0.2137), (7, 0.5), (9, 0.0), (3, 0.1)])
def test_torch_one_cycle(three_phase: bool, shape: Any, strategy: str, steps: int, pct_start: float) -> None:
    rates, momenta = torch_values(
        lambda lib, opt: lib.OneCycleLR(
            opt,
            0.3,
            steps,
            pct_start=pct_start,
            anneal_strategy=strategy,
            base_momentum=0.81,
            max_momentum=0.93,
            div_factor=10.0,
            final_div_factor=30.0,
            three_phase=three_phase,
        ),
        n=steps,
    )
    cycle = OneCycle(start=0.03, peak=0.3, end=0.001, steps=steps, pct_start=pct_start, shape=shape, three_phase=three_phase)
    assert_equal(cycle, rates)
    assert_equal(cycle.momentum(low=0.81, high=0.93), momenta)


def test_one_cycle_at_its_shortest() -> None:
    assert OneCycle(start=0.1, peak=0.3, end=0.01, steps=1)(0) == 0.01
    assert OneCycle(start=0.1, peak=0.3, end=0.01, steps=1, pct_start=1.0)(0) == 0.3
    assert OneCycle(start=0.1, peak=0.3, end=0.01, steps=10, pct_start=0.1)(0) == 0.3  # where torch divides by zero


@pytest.mark.parametrize("mode", ["triangular", "triangular2", "exp_range"])
@pytest.mark.parametrize("steps_down", [None, 41])
def test_torch_cyclic(mode: Any, steps_down: int | None) -> None:
    rates, momenta = torch_values(
        lambda lib, opt: lib.CyclicLR(opt, 0.02, 0.3, 23, steps_down, mode, 0.99, base_momentum=0.81, max_momentum=0.93)
    )
    schedule = Cyclic(start=0.02, peak=0.3, steps_up=23, steps_down=steps_down, mode=mode, gamma=0.99)
    assert_equal(schedule, rates)
    assert_equal(schedule.momentum(low=0.81, high=0.93), momenta)


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("threshold_mode", ["rel", "abs"])
@pytest.mark.parametrize("offset", [0.0, 3.0])
def test_torch_reduce_on_plateau(mode: Any, threshold_mode: Any, offset: float) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    settings = {"mode": mode, "factor": 0.7, "patience": 2, "threshold": 0.03, "threshold_mode": threshold_mode}
    settings |= {"cooldown": 3, "eps": 0.004}
    opt = torch.optim.SGD([torch.zeros(1)], lr=0.3)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(opt, min_lr=0.011, **settings)
    ours: Any = ReduceOnPlateau(start=0.3, floor=0.011, **settings)
    rng = np.random.default_rng(5)
    seen = set()
    for metric in [math.nan, math.inf, -math.inf, *(offset + rng.normal(0, 1, N) * np.geomspace(0.1, 5, N)), math.nan][
        3 if offset else 0 :
    ]:
        theirs.step(metric)
        ours.update(metric)
        assert ours(0) == ours(7) == opt.param_groups[0]["lr"]
        seen.add(ours(0))
        ours = schedules.from_dict(json.loads(json.dumps(ours.to_dict())))
    assert len(seen) > 5
    assert min(seen) < 0.02


# The formulas as Keras' documentation has them: https://keras.io/api/optimizers/learning_rate_schedules


def keras_cosine_decay(step: int, initial: float, decay_steps: int, alpha: float, target: float, warmup_steps: int) -> float:
    if step < warmup_steps:
        return (target - initial) * step / warmup_steps + initial
    step = min(step - warmup_steps, decay_steps)
    return target * ((1 - alpha) * 0.5 * (1 + math.cos(math.pi * step / decay_steps)) + alpha)


def keras_cosine_decay_restarts(step: int, initial: float, first: int, t_mul: int, m_mul: float, alpha: float) -> float:
    i = 0 if t_mul == 1 else math.floor(math.log(1 - step / first * (1 - t_mul)) / math.log(t_mul) + 1e-9)
    done = step / first - (1 - t_mul**i) / (1 - t_mul)
    return initial * ((1 - alpha) * 0.5 * m_mul**i * (1 + math.cos(math.pi * done / t_mul**i)) + alpha)


def keras_polynomial_decay(step: int, initial: float, steps: int, end: float, power: float, cycle: bool) -> float:
    if cycle:
        steps *= max(math.ceil(step / steps), 1)
    return (initial - end) * (1 - min(step, steps) / steps) ** power + end


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (Exponential(start=0.3, gamma=0.8, every=17), lambda t: 0.3 * 0.8 ** (t / 17)),
        (Exponential(start=0.3, gamma=0.8, every=17, staircase=True), lambda t: 0.3 * 0.8 ** math.floor(t / 17)),
        (InverseTime(start=0.3, rate=0.7, every=13), lambda t: 0.3 / (1 + 0.7 * t / 13)),
        (InverseTime(start=0.3, rate=0.7, every=13, staircase=True), lambda t: 0.3 / (1 + 0.7 * math.floor(t / 13))),
        (
            Linear(start=0.01, end=0.3, steps=41) >> Cosine(start=0.3, steps=317, end=0.006),
            lambda t: keras_cosine_decay(t, 0.01, 317, 0.02, 0.3, 41),
        ),
        (
            CosineRestarts(start=0.3, steps=17, end=0.006, t_mult=2, gamma=0.7),
            lambda t: keras_cosine_decay_restarts(t, 0.3, 17, 2, 0.7, 0.02),
        ),
        (
            Polynomial(start=0.3, steps=317, end=0.002, power=1.7),
            lambda t: keras_polynomial_decay(t, 0.3, 317, 0.002, 1.7, False),
        ),
        (CASES["Polynomial"], lambda t: keras_polynomial_decay(t, 0.3, 117, 0.002, 1.7, True)),
        (  # Keras' boundaries belong to what is before them
            PiecewiseConstant(milestones=(8, 51), values=(0.1, 0.3, 0.2)),
            lambda t: 0.1 if t <= 7 else 0.3 if t <= 50 else 0.2,
        ),
    ],
    ids=[
        "ExponentialDecay",
        "ExponentialDecay, staircase",
        "InverseTimeDecay",
        "InverseTimeDecay, staircase",
        "CosineDecay",
        "CosineDecayRestarts",
        "PolynomialDecay",
        "PolynomialDecay, cycle",
        "PiecewiseConstantDecay",
    ],
)
def test_keras(ours: Schedule, theirs: Callable[[int], float]) -> None:
    assert_equal(ours, [theirs(step) for step in range(N)])


def test_scikit_learn_invscaling() -> None:
    linear_model = pytest.importorskip("sklearn.linear_model", reason="scikit-learn is not installed")
    rng = np.random.default_rng(2)
    x = rng.normal(size=(N, 3))
    y = x @ [1.0, -2.0, 0.5] + rng.normal(size=N)
    theirs = linear_model.SGDRegressor(penalty=None, fit_intercept=False, shuffle=False, eta0=0.03, power_t=0.4)
    theirs.set_params(learning_rate="invscaling").partial_fit(x, y)
    w = np.zeros(3)
    opt = gradstep.SGD(w, lr=InverseScaling(start=0.03, power=0.4))
    for row, target in zip(x, y, strict=True):
        opt.step((row @ w - target) * row)
    np.testing.assert_allclose(w, theirs.coef_, rtol=1e-12)


def test_noam() -> None:
    assert_equal(CASES["Noam"], [48**-0.5 * min(t**-0.5, t * 60**-1.5) for t in range(1, N)])


def test_inverse_sqrt() -> None:
    schedule = Linear(start=0.01, end=0.3, steps=40) >> InverseSqrt(start=0.3, timescale=40)
    assert_equal(schedule, [0.01 + 0.29 * t / 40 if t < 40 else 0.3 * math.sqrt(40 / t) for t in range(N)])
    assert_equal(InverseSqrt(start=0.3), [0.3 / math.sqrt(1 + t) for t in range(N)])


@pytest.mark.parametrize(
    ("shape", "left"),
    [
        ("linear", lambda x: 1 - x),
        ("cosine", lambda x: 0.5 + 0.5 * math.cos(math.pi * x)),
        ("1-sqrt", lambda x: 1 - x**0.5),
    ],
)
def test_warmup_stable_decay(shape: Any, left: Callable[[float], float]) -> None:
    schedule = WarmupStableDecay(peak=0.3, steps=300, warmup_steps=30, decay_steps=100, start=0.01, end=0.002, shape=shape)
    expected = [0.01 + 0.29 * t / 30 for t in range(30)] + [0.3] * 170
    expected += [0.002 + 0.298 * left(t / 100) for t in range(100)] + [0.002] * 50
    assert_equal(schedule, expected)


def test_warmup_stable_decay_without_a_phase() -> None:
    assert WarmupStableDecay(peak=0.3, steps=9, warmup_steps=0, decay_steps=9, start=0.1)(0) == 0.3
    only_constant = WarmupStableDecay(peak=0.3, steps=9, warmup_steps=0, decay_steps=0, end=0.1)
    assert [only_constant(t) for t in (0, 8, 9)] == [0.3, 0.3, 0.1]


def test_piecewise_linear() -> None:
    assert_equal(CASES["PiecewiseLinear"], np.interp(np.arange(N), (7, 50, 311), (0.1, 0.3, 0.01)))
