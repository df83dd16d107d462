"""Checkpoints that can't be: what can't be saved, parameters that do not fit, contents that make no sense."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gradstep
from gradstep.checkpoint.tensor_file import Tensor, TensorFile, write
from gradstep.schedules import Constant

from .checkpoint_cases import load, saved
from .saving_cases import ADAMW, Numpy, faces
from .stage_cases import case_of


def test_names_of_other_kinds_are_refused(tmp_path: Path) -> None:
    opt = gradstep.AdamW({frozenset("a"): np.ones(3)})
    with pytest.raises(TypeError, match=r"AdamW.save: the name frozenset\({'a'}\) is .* which can't be saved"):
        opt.save(tmp_path / "a")
    assert not list(tmp_path.iterdir())


@faces
def test_functions_are_refused(face: Numpy, tmp_path: Path) -> None:
    params = face.params()
    opt = face.make(ADAMW, params)
    opt.save(tmp_path / "a")
    before = (tmp_path / "a").read_bytes()
    opt.param_groups[0]["lr"] = lambda step: 0.1
    with pytest.raises(
        TypeError, match=r"AdamW.save: param_groups\[0\]\['lr'\] is <function .*>, a function, which can't be saved"
    ):
        opt.save(tmp_path / "a")
    opt.param_groups[0]["lr"] = 0.1
    opt.defaults["lr"] = max
    with pytest.raises(TypeError, match=r"AdamW.save: defaults\['lr'\] is <built-in function max>"):
        opt.save(tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("value", [object(), b"bytes", {1: 2}, np.ones(2), np.longdouble(1) / 3, 1j], ids=repr)
def test_other_things_are_refused(value: Any, tmp_path: Path) -> None:
    opt = gradstep.SGD([np.ones(3)])
    opt.param_groups[0]["lr"] = value
    with pytest.raises(TypeError, match=r"SGD.save: param_groups\[0\]\['lr'\] is "):
        opt.save(tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_a_schedule_of_ones_own_that_can_not_be_saved(tmp_path: Path) -> None:
    opt = gradstep.SGD([np.ones(3)], lr=Odd())
    with pytest.raises(TypeError, match=r"\['lr'\] is .*, a schedule that can't be saved: its dict makes another one"):
        opt.save(tmp_path / "a")


class Odd(Constant):
    """One that forgets a setting."""

    def __init__(self) -> None:
        super().__init__(value=0.5)

    def to_dict(self) -> dict[str, Any]:
        return {"type": "Constant", "value": 0.25}


@faces
def test_states_of_no_parameter_are_refused(face: Numpy, tmp_path: Path) -> None:
    params = face.params()
    opt = face.make(ADAMW, params)
    face.step(opt, params, (1,), {})
    opt.state["lost"] = {"step": 1}
    with pytest.raises(ValueError, match="AdamW.save: state has 'lost', the optimizer has no such parameter"):
        opt.save(tmp_path / "a")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"a": np.ones(3, "f")}, "param_groups[0] has 1 parameters, {path} has 2"),
        ({"a": np.ones(3, "f"), "c": np.ones(4, "f")}, "param_groups[0] has the parameter 'c' where {path} has 'b'"),
        ({"b": np.ones(4, "f"), "a": np.ones(3, "f")}, "param_groups[0] has the parameter 'b' where {path} has 'a'"),
        ([np.ones(3, "f"), np.ones(4, "f")], "param_groups[0] has the parameter 0 where {path} has 'a'"),
        ({"a": np.ones(3, "f"), "b": np.ones(5, "f")}, "params['b'] has shape (5,), {path} has (4,)"),
        ({"a": np.ones((3, 1), "f"), "b": np.ones(4, "f")}, "params['a'] has shape (3, 1), {path} has (3,)"),
        ({"a": np.ones(3), "b": np.ones(4, "f")}, "params['a'] has dtype float64, {path} has float32"),
        ([{"params": {"a": np.ones(3, "f")}}, {"params": {"b": np.ones(4, "f")}}], "params has 2 groups, {path} has 1"),
    ],
)
def test_parameters_that_do_not_fit(params: Any, message: str, tmp_path: Path) -> None:
    saved(tmp_path / "a")
    with pytest.raises(ValueError) as caught:
        gradstep.AdamW.load(tmp_path / "a", params)
    assert str(caught.value) == f"AdamW.load: {message.format(path=tmp_path / 'a')}"


def test_parameters_that_are_none_are_refused(tmp_path: Path) -> None:
    saved(tmp_path / "a")
    for params in (None, 3, "ab", [3]):
        with pytest.raises(TypeError):
            gradstep.AdamW.load(tmp_path / "a", params)


@faces
def test_a_checkpoint_of_another_class(face: Numpy, tmp_path: Path) -> None:
    params = face.params()
    face.make(ADAMW, params).save(tmp_path / "a")
    with pytest.raises(ValueError) as caught:
        face.cls(case_of("adam")).load(tmp_path / "a", params)
    assert (
        str(caught.value)
        == f"Adam.load: {tmp_path / 'a'} is a checkpoint of AdamW for {face.name}, not of Adam for {face.name}"
    )


def rewrite(path: Path, change: Any) -> None:
    """A file with other contents, under a checksum that is right."""
    with TensorFile(path, "test") as file:
        contents, entries = file.contents, file.tensors
        data = {name: np.empty(entry.end - entry.begin, np.uint8) for name, entry in entries.items()}
        file.read(data.__getitem__)
    change(contents)
    write(
        path,
        contents,
        [Tensor(name, entry.dtype, entry.shape, lambda name=name: data[name]) for name, entry in entries.items()],
    )


# what is changed, and what is said of it; {} where the file is named
WRONG: dict[str, tuple[Any, str]] = {
    "unknown setting": (
        lambda c: c["groups"][0]["settings"].update(color=1),
        "{} has the setting param_groups[0]['color'], which the optimizer has not",
    ),
    "unknown default": (
        lambda c: c["defaults"].update(color=1),
        "{} has the setting defaults['color'], which the optimizer has not",
    ),
    "unknown condition": (lambda c: c["of_all"].update(color=1), "{} has the setting ['color'], which the optimizer has not"),
    "a setting out of range": (
        lambda c: c["groups"][0]["settings"].update(lr=-1.0),
        "param_groups[0]: lr must be >= 0, got -1.0",
    ),
    "no steps": (lambda c: c.pop("steps"), "{} is damaged: its contents make no sense (KeyError: 'steps')"),
    "steps that are none": (lambda c: c.update(steps=-1), "{} is damaged: its contents make no sense"),
    "a step that is none": (
        lambda c: c["groups"][0]["params"][0]["state"].update(step={"number": 0.5}),
        "state['a']['step'] must be a whole number from 0 to 2^53 - 1, got 0.5",
    ),
    "no groups": (lambda c: c.pop("groups"), "{} is damaged"),
    "groups that are none": (lambda c: c.update(groups=3), "{} is damaged"),
    "a state without its array": (
        lambda c: c["groups"][0]["params"][0]["state"].update(ema={"dtype": "float32", "shape": [3]}),
        "{} is damaged: its contents make no sense (ValueError: other arrays than it has)",
    ),
    "an array without its state": (lambda c: c["groups"][0]["params"][0]["state"].pop("exp_avg"), "{} is damaged"),
    "another shape": (lambda c: c["groups"][0]["params"][0]["state"]["exp_avg"].update(shape=[2]), "{} is damaged"),
    "a schedule that is none": (lambda c: c["schedules"].append({"dict": {"type": "Spline"}}), "{} is damaged"),
    "a schedule that is not there": (lambda c: c["defaults"].update(lr={"schedule": 7}), "{} is damaged"),
    "a kind that is none": (lambda c: c["defaults"].update(lr={"complex": [1, 2]}), "{} is damaged"),
}


@pytest.mark.parametrize("name", WRONG)
def test_contents_that_can_not_be(name: str, tmp_path: Path) -> None:
    saved(tmp_path / "a")
    change, message = WRONG[name]
    rewrite(tmp_path / "a", change)
    with pytest.raises(ValueError) as caught:
        load(tmp_path / "a")
    assert str(caught.value).startswith(f"AdamW.load: {message.format(tmp_path / 'a')}")
