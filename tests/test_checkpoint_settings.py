"""Settings in checkpoints: every kind comes back as it was, and what is given when loading overrides it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gradstep
from gradstep.schedules import Constant, Cosine, Linear, ReduceOnPlateau

from .checkpoint_cases import load, saved, some


def test_options_that_are_given_override(tmp_path: Path) -> None:
    saved(tmp_path / "a", lr=0.1, clip_norm=1.0, ema_decay=0.9, on_nonfinite="skip", l1=0.5)
    other = load(tmp_path / "a", lr=0.2, clip_norm=None, ema_decay=None, swa=(0, 1), zero_grad=True)
    (group,) = other.param_groups
    assert (group["lr"], group["swa"], group["l1"]) == (0.2, (0, 1), 0.5) and "ema_decay" not in group
    assert (other.clip_norm, other.on_nonfinite, other.zero_grad) == (None, "skip", True)
    assert other.defaults["lr"] == 0.2 and "ema_decay" not in other.defaults
    assert other.state["a"].keys() == {"exp_avg", "exp_avg_sq", "step", "ema", "ema_count"}
    groups = [{"params": dict(zip("ab", some(), strict=True)), "lr": 0.3, "l1": None}]
    other = gradstep.AdamW.load(tmp_path / "a", groups, lr=0.2)
    assert other.param_groups[0]["lr"] == 0.3 and other.param_groups[0]["l1"] is None and other.defaults["lr"] == 0.2
    assert "lr" in groups[0] and len(groups[0]) == 3


def test_the_groups_given_are_left_alone(tmp_path: Path) -> None:
    saved(tmp_path / "a")
    groups = [{"params": dict(zip("ab", some(), strict=True)), "lr": 0.3}]
    gradstep.AdamW.load(tmp_path / "a", groups)
    assert groups[0].keys() == {"params", "lr"}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"color": 1}, TypeError, "AdamW.__init__() got an unexpected keyword argument 'color'"),
        ({"lr": -1.0}, ValueError, "AdamW: lr must be >= 0, got -1.0"),
        ({"clip_norm": -1.0}, ValueError, "AdamW: clip_norm must be >= 0 and finite, got -1.0"),
        ({"ema_correction": "bias"}, ValueError, "AdamW: ema_correction needs ema_decay"),
        (
            {"state_dtype": "q2"},
            ValueError,
            "AdamW: state_dtype must be one of 'float64', 'float32', 'bfloat16', 'float16', 'q8', 'q4', got 'q2'",
        ),
    ],
)
def test_options_that_can_not_be(options: dict[str, Any], error: type[Exception], message: str, tmp_path: Path) -> None:
    saved(tmp_path / "a")
    with pytest.raises(error) as caught:
        load(tmp_path / "a", **options)
    assert str(caught.value) == message


def test_an_option_that_contradicts_a_saved_one(tmp_path: Path) -> None:
    saved(tmp_path / "a", ema_decay=0.9, ema_correction="bias")
    with pytest.raises(ValueError, match="ema_correction needs ema_decay"):
        load(tmp_path / "a", ema_decay=None)


SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "numbers of NumPy": (
        {"lr": np.float32(0.1), "weight_decay": np.array(0.5), "lookahead": (np.int64(2), 0.5), "centralize": np.bool_(True)},
        {"lr": float(np.float32(0.1)), "weight_decay": 0.5, "lookahead": (2, 0.5), "centralize": True},
    ),
    "infinities": ({"bounds": (-math.inf, math.inf), "trust_ratio": (0.5, math.inf)},) * 2,
    "None in a pair": ({"bounds": (None, 2)},) * 2,
    "lists": ({"betas": [0.5, 0.6]},) * 2,
    "formats by name": ({"state_dtype": {"exp_avg": "bfloat16"}},) * 2,
    "a schedule": ({"lr": Linear(start=0.0, end=0.1, steps=3) >> 0.5 * Cosine(start=0.2, steps=9)},) * 2,
}


@pytest.mark.parametrize("name", SETTINGS)
def test_kinds_of_settings(name: str, tmp_path: Path) -> None:
    given, expected = SETTINGS[name]
    saved(tmp_path / "a", **given)
    for settings in (load(tmp_path / "a").param_groups[0], load(tmp_path / "a").defaults):
        found = {key: settings[key] for key in given}
        assert found == expected
        assert {key: type(value) for key, value in found.items()} == {key: type(value) for key, value in expected.items()}


def test_a_schedule_that_groups_share_is_shared_again(tmp_path: Path) -> None:
    plateau = ReduceOnPlateau(start=0.1, patience=0)
    groups = [
        {"params": {"a": np.ones(3)}},
        {"params": {"b": np.ones(3)}},
        {"params": {"c": np.ones(3)}, "lr": Constant(value=0.1)},
    ]
    opt = gradstep.SGD(groups, lr=plateau)
    for metric in (1.0, math.inf, 2.0):
        plateau.update(metric)
    opt.save(tmp_path / "a")
    other = gradstep.SGD.load(tmp_path / "a", [{"params": group["params"]} for group in groups])
    first, second, third = (group["lr"] for group in other.param_groups)
    assert first is second is other.defaults["lr"] and first == plateau and first is not plateau
    assert third == Constant(value=0.1) and first(0) < 0.1
