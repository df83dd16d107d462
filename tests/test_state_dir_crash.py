"""Folders of states when a disk is full, a folder can't be written or a process is killed."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import gradstep
from gradstep.state_files import folder as folders

from .child import ROOT, run_in_child
from .saving_cases import ADAMW, NUMPY, posix, without_permission
from .state_dir_cases import check_goes_on, in_files, opened

KILLS = int(os.environ.get("GRADSTEP_KILLS", "20"))
"""How many times a process that steps and flushes is killed."""


@posix
def test_a_full_disk(tmp_path: Path) -> None:
    run_in_child(fill_a_disk, str(tmp_path))


def fill_a_disk(name: str) -> None:
    """Files may have 40,000 bytes at most: states of 10,000 numbers fit, those of 20,000 do not."""
    import resource

    path = Path(name)
    small, large = np.ones(10_000, np.float32), np.ones(20_000, np.float32)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, resource.RLIM_INFINITY))
    opt = gradstep.AdamW([small, large], state_dir=path / "states")
    before = large.copy()
    with pytest.raises(OSError, match="File too large"):
        opt.step([small / 2, large / 2])
    assert not opt.state and opt.steps == 0 and np.array_equal(before, large) and np.array_equal(small, large[:10_000])
    opt.step([small / 2, None])
    opt.close()
    in_files(opt, path / "states")
    resumed = gradstep.AdamW([small, large], state_dir=path / "states")
    assert resumed.steps == 1 and resumed.state.keys() == {0}
    resumed.close()
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
    with pytest.raises(OSError, match="File too large"):
        gradstep.AdamW([small], state_dir=path / "others")
    assert not (path / "others").exists()


@posix
def test_a_folder_that_can_not_be_written() -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o555)
        with without_permission(), pytest.raises(PermissionError):
            opened(Path(name) / "states")
        with without_permission(), pytest.raises(PermissionError):
            opened(Path(name))
        assert not list(Path(name).iterdir())
        Path(name).chmod(0o755)


def test_room_is_taken_without_fallocate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "posix_fallocate", raising=False)
    monkeypatch.setattr(folders, "_BLOCK", 100)
    check_goes_on(NUMPY, tmp_path / "states", ADAMW, {"ema_decay": 0.9})


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="needs posix_fallocate")
def test_room_is_taken_when_a_state_is_made(tmp_path: Path) -> None:
    w = np.ones(1_000_000, np.float32)
    opt = gradstep.SGD([w], lr=0.1, momentum=0.9, state_dir=tmp_path)
    opt.step([w / 2])
    assert (tmp_path / "000000.state").stat().st_blocks * 512 >= w.nbytes


SIZE = 300_000


def step_forever(path: str) -> None:
    """Steps of a gradient of ones; every third is flushed. `sum` is the number of the step."""
    w, ones = np.zeros(SIZE, np.float32), np.ones(SIZE, np.float32)
    opt = gradstep.Adagrad([w], state_dir=path)
    while True:
        opt.step([ones])
        if opt.steps % 3 == 0:
            opt.flush()
            print("flushed", flush=True)


@posix
def test_processes_that_are_killed(tmp_path: Path) -> None:
    """At random moments: the folder is that of a step, or it is refused."""
    rng = random.Random(7)
    path = tmp_path / "states"
    code = f"from {__name__} import step_forever; step_forever({str(path)!r})"
    outcomes = []
    for _ in range(KILLS):
        with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE) as child:
            assert child.stdout is not None
            assert child.stdout.readline()
            time.sleep(rng.uniform(0, 0.02))
            child.send_signal(signal.SIGKILL)
        try:
            opt = gradstep.Adagrad([np.zeros(SIZE, np.float32)], state_dir=path)
        except ValueError as error:
            outcomes.append(str(error).split(" was left in the middle")[0])
            shutil.rmtree(path)
        else:
            assert opt.steps == opt.state[0]["step"] and opt.steps % 3 == 0 and (opt.state[0]["sum"] == opt.steps).all()
            outcomes.append("gone on")
            del opt
    refused = f"Adagrad: state_dir {path}"
    assert refused in outcomes and set(outcomes) <= {refused, "gone on"}
