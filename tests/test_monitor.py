"""The monitor records what it is given, goes on where it was when loaded, and watches an optimizer."""

from __future__ import annotations

import copy
import json
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gradstep
from gradstep.monitor import (
    DeadParameterWarning,
    EarlyStopping,
    JSONLinesWriter,
    Monitor,
    Plateau,
    RelativeChange,
    Table,
    Thresholds,
)

from .monitor_cases import INF, NAN, kinds, one, stats


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
