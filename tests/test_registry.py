"""The registry: every compiled rule has a class for each face, a function, a reference and a case; whatever is missing is named."""

from __future__ import annotations

import importlib.util
import inspect
import re
from typing import Any

import pytest

import gradstep
from gradstep import _core

from . import references
from .cases import CASES, NORM_CASES

OPTIMIZERS = sorted(name for name in gradstep.__all__ if isinstance(getattr(gradstep, name), type))


def test_every_rule_has_a_case() -> None:
    assert {case.rule for case in (*CASES, *NORM_CASES)} == set(_core.rules)


def test_every_optimizer_has_a_case() -> None:
    assert sorted({case.optimizer for case in (*CASES, *NORM_CASES)}) == OPTIMIZERS
    assert {case.function for case in (*CASES, *NORM_CASES)} == {getattr(gradstep, f"{name.lower()}_") for name in OPTIMIZERS}


def test_names_of_cases_are_unique() -> None:
    names = [case.name for case in (*CASES, *NORM_CASES)]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("case", [*CASES, *NORM_CASES], ids=lambda case: case.name)
def test_cases_reach_the_rule_that_they_name(case: Any) -> None:
    optimizer = getattr(gradstep, case.optimizer)
    defaults = optimizer([]).defaults
    kernel = optimizer.kernel({**defaults, **case.settings, **case.class_settings})
    assert kernel.rule.name == case.rule
    assert kernel.rule.states == list(case.states)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_has_all_faces(name: str) -> None:
    function = getattr(gradstep, f"{name.lower()}_")
    assert function.__name__ in gradstep.__all__
    assert issubclass(getattr(gradstep, name), gradstep.numpy.Optimizer)
    assert callable(getattr(references, name.lower()).update)
    for text in (function.__doc__, getattr(gradstep, name).__doc__):
        assert ">>>" in text and "Args:" in text and "Raises:" in text
    assert "References:" in function.__doc__ and "<-" in function.__doc__


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_function_and_class_have_the_same_defaults(name: str) -> None:
    function = inspect.signature(getattr(gradstep, f"{name.lower()}_")).parameters
    optimizer = inspect.signature(getattr(gradstep, name).__init__).parameters
    for setting in optimizer.keys() & function.keys():
        assert function[setting].default == optimizer[setting].default, setting
    only_in_class = optimizer.keys() - function.keys() - {"self", "params", "amsgrad", "initial_accumulator_value"}
    assert not only_in_class


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_torch_has_the_same_defaults(name: str) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    import gradstep.torch

    assert name in gradstep.torch.__all__
    ours = inspect.signature(getattr(gradstep, name).__init__).parameters
    faces = [getattr(gradstep.torch, name), *([getattr(torch.optim, name)] if hasattr(torch.optim, name) else [])]
    for theirs in (inspect.signature(face).parameters for face in faces):
        settings = ours.keys() - {"self", "params", "options"}
        assert settings <= theirs.keys()
        for setting in settings:
            assert ours[setting].default == theirs[setting].default, setting
    assert getattr(gradstep.torch, name).rule is getattr(gradstep, name)


def faces_of(name: str) -> list[Any]:
    faces = [getattr(gradstep, f"{name.lower()}_"), getattr(gradstep, name)]
    if importlib.util.find_spec("torch") is not None:
        faces.append(getattr(importlib.import_module("gradstep.torch"), name))
    return faces


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_all_faces_take_options(name: str) -> None:
    for face in faces_of(name):
        assert inspect.signature(face).parameters["options"].kind is inspect.Parameter.VAR_KEYWORD


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_argument_is_described(name: str) -> None:
    """Of the torch classes, those that torch does not describe."""
    for face in faces_of(name):
        if "Args:" not in face.__doc__:
            assert any(cls.__module__.startswith("torch.optim.") and cls.__name__ == name for cls in face.__mro__)
            continue
        described = face.__doc__.split("Args:")[1].split("Raises:")[0]
        for parameter in inspect.signature(face).parameters:
            assert re.search(rf"^ +([a-z0-9_]+, )*{parameter}(, [a-z0-9_]+)*: ", described, re.MULTILINE), parameter


def test_torch_has_classes_of_the_same_names() -> None:
    pytest.importorskip("torch", reason="torch is not installed")
    import gradstep.torch

    classes = [name for name in gradstep.torch.__all__ if isinstance(getattr(gradstep.torch, name), type)]
    assert sorted(classes) == OPTIMIZERS
    for name in classes:
        assert "`gradstep." in getattr(gradstep.torch, name).__doc__


def test_fields_and_stages_are_listed() -> None:
    assert _core.rules["adam"].fields == ["lr", "betas[0]", "betas[1]", "eps"]
    assert _core.rules["novograd"].states == ["exp_avg"]
    stages = dict(_core.stages)
    assert len(stages) == len(_core.stages)
    assert stages["lars"] == ["trust_coefficient", "eps"] and stages["novograd"] == ["betas[1]", "eps"]
    assert stages["clip_value"] == ["clip_value"] and stages["coupled_decay"] == stages["independent_decay"] == ["weight_decay"]
    assert repr(_core.rules["adam"]) == "<gradstep rule adam>"
