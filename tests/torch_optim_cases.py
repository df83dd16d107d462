"""What comparisons with `torch.optim` share: parameters and gradients of any dtype, optimizers of both."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

import gradstep
import gradstep.torch

from .cases import CASES, Case, gradients, parameters

SHAPES = [(5, 7), (1030,), (), (0, 3), (70_001,)]
TORCH_CASES = [case for case in CASES if hasattr(torch.optim, case.optimizer)]
torch_cases = pytest.mark.parametrize("case", TORCH_CASES, ids=lambda case: case.name)
NAMES = sorted({case.optimizer for case in TORCH_CASES})
ADAMW = next(case for case in CASES if case.name == "adamw")


def make_params(dtype: Any = torch.float32, shapes: Any = SHAPES) -> list[Any]:
    numpy = np.float64 if dtype == torch.float64 else np.float32
    return [torch.nn.Parameter(torch.from_numpy(np.array(parameters(s, numpy, i))).to(dtype)) for i, s in enumerate(shapes)]


def set_grads(params: list[Any], step: int) -> None:
    for i, p in enumerate(params):
        numpy = np.float64 if p.dtype == torch.float64 else np.float32
        p.grad = torch.from_numpy(np.array(gradients(tuple(p.shape), numpy, 100 * step + i))).to(p.dtype)


def ours(case: Case, params: Any, **more: Any) -> Any:
    return getattr(gradstep.torch, case.optimizer)(params, **{**case.settings, **case.class_settings, **more})


def theirs(case: Case, params: Any, **more: Any) -> Any:
    return getattr(torch.optim, case.optimizer)(params, **{**case.settings, **case.class_settings, **more})


def run(opt: Any, params: list[Any], steps: Any) -> None:
    for step in steps:
        set_grads(params, step)
        opt.step()
