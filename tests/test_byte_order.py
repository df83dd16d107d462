"""Checkpoints are little-endian: a big-endian machine is refused, when it writes and when it reads."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

import gradstep


def test_a_big_endian_machine_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    params = {"w": np.ones(5, np.float32)}
    opt = gradstep.AdamW(params, lr=0.1)
    opt.step({"w": np.full(5, 0.5, np.float32)})
    opt.save(tmp_path / "a")
    before = (tmp_path / "a").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "byteorder", "big")
        why = "arrays in it are little-endian, this machine is big-endian"
        for name in ("a", "b"):
            with pytest.raises(RuntimeError) as caught:
                opt.save(tmp_path / name)
            assert str(caught.value) == f"{tmp_path / name} can't be written: {why}"
        with pytest.raises(RuntimeError) as caught:
            gradstep.AdamW.load(tmp_path / "a", params)
        assert str(caught.value) == f"AdamW.load: {tmp_path / 'a'} can't be read: {why}"
        assert type(caught.value) is RuntimeError
    assert [file.name for file in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_bytes() == before
    assert gradstep.AdamW.load(tmp_path / "a", params).steps == 1
