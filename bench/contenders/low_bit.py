"""AdamW with states of few bits, by bitsandbytes and torchao. They keep states of their own, and codes of their own."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, ClassVar

from .. import formulas
from ..formats import Format
from ..problem import Problem
from ..rules import Rule
from .base import Contender, Run, UnsupportedError
from .torch_arrays import tensors

_BYTES = {"": 8.0, "q8": 2 + 2 * 4 / 256, "q4": 1 + 2 * 4 / 128}
"""Of both states of an element, with their scales."""


class OwnStates(Contender):
    """AdamW of another package: the class `kind` of `module`, with states of one format."""

    module: ClassVar[str]
    peer = "gradstep-torch"
    stores = True

    def __init__(self, name: str, kind: str, state_dtype: str, about: str) -> None:
        self.name, self.about = name, about
        self._kind, self._state_dtype = kind, state_dtype

    def _takes(self, form: Format) -> bool:
        return form.precision == "nearest" and form.state_dtype == self._state_dtype and form.dtype != "float64"

    def own_bytes(self, form: Format) -> float:
        return _BYTES[self._state_dtype] if self._takes(form) else 0.0

    def prepare(self, problem: Problem) -> Run:
        if problem.rule.name != "adamw":
            raise UnsupportedError("measured for adamw only")
        if not self._takes(problem.form):
            raise UnsupportedError(f"has states of {self._state_dtype or 'float32'}")
        optimizer: Any = getattr(importlib.import_module(self.module), self._kind)
        return Run(optimizer(tensors(problem), **problem.rule.settings).step, lambda: problem.params)


class Bitsandbytes(OwnStates):
    """bitsandbytes: a kernel for each tensor. Whether the parameter decays before its update or after depends on the version."""

    package = "bitsandbytes"
    module = "bitsandbytes.optim"
    _decays_last = False

    def prepare(self, problem: Problem) -> Run:
        run = super().prepare(problem)
        self._decays_last = _decays_last(getattr(importlib.import_module(self.module), self._kind), tensors(problem)[0].device)
        return run

    def formula(self, rule: Rule) -> Callable[..., Any]:
        def formula(*operands: Any) -> Any:  # what it is, `prepare` finds out
            return (formulas.adamw_decayed_last if self._decays_last else formulas.adamw)(*operands)

        return formula

    def note(self, rule: Rule, threads: int) -> str:
        return "decays the parameter after the update" if self._decays_last else ""


def _decays_last(kind: Any, device: Any) -> bool:
    """Return whether a step from 1 by 0.5, with half of the parameter decaying by half, ends at 0.375, and not at 0.25."""
    import torch

    param = torch.nn.Parameter(torch.ones(4096, device=device))
    param.grad = torch.ones_like(param)
    kind([param], lr=0.5, weight_decay=0.5).step()
    return float(param.detach()[0]) > 0.3


class Torchao(OwnStates):
    """torchao: a function compiled by torch for each shape."""

    package = "torchao"
    module = "torchao.optim"


def low_bit() -> list[Contender]:
    """Return all of them."""
    return [
        Bitsandbytes("bitsandbytes", "AdamW", "", "bitsandbytes' AdamW, float32 states"),
        Bitsandbytes("bitsandbytes-8bit", "AdamW8bit", "q8", "bitsandbytes' AdamW8bit"),
        Torchao("torchao-8bit", "AdamW8bit", "q8", "torchao's AdamW8bit, compiled"),
        Torchao("torchao-fp8", "AdamWFp8", "q8", "torchao's AdamWFp8, compiled"),
        Torchao("torchao-4bit", "AdamW4bit", "q4", "torchao's AdamW4bit, compiled"),
    ]
