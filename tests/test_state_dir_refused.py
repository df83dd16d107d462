"""Folders of states that can't be gone on with: refused, and left as they were."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gradstep

from .state_dir_cases import opened, refuse, some


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (lambda: {"a": some()["a"]}, "AdamW: state_dir {} has states of 2 parameters, there are 1"),
        (
            lambda: {"b": some()["b"], "a": some()["a"]},
            "AdamW: state_dir {} has states of a parameter 'a' in the place of 'b'",
        ),
        (lambda: list(some().values()), "AdamW: state_dir {} has states of a parameter 'a' in the place of 0"),
        (
            lambda: {**some(), "b": np.ones((4, 3), np.float32)},
            "AdamW: state_dir {} has states for shape (3, 4) of params['b'], which has (4, 3)",
        ),
        (
            lambda: {**some(), "b": np.ones((3, 4))},
            "AdamW: state_dir {} has states for dtype float32 of params['b'], which has float64",
        ),
    ],
)
def test_parameters_that_do_not_fit(params: Any, message: str, tmp_path: Path) -> None:
    opened(tmp_path, 1).close()
    refuse(tmp_path, ValueError, message, lambda: gradstep.AdamW(params(), state_dir=tmp_path))


def test_another_class(tmp_path: Path) -> None:
    opened(tmp_path, 1).close()
    message = "Adam: state_dir {} has states of AdamW for numpy, not of Adam for numpy"
    refuse(tmp_path, ValueError, message, lambda: gradstep.Adam(some(), state_dir=tmp_path))


def test_something_else_lies_there(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("not to be lost")
    refuse(tmp_path, ValueError, "AdamW: state_dir {} has 'thesis.txt' and no manifest.json: it must be empty, or hold states")
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError):
        opened(tmp_path / "file")


def edit(path: Path, change: Any) -> None:
    text = json.loads((path / "manifest.json").read_text())
    change(text)
    (path / "manifest.json").write_text(json.dumps(text))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(kind="cake"), "is not gradstep's: it has 'cake', not 'gradstep states'"),
        (lambda m: m.update(version=2), "has version 2 of the format, this gradstep reads version 1"),
        (lambda m: m.pop("crc32"), "is damaged, or not gradstep's: its manifest.json can't be read"),
        (lambda m: m["contents"].update(steps=5), "is damaged: the checksum of its manifest.json is "),
        (lambda m: m["contents"]["params"][0]["state"].update(step={"number": 3}), "is damaged: the checksum"),
        (lambda m: m["contents"].update(clean=True, extra=1), "is damaged: the checksum"),
    ],
)
def test_manifests_that_can_not_be(change: Any, message: str, tmp_path: Path) -> None:
    opened(tmp_path, 1).close()
    edit(tmp_path, change)
    refuse(tmp_path, ValueError, f"AdamW: state_dir {{}} {message}")


def test_every_byte_of_a_manifest_counts(tmp_path: Path) -> None:
    opened(tmp_path, 1).close()
    path = tmp_path / "manifest.json"
    data = path.read_bytes()
    for at in range(len(data)):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        refuse(tmp_path, ValueError, "AdamW: state_dir {} ")
    for length in (0, 1, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        refuse(tmp_path, ValueError, "can't be read")


def test_files_that_are_missing_or_of_another_length(tmp_path: Path) -> None:
    opened(tmp_path, 1).close()
    path = tmp_path / "000001.state"
    data = path.read_bytes()
    for content in (data[:-1], data + b"\0", b""):
        path.write_bytes(content)
        refuse(tmp_path, ValueError, f"AdamW: state_dir {{}} has 000001.state with {len(content)} bytes, it should have 120")
    path.unlink()
    refuse(tmp_path, ValueError, "AdamW: state_dir {} has no 000001.state, which its manifest names")
