"""The cases that every test of values runs over: each rule and variant, with every setting away from its default."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

import gradstep

from . import references


@dataclass(frozen=True)
class Case:
    """A rule with settings, under the names of each face."""

    name: str
    rule: str
    """The compiled rule that it must end up in."""
    function: Any
    reference: references.Reference
    optimizer: str
    """Name of the class in `gradstep`, `gradstep.torch` and, if it has one of that name, `torch.optim`."""
    settings: dict[str, Any]
    states: tuple[str, ...]
    numbers: tuple[str, ...] = ()
    """States that are one number."""
    takes_step: bool = True
    initial: float = 0.0
    class_settings: dict[str, Any] = field(default_factory=dict)
    """Settings that only the classes have."""

    def start(self, shape: tuple[int, ...], dtype: Any) -> dict[str, Any]:
        return {name: np.full(shape, self.initial, dtype) for name in self.states} | dict.fromkeys(self.numbers, 0.0)

    def call(self, p: Any, g: Any, states: dict[str, Any], step: Any, **more: Any) -> None:
        steps = {"step": step} if self.takes_step else {}
        self.function(p, g, **states, **steps, **{**self.settings, **more})


ADAM: dict[str, Any] = {"lr": 3e-3, "betas": (0.85, 0.97), "eps": 1e-6, "weight_decay": 0.07}
LION: dict[str, Any] = {"lr": 3e-3, "betas": (0.85, 0.97), "weight_decay": 0.07}
RMSPROP: dict[str, Any] = {"lr": 3e-3, "alpha": 0.93, "eps": 1e-6, "weight_decay": 0.07}
LAMB: dict[str, Any] = {"lr": 3e-3, "betas": (0.85, 0.97), "eps": 1e-5, "weight_decay": 0.07}
LARS: dict[str, Any] = {
    "lr": 0.03,
    "momentum": 0.85,
    "dampening": 0.3,
    "weight_decay": 0.07,
    "trust_coefficient": 0.4,
    "eps": 0.3,
}
NOVOGRAD: dict[str, Any] = {"lr": 3e-3, "betas": (0.85, 0.9), "eps": 0.01, "weight_decay": 0.07}
MOMENTS = ("exp_avg", "exp_avg_sq")
AMSGRAD = (*MOMENTS, "max_exp_avg_sq")


def _case(name: str, rule: str, function: Any, settings: dict[str, Any], states: tuple[str, ...] = (), **more: Any) -> Case:
    optimizer = {
        "sgd_": "SGD",
        "adam_": "Adam",
        "adamw_": "AdamW",
        "lion_": "Lion",
        "adagrad_": "Adagrad",
        "rmsprop_": "RMSprop",
        "lamb_": "LAMB",
        "lars_": "LARS",
        "novograd_": "NovoGrad",
    }
    reference = getattr(references, function.__name__.rstrip("_"))
    return Case(name, rule, function, reference, optimizer[function.__name__], settings, states, **more)


CASES = [
    _case("sgd", "sgd", gradstep.sgd_, {"lr": 0.03, "weight_decay": 0.07, "maximize": True}),
    _case(
        "sgd_momentum",
        "sgd_momentum",
        gradstep.sgd_,
        {"lr": 0.03, "momentum": 0.85, "dampening": 0.3, "weight_decay": 0.07},
        ("momentum_buffer",),
    ),
    _case(
        "sgd_nesterov",
        "sgd_nesterov",
        gradstep.sgd_,
        {"lr": 0.03, "momentum": 0.85, "nesterov": True, "weight_decay": 0.07, "maximize": True},
        ("momentum_buffer",),
    ),
    _case("adam", "adam", gradstep.adam_, {**ADAM, "maximize": True}, MOMENTS),
    _case("adam_plain", "adam", gradstep.adam_, {**ADAM, "weight_decay": 0.0}, MOMENTS),
    _case("adam_amsgrad", "adam_amsgrad", gradstep.adam_, ADAM, AMSGRAD, class_settings={"amsgrad": True}),
    _case("adamw", "adam", gradstep.adamw_, ADAM, MOMENTS),
    _case("adamw_maximize", "adam", gradstep.adamw_, {**ADAM, "maximize": True}, MOMENTS),
    _case("adamw_amsgrad", "adam_amsgrad", gradstep.adamw_, ADAM, AMSGRAD, class_settings={"amsgrad": True}),
    _case("lion", "lion", gradstep.lion_, LION, ("exp_avg",), takes_step=False),
    _case(
        "lion_maximize", "lion", gradstep.lion_, {**LION, "weight_decay": 0.0, "maximize": True}, ("exp_avg",), takes_step=False
    ),
    _case(
        "adagrad",
        "adagrad",
        gradstep.adagrad_,
        {"lr": 0.03, "lr_decay": 0.1, "weight_decay": 0.07, "eps": 1e-6},
        ("sum",),
        initial=0.25,
        class_settings={"initial_accumulator_value": 0.25},
    ),
    _case("rmsprop", "rmsprop", gradstep.rmsprop_, {**RMSPROP, "maximize": True}, ("square_avg",), takes_step=False),
    _case(
        "rmsprop_momentum",
        "rmsprop_momentum",
        gradstep.rmsprop_,
        {**RMSPROP, "momentum": 0.85},
        ("square_avg", "momentum_buffer"),
        takes_step=False,
    ),
    _case(
        "rmsprop_centered",
        "rmsprop_centered",
        gradstep.rmsprop_,
        {**RMSPROP, "centered": True},
        ("square_avg", "grad_avg"),
        takes_step=False,
    ),
    _case(
        "rmsprop_momentum_centered",
        "rmsprop_momentum_centered",
        gradstep.rmsprop_,
        {**RMSPROP, "momentum": 0.85, "centered": True},
        ("square_avg", "momentum_buffer", "grad_avg"),
        takes_step=False,
    ),
]

# Rules that look at norms of the whole tensor: an element depends on all others. See test_norm_rules.
NORM_CASES = [
    _case("lamb", "lamb", gradstep.lamb_, {**LAMB, "maximize": True}, MOMENTS),
    _case("lamb without bias_correction", "lamb", gradstep.lamb_, {**LAMB, "bias_correction": False}, MOMENTS),
    _case("lamb without grad_averaging", "lamb", gradstep.lamb_, {**LAMB, "grad_averaging": False}, MOMENTS),
    _case("lamb without decay", "lamb", gradstep.lamb_, {**LAMB, "weight_decay": 0.0}, MOMENTS),
    _case("lamb that does not adapt", "lamb", gradstep.lamb_, {**LAMB, "weight_decay": 0.0, "always_adapt": False}, MOMENTS),
    _case("lamb that adapts for its decay", "lamb", gradstep.lamb_, {**LAMB, "always_adapt": False}, MOMENTS),
    _case("lamb with decay beside", "lamb", gradstep.lamb_, {**LAMB, "decay_in_ratio": False}, MOMENTS),
    _case("lamb with limits", "lamb", gradstep.lamb_, {**LAMB, "trust_ratio": (0.6, 0.95)}, MOMENTS),
    _case("lars", "sgd_momentum", gradstep.lars_, {**LARS, "maximize": True}, ("momentum_buffer",)),
    _case("lars_nesterov", "sgd_nesterov", gradstep.lars_, {**LARS, "dampening": 0.0, "nesterov": True}, ("momentum_buffer",)),
    _case("lars_decoupled", "sgd_momentum", gradstep.lars_, {**LARS, "decay_mode": "decoupled"}, ("momentum_buffer",)),
    _case("lars without decay", "sgd_momentum", gradstep.lars_, {**LARS, "weight_decay": 0.0}, ("momentum_buffer",)),
    _case("novograd", "novograd", gradstep.novograd_, NOVOGRAD, ("exp_avg",), numbers=("grad_norm_sq",)),
    _case(
        "novograd_averaging",
        "novograd",
        gradstep.novograd_,
        {**NOVOGRAD, "grad_averaging": True, "maximize": True},
        ("exp_avg",),
        numbers=("grad_norm_sq",),
    ),
    _case(
        "novograd without decay",
        "novograd",
        gradstep.novograd_,
        {**NOVOGRAD, "weight_decay": 0.0},
        ("exp_avg",),
        numbers=("grad_norm_sq",),
    ),
]


def gradients(shape: tuple[int, ...], dtype: Any, seed: int) -> Any:
    """Gradients of many sizes and both signs, some of them zero; no sum, product or average of them is denormal."""
    rng = np.random.default_rng(seed)
    g = rng.standard_normal(shape) * 10.0 ** rng.integers(-3, 3, shape)
    return np.where(rng.random(shape) < 0.05, 0.0, g).astype(dtype)


def parameters(shape: tuple[int, ...], dtype: Any, seed: int = 99) -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)
