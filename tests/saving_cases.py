"""What tests of checkpoints and state files share: optimizers of both faces, the same steps with them, and comparing all that there is."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import gradstep

from .cases import CASES, NORM_CASES, Case
from .format_cases import assert_same, formats_of, make_params, make_sources
from .format_references import bfloat16
from .stage_cases import MANY, STAGES, case_of, settings_of, step_arguments

SHAPES = [(33, 3), (1030,), (7,), (0, 3), (), (65, 66)]
HAS_TORCH = importlib.util.find_spec("torch") is not None

ADAMW = case_of("adamw")
ALL_CASES = [*CASES, *NORM_CASES]
RULES = ("adamw", "sgd_nesterov", "lamb")
OPTIONS: dict[str, dict[str, Any]] = {
    **STAGES,
    **MANY,
    "noise": {"noise": 0.1, "noise_decay": 0.3, "seed": 5},
    "skip": {"on_nonfinite": "skip"},
}
# the dtype of the parameters, and options
FORMATS: list[tuple[str, dict[str, Any]]] = [
    ("float32", {"state_dtype": "q8"}),
    ("float32", {"state_dtype": "q4"}),
    ("float32", {"state_dtype": "bfloat16"}),
    ("float64", {"state_dtype": "float32"}),
    ("float16", {"state_dtype": "float16", "precision": "kahan"}),
    ("bfloat16", {}),
    ("bfloat16", {"precision": "master"}),
    ("bfloat16", formats_of(precision="split", state_dtype="q8", state_rounding="stochastic")),
    ("bfloat16", formats_of(precision="stochastic", state_dtype={"exp_avg": "q4"})),
]


class Numpy:
    """The classes for NumPy loops."""

    name = "numpy"

    def params(self, shapes: Any = SHAPES, dtype: str = "float32") -> list[Any]:
        return make_params(shapes, dtype)

    def cls(self, case: Case) -> Any:
        return getattr(gradstep, case.optimizer)

    def make(self, case: Case, params: Any, **options: Any) -> Any:
        return self.cls(case)(params, **{**settings_of(case), **case.class_settings, **options})

    def array(self, value: Any) -> Any:
        """The same elements as NumPy's array."""
        return value

    def from_numpy(self, array: Any) -> Any:
        return array

    def copy(self, params: list[Any]) -> list[Any]:
        return [p.copy(order="K") for p in params]

    def step(self, opt: Any, params: list[Any], steps: Any, options: dict[str, Any]) -> None:
        _, scale, weights = step_arguments(options)
        for step in steps:
            shapes, dtype = [np.shape(p) for p in params], str(self.array(params[0]).dtype)
            sources = make_sources(shapes, dtype, step, options)
            self._step(opt, params, sources, scale, weights)

    def _step(self, opt: Any, params: list[Any], sources: Any, scale: float, weights: Any) -> None:
        opt.step(sources if weights else sources[0][1], grad_scale=scale)

    def states(self, opt: Any, params: list[Any]) -> list[dict[str, Any]]:
        keys = [key for keys in opt._keys for key in keys]
        return [opt.state.get(key, {}) for key in keys]


class Torch(Numpy):
    """The torch classes."""

    name = "torch"

    def params(self, shapes: Any = SHAPES, dtype: str = "float32") -> list[Any]:
        import torch

        return [torch.nn.Parameter(self.from_numpy(p)) for p in make_params(shapes, dtype)]

    def cls(self, case: Case) -> Any:
        import gradstep.torch

        return getattr(gradstep.torch, case.optimizer)

    def from_numpy(self, array: Any) -> Any:
        import torch

        if array is None or not isinstance(array, np.ndarray):
            return array
        return (
            torch.from_numpy(array.view(np.int16)).view(torch.bfloat16) if array.dtype == bfloat16 else torch.from_numpy(array)
        )

    def array(self, value: Any) -> Any:
        import torch

        if not isinstance(value, torch.Tensor):
            return value
        value = value.detach()
        return value.view(torch.int16).numpy().view(bfloat16) if value.dtype == torch.bfloat16 else value.numpy()

    def copy(self, params: list[Any]) -> list[Any]:
        import torch

        return [torch.nn.Parameter(p.detach().clone()) for p in params]

    def _step(self, opt: Any, params: list[Any], sources: Any, scale: float, weights: Any) -> None:
        if weights:
            opt.step(grads=[(w, [self.from_numpy(g) for g in grads]) for w, grads in sources], grad_scale=scale)
            return
        for p, g in zip(params, sources[0][1], strict=True):
            p.grad = self.from_numpy(g)
        opt.step(grad_scale=scale)

    def states(self, opt: Any, params: list[Any]) -> list[dict[str, Any]]:
        return [opt.state.get(p, {}) for p in params]


NUMPY = Numpy()
FACES = [NUMPY, *([Torch()] if HAS_TORCH else [])]

posix = pytest.mark.skipif(os.name == "nt", reason="needs POSIX")
faces = pytest.mark.parametrize("face", FACES, ids=lambda face: face.name)
# what training goes on with, whether states are saved or lie in files
each_case = pytest.mark.parametrize("case", ALL_CASES, ids=lambda case: case.name)
each_rule = pytest.mark.parametrize("rule", RULES)
each_option = pytest.mark.parametrize("name", OPTIONS)
each_format = pytest.mark.parametrize("kind", FORMATS, ids=lambda kind: "-".join([kind[0], *map(str, kind[1].values())]))
each_order = pytest.mark.parametrize("order", ["F", "reversed axes", "columns"])


def in_order(order: str) -> Any:
    """An array whose elements lie in memory otherwise than in the order C."""
    base = np.linspace(-1, 1, 2 * 34 * 70, dtype=np.float32)
    if order == "F":
        return np.asfortranarray(base.reshape(34, 140))
    if order == "columns":
        return base.copy().reshape(34, 140)[:, 3:50:2]
    return base.copy().reshape(2, 34, 70).transpose(2, 0, 1)


def assert_all_same(face: Numpy, opt: Any, params: list[Any], other: Any, others: list[Any]) -> None:
    """The same in every bit: parameters, states, numbers, settings."""
    for i, (p, q) in enumerate(zip(params, others, strict=True)):
        assert_same(face.array(p), face.array(q), f"parameter {i}")
    for i, (state, theirs) in enumerate(zip(face.states(opt, params), face.states(other, others), strict=True)):
        assert state.keys() == theirs.keys(), f"states of {i}"
        for name, value in state.items():
            assert type(value) is type(theirs[name]), f"{name} of {i}"
            if hasattr(value, "shape"):
                assert value.dtype == theirs[name].dtype, f"{name} of {i}"
                assert_same(face.array(value), face.array(theirs[name]), f"{name} of {i}")
            else:
                assert value == theirs[name], f"{name} of {i}"
    settings, theirs = ([{**group, "params": None} for group in o.param_groups] for o in (opt, other))
    assert settings == theirs
    assert opt.steps == other.steps and opt.defaults == other.defaults and opt._of_all() == other._of_all()


def case_options(case: Case, options: dict[str, Any]) -> dict[str, Any]:
    """Options, without names of states that the rule does not have."""
    named = options.get("state_dtype")
    if isinstance(named, dict):
        options = {**options, "state_dtype": {name: form for name, form in named.items() if name in case.states}}
    return options


@contextlib.contextmanager
def without_permission() -> Iterator[None]:
    """As somebody who is not root, to whom permissions mean nothing."""
    if os.name == "nt" or os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)
