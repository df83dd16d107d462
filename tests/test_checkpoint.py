"""Checkpoints: training goes on with the same bits, into other formats where asked for; what does not fit is refused."""

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
from gradstep import formats
from gradstep.checkpoint.tensor_file import Tensor, TensorFile, write
from gradstep.schedules import Constant, Cosine, Linear, ReduceOnPlateau

from .cases import Case
from .format_cases import assert_same, formats_of
from .format_references import FLOATS
from .saving_cases import (
    ADAMW,
    ALL_CASES,
    FORMATS,
    OPTIONS,
    RULES,
    Numpy,
    assert_all_same,
    case_options,
    faces,
)
from .stage_cases import case_of, step_arguments

NUMPY = Numpy()


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
@pytest.mark.parametrize("case", ALL_CASES, ids=lambda case: case.name)
def test_every_rule_goes_on(face: Numpy, case: Case, tmp_path: Path) -> None:
    for dtype in ("float32", "float64"):
        check_goes_on(face, tmp_path / "checkpoint", case, {}, dtype)


@faces
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("rule", RULES)
def test_every_option_goes_on(face: Numpy, rule: str, name: str, tmp_path: Path) -> None:
    check_goes_on(face, tmp_path / "checkpoint", case_of(rule), OPTIONS[name])


@faces
@pytest.mark.parametrize("kind", FORMATS, ids=lambda kind: "-".join([kind[0], *map(str, kind[1].values())]))
@pytest.mark.parametrize("rule", RULES)
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


# ---- forms of parameters --------------------------------------------------------------------------------------------------


def some(n: int = 2) -> list[Any]:
    return [np.linspace(0.5, 1.5, 3 + i, dtype=np.float32) for i in range(n)]


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


def test_names_of_other_kinds_are_refused(tmp_path: Path) -> None:
    opt = gradstep.AdamW({frozenset("a"): np.ones(3)})
    with pytest.raises(TypeError, match=r"AdamW.save: the name frozenset\({'a'}\) is .* which can't be saved"):
        opt.save(tmp_path / "a")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("order", ["F", "reversed axes", "columns"])
def test_layouts_of_parameters(order: str, tmp_path: Path) -> None:
    base = np.linspace(-1, 1, 2 * 34 * 70, dtype=np.float32)

    def make() -> Any:
        if order == "F":
            return np.asfortranarray(base.reshape(34, 140))
        if order == "columns":
            return base.copy().reshape(34, 140)[:, 3:50:2]
        return base.copy().reshape(2, 34, 70).transpose(2, 0, 1)

    for dtype in (None, "bfloat16", "q8"):
        p, q = make(), make()
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


# ---- settings -------------------------------------------------------------------------------------------------------------


def saved(path: Path, **options: Any) -> Any:
    """An optimizer after a step, saved."""
    opt = gradstep.AdamW(dict(zip("ab", some(), strict=True)), **options)
    opt.step(dict(zip("ab", some(), strict=True)))
    opt.save(path)
    return opt


def load(path: Path, **options: Any) -> Any:
    return gradstep.AdamW.load(path, dict(zip("ab", some(), strict=True)), **options)


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


# ---- numbers and states -----------------------------------------------------------------------------------------------------


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


@faces
def test_states_of_no_parameter_are_refused(face: Numpy, tmp_path: Path) -> None:
    params = face.params()
    opt = face.make(ADAMW, params)
    face.step(opt, params, (1,), {})
    opt.state["lost"] = {"step": 1}
    with pytest.raises(ValueError, match="AdamW.save: state has 'lost', the optimizer has no such parameter"):
        opt.save(tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_what_is_loaded_is_ones_own(tmp_path: Path) -> None:
    opt = saved(tmp_path / "a")
    other = load(tmp_path / "a")
    for name in ("exp_avg", "exp_avg_sq"):
        assert other.state["a"][name].flags.writeable and other.state["a"][name].base is None
    (tmp_path / "a").unlink()
    other.step(dict(zip("ab", some(), strict=True)))
    assert opt.state["a"]["step"] == 1 and other.state["a"]["step"] == 2


# ---- other formats ----------------------------------------------------------------------------------------------------------

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


# ---- what does not fit --------------------------------------------------------------------------------------------------------


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


def contents_of(path: Path) -> Any:
    with TensorFile(path, "test") as file:
        return file.contents


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


def test_contents_are_plain(tmp_path: Path) -> None:
    """What docs/checkpoints.md shows of a file."""
    saved(tmp_path / "a", lr=Cosine(start=0.1, steps=5))
    contents = contents_of(tmp_path / "a")
    assert json.loads(json.dumps(contents, allow_nan=False)) == contents
    assert contents["optimizer"] == "AdamW" and contents["steps"] == 1 and contents["gradstep"] == gradstep.__version__
    assert contents["groups"][0]["params"][0]["name"] == "a" and contents["groups"][0]["params"][0]["state"]["step"] == {
        "number": 1
    }


# ---- torch --------------------------------------------------------------------------------------------------------------------


def torch_case(**options: Any) -> tuple[Any, list[Any], Any]:
    pytest.importorskip("torch", reason="torch is not installed")
    from .saving_cases import Torch

    face = Torch()
    params = face.params()
    opt = face.make(ADAMW, params, **options)
    face.step(opt, params, (1, 2), {})
    return face, params, opt


def test_named_parameters(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    import gradstep.torch

    def model(*names: str) -> Any:
        return torch.nn.ModuleDict({name: torch.nn.Linear(3, 3) for name in names})

    first = model("a", "b")
    opt = gradstep.torch.AdamW(first.named_parameters())
    first["b"](first["a"](torch.ones(1, 3))).sum().backward()
    opt.step()
    opt.save(tmp_path / "a")
    load = gradstep.torch.AdamW.load
    assert load(tmp_path / "a", model("a", "b").named_parameters()).steps == 1
    assert load(tmp_path / "a", model("a", "b").parameters()).steps == 1
    with pytest.raises(ValueError, match=r"param_groups\[0\] has the parameter 'c.weight' where .* has 'a.weight'"):
        load(tmp_path / "a", model("c", "d").named_parameters())


def test_what_schedulers_leave_in_groups(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    face, params, opt = torch_case()
    scheduler = torch.optim.lr_scheduler.OneCycleLR(opt, 0.1, total_steps=20)
    opt.param_groups[0]["tag"] = ("mine", [1, None])
    opt.step()
    scheduler.step()
    opt.save(tmp_path / "a")
    other = face.cls(ADAMW).load(tmp_path / "a", face.copy(params))
    ours, theirs = ({**o.param_groups[0], "params": None} for o in (opt, other))
    assert ours == theirs and "max_momentum" in theirs and theirs["tag"] == ("mine", [1, None])


def test_settings_that_are_tensors(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    for lr in (torch.tensor(0.1), torch.tensor([0.1], dtype=torch.float64)):
        face, params, opt = torch_case(lr=lr)
        opt.save(tmp_path / "a")
        found = face.cls(ADAMW).load(tmp_path / "a", face.copy(params)).param_groups[0]["lr"]
        assert torch.equal(found, lr) and found.dtype == lr.dtype and found.shape == lr.shape


def test_flags_of_torch(tmp_path: Path) -> None:
    face, params, opt = torch_case(fused=True, maximize=True)
    opt.save(tmp_path / "a")
    other = face.cls(ADAMW).load(tmp_path / "a", face.copy(params))
    assert other.param_groups[0]["fused"] is True and other.param_groups[0]["maximize"] is True
    assert face.cls(ADAMW).load(tmp_path / "a", face.copy(params), fused=None).param_groups[0]["fused"] is None
    for state in other.state.values():
        assert state["step"].dtype.is_floating_point and state["step"].itemsize == 8


def test_states_that_torch_makes_itself(tmp_path: Path) -> None:
    """Adagrad's, which are there before the first step; and those of a torch class, momentum that is None among them."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    import gradstep.torch

    p = torch.nn.Parameter(torch.ones(3))
    gradstep.torch.Adagrad([p], initial_accumulator_value=0.5).save(tmp_path / "a")
    other = gradstep.torch.Adagrad.load(tmp_path / "a", [p])
    assert (other.state[p]["sum"] == 0.5).all() and other.state[p]["step"] == 0
    sgd = torch.optim.SGD([p], lr=0.1)
    p.grad = torch.ones(3)
    sgd.step()
    sgd.state[p]["momentum_buffer"] = None
    opt = gradstep.torch.SGD([p])
    opt.load_state_dict(sgd.state_dict())
    opt.save(tmp_path / "a")
    other = gradstep.torch.SGD.load(tmp_path / "a", [p])
    assert other.state[p] == {"momentum_buffer": None} and other.param_groups[0]["lr"] == 0.1


def test_conjugated_states(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    import gradstep.torch

    p = torch.nn.Parameter(torch.tensor([1 + 2j, 3 - 1j]))
    opt = gradstep.torch.AdamW([p])
    p.grad = p.detach().clone()
    opt.step()
    expected = opt.state[p]["exp_avg"].clone()
    opt.state[p]["exp_avg"] = expected.conj().resolve_conj().conj()
    opt.save(tmp_path / "a")
    assert torch.equal(gradstep.torch.AdamW.load(tmp_path / "a", [p]).state[p]["exp_avg"], expected)


def test_names_that_are_no_text(tmp_path: Path) -> None:
    _, params, opt = torch_case()
    opt.param_groups[0][3] = 1
    with pytest.raises(TypeError, match=r"AdamW.save: param_groups\[0\] has the key 3, which is no text"):
        opt.save(tmp_path / "a")
    del opt.param_groups[0][3]
    opt.state[params[1]][7] = 1
    with pytest.raises(TypeError, match=r"AdamW.save: state\[1\] has the key 7, which is no text"):
        opt.save(tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_tensors_in_a_numpy_optimizer(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    p, q = torch.linspace(0, 1, 5), torch.linspace(0, 1, 5)
    opt = gradstep.AdamW([p], lr=0.1)
    opt.step([torch.ones(5)])
    opt.save(tmp_path / "a")
    q.copy_(p)
    other = gradstep.AdamW.load(tmp_path / "a", [q])
    for o in (opt, other):
        o.step([torch.ones(5)])
    assert torch.equal(p, q)
    with pytest.raises(ValueError, match=r"params\[0\] has dtype float64, .* has float32"):
        gradstep.AdamW.load(tmp_path / "a", [q.double()])


# ---- subclasses -----------------------------------------------------------------------------------------------------------------


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
