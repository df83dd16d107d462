"""Criteria know when to stop, alone and in a monitor."""

from __future__ import annotations

import copy
import json
import pickle
from typing import Any

import numpy as np
import pytest

from gradstep.monitor import Criterion, EarlyStopping, Monitor, Plateau, RelativeChange

from .monitor_cases import INF, NAN


def reached_at(criterion: Criterion, values: list[float]) -> list[int]:
    """Return the positions, from 1, of the values at which the condition is met."""
    return [i for i, value in enumerate(values, 1) if criterion.update(value)]


@pytest.mark.parametrize("sign", [1, -1])
def test_early_stopping_waits_and_remembers_the_best(sign: int) -> None:
    stopping = EarlyStopping(3, mode="min" if sign == 1 else "max", min_delta=0.1)
    values = [1.0, 0.95, 0.85, NAN, 0.8, 0.84, 0.7]
    improved = []
    reached = []
    for step, value in enumerate(values, 1):
        reached.append(stopping.update(sign * value, 10 * step))
        improved.append(stopping.improved)
    assert improved == [True, False, True, False, False, False, True]
    assert reached == [False] * 5 + [True, False]
    assert (stopping.best, stopping.best_step, stopping.waited) == (sign * 0.7, 70, 0)


def test_early_stopping_says_what_to_restore() -> None:
    stopping = EarlyStopping(2)
    assert reached_at(stopping, [0.5, 0.5, -INF]) == [3]
    assert stopping.describe() == "no better for 2 values; the best is 0.5, of step 1"
    stopping.reset()
    assert reached_at(stopping, [NAN, NAN]) == [2]
    assert stopping.describe() == "no better for 2 values; there is no best"


@pytest.mark.parametrize("mode", ["min", "max"])
def test_plateau_sees_through_noise(mode: Any) -> None:
    rng = np.random.default_rng(2)
    falling = [2 - step / 200 + 0.3 * rng.standard_normal() for step in range(200)]
    flat = [1 + 0.3 * rng.standard_normal() for _ in range(200)]
    sign = 1 if mode == "min" else -1
    reached = reached_at(Plateau(50, tolerance=0.02, mode=mode), [sign * value for value in falling + flat])
    assert 250 < reached[0] < 360


def test_plateau_is_met_by_a_gain_up_to_the_tolerance() -> None:
    assert reached_at(Plateau(2, tolerance=0.25), [4, 4, 2, 2, 1.5, 1.5, 1.125, 1]) == [6, 7]
    assert reached_at(Plateau(1, tolerance=0), [1, 2]) == [2]
    assert reached_at(Plateau(2), [1, 1, NAN, 1, 1, 1, 1]) == [7]


def test_plateau_begins_anew_after_reset() -> None:
    plateau = Plateau(1)
    assert reached_at(plateau, [1, 1]) == [2]
    plateau.reset()
    assert not plateau.reached and plateau.describe() == "0 of 2 values seen"
    assert reached_at(plateau, [1, 1]) == [2]
    assert plateau.describe() == "the mean of 1 values is 1, that of the 1 before 1"


def test_relative_change_is_over_the_whole_window() -> None:
    assert reached_at(RelativeChange(0.25, window=3), [4, 3, 3.5, 3, 2, 2.5, 2]) == [3, 4, 7]
    assert reached_at(RelativeChange(0.0, window=2), [-1, -1, 0, 0, INF, 0, 0]) == [2, 4, 7]
    change = RelativeChange(0.5, window=2)
    change.update(1)
    assert change.describe() == "1 of 2 values seen"
    change.update(2)
    assert change.describe() == "the last 2 values lie between 1 and 2"


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: EarlyStopping(0), ValueError, "EarlyStopping: patience must be at least 1, got 0"),
        (lambda: EarlyStopping(2.5), TypeError, "EarlyStopping: patience must be an int, got 2.5"),
        (lambda: EarlyStopping(mode="best"), ValueError, "EarlyStopping: mode must be one of 'min', 'max', got 'best'"),
        (lambda: EarlyStopping(min_delta=-0.1), ValueError, "EarlyStopping: min_delta must be finite and at least 0, got -0.1"),
        (lambda: Plateau(0), ValueError, "Plateau: window must be at least 1, got 0"),
        (lambda: Plateau(tolerance=NAN), ValueError, "Plateau: tolerance must be finite and at least 0, got nan"),
        (lambda: Plateau(mode=1), ValueError, "Plateau: mode must be one of 'min', 'max', got 1"),
        (lambda: RelativeChange("1"), TypeError, "RelativeChange: tolerance must be a number, got '1'"),
        (lambda: RelativeChange(window=1), ValueError, "RelativeChange: window must be at least 2, got 1"),
        (
            lambda: Plateau().update("x"),
            TypeError,
            "Plateau.update: value must be a number or an array of one element, got 'x'",
        ),
        (lambda: Monitor(watch={"loss": 3}), TypeError, "Monitor: watch['loss'] must be a Criterion, got int"),
        (lambda: Monitor(watch={"loss": [Plateau]}), TypeError, "Monitor: watch['loss'] must be a Criterion, got ABCMeta"),
    ],
)
def test_criteria_refuse_wrong_settings(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as info:
        make()
    assert str(info.value) == message


CRITERIA = [
    lambda: EarlyStopping(3, mode="max", min_delta=0.01),
    lambda: Plateau(4, tolerance=0.05, mode="max"),
    lambda: RelativeChange(0.1, window=4),
]


@pytest.mark.parametrize("make", CRITERIA)
@pytest.mark.parametrize("way", ["state_dict", "pickle", "deepcopy"])
def test_criteria_go_on_where_they_were(make: Any, way: str) -> None:
    values = np.random.default_rng(4).uniform(0.9, 1.1, 60).tolist()
    criterion = make()
    reached_at(criterion, values[:30])
    if way == "state_dict":
        again = make()
        again.load_state_dict(json.loads(json.dumps(criterion.state_dict())))
    else:
        again = pickle.loads(pickle.dumps(criterion)) if way == "pickle" else copy.deepcopy(criterion)
    assert repr(again) == repr(criterion) and again.reached == criterion.reached
    rest = reached_at(criterion, values[30:])
    assert reached_at(again, values[30:]) == rest and rest
    assert again.state_dict() == criterion.state_dict()


def test_criteria_refuse_the_state_of_others() -> None:
    with pytest.raises(
        ValueError, match="^Plateau.load_state_dict: state_dict must have reached, count, values, got reached, co"
    ):
        Plateau().load_state_dict(EarlyStopping().state_dict())


def test_monitor_tells_what_its_criteria_say_once() -> None:
    stopping = EarlyStopping(2, mode="max")
    monitor = Monitor(watch={"validation/accuracy": stopping, "loss": [Plateau(1), RelativeChange(0.0, window=3)]})
    for step, accuracy in enumerate([0.5, 0.7, 0.6, 0.6, 0.6], 1):
        monitor.record(loss=1.0 / min(step, 3))
        monitor.validate(accuracy=accuracy)
    assert [str(event) for event in monitor.events] == [
        "step 4: loss: the mean of 1 values is 0.333333, that of the 1 before 0.333333",
        "step 4: validation/accuracy: no better for 2 values; the best is 0.7, of step 2",
        "step 5: loss: the last 3 values lie between 0.333333 and 0.333333",
    ]
    assert {event.category for event in monitor.events} == {None}
    assert monitor.reached == ["validation/accuracy", "loss"] and monitor.stop
    assert (stopping.best, stopping.best_step) == (0.7, 2)
