"""The monitor's writers: files that are valid at every moment, and numbers for TensorBoard."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gradstep.monitor import CSVWriter, JSONLinesWriter, Monitor, TensorBoardWriter

from .monitor_cases import INF, NAN, one, stats


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
