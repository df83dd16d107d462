"""Schedules: the values of torch, Keras and scikit-learn where they have the same one, composition, saving, errors."""

from __future__ import annotations

import copy
import json
import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

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
    MultiStep,
    Noam,
    OneCycle,
    PiecewiseConstant,
    PiecewiseLinear,
    Polynomial,
    Product,
    ReduceOnPlateau,
    Scaled,
    Schedule,
    Sequence,
    Step,
    WarmupStableDecay,
)

N = 500

# Each schedule with every setting away from its default.
CASES: dict[str, Schedule] = {
    "Constant": Constant(value=0.3, steps=70),
    "Cosine": Cosine(start=0.3, steps=317, end=0.002),
    "CosineRestarts": CosineRestarts(start=0.3, steps=37, end=0.002, t_mult=2, gamma=0.7, cycles=3),
    "Cyclic": Cyclic(start=0.02, peak=0.3, steps_up=23, steps_down=41, mode="exp_range", gamma=0.99),
    "Exponential": Exponential(start=0.3, gamma=0.8, every=17, staircase=True),
    "InverseScaling": InverseScaling(start=0.3, power=0.4),
    "InverseSqrt": InverseSqrt(start=0.3, timescale=12.5),
    "InverseTime": InverseTime(start=0.3, rate=0.7, every=13, staircase=True),
    "Linear": Linear(start=0.01, end=0.3, steps=317),
    "MultiStep": MultiStep(start=0.3, milestones=(7, 50, 311), gamma=0.4),
    "Noam": Noam(model_size=48, warmup_steps=60),
    "OneCycle": OneCycle(start=0.03, peak=0.3, end=0.001, steps=501, pct_start=0.21, shape="linear", three_phase=True),
    "PiecewiseConstant": PiecewiseConstant(milestones=(7, 50, 311), values=(0.1, 0.3, 0.2, 0.01)),
    "PiecewiseLinear": PiecewiseLinear(milestones=(7, 50, 311), values=(0.1, 0.3, 0.01)),
    "Polynomial": Polynomial(start=0.3, steps=117, end=0.002, power=1.7, cycle=True),
    "Product": Product(schedules=(Linear(start=0.1, end=1.0, steps=10), Cosine(start=0.3, steps=30))),
    "ReduceOnPlateau": ReduceOnPlateau(
        start=0.3,
        mode="max",
        factor=0.4,
        patience=3,
        threshold=0.02,
        threshold_mode="abs",
        cooldown=2,
        floor=0.001,
        eps=1e-5,
        reduced=0.12,
        best=-1.5,
        bad_updates=2,
        cooldown_left=1,
    ),
    "Scaled": Scaled(schedule=Cosine(start=0.3, steps=30), factor=0.7),
    "Sequence": Sequence(schedules=(Linear(start=0.1, end=1.0, steps=10), Cosine(start=1.0, steps=30)), milestones=(15,)),
    "Step": Step(start=0.3, every=31, gamma=0.7),
    "WarmupStableDecay": WarmupStableDecay(
        peak=0.3, steps=317, warmup_steps=31, decay_steps=101, start=0.01, end=0.002, shape="1-sqrt"
    ),
}
each = pytest.mark.parametrize("schedule", CASES.values(), ids=CASES.keys())


def assert_equal(schedule: Callable[[Any], Any], expected: Any) -> None:
    """The values from step 0 on are those expected, but for roundings."""
    np.testing.assert_allclose(schedule(np.arange(len(expected))), expected, rtol=1e-12, atol=0)


def test_every_schedule_has_a_case_and_a_complete_docstring() -> None:
    classes = {name for name in schedules.__all__ if name not in ("Schedule", "from_dict")}
    ours = {kind.__name__ for kind in Schedule.__subclasses__() if kind.__module__.startswith("gradstep.")}
    assert CASES.keys() == classes == ours
    for name in classes:
        text = getattr(schedules, name).__doc__
        assert ">>>" in text and "Args:" in text and "Raises:" in text, name


# ---- torch ------------------------------------------------------------------------------------------------------------------


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


# ---- Keras and scikit-learn -------------------------------------------------------------------------------------------------

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


# ---- those of papers --------------------------------------------------------------------------------------------------------


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


# ---- calls ------------------------------------------------------------------------------------------------------------------


@each
def test_arrays_have_the_values_of_their_elements(schedule: Schedule) -> None:
    for kind in (np.int64, np.uint8, np.int16):
        values = schedule(np.arange(120, dtype=kind).reshape(2, 3, 20))
        assert values.shape == (2, 3, 20) and values.dtype == np.float64
        assert values.ravel().tolist() == [schedule(t) for t in range(120)]
    assert schedule(np.zeros((0, 3), int)).shape == (0, 3)
    value = schedule(np.int32(7))
    assert type(value) is float and value == schedule(7)
    assert all(type(schedule(t)) is float for t in (0, 1, 300))


@each
def test_steps_that_are_none(schedule: Schedule) -> None:
    name = type(schedule).__name__
    with pytest.raises(ValueError, match=f"^{name}: step must not be negative, got -1$"):
        schedule(-1)
    with pytest.raises(ValueError, match=f"^{name}: step must not be negative, got -2$"):
        schedule(np.array([3, -2]))
    with pytest.raises(TypeError, match=f"^{name}: step must be an integer or an array of integers, got 1.0$"):
        schedule(1.0)
    with pytest.raises(TypeError, match=f"^{name}: step must have an integer dtype, got float64$"):
        schedule(np.ones(3))


@each
def test_past_the_end(schedule: Schedule) -> None:
    if isinstance(schedule, OneCycle):
        with pytest.raises(ValueError, match="^OneCycle: step must be less than steps = 501, got 501$"):
            schedule(501)
    elif schedule.length is not None:
        assert schedule(schedule.length) == schedule(schedule.length + 1) == schedule(10**12)


def test_lengths() -> None:
    lengths = {name: schedule.length for name, schedule in CASES.items() if schedule.length is not None}
    assert lengths == {
        "Constant": 70,
        "Cosine": 317,
        "CosineRestarts": 37 + 74 + 148,
        "Linear": 317,
        "OneCycle": 501,
        "PiecewiseLinear": 311,
        "Product": 30,
        "Scaled": 30,
        "Sequence": 45,
        "WarmupStableDecay": 317,
    }
    assert CosineRestarts(start=0.3, steps=7, cycles=10**12).length == 7 * 10**12
    assert Polynomial(start=1.0, steps=9).length == 9
    assert Constant(value=1.0).length is None
    assert Product(schedules=(Constant(value=1.0), Constant(value=1.0, steps=3))).length is None


def test_ends_are_exact() -> None:
    for start, end in [(0.1, 0.3), (0.3, 0.1), (1e-3, 1.0), (0.7, 1e-9), (0.0, 0.7)]:
        for schedule in (
            Linear(start=start, end=end, steps=7),
            Cosine(start=start, steps=7, end=end),
            Polynomial(start=start, steps=7, end=end, power=3.0),
            PiecewiseLinear(milestones=(0, 7), values=(start, end)),
            WarmupStableDecay(start=start, peak=end, end=start, steps=21, warmup_steps=7, decay_steps=7),
            Cyclic(start=start, peak=end, steps_up=7),
            OneCycle(start=start, peak=end, steps=16, pct_start=0.5),
        ):
            assert (schedule(0), schedule(7)) == (start, end), schedule


# ---- composition ------------------------------------------------------------------------------------------------------------

A, B, C = Linear(start=0.1, end=0.3, steps=10), Cosine(start=0.3, steps=30, end=0.01), Exponential(start=0.01, gamma=0.9)


def test_chains() -> None:
    chain = A >> B >> C
    expected = [A(t) for t in range(10)] + [B(t) for t in range(30)] + [C(t) for t in range(60)]
    assert chain(np.arange(100)).tolist() == expected
    assert chain == A >> (B >> C) == Sequence(schedules=(A, B, C), milestones=(10, 40))
    assert chain.length is None and (A >> B).length == 40
    assert Sequence(schedules=(A, B, A, B), milestones=(10, 40, 50)) == (A >> B) >> (A >> B)


def test_sequences_cut_schedules_short_or_let_them_hold() -> None:
    sequence = Sequence(schedules=[C, A, B], milestones=np.array([5, 25]))
    expected = [C(t) for t in range(5)] + [A(t) for t in range(10)] + [0.3] * 10 + [B(t) for t in range(30)]
    assert sequence(np.arange(55)).tolist() == expected
    assert sequence.length == 55


def test_multiples_and_products() -> None:
    assert 2 * A == A * 2 == A * np.float64(2) == np.float64(2) * A == np.int8(2) * A == Scaled(schedule=A, factor=2.0)
    assert (2 * A)(5) == 2 * A(5) and (2 * A).length == 10
    assert Product(schedules=(A, B)) == A * B
    assert (A * B)(np.arange(50)).tolist() == [A(t) * B(t) for t in range(50)]
    assert ((0.5 * (A >> B)) >> C)(41) == C(1)


def test_operators_leave_other_types_alone() -> None:
    for operation in (
        lambda: A >> 3,
        lambda: A >> abs,
        lambda: A * "2",
        lambda: "2" * A,
        lambda: 3 >> A,
        lambda: np.ones(2) * A,
    ):
        with pytest.raises(TypeError, match="unsupported operand|can't multiply|does not support"):
            operation()


# ---- saving -----------------------------------------------------------------------------------------------------------------


def assert_survives(schedule: Schedule) -> None:
    text = json.dumps(schedule.to_dict(), allow_nan=False)
    twins = [
        schedules.from_dict(json.loads(text)),
        pickle.loads(pickle.dumps(schedule)),
        copy.deepcopy(schedule),
        eval(repr(schedule), {name: getattr(schedules, name) for name in schedules.__all__}),
    ]
    steps = np.arange(schedule.length or 40)
    for twin in twins:
        assert twin == schedule and twin is not schedule and type(twin) is type(schedule)
        assert twin(steps).tolist() == schedule(steps).tolist()
    assert schedule * 2 != schedule


@each
def test_saving(schedule: Schedule) -> None:
    assert_survives(schedule)


values = st.floats(0, 10)
lengths = st.integers(1, 50)
names_of_shapes = st.sampled_from(["linear", "cosine", "1-sqrt"])
finite = (
    st.builds(Linear, start=values, end=values, steps=lengths)
    | st.builds(Cosine, start=values, end=values, steps=lengths)
    | st.builds(Polynomial, start=values, end=values, steps=lengths, power=st.floats(0.1, 4))
    | st.builds(CosineRestarts, start=values, end=values, steps=lengths, t_mult=st.integers(1, 3), cycles=st.integers(1, 3))
    | st.builds(
        WarmupStableDecay,
        peak=values,
        steps=st.integers(40, 60),
        warmup_steps=st.integers(0, 20),
        decay_steps=st.integers(0, 20),
        start=values,
        end=values,
        shape=names_of_shapes,
    )
    | st.builds(
        OneCycle,
        peak=values,
        start=values,
        end=values,
        steps=lengths,
        pct_start=st.floats(0, 0.5),
        shape=names_of_shapes,
        three_phase=st.booleans(),
    )
)
endless = (
    st.builds(Exponential, start=values, gamma=st.floats(0.01, 1), every=lengths, staircase=st.booleans())
    | st.builds(Cyclic, start=values, peak=values, steps_up=lengths, mode=st.sampled_from(["triangular", "triangular2"]))
    | st.builds(InverseScaling, start=values, power=st.floats(0, 2))
)


@given(finite, finite, endless, st.floats(0, 3))
def test_saving_of_compositions(a: Schedule, b: Schedule, c: Schedule, factor: float) -> None:
    assert_survives(factor * (a >> b) >> (factor * c))
    assert_survives(Sequence(schedules=(c * factor, a), milestones=(3,)))


@given(finite)
def test_values_lie_between_the_settings(schedule: Any) -> None:
    ends = [getattr(schedule, name) for name in ("start", "peak", "end") if hasattr(schedule, name)]
    slack = 1e-14 * max(ends) + 1e-300
    for value in schedule(np.arange(schedule.length)):
        assert min(ends) - slack <= value <= max(ends) + slack


@given(endless)
def test_endless_values_lie_between_the_settings(schedule: Any) -> None:
    highest = max(schedule.start, getattr(schedule, "peak", 0))
    assert all(0 <= value <= highest * (1 + 1e-15) + 1e-300 for value in schedule(np.array([0, 1, 7, 1000, 10**9])))


def test_settings_are_plain_values() -> None:
    schedule = MultiStep(start=np.float32(2), milestones=np.array([3, 4]), gamma=1)
    assert repr(schedule) == "MultiStep(start=2.0, milestones=(3, 4), gamma=1.0)"
    assert hash(schedule) == hash(MultiStep(start=2.0, milestones=(3, 4), gamma=1.0))
    assert schedule.to_dict() == {"type": "MultiStep", "start": 2.0, "milestones": [3, 4], "gamma": 1.0}
    with pytest.raises(AttributeError):
        schedule.gamma = 0.5


# ---- errors -----------------------------------------------------------------------------------------------------------------

LINEAR: dict[str, Any] = {"start": 0.1, "end": 0.3, "steps": 10}
PLATEAU: dict[str, Any] = {"start": 0.1}


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Linear(**{**LINEAR, "start": -0.1}), ValueError, "Linear: start must not be negative, got -0.1"),
        (lambda: Linear(**{**LINEAR, "end": math.nan}), ValueError, "Linear: end must be finite, got nan"),
        (lambda: Linear(**{**LINEAR, "end": -math.inf}), ValueError, "Linear: end must be finite, got -inf"),
        (lambda: Linear(**{**LINEAR, "end": "0.1"}), TypeError, "Linear: end must be a number, got '0.1'"),
        (lambda: Linear(**{**LINEAR, "end": True}), TypeError, "Linear: end must be a number, got True"),
        (lambda: Linear(**{**LINEAR, "steps": 0}), ValueError, "Linear: steps must be at least 1, got 0"),
        (lambda: Linear(**{**LINEAR, "steps": 2.0}), TypeError, "Linear: steps must be an integer, got 2.0"),
        (lambda: Linear(**{**LINEAR, "steps": True}), TypeError, "Linear: steps must be an integer, got True"),
        (lambda: Constant(value=0.1, steps=-3), ValueError, "Constant: steps must be at least 1, got -3"),
        (lambda: Exponential(start=0.1, gamma=0), ValueError, "Exponential: gamma must be positive, got 0"),
        (
            lambda: Exponential(start=0.1, gamma=0.5, staircase=1),
            TypeError,
            "Exponential: staircase must be True or False, got 1",
        ),
        (lambda: Step(start=0.1, every=3, gamma=math.nan), ValueError, "Step: gamma must be finite, got nan"),
        (
            lambda: MultiStep(start=0.1, milestones=(3, 3)),
            ValueError,
            "MultiStep: milestones must increase, got 3 after 3",
        ),
        (lambda: MultiStep(start=0.1, milestones=(0,)), ValueError, "MultiStep: milestones[0] must be at least 1, got 0"),
        (
            lambda: MultiStep(start=0.1, milestones="12"),
            TypeError,
            "MultiStep: milestones must be a sequence, got '12'",
        ),
        (
            lambda: MultiStep(start=0.1, milestones=5),
            TypeError,
            "MultiStep: milestones must be a sequence, got 5",
        ),
        (
            lambda: PiecewiseConstant(milestones=(3, 5), values=(1.0, -2.0, 3.0)),
            ValueError,
            "PiecewiseConstant: values[1] must not be negative, got -2.0",
        ),
        (
            lambda: PiecewiseConstant(milestones=(3, 5), values=(1.0, 2.0)),
            ValueError,
            "PiecewiseConstant: values must be one more than milestones, got 2 and 2",
        ),
        (
            lambda: PiecewiseLinear(milestones=(0, 5), values=(1.0,)),
            ValueError,
            "PiecewiseLinear: values must be as many as milestones, got 1 and 2",
        ),
        (
            lambda: PiecewiseLinear(milestones=(5, 2), values=(1.0, 2.0)),
            ValueError,
            "PiecewiseLinear: milestones must increase, got 2 after 5",
        ),
        (lambda: PiecewiseLinear(milestones=(), values=()), ValueError, "PiecewiseLinear: milestones must not be empty"),
        (lambda: InverseTime(start=0.1, rate=-1), ValueError, "InverseTime: rate must not be negative, got -1"),
        (lambda: InverseScaling(start=0.1, power=-1), ValueError, "InverseScaling: power must not be negative, got -1"),
        (lambda: InverseSqrt(start=0.1, timescale=0.0), ValueError, "InverseSqrt: timescale must be positive, got 0.0"),
        (lambda: Noam(model_size=64, warmup_steps=0), ValueError, "Noam: warmup_steps must be at least 1, got 0"),
        (lambda: Polynomial(start=0.1, steps=9, power=0), ValueError, "Polynomial: power must be positive, got 0"),
        (
            lambda: WarmupStableDecay(peak=0.1, steps=10, warmup_steps=6, decay_steps=5),
            ValueError,
            "WarmupStableDecay: warmup_steps + decay_steps must be at most steps = 10, got 6 + 5",
        ),
        (
            lambda: WarmupStableDecay(peak=0.1, steps=10, warmup_steps=-1, decay_steps=5),
            ValueError,
            "WarmupStableDecay: warmup_steps must be at least 0, got -1",
        ),
        (
            lambda: WarmupStableDecay(peak=0.1, steps=10, warmup_steps=1, decay_steps=5, shape="sqrt"),
            ValueError,
            "WarmupStableDecay: shape must be one of 'linear', 'cosine', '1-sqrt', got 'sqrt'",
        ),
        (lambda: OneCycle(peak=0.1, steps=9, pct_start=1.5), ValueError, "OneCycle: pct_start must be in [0, 1], got 1.5"),
        (
            lambda: OneCycle(peak=0.1, steps=9, pct_start=0.6, three_phase=True),
            ValueError,
            "OneCycle: pct_start must be in [0, 0.5] with three_phase, got 0.6",
        ),
        (lambda: Cyclic(start=0.1, peak=0.3, steps_up=0), ValueError, "Cyclic: steps_up must be at least 1, got 0"),
        (
            lambda: Cyclic(start=0.1, peak=0.3, steps_up=5, mode="square"),
            ValueError,
            "Cyclic: mode must be one of 'triangular', 'triangular2', 'exp_range', got 'square'",
        ),
        (lambda: CosineRestarts(start=0.1, steps=9, t_mult=0), ValueError, "CosineRestarts: t_mult must be at least 1, got 0"),
        (
            lambda: CosineRestarts(start=0.1, steps=9, t_mult=1.5),
            TypeError,
            "CosineRestarts: t_mult must be an integer, got 1.5",
        ),
        (lambda: ReduceOnPlateau(**PLATEAU, factor=1.0), ValueError, "ReduceOnPlateau: factor must be in [0, 1), got 1.0"),
        (
            lambda: ReduceOnPlateau(**PLATEAU, floor=0.2),
            ValueError,
            "ReduceOnPlateau: floor must be at most start = 0.1, got 0.2",
        ),
        (
            lambda: ReduceOnPlateau(**PLATEAU, mode="lower"),
            ValueError,
            "ReduceOnPlateau: mode must be one of 'min', 'max', got 'lower'",
        ),
        (lambda: ReduceOnPlateau(**PLATEAU, patience=-1), ValueError, "ReduceOnPlateau: patience must be at least 0, got -1"),
        (lambda: ReduceOnPlateau(**PLATEAU, best=math.nan), ValueError, "ReduceOnPlateau: best must not be NaN"),
        (
            lambda: ReduceOnPlateau(**PLATEAU, best="1"),
            TypeError,
            "ReduceOnPlateau: best must be a number or None, got '1'",
        ),
        (lambda: C >> A, ValueError, "Exponential has no end, so Linear can't follow it: Sequence takes milestones"),
        (lambda: A >> C >> B, ValueError, "Sequence has no end, so Cosine can't follow it: Sequence takes milestones"),
        (
            lambda: Sequence(schedules=(A, B), milestones=()),
            ValueError,
            "Sequence: milestones must be one fewer than schedules, got 0 and 2",
        ),
        (
            lambda: Sequence(schedules=(), milestones=()),
            ValueError,
            "Sequence: milestones must be one fewer than schedules, got 0 and 0",
        ),
        (
            lambda: Sequence(schedules=(A, B, C), milestones=(20, 10)),
            ValueError,
            "Sequence: milestones must increase, got 10 after 20",
        ),
        (
            lambda: Sequence(schedules=(A, abs), milestones=(5,)),
            TypeError,
            "Sequence: schedules[1] must be a schedule, got <built-in function abs>",
        ),
        (
            lambda: Sequence(schedules=(OneCycle(peak=0.1, steps=9), A), milestones=(10,)),
            ValueError,
            "OneCycle: step must be less than steps = 9, got 9",
        ),
        (lambda: A * -1, ValueError, "Scaled: factor must not be negative, got -1.0"),
        (lambda: math.nan * A, ValueError, "Scaled: factor must be finite, got nan"),
        (lambda: Product(schedules=()), ValueError, "Product: schedules must not be empty"),
        (lambda: schedules.from_dict([1]), TypeError, "from_dict: a schedule must be a dict, got [1]"),
        (lambda: schedules.from_dict({"type": "Linear"}), ValueError, "from_dict: Linear must have the setting 'start'"),
        (
            lambda: schedules.from_dict({"type": "Linear", **LINEAR, "gamma": 1}),
            ValueError,
            "from_dict: Linear has no setting 'gamma'",
        ),
    ],
)
def test_errors(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        make()
    assert str(caught.value) == message
    assert type(caught.value) is error


@pytest.mark.parametrize("name", ["Sine", None, 3, ["Linear"], "Schedule"])
def test_from_dict_names_the_types(name: Any) -> None:
    with pytest.raises(ValueError) as caught:
        schedules.from_dict({"type": name})
    assert str(caught.value).startswith("from_dict: type must be one of 'Constant', 'Cosine', 'CosineRestarts', ")
    assert str(caught.value).endswith(f"'WarmupStableDecay', got {name!r}")


def test_settings_have_names() -> None:
    with pytest.raises(TypeError, match="positional"):
        Linear(0.1, 0.3, 10)


# ---- with optimizers --------------------------------------------------------------------------------------------------------


def test_optimizers_follow_schedules() -> None:
    schedule = Linear(start=0.01, end=0.1, steps=3) >> Cosine(start=0.1, steps=5, end=0.02)
    w, v = np.ones((2, 4)), np.ones((2, 4))
    opt, by_hand = gradstep.AdamW(w, lr=schedule), gradstep.AdamW(v, lr=0.0)
    for step in range(10):
        opt.step(2 * w)
        by_hand.param_groups[0]["lr"] = schedule(step)
        by_hand.step(2 * v)
    assert w.tobytes() == v.tobytes()
    assert not np.array_equal(w, np.ones((2, 4)))

    later = pickle.loads(pickle.dumps(opt))
    assert later.param_groups[0]["lr"] == schedule
    x = np.array(w)
    later = gradstep.AdamW(x, lr=0.5)
    later.load_state_dict(opt.state_dict())
    later.step(2 * x)
    opt.step(2 * w)
    assert x.tobytes() == w.tobytes()


def test_optimizers_follow_plateaus() -> None:
    schedule = ReduceOnPlateau(start=0.5, factor=0.5, patience=0)
    w = np.array([4.0])
    opt = gradstep.SGD(w, lr=schedule)
    opt.step(np.array([1.0]))
    schedule.update(1.0)
    schedule.update(1.0)
    opt.step(np.array([1.0]))
    assert w == 4.0 - 0.5 - 0.25


def test_a_schedule_of_ones_own() -> None:
    class Sawtooth(Schedule):
        """No dataclass: calls and composition need `at` alone."""

        def at(self, step: int) -> float:
            return float(step % 3)

    schedule = Linear(start=0.0, end=9.0, steps=3) >> 2 * Sawtooth()
    assert schedule(np.arange(7)).tolist() == [0, 3, 6, 0, 2, 4, 0]
