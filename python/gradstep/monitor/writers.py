"""Writers: where a monitor's records go as they come. Files are flushed after every record."""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, TypeAlias

from gradstep.monitor.alarms import Event
from gradstep.monitor.checks import check_choice
from gradstep.stats import Stats

Existing: TypeAlias = Literal["refuse", "append", "overwrite"]
"""What to do with a file that is already there."""

Row: TypeAlias = Mapping[str, float]
"""A record: numbers by name, ``step`` first; only what was given."""

STATS_COLUMNS = (*(field.name for field in fields(Stats) if field.name != "size"), "update_ratio")
"""The statistics that records have: all but the size, which stays the same."""


class Writer:
    """Base of the writers: takes all records and writes none. A subclass overrides those that it wants."""

    def write_step(self, row: Row, parameters: Mapping[Hashable, Stats]) -> None:
        """Write the record of a step."""

    def write_validation(self, row: Row) -> None:
        """Write the record of a validation."""

    def write_event(self, event: Event) -> None:
        """Write an event."""

    def close(self) -> None:
        """Write nothing any more."""


class _FileWriter(Writer):
    """Base of the writers that own a file."""

    def __init__(self, path: str | os.PathLike[str], existing: Existing) -> None:
        self.path, name = Path(path), type(self).__name__
        check_choice(f"{name}: existing", existing, ("refuse", "append", "overwrite"))
        found = None
        if existing == "append" and self.path.exists():
            _drop_incomplete_line(self.path)
            with self.path.open(encoding="utf-8", newline="") as file:
                found = file.readline() or None
        self._check_header(found)
        mode = {"refuse": "x", "append": "a", "overwrite": "w"}[existing]
        try:
            self._file = self.path.open(mode, encoding="utf-8", newline="")
        except FileExistsError:
            raise FileExistsError(f'{name}: {self.path} exists; pass existing="append" or existing="overwrite"') from None

    def _check_header(self, found: str | None) -> None:
        """Look at the first line of the file that is to be continued; None if there is none."""

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class CSVWriter(_FileWriter):
    """Writes the records of steps, or of validations, as a CSV file with one header.

    A value that a record lacks is an empty cell, NaN is ``nan``, infinity ``inf``; ``skipped`` is 0 or 1.

    Args:
        path: the file.
        records: which records to write, "steps" or "validations": they have different columns, and so files of their own.
        columns: the header, and with it the values that are written. By default step, loss, learning rate, statistics if there
            are some, and the metrics of the first record; a metric that turns up later is an error then.
        existing: "refuse" a file that is already there, "append" to it (its header stays; an incomplete last line, of a
            program that was killed, is dropped), or "overwrite" it.

    Raises:
        FileExistsError: if the file exists, and `existing` is "refuse".
        ValueError: if an argument is none of its choices, or `columns` is not the header of the file to append to.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        records: Literal["steps", "validations"] = "steps",
        columns: Sequence[str] | None = None,
        existing: Existing = "refuse",
    ) -> None:
        check_choice("CSVWriter: records", records, ("steps", "validations"))
        if columns is not None and (len(set(columns)) < len(columns) or not columns):
            raise ValueError(f"CSVWriter: columns must be different names, got {list(columns)!r}")
        self._records = records
        self._selected = columns is not None
        self._columns = None if columns is None else list(columns)
        self._headed = False
        super().__init__(path, existing)

    def _check_header(self, found: str | None) -> None:
        if found is None:
            return
        header = next(csv.reader([found]))
        if self._columns not in (None, header):
            raise ValueError(f"CSVWriter: columns are {self._columns}, the header of {self.path} has {header}")
        self._columns, self._headed = header, True

    def write_step(self, row: Row, parameters: Mapping[Hashable, Stats]) -> None:  # noqa: ARG002
        """Write a line for a step."""
        if self._records == "steps":
            self._write(row, ["step", "loss", "lr"])

    def write_validation(self, row: Row) -> None:
        """Write a line for a validation."""
        if self._records == "validations":
            self._write(row, ["step"])

    def _write(self, row: Row, first: list[str]) -> None:
        if self._columns is None:
            self._columns = [*first, *(name for name in row if name not in first)]
        unknown = [] if self._selected else [name for name in row if name not in self._columns]
        if unknown:
            raise ValueError(f"CSVWriter: {self.path} has no column {unknown[0]!r}, its header is {','.join(self._columns)}")
        writer = csv.writer(self._file, lineterminator="\n")
        if not self._headed:
            writer.writerow(self._columns)
            self._headed = True
        writer.writerow([_cell(row.get(name)) for name in self._columns])
        self._file.flush()


def _cell(value: float | bool | None) -> float | None:
    return int(value) if isinstance(value, bool) else value


class JSONLinesWriter(_FileWriter):
    """Writes all records into one file, a JSON object a line; ``kind`` says what it is.

    The first line is ``{"kind": "header", "format": "gradstep.monitor", "version": 1}``. The others are of kind ``step``,
    ``validation`` or ``event``. JSON has no number for NaN and the infinities: they are the strings ``"NaN"``, ``"Infinity"``
    and ``"-Infinity"``, which Python's ``float`` and JavaScript's ``Number`` read.

    Args:
        path: the file.
        parameters: whether steps have the statistics of each parameter: a list ``parameters`` of objects with a ``key``, which
            is the parameter's name or position.
        existing: "refuse" a file that is already there, "append" to it (an incomplete last line, of a program that was
            killed, is dropped), or "overwrite" it.

    Raises:
        FileExistsError: if the file exists, and `existing` is "refuse".
        ValueError: if `existing` is none of its choices, or the file to append to was not written by this class.
    """

    _HEADER: ClassVar = {"kind": "header", "format": "gradstep.monitor", "version": 1}

    def __init__(self, path: str | os.PathLike[str], *, parameters: bool = False, existing: Existing = "refuse") -> None:
        self._parameters = parameters
        self._headed = False
        super().__init__(path, existing)
        if not self._headed:
            self._write(self._HEADER)

    def _check_header(self, found: str | None) -> None:
        wanted = json.dumps(self._HEADER)
        if found is not None and found.rstrip("\r\n") != wanted:
            raise ValueError(f"JSONLinesWriter: {self.path} must begin with the line {wanted}, got {found[:80]!r}")
        self._headed = found is not None

    def write_step(self, row: Row, parameters: Mapping[Hashable, Stats]) -> None:
        """Write a line for a step."""
        record: dict[str, Any] = {"kind": "step", **row}
        if self._parameters:
            record["parameters"] = [{"key": _plain_key(key), **stats_row(stats)} for key, stats in parameters.items()]
        self._write(record)

    def write_validation(self, row: Row) -> None:
        """Write a line for a validation."""
        self._write({"kind": "validation", **row})

    def write_event(self, event: Event) -> None:
        """Write a line for an event."""
        parameters = [_plain_key(key) for key in event.parameters]
        self._write(
            {"kind": "event", "step": event.step, "event": event.kind, "message": event.message, "parameters": parameters}
        )

    def _write(self, record: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(_valid(record), allow_nan=False) + "\n")
        self._file.flush()


def stats_row(stats: Stats) -> dict[str, float]:
    """Return statistics as numbers by name."""
    return {name: getattr(stats, name) for name in STATS_COLUMNS}


def _plain_key(key: Hashable) -> str | int:
    return key if isinstance(key, (str, int)) else str(key)


def _valid(value: Any) -> Any:
    """Return a value with strings in the place of floats that JSON does not have."""
    if isinstance(value, Mapping):
        return {name: _valid(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_valid(item) for item in value]
    if not isinstance(value, float) or math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


class ScalarWriter(Protocol):
    """What writes TensorBoard's events: ``torch.utils.tensorboard.SummaryWriter``, tensorboardX's, or anything like them."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int, /) -> object:
        """Write a number under a tag, for a step."""


class TensorBoardWriter(Writer):
    """Passes the numbers on to a writer of TensorBoard events, which stays its owner's to flush and close.

    Tags are ``train/loss``, ``train/grad_norm`` and so on, ``validation/accuracy``, and ``parameters/weight0/grad_norm``.

    Args:
        writer: has a method ``add_scalar(tag, value, step)``.
        parameters: whether to write gradient norm and update ratio of each parameter as well.
        prefix: what tags begin with, as ``run1/``.

    Raises:
        TypeError: if `writer` has no ``add_scalar``.
    """

    def __init__(self, writer: ScalarWriter, *, parameters: bool = False, prefix: str = "") -> None:
        if not callable(getattr(writer, "add_scalar", None)):
            raise TypeError(f"TensorBoardWriter: writer must have a method add_scalar, got {type(writer).__name__}")
        self._writer, self._parameters, self._prefix = writer, parameters, prefix

    def write_step(self, row: Row, parameters: Mapping[Hashable, Stats]) -> None:
        """Pass on the numbers of a step."""
        self._add("train", row, row)
        if self._parameters:
            for key, stats in parameters.items():
                self._add(f"parameters/{key}", row, {"grad_norm": stats.grad_norm, "update_ratio": stats.update_ratio})

    def write_validation(self, row: Row) -> None:
        """Pass on the numbers of a validation."""
        self._add("validation", row, row)

    def _add(self, group: str, row: Row, values: Row) -> None:
        for name, value in values.items():
            if name != "step":
                self._writer.add_scalar(f"{self._prefix}{group}/{name}", float(value), int(row["step"]))


def _drop_incomplete_line(path: Path) -> None:
    """Cut off what follows the file's last line end."""
    with path.open("r+b") as file:
        end = file.seek(0, os.SEEK_END)
        while end > 0:
            begin = max(end - 65536, 0)
            file.seek(begin)
            found = file.read(end - begin).rfind(b"\n")
            if found >= 0:
                file.truncate(begin + found + 1)
                return
            end = begin
        file.truncate(0)
