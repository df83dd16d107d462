"""The monitor's alarms: each is raised once when it should be, and not before."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest

from gradstep.monitor import (
    DeadParameterWarning,
    DivergenceWarning,
    Event,
    ExplodingGradientWarning,
    Monitor,
    Thresholds,
    TrainingWarning,
    VanishingGradientWarning,
)

from .monitor_cases import INF, NAN, kinds, one, quiet, stats


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
