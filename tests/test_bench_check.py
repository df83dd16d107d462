"""The gate before timing: contenders agree with the formula, and those that do not are caught."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from gradstep.bench import plan, problem
from gradstep.bench.chains import CHAINS
from gradstep.bench.check import check
from gradstep.bench.contenders import Contender, Run, UnsupportedError, contenders
from gradstep.bench.rules import NORM, RULES

from .bench_cases import FLOAT32, FLOAT64, Idle, Wrong, faces, installed, whole


@pytest.mark.parametrize("dtype", plan.DTYPES.values(), ids=str)
@pytest.mark.parametrize("rule", RULES.values(), ids=lambda rule: rule.name)
@faces
def test_contenders_agree_with_the_formula(name, rule, dtype):
    contender = installed(name)
    if name.startswith("torch-") and (rule.optimizer == "Lion" or (name, rule.optimizer) == ("torch-fused", "RMSprop")):
        with pytest.raises(UnsupportedError, match=f"torch has no .*{rule.optimizer}"):
            check(contender, rule, dtype)
    else:
        assert check(contender, rule, dtype) is None


@pytest.mark.parametrize("name", ["numba", "optax"])
@pytest.mark.parametrize("rule", ["adamw", "sgd-nesterov"])
def test_compiled_contenders_agree_with_the_formula(name, rule):
    contender = installed(name)
    assert check(contender, RULES[rule], FLOAT32) is None


_TORCH = {
    "full",
    "clip",
    "unscale-clip",
    "off",
    "norm",
    "lamb",
    "scale",
    "clip-value",
    "clip-tensor",
    "bounds",
    "ema",
    "swa",
    "zero",
}


@pytest.mark.parametrize("dtype", plan.DTYPES.values(), ids=str)
@pytest.mark.parametrize("step", [*CHAINS, "norm"])
@faces
def test_contenders_agree_with_the_whole_step(name, step, dtype):
    contender = installed(name)
    alone = {"gradstep": set(CHAINS), "gradstep-object": {"norm"}, "numpy": {"stats"}, "torch-fused": {"norm"}}.get(name, set())
    if step in alone or (name.startswith("torch-") and step not in _TORCH):
        with pytest.raises(UnsupportedError):
            check(contender, whole(step), dtype)
    else:
        assert check(contender, whole(step), dtype) is None


def test_compiled_torch_refuses_what_it_is_not_written_for():
    contender = installed("torch-compile")
    with pytest.raises(UnsupportedError, match="adamw and lamb only"):
        check(contender, RULES["sgd"], FLOAT32)
    with pytest.raises(UnsupportedError, match="torch has no agc"):
        check(contender, whole("agc"), FLOAT32)
    with pytest.raises(UnsupportedError, match="up to 8 tensors"):
        contender.prepare(problem.Problem(whole("full"), ((2,),) * 9, FLOAT32))


def test_contenders_agree_with_their_own_lamb():
    contender = installed("pytorch-optimizer")
    assert check(contender, RULES["lamb"], FLOAT32) is None
    with pytest.raises(UnsupportedError, match="lamb only"):
        check(contender, RULES["adam"], FLOAT32)


class Other(Contender):
    """gradstep's optimizer with other options than the chain's."""

    name = about = "other"
    whole = True

    def __init__(self, **options):
        self.options = options

    def prepare(self, problem):
        chain = problem.rule.chain
        given = {**chain.options, **chain.call, **self.options}
        step = {name: value for name, value in given.items() if name in ("grad_scale", "stats")}
        options = {name: value for name, value in given.items() if name not in step}
        other = dataclasses.replace(chain, options=options, call=step)
        problem.rule = dataclasses.replace(problem.rule, chain=other)
        return contenders()["gradstep-object"].prepare(problem)


@pytest.mark.parametrize(
    ("step", "options"),
    [
        ("full", {"grad_scale": 1 / 1000, "clip_norm": None}),
        ("full", {"clip_norm": 1.01}),
        ("full", {"ema_decay": 0.71}),
        ("full", {"zero_grad": False}),
        ("clip", {"clip_norm": None}),
        ("agc", {"agc": 0.011}),
        ("clip-value", {"clip_value": 0.51}),
        ("clip-tensor", {"clip_norm_per_tensor": 1.01}),
        ("centralize", {"centralize": False}),
        ("noise", {"noise": 0.01}),
        ("cautious", {"cautious": False}),
        ("trust-ratio", {"trust_ratio": (0.0, 0.5)}),
        ("elastic-net", {"l1": 0.11}),
        ("elastic-net", {"l2": 0.2}),
        ("bounds", {"bounds": (-1.0, None)}),
        ("group-lasso", {"group_lasso": 0.11}),
        ("max-norm", {"max_norm": 1.01}),
        ("lookahead", {"lookahead": (3, 0.5)}),
        ("lookahead", {"lookahead": (2, 0.6)}),
        ("swa", {"swa": (1, 1)}),
        ("zero", {"zero_grad": False}),
    ],
)
def test_gate_catches_another_option(step, options):
    assert check(Other(), whole(step), FLOAT64) is None
    assert check(Other(**options), whole(step), FLOAT64) is not None


def test_gate_catches_wrong_statistics_and_a_wrong_norm():
    class Silent(Contender):
        name = about = "silent"
        whole = True

        def prepare(self, problem):
            run = contenders()["gradstep-object"].prepare(problem)
            return run._replace(step=lambda: dataclasses.replace(run.step(), grad_norm=3.0))

    class Guess(Contender):
        name = about = "guess"

        def prepare(self, problem):
            return Run(lambda: None, lambda: [np.array([3.0])])

    assert "grad_norm is 3, not" in check(Silent(), whole("stats"), FLOAT32)
    assert "is off by" in check(Guess(), NORM, FLOAT32)


@pytest.mark.parametrize(
    ("rule", "settings"),
    [
        ("adamw", {"lr": 0.051}),
        ("adamw", {"betas": (0.81, 0.9)}),
        ("adamw", {"betas": (0.8, 0.91)}),
        ("adamw", {"eps": 0.011}),
        ("adamw", {"weight_decay": 0.0}),
        ("sgd-momentum", {"momentum": 0.71}),
        ("sgd-nesterov", {"nesterov": False}),
        ("rmsprop-centered", {"alpha": 0.81}),
        ("lion", {"betas": (0.8, 0.91)}),
    ],
)
@pytest.mark.parametrize("dtype", plan.DTYPES.values(), ids=str)
def test_gate_catches_a_wrong_setting(rule, settings, dtype):
    assert check(Wrong(), RULES[rule], dtype) is None
    assert "is off by" in check(Wrong(**settings), RULES[rule], dtype)


@pytest.mark.parametrize("value", [None, math.nan])
def test_gate_catches_a_contender_that_does_nothing_or_harm(value):
    assert "is off by" in check(Idle(value), RULES["sgd"], FLOAT32)
