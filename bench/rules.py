"""The steps that are measured: class, settings, states and formula of each rule, and what stands around it."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import gradstep

from . import formulas
from .chains import CHAINS, EACH, NO_CHAIN, Chain

_CORRECTIONS = ["correction1", "correction2"]

# Settings far from every default, so that one that is lost or mixed up shows.
_DEMANDING = {"betas": (0.8, 0.9), "alpha": 0.8, "momentum": 0.7, "eps": 0.01, "weight_decay": 0.1}


@dataclass(frozen=True)
class Rule:
    """One update rule with its settings."""

    name: str
    optimizer: str
    """Name of the class, in gradstep, gradstep.torch and torch.optim; empty: there is none."""
    formula: Callable[..., Any]
    states: tuple[str, ...]
    settings: dict[str, Any]
    """Arguments of the class."""
    again: int = 0
    """How many arrays have to be read twice: a norm must be known before what it scales can be used."""
    chain: Chain = NO_CHAIN
    """What stands around it."""

    @property
    def about(self) -> str:
        """What the step does besides the rule, in a line."""
        return self.chain.about if self.chain else f"{self.name} alone"

    @property
    def label(self) -> str:
        """The name, with that of the chain."""
        return f"{self.name} {self.chain.name}".rstrip()

    @property
    def arrays(self) -> tuple[str, ...]:
        """Names of all arrays beside parameter and gradient: the states, and what the chain keeps."""
        return (*self.states, *self.chain.states)

    @property
    def streams(self) -> int:
        """How many arrays a step has to read or write, at least: parameter and states both, the gradient is read."""
        return (3 + 2 * len(self.states) if self.optimizer else 0) + self.again + self.chain.streams

    @property
    def decoupled(self) -> bool:
        """Whether its weight decay goes past the states."""
        return self.optimizer in ("AdamW", "Lion", "LAMB")

    def alone(self) -> Rule:
        """Return the rule with nothing around it."""
        return dataclasses.replace(self, chain=NO_CHAIN)

    def demanding(self, lr: float = 0.05) -> Rule:
        """Return the rule with settings that tell a right contender from a wrong one."""
        demanding = {**_DEMANDING, "lr": lr}
        settings = {name: demanding.get(name, value) for name, value in self.settings.items()}
        return dataclasses.replace(self, settings=settings, chain=self.chain.demanding())

    def function(self) -> tuple[Callable[..., None], dict[str, Any], bool]:
        """Return gradstep's function for the rule, its settings, and whether it takes the number of the step."""
        function = getattr(gradstep, f"{self.optimizer.lower()}_")
        takes = inspect.signature(function).parameters
        return function, {name: value for name, value in self.settings.items() if name in takes}, "step" in takes

    def constants(self, number: Callable[[float], Any] = float) -> Callable[[int], tuple[Any, ...]]:
        """Return a function of the step's number that returns the formula's last arguments, as `number` makes them."""
        values = dict(self.settings)
        beta1, beta2 = values.get("betas", (0.0, 0.0))
        values.update(beta1=beta1, rest1=1 - beta1, beta2=beta2, rest2=1 - beta2, rest=1 - values.get("alpha", 0.0))
        names = list(inspect.signature(self.formula).parameters)[2 + len(self.states) :]
        fixed = tuple(number(values[name]) for name in names if name not in _CORRECTIONS)
        if names[-2:] != _CORRECTIONS:
            return lambda _: fixed
        return lambda step: (*fixed, number(1 - beta1**step), number(1 - beta2**step))


_SGD = {"lr": 1e-3, "weight_decay": 1e-4}
_MOMENTUM = {**_SGD, "momentum": 0.9}
_ADAM = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8}
# The gradients stay the same, so the averages approach g and g^2. With an alpha of 0.99 the centered variance, v - a^2, would soon
# be rounding noise, and its root NaN.
_RMSPROP = {"lr": 1e-2, "alpha": 0.99999, "eps": 1e-8, "weight_decay": 1e-4}
_CENTERED = {**_RMSPROP, "centered": True}

RULES = {
    rule.name: rule
    for rule in (
        Rule("adamw", "AdamW", formulas.adamw, ("exp_avg", "exp_avg_sq"), {**_ADAM, "weight_decay": 1e-2}),
        Rule("adam", "Adam", formulas.adam, ("exp_avg", "exp_avg_sq"), {**_ADAM, "weight_decay": 1e-4}),
        Rule(
            "amsgrad",
            "AdamW",
            formulas.amsgrad,
            ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
            {**_ADAM, "weight_decay": 1e-2, "amsgrad": True},
        ),
        Rule("sgd", "SGD", formulas.sgd, (), _SGD),
        Rule("sgd-momentum", "SGD", formulas.sgd_momentum, ("momentum_buffer",), _MOMENTUM),
        Rule("sgd-nesterov", "SGD", formulas.sgd_nesterov, ("momentum_buffer",), {**_MOMENTUM, "nesterov": True}),
        Rule("lion", "Lion", formulas.lion, ("exp_avg",), {"lr": 1e-4, "betas": (0.9, 0.99), "weight_decay": 1e-2}),
        Rule("adagrad", "Adagrad", formulas.adagrad, ("sum",), {"lr": 1e-2, "eps": 1e-10, "weight_decay": 1e-4}),
        Rule("rmsprop", "RMSprop", formulas.rmsprop, ("square_avg",), _RMSPROP),
        Rule(
            "rmsprop-momentum",
            "RMSprop",
            formulas.rmsprop_momentum,
            ("square_avg", "momentum_buffer"),
            {**_RMSPROP, "momentum": 0.9},
        ),
        Rule("rmsprop-centered", "RMSprop", formulas.rmsprop_centered, ("square_avg", "grad_avg"), _CENTERED),
        Rule(
            "rmsprop-momentum-centered",
            "RMSprop",
            formulas.rmsprop_momentum_centered,
            ("square_avg", "momentum_buffer", "grad_avg"),
            {**_CENTERED, "momentum": 0.9},
        ),
        Rule(
            "lamb",
            "LAMB",
            formulas.lamb,
            ("exp_avg", "exp_avg_sq"),
            {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 1e-2},
            again=3,
        ),
    )
}

NORM = Rule("norm", "", formulas.norm, (), {}, again=1)
"""The norm of all gradients, and nothing else."""

_FIXED = {"norm": NORM, "lamb": RULES["lamb"]}

STEPS: dict[str, tuple[str, ...]] = {
    **{name: (name,) for name in (*CHAINS, *_FIXED)},
    "each": EACH,
    "all": ("full", "clip", "unscale-clip", "norm", "stats", "off", "lamb"),
}
"""What stands for which whole steps."""


def whole_steps(name: str, rules: Sequence[Rule]) -> list[Rule]:
    """Return the steps that `name` of `STEPS` stands for, made of `rules` where they are not made of one of their own."""
    steps: list[Rule] = []
    for step in STEPS[name]:
        steps += [_FIXED[step]] if step in _FIXED else [dataclasses.replace(rule, chain=CHAINS[step]) for rule in rules]
    return steps
