"""Checkpoints loaded into other formats: states are converted, or refused where the formats can't follow."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gradstep
from gradstep import formats

from .format_cases import assert_same
from .format_references import FLOATS
from .saving_cases import ADAMW, Numpy, faces

BIG = [(70, 60), (5000,), (64,)]
ALL_FORMATS = ["float64", "float32", "bfloat16", "float16", "q8", "q4"]


def as_float(state: dict[str, Any], name: str, form: str, shape: Any) -> Any:
    """A state as float64."""
    if f"{name}_scale" in state:
        array = formats.dequantize(state[name], state[f"{name}_scale"], shape, form, unsigned=name == "exp_avg_sq")
        return array.astype(np.float64)
    return np.asarray(state[name]).astype(np.float64)


@faces
@pytest.mark.parametrize("to", [*ALL_FORMATS, None])
@pytest.mark.parametrize("source", ALL_FORMATS)
def test_states_are_converted(face: Numpy, source: str, to: str | None, tmp_path: Path) -> None:
    params = face.params(BIG)
    opt = face.make(ADAMW, params, state_dtype=source, ema_decay=0.9)
    face.step(opt, params, (1, 2), {})
    opt.save(tmp_path / "a")
    others = face.copy(params)
    other = face.cls(ADAMW).load(tmp_path / "a", others, state_dtype=to)
    assert other.param_groups[0].get("state_dtype") == to
    for shape, state, theirs in zip(BIG, face.states(opt, params), face.states(other, others), strict=True):
        state, theirs = ({name: face.array(value) for name, value in s.items()} for s in (state, theirs))
        small = math.prod(shape) < formats.LEAST_COMPRESSED
        form = "float32" if to is None or (small and to in ("q8", "q4")) else to
        for name in ("exp_avg", "exp_avg_sq"):
            exact = as_float(state, name, source, shape)
            if form in ("q8", "q4"):
                codes, scale = formats.quantize(exact, form, unsigned=name == "exp_avg_sq")  # type: ignore[arg-type]
                assert_same(theirs[name], codes, name)
                assert_same(theirs[f"{name}_scale"], scale, name)
            else:
                assert f"{name}_scale" not in theirs
                assert_same(theirs[name], exact.astype(FLOATS[form]), name)
        assert theirs["ema"].dtype == np.float32
        assert_same(theirs["ema"], state["ema"], "ema")
        assert theirs["step"] == 2
    face.step(other, others, (3,), {})
    for state in face.states(other, others):
        assert state["step"] == 3


@faces
def test_conversions_by_name_and_by_group(face: Numpy, tmp_path: Path) -> None:
    params = face.params(BIG)
    opt = face.make(ADAMW, [{"params": params[:1]}, {"params": params[1:]}], ema_decay=0.9)
    face.step(opt, params, (1, 2), {})
    opt.save(tmp_path / "a")
    others = face.copy(params)
    by_name = {"exp_avg": "q8", "ema": "bfloat16"}
    other = face.cls(ADAMW).load(tmp_path / "a", [{"params": others[:1], "state_dtype": by_name}, {"params": others[1:]}])
    first, second, _ = (
        {name: str(getattr(value, "dtype", "")) for name, value in s.items()} for s in face.states(other, others)
    )
    first = {name: dtype.removeprefix("torch.") for name, dtype in first.items()}
    assert (first["exp_avg"], first["exp_avg_scale"], first["exp_avg_sq"]) == ("uint8", "float32", "float32")
    assert first["ema"] == "bfloat16"
    assert second["exp_avg"].removeprefix("torch.") == "float32" and "exp_avg_scale" not in second


def test_conversions_of_parameters_in_another_order(tmp_path: Path) -> None:
    p = np.asfortranarray(np.random.default_rng(0).standard_normal((70, 64)).astype(np.float32))
    opt = gradstep.AdamW([p])
    opt.step([p / 2])
    opt.save(tmp_path / "a")
    compressed = gradstep.AdamW.load(tmp_path / "a", [p], state_dtype="q8")
    expected, _ = formats.quantize(opt.state[0]["exp_avg"], "q8")
    assert_same(compressed.state[0]["exp_avg"], expected, "codes")
    compressed.save(tmp_path / "b")
    back = gradstep.AdamW.load(tmp_path / "b", [p], state_dtype="float32")
    assert back.state[0]["exp_avg"].strides == p.strides
    decoded = formats.dequantize(compressed.state[0]["exp_avg"], compressed.state[0]["exp_avg_scale"], p.shape, "q8")
    assert_same(back.state[0]["exp_avg"], decoded, "decoded")


def test_complex_states_have_one_format(tmp_path: Path) -> None:
    opt = gradstep.AdamW([np.ones(3, np.complex64)])
    opt.step([np.ones(3, np.complex64)])
    opt.save(tmp_path / "a")
    with pytest.raises(ValueError, match="state_dtype is for real parameters"):
        gradstep.AdamW.load(tmp_path / "a", [np.ones(3, np.complex64)], state_dtype="bfloat16")


@faces
@pytest.mark.parametrize("precision", ["kahan", "master", "split"])
def test_another_precision(face: Numpy, precision: str, tmp_path: Path) -> None:
    kept = {"kahan": "compensation", "master": "master", "split": "remainder"}
    params = face.params(dtype="bfloat16")
    opt = face.make(ADAMW, params, precision=precision)
    face.step(opt, params, (1, 2), {})
    opt.save(tmp_path / "a")
    for given in ("nearest", None, precision):
        other = face.cls(ADAMW).load(tmp_path / "a", face.copy(params), precision=given)
        for state, theirs in zip(face.states(opt, params), face.states(other, other_params(other)), strict=True):
            assert theirs.keys() == (state.keys() if given == precision else state.keys() - {kept[precision]})
    for given in kept.keys() - {precision}:
        message = f"was saved with its '{kept[precision]}', which precision='{given}' can't go on from"
        with pytest.raises(ValueError, match=message):
            face.cls(ADAMW).load(tmp_path / "a", face.copy(params), precision=given)
    plain = face.make(ADAMW, params)
    plain.save(tmp_path / "b")
    others = face.copy(params)
    other = face.cls(ADAMW).load(tmp_path / "b", others, precision=precision)
    face.step(other, others, (1,), {})
    assert kept[precision] in face.states(other, others)[0]


def other_params(opt: Any) -> list[Any]:
    return [p for group in opt.param_groups for p in group["params"]]
