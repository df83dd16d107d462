"""The registry: every compiled rule has a class for each face, a function, a reference and a case; whatever is missing is named."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

import gradstep
from gradstep import _core

from . import references
from .cases import CASES

OPTIMIZERS = sorted({case.optimizer for case in CASES})


def test_every_rule_has_a_case() -> None:
    assert {case.rule for case in CASES} == set(_core.rules)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_cases_reach_the_rule_that_they_name(case: Any) -> None:
    optimizer = getattr(gradstep, case.optimizer)
    defaults = optimizer([]).defaults
    kernel = optimizer.kernel({**defaults, **case.settings, **case.class_settings})
    assert kernel.rule.name == case.rule
    assert kernel.rule.states == list(case.states)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_has_all_faces(name: str) -> None:
    function = getattr(gradstep, f"{name.lower()}_")
    assert name in gradstep.__all__ and function.__name__ in gradstep.__all__
    assert callable(getattr(references, name.lower()))
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

    theirs = inspect.signature(getattr(torch.optim, name, getattr(gradstep.torch, name)).__init__).parameters
    ours = inspect.signature(getattr(gradstep, name).__init__).parameters
    for setting in ours.keys() & theirs.keys() - {"self", "params"}:
        assert ours[setting].default == theirs[setting].default, setting
    assert name in gradstep.torch.__all__


def test_fields_and_stages_are_listed() -> None:
    assert _core.rules["adam"].fields == ["lr", "betas[0]", "betas[1]", "eps"]
    stages = dict(_core.stages)
    assert len(stages) == len(_core.stages)
    assert stages["clip_value"] == ["clip_value"] and stages["coupled_decay"] == stages["independent_decay"] == ["weight_decay"]
    assert repr(_core.rules["adam"]) == "<gradstep rule adam>"
