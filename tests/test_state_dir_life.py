"""The life of a folder of states: made, flushed, closed and opened again, by one optimizer at a time."""

from __future__ import annotations

import copy
import json
import mmap
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gradstep

from .child import ROOT, run_in_child
from .state_dir_cases import in_files, opened, some


def manifest(path: Path) -> Any:
    return json.loads((path / "manifest.json").read_text())["contents"]


def test_what_lies_in_a_folder(tmp_path: Path) -> None:
    """What docs/checkpoints.md says."""
    path = tmp_path / "states"
    opt = opened(path)
    assert sorted(p.name for p in path.iterdir()) == ["lock", "manifest.json"] and manifest(path)["clean"]
    opt.step(some())
    assert not manifest(path)["clean"]
    files = sorted(p.name for p in path.iterdir())
    assert files == ["000000.state", "000001.state", "000002.state", "000003.state", "lock", "manifest.json"]
    opt.flush()
    contents = manifest(path)
    assert contents["clean"] and contents["steps"] == 1 and contents["optimizer"] == "AdamW"
    record = contents["params"][0]
    assert record["name"] == "a" and record["state"]["step"] == {"number": 1}
    of_file = record["state"]["exp_avg"]
    assert np.array_equal(np.fromfile(path / of_file["file"], np.float32), opt.state["a"]["exp_avg"])


def test_states_are_used_in_place(tmp_path: Path) -> None:
    opt = opened(tmp_path, 1)
    array = opt.state["a"]["exp_avg"]
    assert isinstance(array.base, mmap.mmap) and array.flags.writeable
    opt.step(some())
    assert opt.state["a"]["exp_avg"] is array
    opt.flush()
    assert opt.state["a"]["exp_avg"] is array


def test_steps_since_the_last_flush_are_lost_loudly(tmp_path: Path) -> None:
    opt = opened(tmp_path, 2)
    opt.flush()
    del opt
    opt = opened(tmp_path)
    assert opt.steps == opt.state["a"]["step"] == 2
    opt.step(some())
    del opt
    for _ in range(2):
        with pytest.raises(ValueError) as caught:
            opened(tmp_path)
        assert str(caught.value) == (
            f"AdamW: state_dir {tmp_path} was left in the middle: steps were taken since the last flush(), so its files belong "
            "to no step; delete it to start over, or to load a checkpoint into it"
        )


def test_opening_alone_changes_nothing(tmp_path: Path) -> None:
    opened(tmp_path, 2).close()
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    for _ in range(2):
        opt = opened(tmp_path)
        assert opt.steps == 2
        del opt
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_refused_step_changes_no_state(tmp_path: Path) -> None:
    opt = opened(tmp_path, 1)
    before = copy.deepcopy(opt.state)
    for grads in ({"a": np.ones(30, np.int32), "b": None}, {"a": np.ones(31, np.float32), "b": None}):
        with pytest.raises((TypeError, ValueError)):
            opt.step(grads)
    opt.close()
    resumed = opened(tmp_path)
    for key, state in before.items():
        for name, value in state.items():
            assert np.array_equal(resumed.state[key][name], value)


def test_files_of_a_refused_first_step_are_removed(tmp_path: Path) -> None:
    opt = opened(tmp_path)
    with pytest.raises(ValueError, match="shape"):
        opt.step({"a": some()["a"], "b": np.ones(5, np.float32)})
    assert not opt.state
    opt.step(some())
    opt.flush()
    in_files(opt, tmp_path)


def test_a_skipped_step(tmp_path: Path) -> None:
    opt = opened(tmp_path, 1, on_nonfinite="skip")
    opt.step({"a": np.full(30, np.nan, np.float32), "b": None})
    opt.close()
    assert opened(tmp_path).steps == 1


def test_one_optimizer_at_a_time(tmp_path: Path) -> None:
    opt = opened(tmp_path, 1)
    opt.flush()
    message = f"AdamW: state_dir {tmp_path} is in use by another optimizer, of this process or another; close() ends that"
    with pytest.raises(RuntimeError) as caught:
        opened(tmp_path)
    assert str(caught.value) == message
    code = f"import tests.state_dir_cases as t; from pathlib import Path; t.opened(Path({str(tmp_path)!r}))"
    child = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert message in child.stderr
    opt.close()
    assert opened(tmp_path).steps == 1


def test_a_closed_folder_takes_no_steps(tmp_path: Path) -> None:
    opt = opened(tmp_path, 1, ema_decay=0.9)
    opt.close()
    p = copy.deepcopy(opt.param_groups[0]["params"])
    for call in (lambda: opt.step(some()), opt.flush, opt.close, opt.swap_ema):
        with pytest.raises(RuntimeError, match=f"AdamW: state_dir {tmp_path} is closed"):
            call()
    assert all(np.array_equal(x, y) for x, y in zip(p, opt.param_groups[0]["params"], strict=True))
    assert opened(tmp_path).steps == 1


def test_without_a_folder(tmp_path: Path) -> None:
    opt = gradstep.AdamW(some())
    for function in ("flush", "close"):
        with pytest.raises(RuntimeError) as caught:
            getattr(opt, function)()
        assert str(caught.value) == f"AdamW.{function}: there is no state_dir; save(path) writes a checkpoint"
    assert gradstep.AdamW(some(), state_dir=None).state == {}


def test_a_fork_of_the_process(tmp_path: Path) -> None:
    run_in_child(step_in_a_fork, str(tmp_path))


def step_in_a_fork(path: str) -> None:
    if not hasattr(os, "fork"):
        return
    opt = opened(Path(path), 1)
    child = os.fork()
    if child == 0:
        try:
            opt.step(some())
        except RuntimeError as error:
            os._exit(0 if f"belongs to process {os.getppid()}" in str(error) else 2)
        os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    opt.step(some())
    opt.close()


@pytest.mark.parametrize("how", ["pickle", "deepcopy", "state_dict"])
def test_copies_are_in_memory(how: str, tmp_path: Path) -> None:
    opt = opened(tmp_path, 2)
    if how == "state_dict":
        twin = gradstep.AdamW(some())
        twin.load_state_dict(opt.state_dict())
    else:
        twin = pickle.loads(pickle.dumps(opt)) if how == "pickle" else copy.deepcopy(opt)
    assert twin._work is None
    before = opt.state["a"]["exp_avg"].copy()
    twin.step(some())
    assert np.array_equal(opt.state["a"]["exp_avg"], before) and opt.steps == 2
    opt.close()
    assert opened(tmp_path).steps == 2


def test_states_that_are_replaced_are_put_into_files(tmp_path: Path) -> None:
    opt = opened(tmp_path, 1)
    other = gradstep.AdamW(some(), ema_decay=0.5)
    for _ in range(3):
        other.step(some())
    opt.load_state_dict(other.state_dict())
    opt.state["b"]["exp_avg"] = opt.state["b"]["exp_avg"].copy()[::-1].copy()[::-1]
    opt.close()
    in_files(opt, tmp_path)
    resumed = opened(tmp_path)
    assert resumed.steps == 3 and resumed.state["a"]["ema_count"] == 3
    for key, state in other.state.items():
        for name, value in state.items():
            assert np.array_equal(resumed.state[key][name], value), (key, name)


def test_averages_in_the_place_of_parameters(tmp_path: Path) -> None:
    """An exchange writes into the files: until the next flush they belong to no step."""
    opt = opened(tmp_path, 2, ema_decay=0.5)
    opt.flush()
    ema = opt.ema["a"].copy()
    with opt.averaged():
        assert np.array_equal(opt.param_groups[0]["params"][0], ema)
        assert not manifest(tmp_path)["clean"]
    assert np.array_equal(opt.ema["a"], ema)
    opt.close()
    assert np.array_equal(opened(tmp_path, ema_decay=0.5).ema["a"], ema)


def test_paths_of_any_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    opt = opened(Path("here") / "and" / "there", 1)
    monkeypatch.chdir("/")
    opt.step(some())
    opt.close()
    assert opened(tmp_path / "here" / "and" / "there").steps == 2


@pytest.mark.parametrize("face", [gradstep, "torch"], ids=["numpy", "torch"])
def test_no_group_has_a_folder_of_its_own(face: Any, tmp_path: Path) -> None:
    if face == "torch":
        torch = pytest.importorskip("torch", reason="torch is not installed")
        import gradstep.torch

        face, make = gradstep.torch, lambda: torch.nn.Parameter(torch.ones(3))
    else:
        make = lambda: np.ones(3, np.float32)
    message = "state_dir holds for all groups together: the constructor takes it"
    with pytest.raises(TypeError, match=message):
        face.AdamW([{"params": [make()], "state_dir": tmp_path}])
    opt = face.AdamW([make()])
    with pytest.raises(TypeError, match=message):
        opt.add_param_group({"params": [make()], "state_dir": tmp_path})
    assert not list(tmp_path.iterdir())
