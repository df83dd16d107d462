"""Checkpoints loaded into folders of states."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gradstep

from .child import run_in_child
from .saving_cases import ADAMW, Numpy, assert_all_same, faces, posix
from .state_dir_cases import in_files, opened, refuse, some


@faces
@pytest.mark.parametrize("state_dtype", ["as it is", "q8", "bfloat16"])
def test_a_checkpoint_into_a_folder(face: Numpy, state_dtype: str, tmp_path: Path) -> None:
    params = face.params()
    opt = face.make(ADAMW, params, ema_decay=0.9)
    face.step(opt, params, (1, 2), {})
    opt.save(tmp_path / "a")
    given = {} if state_dtype == "as it is" else {"state_dtype": state_dtype}
    others, copies = face.copy(params), face.copy(params)
    in_memory = face.cls(ADAMW).load(tmp_path / "a", others, **given)
    mapped = face.cls(ADAMW).load(tmp_path / "a", copies, **given, state_dir=tmp_path / "states")
    in_files(mapped, tmp_path / "states")
    for o, p in ((in_memory, others), (mapped, copies)):
        face.step(o, p, (3, 4), {})
    assert_all_same(face, in_memory, others, mapped, copies)
    mapped.close()
    resumed = face.make(ADAMW, copies, ema_decay=0.9, **given, state_dir=tmp_path / "states")
    assert_all_same(face, in_memory, others, resumed, copies)
    resumed.save(tmp_path / "b")
    in_memory.save(tmp_path / "c")
    assert (tmp_path / "b").read_bytes() == (tmp_path / "c").read_bytes()


def test_a_checkpoint_into_a_folder_at_once_is_flushed(tmp_path: Path) -> None:
    opt = gradstep.AdamW(some())
    opt.step(some())
    opt.save(tmp_path / "a")
    loaded = gradstep.AdamW.load(tmp_path / "a", some(), state_dir=tmp_path / "states")
    del loaded
    assert opened(tmp_path / "states").steps == 1


def test_a_checkpoint_does_not_go_where_states_are(tmp_path: Path) -> None:
    opt = opened(tmp_path / "states", 1)
    opt.save(tmp_path / "a")
    opt.close()

    def load(folder: str) -> Any:
        return gradstep.AdamW.load(tmp_path / "a", some(), state_dir=tmp_path / folder)

    message = "AdamW.load: state_dir {} holds states already: it must be empty, or not there yet"
    refuse(tmp_path / "states", ValueError, message, lambda: load("states"))
    data = (tmp_path / "a").read_bytes()
    (tmp_path / "a").write_bytes(data[:-1] + b"\0")
    with pytest.raises(ValueError, match="is damaged"):
        load("others")
    assert not (tmp_path / "others").exists()
    (tmp_path / "a").write_bytes(data)
    (tmp_path / "others").mkdir()
    assert load("others").steps == 1


@posix
def test_a_checkpoint_into_a_full_disk(tmp_path: Path) -> None:
    run_in_child(load_into_a_full_disk, str(tmp_path))


def load_into_a_full_disk(name: str) -> None:
    import resource

    w = np.ones(20_000, np.float32)
    opt = gradstep.AdamW([w])
    opt.step([w / 2])
    opt.save(Path(name) / "a")
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, resource.RLIM_INFINITY))
    with pytest.raises(OSError, match="File too large"):
        gradstep.AdamW.load(Path(name) / "a", [w], state_dir=Path(name) / "states")
    assert [p.name for p in Path(name).iterdir()] == ["a"]
