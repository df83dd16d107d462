"""The monitor records what it is given, warns once when it should, knows when to stop, writes valid files and draws."""

from __future__ import annotations

import copy
import json
import math
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gradstep
from gradstep.monitor import (
    Criterion,
    CSVWriter,
    DeadParameterWarning,
    DivergenceWarning,
    EarlyStopping,
    Event,
    ExplodingGradientWarning,
    JSONLinesWriter,
    Monitor,
    Plateau,
    RelativeChange,
    Table,
    TensorBoardWriter,
    Thresholds,
    TrainingWarning,
    VanishingGradientWarning,
)
from gradstep.stats import Stats, StepStats

NAN, INF = math.nan, math.inf


def one(grad_norm: float = 1.0, **changes: Any) -> dict[str, Any]:
    """Return the fields of healthy statistics, with changes."""
    return {
        "grad_norm": grad_norm,
        "grad_norm_clipped": grad_norm,
        "update_norm": 0.01,
        "param_norm": 10.0,
        "grad_max": 0.5,
        "grad_nans": 0,
        "grad_infs": 0,
        "grad_zeros": 0,
        "size": 100,
        "clip_factor": 1.0,
        "skipped": False,
        **changes,
    }


def stats(
    step: int, grad_norm: float = 1.0, parameters: Mapping[Any, dict[str, Any]] | None = None, **changes: Any
) -> StepStats:
    parts = {key: Stats(**fields) for key, fields in (parameters or {}).items()}
    return StepStats(**one(grad_norm, **changes), step=step, parameters=parts)


def kinds(events: list[Event]) -> list[str]:
    return [event.kind for event in events]


def quiet(**settings: Any) -> Monitor:
    return Monitor(thresholds=Thresholds(**settings), warn=False)


# ---- recording ------------------------------------------------------------------------------------------------------------


def test_history_has_what_was_recorded_by_column() -> None:
    monitor = Monitor()
    monitor.record(stats(1, 2.0, {"w": one(1.5), "b": one(0.5)}), loss=0.7, lr=0.1)
    monitor.record(stats(2, 3.0, {"w": one(2.5, update_norm=0.2)}), loss=np.float32(0.5), lr=0.05, top5=0.9)
    monitor.validate(loss=0.8, accuracy=np.array(0.6))
    np.testing.assert_array_equal(monitor.history["step"], [1, 2])
    np.testing.assert_array_equal(monitor.history["loss"], [0.7, 0.5])
    np.testing.assert_array_equal(monitor.history["lr"], [0.1, 0.05])
    np.testing.assert_array_equal(monitor.history["grad_norm"], [2, 3])
    np.testing.assert_array_equal(monitor.history["update_ratio"], [0.001, 0.001])
    np.testing.assert_array_equal(monitor.history["skipped"], [0, 0])
    np.testing.assert_array_equal(monitor.history["top5"], [NAN, 0.9])
    np.testing.assert_array_equal(monitor.validation["step"], [2])
    np.testing.assert_array_equal(monitor.validation["accuracy"], [0.6])
    assert monitor.keys == ["w", "b"]
    np.testing.assert_array_equal(monitor.parameters["w", "grad_norm"], [1.5, 2.5])
    np.testing.assert_array_equal(monitor.parameters["b", "grad_norm"], [0.5, NAN])
    np.testing.assert_array_equal(monitor.parameters["w", "update_ratio"], [0.001, 0.02])


def test_steps_are_counted_where_there_are_no_statistics() -> None:
    monitor = Monitor()
    monitor.record(loss=1.0)
    monitor.record(loss=1.0, step=10)
    monitor.record(loss=1.0)
    np.testing.assert_array_equal(monitor.history["step"], [1, 10, 11])
    assert monitor.step == 11


def test_tensors_of_one_element_are_numbers() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    monitor = Monitor()
    monitor.record(loss=torch.tensor(0.5, requires_grad=True), norm=torch.ones(1))
    assert monitor.history["loss"][0] == 0.5
    with pytest.raises(
        TypeError, match=r"^Monitor.record: loss must be a number or an array of one element, got Tensor of shape"
    ):
        monitor.record(loss=torch.ones(2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"loss": "low"}, "Monitor.record: loss must be a number or an array of one element, got 'low'"),
        ({"lr": [0.1]}, "Monitor.record: lr must be a number or an array of one element, got list"),
        (
            {"acc": np.ones(3)},
            "Monitor.record: metrics['acc'] must be a number or an array of one element, got ndarray of shape (3,)",
        ),
        ({"grad_norm": 1.0}, "Monitor.record: metrics['grad_norm'] has a name that is taken"),
        ({"validation/loss": 1.0}, "Monitor.record: metrics['validation/loss'] has a name that is taken"),
    ],
)
def test_values_that_are_no_numbers_change_nothing(arguments: dict[str, Any], message: str) -> None:
    monitor = Monitor()
    with pytest.raises(TypeError) as error:
        monitor.record(**arguments)
    assert str(error.value) == message
    assert len(monitor.history) == monitor.step == 0


def test_validation_needs_metrics() -> None:
    with pytest.raises(TypeError, match="^Monitor.validate: metrics must not be empty$"):
        Monitor().validate()
    with pytest.raises(TypeError, match=r"^Monitor.validate: metrics\['kind'\] has a name that is taken$"):
        Monitor().validate(kind=1)


@pytest.mark.parametrize("keep", [1, 2, 5, 8, 64])
def test_bounded_tables_spread_over_the_whole_run(keep: int) -> None:
    table = Table(keep)
    for step in range(1000):
        table.append({"step": step})
        assert len(table) <= keep
    steps = table["step"]
    assert len(steps) > keep // 2 or keep == 1
    assert len(set(np.diff(steps))) <= 1
    assert steps[0] == 0 and (keep == 1 or steps[-1] >= 500)


def test_monitor_keeps_what_it_is_told_to() -> None:
    monitor = Monitor(keep=4, keep_parameters=0)
    for step in range(1, 100):
        monitor.record(stats(step, parameters={"w": one()}))
    assert 2 < len(monitor.history) <= 4
    assert len(monitor.parameters) == 0
    with pytest.raises(TypeError, match="^Monitor: keep must be an int, got 1.5$"):
        Monitor(keep=1.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="^Monitor: keep_parameters must be at least 0, got -1$"):
        Monitor(keep_parameters=-1)


# ---- alarms ---------------------------------------------------------------------------------------------------------------


def test_healthy_training_raises_no_alarm() -> None:
    rng = np.random.default_rng(1)
    monitor = Monitor()
    for step in range(1, 400):
        noise = float(rng.lognormal(sigma=0.5))
        monitor.record(stats(step, noise, {"w": one(noise), 1: one(noise / 9)}), loss=2 / step + 0.1 * noise)
    assert monitor.events == [] and monitor.alarms == frozenset() and not monitor.diverged


def test_vanishing_gradient_is_told_once_with_its_parameters() -> None:
    monitor = quiet(vanishing_ratio=1e-6, vanishing_steps=3)
    for step in range(1, 10):
        monitor.record(stats(step, parameters={"w": one(0.9e-5), "b": one(1.1e-5)}))
    assert monitor.events == [Event("vanishing", 3, "gradients have almost vanished for 3 steps, of 'w'", ("w",))]
    assert monitor.events[0].category is VanishingGradientWarning


def test_vanishing_gradient_by_absolute_norm_and_without_parameters() -> None:
    monitor = quiet(vanishing_ratio=None, vanishing_norm=1e-3, vanishing_steps=2)
    for step in range(1, 5):
        monitor.record(stats(step, 1e-3))
    assert list(map(str, monitor.events)) == ["step 2: gradients have almost vanished for 2 steps"]
    assert monitor.events[0].parameters == ()


def test_small_gradients_in_between_do_not_vanish() -> None:
    monitor = quiet(vanishing_steps=3, exploding_factor=None)
    for step in range(1, 40):
        monitor.record(stats(step, 1.0 if step % 3 == 0 else 1e-9))
    assert monitor.events == []


def test_dead_parameters_are_told_together_and_each_once() -> None:
    monitor = quiet(dead_steps=4)
    zeros = one(0.0, grad_zeros=100)
    for step in range(1, 20):
        parts = {"a": zeros, "b": zeros, "c": one(1.0, grad_zeros=99), "none": one(0.0, size=0)}
        if step > 5:
            parts["late"] = zeros
        monitor.record(stats(step, parameters=parts))
    assert monitor.events == [
        Event("dead", 4, "gradients were all zeros for 4 steps, of 'a', 'b'", ("a", "b")),
        Event("dead", 9, "gradients were all zeros for 4 steps, of 'late'", ("late",)),
    ]
    assert monitor.events[0].category is DeadParameterWarning


def test_long_lists_of_parameters_are_cut_in_the_message_alone() -> None:
    monitor = quiet(dead_steps=1)
    (event,) = monitor.record(stats(1, parameters={i: one(0.0, grad_zeros=100) for i in range(5)}))
    assert event.message == "gradients were all zeros for 1 steps, of 0, 1, 2 and 2 more"
    assert event.parameters == (0, 1, 2, 3, 4)


def test_exploding_gradient_is_one_far_over_the_median() -> None:
    monitor = quiet(exploding_factor=10, exploding_after=5, exploding_window=5)
    for step in range(1, 6):
        assert monitor.record(stats(step, 2.0 * step)) == []
    assert monitor.record(stats(6, 60.0)) == []
    (event,) = monitor.record(stats(7, 81.0))
    assert str(event) == "step 7: the gradient's norm is 81, its running median 8"
    assert event.category is ExplodingGradientWarning


def test_exploding_gradient_needs_some_norms_first() -> None:
    monitor = quiet(exploding_after=5)
    assert [kinds(monitor.record(stats(step, 100.0**step))) for step in range(1, 6)] == [[]] * 5
    assert kinds(monitor.record(stats(6, 100.0**6))) == ["exploding"]


def test_explosion_that_clipping_holds_is_none() -> None:
    monitor = quiet(exploding_after=5)
    for step in range(1, 20):
        monitor.record(stats(step, 1.0))
    assert monitor.record(stats(20, 1e6, grad_norm_clipped=1.0, clip_factor=1e-6)) == []


def test_gradient_with_nan_explodes_and_is_named() -> None:
    monitor = quiet()
    parts = {"w": one(NAN, grad_nans=3, update_norm=NAN), "b": one()}
    events = monitor.record(stats(1, NAN, parts, grad_nans=3, update_norm=NAN))
    assert events == [
        Event("exploding", 1, "the gradient has 3 NaN and 0 infinite elements, of 'w'", ("w",)),
        Event("nonfinite_updates", 1, "the norm of the update is nan, that of the parameters 10, of 'w'", ("w",)),
    ]
    assert monitor.diverged


def test_alarm_is_raised_again_only_after_calm() -> None:
    monitor = quiet(calm_steps=3)
    losses = [NAN, NAN, 1, NAN, 1, 1, NAN, 1, 1, 1, NAN]
    raised = [event.step for loss in losses for event in monitor.record(loss=loss)]
    assert raised == [1, 11]
    assert str(monitor.events[0]) == "step 1: the loss is nan"


def test_alarm_goes() -> None:
    monitor = quiet(calm_steps=2)
    monitor.record(loss=-INF)
    assert monitor.alarms == {"nonfinite_loss"} and monitor.diverged
    monitor.record(loss=1)
    assert monitor.diverged
    monitor.record(loss=1)
    assert not monitor.diverged and len(monitor.events) == 1


def test_rising_loss_is_divergence() -> None:
    monitor = quiet(loss_rise=0.5, loss_window=3)
    for loss in [4.0, 4.0, 4.0, 1.0, 1.0, 1.0, 3.0, 3.0, 3.0]:  # 1 + 0.5 * 4 is not passed
        assert monitor.record(loss=loss) == []
    assert monitor.record(loss=3.1) == []
    (event,) = monitor.record(loss=3.2)
    assert str(event) == "step 11: the loss has risen to 3.1, from 1 at its best"
    assert event.category is DivergenceWarning


def test_rise_is_measured_by_the_best_where_losses_fall_below_zero() -> None:
    monitor = quiet(loss_rise=0.5, loss_window=1)
    assert [kinds(monitor.record(loss=loss)) for loss in [-1, -100, -51, -49]] == [[], [], [], ["rising_loss"]]


def test_large_updates_in_a_row_are_divergence() -> None:
    monitor = quiet(update_ratio=0.5, update_steps=2)
    assert monitor.record(stats(1, update_norm=1.0, param_norm=0.0)) == []
    assert monitor.record(stats(2, update_norm=5.0)) == []
    assert monitor.record(stats(3, update_norm=6.0)) == []
    (event,) = monitor.record(stats(4, update_norm=7.0))
    assert str(event) == "step 4: updates are larger than 0.5 times the parameters for 2 steps: 7 to 10"


def test_skipped_steps_count_for_nothing_else() -> None:
    monitor = quiet(skipped_steps=3, dead_steps=1, exploding_after=1)
    bad = {"grad_nans": 2, "grad_zeros": 100, "update_norm": 0.0, "grad_norm_clipped": 0.0, "skipped": True}
    events = [kinds(monitor.record(stats(7, NAN, {"w": one(NAN, **bad)}, **bad))) for _ in range(5)]
    assert events == [[], [], ["skipped_steps"], [], []]
    assert str(monitor.events[0]) == "step 7: 3 steps in a row were skipped for non-finite gradients"


def test_none_turns_alarms_off() -> None:
    names = ["vanishing_ratio", "exploding_factor", "dead_steps", "loss_rise", "update_ratio", "skipped_steps"]
    monitor = Monitor(thresholds=Thresholds(**dict.fromkeys(names)))  # type: ignore[arg-type]
    for step in range(1, 40):
        monitor.record(stats(step, 0.0 if step < 20 else 10.0**step, grad_zeros=100, update_norm=99.0), loss=10.0**step)
        monitor.record(stats(step, skipped=True))
    assert monitor.events == []


def test_warnings_come_after_all_is_recorded_and_point_to_the_caller() -> None:
    seen: list[Event] = []
    monitor = Monitor(on_event=seen.append)
    with pytest.warns(DivergenceWarning, match="^step 1: the loss is inf$") as record:
        monitor.record(loss=INF)
    assert record[0].filename == __file__
    assert seen == monitor.events and len(monitor.history) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error", TrainingWarning)
        monitor.record(loss=INF)  # told before
        with pytest.raises(ExplodingGradientWarning):
            monitor.record(stats(3, NAN, grad_nans=1))
    assert len(monitor.history) == 3 and kinds(seen) == ["nonfinite_loss", "exploding"]


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"vanishing_ratio": 0}, ValueError, "vanishing_ratio must be finite and greater than 0, got 0"),
        ({"vanishing_norm": -1.0}, ValueError, "vanishing_norm must be finite and greater than 0, got -1.0"),
        ({"vanishing_steps": 0}, ValueError, "vanishing_steps must be at least 1, got 0"),
        ({"vanishing_steps": None}, TypeError, "vanishing_steps must be an int, got None"),
        ({"exploding_factor": 1}, ValueError, "exploding_factor must be greater than 1, got 1"),
        ({"exploding_factor": INF}, ValueError, "exploding_factor must be finite and greater than 0, got inf"),
        ({"exploding_window": 5}, ValueError, "exploding_after must be at most exploding_window, 5, got 10"),
        ({"dead_steps": 2.0}, TypeError, "dead_steps must be an int, got 2.0"),
        ({"loss_rise": NAN}, ValueError, "loss_rise must be finite and greater than 0, got nan"),
        ({"update_ratio": "big"}, TypeError, "update_ratio must be a number, got 'big'"),
        ({"calm_steps": True}, TypeError, "calm_steps must be an int, got True"),
    ],
)
def test_thresholds_out_of_range_are_refused(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as info:
        Thresholds(**settings)
    assert str(info.value) == f"Thresholds: {message}"


# ---- criteria -------------------------------------------------------------------------------------------------------------


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


# ---- files ----------------------------------------------------------------------------------------------------------------


def strict_json(line: str) -> Any:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(line, parse_constant=refuse)


def test_csv_has_a_fixed_header_and_comes_at_once(tmp_path: Path) -> None:
    path = tmp_path / "run.csv"
    monitor = Monitor(writers=[CSVWriter(path), CSVWriter(tmp_path / "validation.csv", records="validations")], warn=False)
    monitor.record(loss=0.5, accuracy=0.25)
    monitor.record(loss=NAN, lr=0.1, step=7)
    monitor.validate(loss=INF)
    # Not closed yet.
    assert path.read_bytes() == b"step,loss,lr,accuracy\n1,0.5,,0.25\n7,nan,0.1,\n"
    assert (tmp_path / "validation.csv").read_text() == "step,loss\n7,inf\n"
    with pytest.raises(ValueError) as error:
        monitor.record(loss=0.5, late=1)
    assert str(error.value) == f"CSVWriter: {path} has no column 'late', its header is step,loss,lr,accuracy"
    monitor.close()


def test_csv_has_the_statistics_and_numpy_reads_it(tmp_path: Path) -> None:
    with Monitor(writers=[CSVWriter(tmp_path / "run.csv")]) as monitor:
        for step in range(1, 4):
            monitor.record(stats(step, 0.1 * step, skipped=step == 2), loss=1 / step, lr=0.5)
    table = np.genfromtxt(tmp_path / "run.csv", delimiter=",", names=True)
    assert table.dtype.names is not None and set(monitor.history.names) == set(table.dtype.names)
    for name in table.dtype.names:
        np.testing.assert_array_equal(table[name], monitor.history[name])
    assert table["skipped"].tolist() == [0, 1, 0]


def test_csv_writes_the_columns_asked_for(tmp_path: Path) -> None:
    with Monitor(writers=[CSVWriter(tmp_path / "a.csv", columns=["step", "top5", "loss"])]) as monitor:
        monitor.record(stats(1), loss=0.5)
        monitor.record(stats(2), loss=0.25, top5=1.0, other=3.0)
    assert (tmp_path / "a.csv").read_text() == "step,top5,loss\n1,,0.5\n2,1.0,0.25\n"
    with pytest.raises(ValueError, match=r"^CSVWriter: columns must be different names, got \['step', 'step'\]$"):
        CSVWriter(tmp_path / "b.csv", columns=["step", "step"])


@pytest.mark.parametrize("kind", [CSVWriter, JSONLinesWriter])
def test_existing_files_are_left_alone_unless_asked(kind: Any, tmp_path: Path) -> None:
    path = tmp_path / "run"
    path.write_text("precious")
    with pytest.raises(FileExistsError) as error:
        kind(path)
    assert str(error.value) == f'{kind.__name__}: {path} exists; pass existing="append" or existing="overwrite"'
    with pytest.raises(ValueError, match="existing must be one of 'refuse', 'append', 'overwrite', got 'replace'"):
        kind(path, existing="replace")
    assert path.read_text() == "precious"
    with Monitor(writers=[kind(path, existing="overwrite")]) as monitor:
        monitor.record(loss=1)
    assert "precious" not in path.read_text() and "loss" in path.read_text()


@pytest.mark.parametrize("kind", [CSVWriter, JSONLinesWriter])
@pytest.mark.parametrize("torn", ["", "77,0.1", "x" * 200_000])
def test_appending_goes_on_after_the_last_whole_line(kind: Any, torn: str, tmp_path: Path) -> None:
    path = tmp_path / "run"
    with Monitor(writers=[kind(path, existing="append")]) as monitor:
        monitor.record(loss=1)
    with path.open("a") as file:
        file.write(torn)
    with Monitor(writers=[kind(path, existing="append")]) as monitor:
        monitor.record(loss=2, step=2)
    lines = path.read_text().splitlines()
    assert len(lines) == 3
    if kind is CSVWriter:
        assert lines == ["step,loss,lr", "1,1.0,", "2,2.0,"]
    else:
        assert [strict_json(line)["kind"] for line in lines] == ["header", "step", "step"]


def test_appending_to_another_kind_of_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run"
    path.write_text("step,loss\n")
    with pytest.raises(ValueError) as error:
        CSVWriter(path, columns=["step", "lr"], existing="append")
    assert str(error.value) == f"CSVWriter: columns are ['step', 'lr'], the header of {path} has ['step', 'loss']"
    with pytest.raises(ValueError, match=r"^JSONLinesWriter: .* must begin with the line {.*}, got 'step,loss\\n'$"):
        JSONLinesWriter(path, existing="append")
    path.write_text("cut")
    CSVWriter(path, existing="append").close()
    assert path.read_text() == ""


def test_json_lines_are_valid_json_whatever_the_numbers(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    monitor = Monitor(writers=[JSONLinesWriter(path, parameters=True)], warn=False)
    parts = {"w": one(NAN, grad_nans=1), 3: one(param_norm=0.0), ("a", 1): one(-INF)}
    monitor.record(stats(1, NAN, parts, grad_nans=1), loss=INF, note=-INF)
    monitor.validate(accuracy=0.5)
    header, step, *events, validation = [strict_json(line) for line in path.read_text().splitlines()]
    monitor.close()
    assert header == {"kind": "header", "format": "gradstep.monitor", "version": 1}
    assert (step["kind"], step["step"], step["loss"], step["note"]) == ("step", 1, "Infinity", "-Infinity")
    assert step["grad_norm"] == "NaN" and step["skipped"] is False and step["grad_nans"] == 1
    assert [part["key"] for part in step["parameters"]] == ["w", 3, "('a', 1)"]
    assert [part["update_ratio"] for part in step["parameters"]] == [0.001, "Infinity", 0.001]
    assert [event["event"] for event in events] == ["nonfinite_loss", "exploding"]
    assert events[1] == {
        "kind": "event",
        "step": 1,
        "event": "exploding",
        "message": "the gradient has 1 NaN and 0 infinite elements, of 'w'",
        "parameters": ["w"],
    }
    assert validation == {"kind": "validation", "step": 1, "accuracy": 0.5}
    assert math.isnan(float(step["grad_norm"])) and float(step["loss"]) == INF


def test_json_lines_leave_parameters_out_by_default(tmp_path: Path) -> None:
    with Monitor(writers=[JSONLinesWriter(tmp_path / "run.jsonl")]) as monitor:
        monitor.record(stats(1, parameters={"w": one()}))
    assert "parameters" not in strict_json((tmp_path / "run.jsonl").read_text().splitlines()[1])


class Scalars:
    def __init__(self) -> None:
        self.calls: list[tuple[str, float, int]] = []

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        assert type(value) is float and type(step) is int
        self.calls.append((tag, value, step))


def test_tensorboard_gets_the_numbers() -> None:
    scalars = Scalars()
    monitor = Monitor(writers=[TensorBoardWriter(scalars, parameters=True, prefix="a/")])
    monitor.record(stats(3, 2.0, {"w": one(4.0)}), loss=0.5, top5=0.75)
    monitor.validate(accuracy=0.25)
    assert scalars.calls[0] == ("a/train/loss", 0.5, 3)
    assert ("a/train/grad_norm", 2.0, 3) in scalars.calls and ("a/train/top5", 0.75, 3) in scalars.calls
    assert scalars.calls[-3:] == [
        ("a/parameters/w/grad_norm", 4.0, 3),
        ("a/parameters/w/update_ratio", 0.001, 3),
        ("a/validation/accuracy", 0.25, 3),
    ]
    with pytest.raises(TypeError, match="^TensorBoardWriter: writer must have a method add_scalar, got list$"):
        TensorBoardWriter([])  # type: ignore[arg-type]


def test_tensorboard_reads_what_torchs_writer_wrote(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tensorboard's own
        tensorboard = pytest.importorskip("torch.utils.tensorboard", reason="torch is not installed")
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        with tensorboard.SummaryWriter(tmp_path) as writer:
            monitor = Monitor(writers=[TensorBoardWriter(writer)])
            monitor.record(stats(3), loss=0.5)
        events = EventAccumulator(str(tmp_path))
        events.Reload()
        (scalar,) = events.Scalars("train/loss")
    assert (scalar.step, scalar.value) == (3, 0.5)


# ---- pictures -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def full() -> Monitor:
    """A monitor that has seen all kinds of values."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    monitor = Monitor(warn=False)
    for step in range(1, 31):
        parts = {f"layer{i}": one(10.0 ** -(i % 3) / step, update_norm=0.1 / step) for i in range(4)}
        parts["dead"] = one(0.0, grad_zeros=100, update_norm=0.0)
        parts["fresh"] = one(1.0, param_norm=0.0 if step == 1 else 1.0)
        if step % 2:
            parts["rare"] = one(NAN if step == 9 else 1.0)
        monitor.record(stats(step, parameters=parts), loss=NAN if step == 5 else 1 / step, lr=0.1 / step)
        if step % 10 == 0:
            monitor.validate(loss=2 / step)
    return monitor


def test_loss_curves(full: Monitor) -> None:
    axes, rates = full.plot_losses(log=True, smooth=4).axes
    faint, smooth, validation, _ = axes.lines
    np.testing.assert_array_equal(faint.get_xdata(), [step for step in range(1, 31) if step != 5])
    np.testing.assert_allclose(smooth.get_ydata()[0], (1 + 1 / 2 + 1 / 3 + 1 / 4) / 4)
    np.testing.assert_array_equal(validation.get_xydata(), [[10, 0.2], [20, 0.1], [30, 2 / 30]])
    np.testing.assert_array_equal(rates.lines[0].get_ydata(), full.history["lr"])
    assert axes.get_yscale() == "log"
    assert full.plot_losses().axes[0].get_yscale() == "linear"


@pytest.mark.parametrize("over", ["steps", "parameters"])
def test_gradient_flow(full: Monitor, over: Any, tmp_path: Path) -> None:
    figure = full.plot_gradients(over=over)
    axes = [axes for axes in figure.axes if axes.get_title(loc="left")]
    assert [axes.get_title(loc="left") for axes in axes] == ["gradient norm", "update norm / parameter norm"]
    axis = axes[-1].yaxis if over == "steps" else axes[-1].xaxis
    assert [label.get_text() for label in axis.get_ticklabels()] == full.keys
    figure.savefig(tmp_path / "flow.png")
    if over == "steps":
        values = axes[0].collections[0].get_array()
        assert values.shape == (7, 30)
        assert values[0, 2] == pytest.approx(1 / 3)
        assert (values[4] < values[:4].min()).all()  # dead: under the scale
        assert values.mask[6].tolist() == [bool(step % 2 == 0 or step == 9) for step in range(1, 31)]
        assert axes[1].collections[0].get_array()[5, 0] > axes[1].collections[0].norm.vmax


def test_pictures_are_saved_and_pyplot_is_left_alone(full: Monitor, tmp_path: Path) -> None:
    import matplotlib.pyplot as plt

    full.save(tmp_path / "all.png", log=True, smooth=3)
    full.save(tmp_path / "all.svg")
    assert (tmp_path / "all.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert plt.get_fignums() == []


def test_picture_of_losses_alone(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    monitor = Monitor()
    monitor.validate(loss=1.0, step=3)
    monitor.save(tmp_path / "losses.pdf")
    assert (tmp_path / "losses.pdf").stat().st_size > 0


def test_nothing_to_draw_is_an_error(full: Monitor) -> None:
    monitor = Monitor(keep_parameters=0)
    with pytest.raises(ValueError, match="^the monitor has no loss to draw$"):
        monitor.plot_losses()
    monitor.record(stats(1, parameters={"w": one()}))
    with pytest.raises(ValueError, match="^Monitor.plot_gradients: no statistics of parameters have been kept$"):
        monitor.plot_gradients()
    with pytest.raises(ValueError, match="^Monitor.plot_gradients: over must be one of 'steps', 'parameters', got 'time'$"):
        full.plot_gradients(over="time")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="^Monitor.save: smooth must be at least 1, got 0$"):
        full.save("never.png", smooth=0)


def test_pictures_say_that_they_need_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="^the monitor's pictures need matplotlib: pip install matplotlib$"):
        Monitor().plot_losses()


# ---- saving ---------------------------------------------------------------------------------------------------------------


def drive(monitor: Monitor, first: int, last: int) -> None:
    """Feed steps that depend on their number alone, with all kinds of trouble."""
    for step in range(first, last):
        noise = np.random.default_rng(step)
        norm = float(noise.lognormal(sigma=2))
        zeros = {"grad_zeros": 100} if step % 30 > 5 else {}
        parts = {"w": one(norm), 1: one(0.0, **zeros)}
        loss = NAN if step % 17 == 0 else float(noise.uniform(1, 1 + step % 40))
        monitor.record(stats(step, norm, parts, skipped=step % 50 < 7), loss=loss)
        if step % 5 == 0:
            monitor.validate(accuracy=noise.uniform())


def make() -> Monitor:
    watch = {"validation/accuracy": EarlyStopping(3, mode="max"), "loss": [Plateau(5), RelativeChange(0.5, window=3)]}
    return Monitor(thresholds=Thresholds(calm_steps=4, loss_rise=0.5), watch=watch, warn=False, keep=40, keep_parameters=16)


@pytest.mark.parametrize("way", ["json", "pickle", "deepcopy"])
def test_monitor_goes_on_where_it_was(way: str, tmp_path: Path) -> None:
    whole, part = make(), make()
    drive(whole, 1, 200)
    drive(part, 1, 90)
    if way == "json":
        again = make()
        again.load_state_dict(json.loads(json.dumps(part.state_dict())))
    else:
        part.writers = [JSONLinesWriter(tmp_path / "run.jsonl")]
        again = pickle.loads(pickle.dumps(part)) if way == "pickle" else copy.deepcopy(part)
        part.close()
        assert again.writers == []
    drive(again, 90, 200)
    assert {event.kind for event in whole.events} >= {
        "exploding",
        "dead",
        "nonfinite_loss",
        "rising_loss",
        "skipped_steps",
        "reached",
    }
    assert again.events == whole.events
    assert (again.alarms, again.reached, again.keys, repr(again)) == (whole.alarms, whole.reached, whole.keys, repr(whole))
    assert repr(again.state_dict()) == repr(whole.state_dict())


def test_state_dict_survives_torchs_safe_loading(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    monitor = make()
    drive(monitor, 1, 60)
    torch.save(monitor.state_dict(), tmp_path / "monitor.pt")
    again = make()
    again.load_state_dict(torch.load(tmp_path / "monitor.pt", weights_only=True))
    assert repr(again.state_dict()) == repr(monitor.state_dict())
    np.testing.assert_array_equal(again.parameters["w", "grad_norm"], monitor.parameters["w", "grad_norm"])


def test_state_is_thinned_out_for_a_smaller_bound() -> None:
    monitor = make()
    drive(monitor, 1, 100)
    small = Monitor(keep=5, watch=make().watch)
    small.load_state_dict(monitor.state_dict())
    assert 2 < len(small.history) <= 5


def test_state_of_other_criteria_is_refused() -> None:
    monitor = Monitor(watch={"loss": Plateau()})
    with pytest.raises(ValueError) as error:
        monitor.load_state_dict(make().state_dict())
    wanted = "{'validation/accuracy': 1, 'loss': 2}, the monitor has {'loss': 1}"
    assert str(error.value) == f"Monitor.load_state_dict: state_dict has criteria {wanted}"


# ---- with an optimizer ----------------------------------------------------------------------------------------------------


def test_monitor_watches_an_optimizer() -> None:
    params = {"w": np.full((3, 4), 2.0), "b": np.ones(5)}
    optimizer = gradstep.SGD(params, lr=0.25)
    monitor = Monitor(thresholds=Thresholds(dead_steps=3), watch={"loss": RelativeChange(1e-9, window=3)})

    def train() -> None:
        while not monitor.stop and monitor.step < 100:
            loss = 1 + float(np.square(params["w"]).sum()) / 2
            monitor.record(optimizer.step({"w": params["w"].copy(), "b": np.zeros(5)}, stats=True), loss=loss, lr=0.25)

    with pytest.warns(DeadParameterWarning, match="^step 3: gradients were all zeros for 3 steps, of 'b'$"):
        train()
    assert monitor.stop and monitor.step < 60
    norms = 2 * math.sqrt(12) * 0.75 ** np.arange(len(monitor.history))
    np.testing.assert_allclose(monitor.history["grad_norm"], norms)
    np.testing.assert_allclose(monitor.parameters["w", "update_ratio"], 0.25)
    np.testing.assert_array_equal(monitor.parameters["b", "update_ratio"], 0)


def test_steps_that_an_optimizer_skips_are_counted() -> None:
    optimizer = gradstep.AdamW(np.ones(7, np.float32), on_nonfinite="skip")
    monitor = Monitor(thresholds=Thresholds(skipped_steps=3), warn=False)
    grads = [np.full(7, value, np.float32) for value in [1, NAN, INF, NAN, 1]]
    events = [kinds(monitor.record(optimizer.step(grad, stats=True))) for grad in grads]
    assert events == [[], [], [], ["skipped_steps"], []]
    np.testing.assert_array_equal(monitor.history["skipped"], [0, 1, 1, 1, 0])
