"""What all schedules share: calls, lengths, composition, saving, and optimizers that follow them."""

from __future__ import annotations

import copy
import json
import pickle
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
    Linear,
    MultiStep,
    OneCycle,
    PiecewiseLinear,
    Polynomial,
    Product,
    ReduceOnPlateau,
    Scaled,
    Schedule,
    Sequence,
    WarmupStableDecay,
)

from .schedule_cases import CASES, A, B, C, each


def test_every_schedule_has_a_case_and_a_complete_docstring() -> None:
    classes = {name for name in schedules.__all__ if name not in ("Schedule", "from_dict")}
    ours = {kind.__name__ for kind in Schedule.__subclasses__() if kind.__module__.startswith("gradstep.")}
    assert CASES.keys() == classes == ours
    for name in classes:
        text = getattr(schedules, name).__doc__
        assert ">>>" in text and "Args:" in text and "Raises:" in text, name


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
