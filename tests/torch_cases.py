"""What tests of the torch classes share: parameters and gradients as tensors, steps with them, and what a step may not change."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

import gradstep.torch

from .cases import Case
from .stage_cases import SHAPES, case_of, make_grads, make_params, settings_of
from .test_values import assert_same_bits

USUAL: dict[str, Any] = {"clip_norm": 3.0, "ema_decay": 0.9, "l1": 5.0, "swa": (0, 1), "zero_grad": True, "lookahead": (2, 0.4)}
SMALL = [(6, 40), (33,), (5, 7)]
RULES = ("adamw", "sgd_momentum", "lion", "lamb")


ADAMW = case_of("adamw")


def tensors(shapes: Any = SHAPES, dtype: Any = np.float32) -> list[Any]:
    return [torch.nn.Parameter(torch.from_numpy(p)) for p in make_params(shapes, dtype)]


def make(case: Case, params: Any, options: dict[str, Any]) -> Any:
    return getattr(gradstep.torch, case.optimizer)(params, **{**settings_of(case), **case.class_settings, **options})


def sources(shapes: Any, step: int, options: dict[str, Any], dtype: Any = np.float32) -> Any:
    made = make_grads(shapes, dtype, step, options)
    return [(weight, [None if g is None else torch.from_numpy(g) for g in grads]) for weight, grads in made]


def set_grads(params: list[Any], step: int) -> None:
    dtype = np.float64 if params[0].dtype == torch.float64 else np.float32
    for p, g in zip(params, sources([tuple(p.shape) for p in params], step, {}, dtype)[0][1], strict=True):
        p.grad = g


def run(opt: Any, params: list[Any], steps: Any) -> None:
    for step in steps:
        set_grads(params, step)
        opt.step()


def assert_same(ours: Any, theirs: Any, what: str) -> None:
    """Of arrays the same bits, of numbers the same."""
    if not isinstance(ours, torch.Tensor):
        assert ours == theirs and type(ours) is type(theirs), what
        return
    assert_same_bits(ours.detach().numpy(), theirs.detach().numpy() if isinstance(theirs, torch.Tensor) else theirs, what)


def assert_all_same(params: list[Any], others: list[Any], opt: Any = None, other: Any = None) -> None:
    """The same bits in parameters and, given the optimizers, in all of their states."""
    for i, (p, q) in enumerate(zip(params, others, strict=True)):
        assert_same(p, q, f"parameter {i}")
        if opt is not None:
            state, theirs = opt.state[p], other.state[q]
            assert state.keys() == theirs.keys()
            for name in state:
                ours, others = (
                    value.double() if isinstance(value, torch.Tensor) else value for value in (state[name], theirs[name])
                )
                assert_same(ours, others, f"{name} of {i}")


def snapshot(opt: Any, params: list[Any]) -> Any:
    """All that a step may change, apart from gradients."""
    kept = [[p.detach().clone(), copy.deepcopy(dict(opt.state.get(p, {})))] for p in params]
    return kept, opt.steps, copy.deepcopy([{**g, "params": None} for g in opt.param_groups])


def assert_unchanged(opt: Any, params: list[Any], before: Any) -> None:
    kept, steps, groups = snapshot(opt, params)
    assert steps == before[1] and groups == before[2]
    for (p, state), (q, theirs) in zip(kept, before[0], strict=True):
        assert torch.equal(p, q)
        assert state.keys() == theirs.keys() and all(
            bool((state[name] == theirs[name]).all()) if isinstance(state[name], torch.Tensor) else state[name] == theirs[name]
            for name in state
        )
    assert len(opt.state) == sum(bool(state) for _, state in before[0])
