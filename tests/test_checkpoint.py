"""Checkpoints: training goes on with the same bits, whatever form parameters have and whatever states hold."""

from __future__ import annotations

import copy
import json
import math
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gradstep
from gradstep.checkpoint.tensor_file import TensorFile
from gradstep.schedules import Cosine

from .cases import Case
from .checkpoint_cases import load, saved, some
from .format_cases import formats_of
from .saving_cases import (
    ADAMW,
    NUMPY,
    OPTIONS,
    Numpy,
    assert_all_same,
    case_options,
    each_case,
    each_format,
    each_option,
    each_order,
    each_rule,
    faces,
    in_order,
)
from .stage_cases import case_of, step_arguments


def check_goes_on(face: Numpy, path: Path, case: Case, options: dict[str, Any], dtype: str = "float32") -> None:
    """Save after two steps, load, take two more with both: all the same. And a file that is saved again is the same."""
    of_constructor, _, _ = step_arguments(case_options(case, options))
    params = face.params(dtype=dtype)
    opt = face.make(case, params, **of_constructor)
    face.step(opt, params, (1, 2), options)
    opt.save(path)
    others = face.copy(params)
    other = face.cls(case).load(path, others)
    assert_all_same(face, opt, params, other, others)
    face.step(opt, params, (3, 4), options)
    face.step(other, others, (3, 4), options)
    assert_all_same(face, opt, params, other, others)
    again = path.with_name("again")
    opt.save(path)
    other.save(again)
    assert path.read_bytes() == again.read_bytes()
    assert sorted(p.name for p in path.parent.iterdir()) == sorted([path.name, "again"])


@faces
@each_case
def test_every_rule_goes_on(face: Numpy, case: Case, tmp_path: Path) -> None:
    for dtype in ("float32", "float64"):
        check_goes_on(face, tmp_path / "checkpoint", case, {}, dtype)


@faces
@each_option
@each_rule
def test_every_option_goes_on(face: Numpy, rule: str, name: str, tmp_path: Path) -> None:
    check_goes_on(face, tmp_path / "checkpoint", case_of(rule), OPTIONS[name])


@faces
@each_format
@each_rule
def test_every_format_goes_on(face: Numpy, rule: str, kind: tuple[str, dict[str, Any]], tmp_path: Path) -> None:
    for options in ({}, OPTIONS["a usual step"]):
        check_goes_on(face, tmp_path / "checkpoint", case_of(rule), {**options, **kind[1]}, kind[0])


@faces
def test_before_the_first_step(face: Numpy, tmp_path: Path) -> None:
    params, others = face.params(), face.params()
    opt = face.make(ADAMW, params, ema_decay=0.9)
    opt.save(tmp_path / "a")
    other = face.cls(ADAMW).load(tmp_path / "a", others)
    face.step(opt, params, (1, 2), {})
    face.step(other, others, (1, 2), {})
    assert_all_same(face, opt, params, other, others)


def test_complex_parameters(tmp_path: Path) -> None:
    for dtype in (np.complex64, np.complex128):
        p = np.array([1 + 2j, 3 - 1j], dtype)
        opt = gradstep.AdamW({"w": p}, lr=0.1)
        opt.step({"w": p * (1 - 2j)})
        opt.save(tmp_path / "a")
        q = p.copy()
        other = gradstep.AdamW.load(tmp_path / "a", {"w": q})
        for o, x in ((opt, p), (other, q)):
            o.step({"w": x * (0.5 + 1j)})
        assert np.array_equal(p, q)
        for name in ("exp_avg", "exp_avg_sq"):
            assert np.array_equal(opt.state["w"][name], other.state["w"][name]) and other.state["w"][name].dtype == dtype


FORMS: dict[str, Any] = {
    "an array": lambda: some()[0],
    "a list": some,
    "a tuple": lambda: tuple(some()),
    "an iterator": lambda: iter(some()),
    "a dict": lambda: dict(zip("ab", some(), strict=True)),
    "a dict of other keys": lambda: dict(zip([("layer", 1), 7], some(), strict=True)),
    "an ordered dict": lambda: OrderedDict(zip("ab", some(), strict=True)),
    "groups": lambda: [{"params": some()}, {"params": dict(zip("ab", some(), strict=True)), "lr": 0.5}],
    "one group": lambda: [{"params": some()[0], "weight_decay": 0.5}],
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_parameters(form: str, tmp_path: Path) -> None:
    opt, twin = (gradstep.AdamW(FORMS[form](), lr=0.1) for _ in range(2))
    everything = [
        {key: p / 2 for key, p in zip(keys, group["params"], strict=True)}
        for keys, group in zip(opt._keys, opt.param_groups, strict=True)
    ]
    grads: Any = [
        list(group.values()) if f == "list" else group if f == "dict" else next(iter(group.values()))
        for group, f in zip(everything, opt._forms, strict=True)
    ]
    grads = grads if opt._grouped else grads[0]
    for o in (opt, twin):
        o.step(grads)
    opt.save(tmp_path / "a")
    given = FORMS[form]()
    other = gradstep.AdamW.load(tmp_path / "a", given)
    for ours, theirs in zip(opt.param_groups, other.param_groups, strict=True):
        for p, q in zip(ours["params"], theirs["params"], strict=True):
            q[...] = p
    other.step(grads)
    twin.step(grads)
    ours, theirs = ([p for group in o.param_groups for p in group["params"]] for o in (other, twin))
    assert_all_same(NUMPY, other, ours, twin, theirs)


@each_order
def test_layouts_of_parameters(order: str, tmp_path: Path) -> None:
    for dtype in (None, "bfloat16", "q8"):
        p, q = in_order(order), in_order(order)
        opt, _ = gradstep.AdamW([p], state_dtype=dtype), None
        opt.step([p / 2])
        opt.save(tmp_path / "a")
        q[...] = p
        other = gradstep.AdamW.load(tmp_path / "a", [q])
        for name, state in opt.state[0].items():
            if name != "step":
                assert other.state[0][name].strides == state.strides
        for o, x in ((opt, p), (other, q)):
            o.step([x * x])
        assert_all_same(NUMPY, opt, [p], other, [q])


@faces
def test_groups_with_settings_of_their_own(face: Numpy, tmp_path: Path) -> None:
    def groups(params: list[Any]) -> Any:
        return [{"params": params[:3], "lr": 0.02, "ema_decay": 0.9}, {"params": params[3:], "clip_value": 0.1}]

    params = face.params()
    opt = face.make(ADAMW, groups(params), clip_norm=3.0, on_nonfinite="skip")
    face.step(opt, params, (1, 2), {})
    opt.param_groups[0]["lr"] = 0.5
    opt.save(tmp_path / "a")
    others = face.copy(params)
    other = face.cls(ADAMW).load(tmp_path / "a", [{"params": others[:3]}, {"params": others[3:]}])
    assert other.param_groups[0]["lr"] == 0.5 and other.param_groups[1]["lr"] == opt.param_groups[1]["lr"]
    assert "ema_decay" not in other.param_groups[1]
    for o, p in ((opt, params), (other, others)):
        face.step(o, p, (3, 4), {})
    assert_all_same(face, opt, params, other, others)


def test_a_group_that_was_added(tmp_path: Path) -> None:
    opt = gradstep.AdamW(some(), lr=0.1)
    opt.add_param_group({"params": {"c": np.ones(4, np.float32)}, "lr": 0.2})
    opt.step([*some(), np.ones(4, np.float32)])
    opt.save(tmp_path / "a")
    other = gradstep.AdamW.load(tmp_path / "a", [{"params": some()}, {"params": {"c": np.ones(4, np.float32)}}])
    assert [group["lr"] for group in other.param_groups] == [0.1, 0.2]
    assert other.state.keys() == {0, 1, "c"}
    with pytest.raises(ValueError, match=r"AdamW.load: params has 1 groups, .* has 2"):
        gradstep.AdamW.load(tmp_path / "a", some())


@pytest.mark.parametrize("value", [0.5, math.inf, math.nan])
def test_norms_that_gradients_can_have(value: float, tmp_path: Path) -> None:
    opt = gradstep.NovoGrad({"a": np.ones(3)})
    opt.step({"a": np.ones(3)})
    opt.state["a"]["grad_norm_sq"] = value
    opt.save(tmp_path / "a")
    found = gradstep.NovoGrad.load(tmp_path / "a", {"a": np.ones(3)}).state["a"]["grad_norm_sq"]
    assert type(found) is float and np.array_equal(found, value, equal_nan=True)


def test_counts_that_are_arrays_of_one_number(tmp_path: Path) -> None:
    opt = saved(tmp_path / "a")
    opt.state["a"]["step"] = np.array(41)
    opt.state["b"]["step"] = 2**53 - 1
    opt.save(tmp_path / "a")
    state = load(tmp_path / "a").state
    assert (state["a"]["step"], state["b"]["step"]) == (41, 2**53 - 1) and type(state["a"]["step"]) is int


def test_what_others_keep_in_states(tmp_path: Path) -> None:
    opt = saved(tmp_path / "a")
    mine = {"mask": np.array([True, False]), "ids": np.arange(3, dtype=np.int64), "note": "hello", "pair": (1, None)}
    opt.state["a"].update(mine)
    opt.save(tmp_path / "a")
    state = load(tmp_path / "a", state_dtype="bfloat16").state["a"]
    for name, value in mine.items():
        assert np.array_equal(state[name], value) and type(state[name]) is type(value)
    assert state["ids"].dtype == np.int64
    opt.state["a"]["objects"] = np.array([None])
    with pytest.raises(TypeError, match=r"AdamW.save: state\['a'\]\['objects'\] has dtype object, which can't be saved"):
        opt.save(tmp_path / "a")


def test_what_is_loaded_is_ones_own(tmp_path: Path) -> None:
    opt = saved(tmp_path / "a")
    other = load(tmp_path / "a")
    for name in ("exp_avg", "exp_avg_sq"):
        assert other.state["a"][name].flags.writeable and other.state["a"][name].base is None
    (tmp_path / "a").unlink()
    other.step(dict(zip("ab", some(), strict=True)))
    assert opt.state["a"]["step"] == 1 and other.state["a"]["step"] == 2


def contents_of(path: Path) -> Any:
    with TensorFile(path, "test") as file:
        return file.contents


def test_contents_are_plain(tmp_path: Path) -> None:
    """What docs/checkpoints.md shows of a file."""
    saved(tmp_path / "a", lr=Cosine(start=0.1, steps=5))
    contents = contents_of(tmp_path / "a")
    assert json.loads(json.dumps(contents, allow_nan=False)) == contents
    assert contents["optimizer"] == "AdamW" and contents["steps"] == 1 and contents["gradstep"] == gradstep.__version__
    assert contents["groups"][0]["params"][0]["name"] == "a" and contents["groups"][0]["params"][0]["state"]["step"] == {
        "number": 1
    }


class Mine(gradstep.AdamW):
    """One with a constructor of its own."""

    def __init__(self, params: Any, warm: bool = False) -> None:
        super().__init__(params, lr=0.5 if warm else 0.25, clip_norm=2.0, ema_decay=0.5)


def test_a_class_of_ones_own(tmp_path: Path) -> None:
    opt = Mine(some(), warm=True)
    opt.step(some())
    opt.save(tmp_path / "a")
    other = Mine.load(tmp_path / "a", some())
    assert other.param_groups[0]["lr"] == other.defaults["lr"] == 0.5 and other.clip_norm == 2.0 and other.steps == 1
    with pytest.raises(ValueError, match="is a checkpoint of Mine for numpy, not of AdamW for numpy"):
        gradstep.AdamW.load(tmp_path / "a", some())


def test_copies_save_alike(tmp_path: Path) -> None:
    opt = saved(tmp_path / "a")
    copy.deepcopy(opt).save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_stochastic_rounding_goes_on_from_its_own_numbers(tmp_path: Path) -> None:
    """Nothing is drawn twice, and nothing is left out: draws follow from the step count."""
    check_goes_on(NUMPY, tmp_path / "a", ADAMW, formats_of(precision="stochastic", state_rounding="stochastic"), "bfloat16")
