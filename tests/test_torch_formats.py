"""Formats through the torch classes: the bits of the NumPy classes, for parameters of every format."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

import gradstep.torch

from .format_cases import SEED, Run, assert_same
from .format_references import FLOATS, bfloat16
from .stage_cases import MANY, case_of, settings_of

KINDS: list[tuple[str, dict[str, Any]]] = [
    ("bfloat16", {}),
    ("float16", {"state_dtype": "float16"}),
    ("bfloat16", {"precision": "stochastic", "state_dtype": "bfloat16", "state_rounding": "stochastic", "seed": SEED}),
    ("float16", {"precision": "kahan", "state_dtype": "bfloat16"}),
    ("bfloat16", {"precision": "kahan"}),
    ("float16", {"precision": "master"}),
    ("bfloat16", {"precision": "split", "state_dtype": "q8", "state_rounding": "stochastic", "seed": 7}),
    ("float32", {"state_dtype": "q4"}),
    ("float32", {"state_dtype": "float64"}),
    ("float64", {"state_dtype": {"exp_avg": "bfloat16", "momentum_buffer": "q8"}}),
]
SHAPES = [(33, 3), (4100,), (67,), (0, 3), (), (70, 60)]


def tensor(a: Any) -> Any:
    if a is None:
        return None
    return torch.from_numpy(a.view(np.int16)).view(torch.bfloat16) if a.dtype == bfloat16 else torch.from_numpy(a)


def array(t: Any) -> Any:
    t = t.detach()
    return t.view(torch.int16).numpy().view(bfloat16) if t.dtype == torch.bfloat16 else t.numpy()


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join([kind[0], *map(str, kind[1].values())]))
@pytest.mark.parametrize("rule", ["adamw", "sgd_nesterov", "lion", "lars", "novograd"])
def test_same_bits_as_the_reference(kind: tuple[str, dict[str, Any]], rule: str) -> None:
    (fmt, formats), case = kind, case_of(rule)
    named = formats.get("state_dtype")
    if isinstance(named, dict):
        formats = {**formats, "state_dtype": {name: dtype for name, dtype in named.items() if name in case.states}}
    for options in ({}, {name: value for name, value in MANY["a usual step"].items() if name != "grad_scale"}):
        expected = Run(case, fmt, fmt, formats, options, SHAPES, steps=3)
        params = [torch.nn.Parameter(tensor(p)) for p in expected.optimizer()[1]]
        settings = {**settings_of(case), **case.class_settings, **options, **formats}
        opt = getattr(gradstep.torch, case.optimizer)(params, **settings)
        for step, (theirs, states) in enumerate(expected.history, 1):
            for p, g in zip(params, expected.sources(step)[0][1], strict=True):
                p.grad = tensor(g)
            opt.step()
            for i, p in enumerate(params):
                assert_same(array(p), theirs[i], f"parameter {i} at step {step}")
                state = {name: value for name, value in opt.state.get(p, {}).items() if name != "step"}
                assert state.keys() == states.get(i, {"step": 0}).keys() - {"step"}
                for name, value in state.items():
                    numpys = states[i][name]
                    same = array(value) if isinstance(value, torch.Tensor) else value
                    if isinstance(numpys, np.ndarray):
                        assert_same(same, numpys, f"{name} of {i} at step {step}")
                    else:
                        assert same == numpys, f"{name} of {i} at step {step}"


@pytest.mark.parametrize("fmt", FLOATS)
def test_gradients_of_another_format_than_their_parameters(fmt: str) -> None:
    case = case_of("adamw")
    expected = Run(case, "bfloat16", fmt, {"precision": "kahan"}, {"weights": (0.75, -0.5)}, SHAPES)
    params = [torch.nn.Parameter(tensor(p)) for p in expected.optimizer()[1]]
    opt = gradstep.torch.AdamW(params, **settings_of(case), precision="kahan")
    for step, (theirs, _) in enumerate(expected.history, 1):
        opt.step(grads=[(w, [tensor(g) for g in grads]) for w, grads in expected.sources(step)])
        for i, p in enumerate(params):
            assert_same(array(p), theirs[i], f"parameter {i} at step {step}")


# ---- loops of training ------------------------------------------------------------------------------------------------------


def regression(dtype: Any) -> tuple[Any, Any, Any]:
    """A network of two layers, inputs, and what it is to say of them."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(256, 20, generator=generator)
    y = torch.tanh(x @ torch.randn(20, 3, generator=generator))
    model = torch.nn.Sequential(torch.nn.Linear(20, 64), torch.nn.Tanh(), torch.nn.Linear(64, 3))
    for p in model.parameters():
        with torch.no_grad():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.2)
    return model.to(dtype), x.to(dtype), y.to(dtype)


def final_loss(model: Any, x: Any, y: Any, opt: Any, autocast: bool = False) -> float:
    for _ in range(300):
        opt.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = torch.nn.functional.mse_loss(model(x), y)
        loss.backward()
        opt.step()
    with torch.no_grad():
        return float(torch.nn.functional.mse_loss(model.float()(x.float()), y.float()))


@pytest.mark.parametrize("precision", ["stochastic", "kahan", "master", "split"])
def test_a_loop_of_bfloat16_learns_what_float32_does(precision: str) -> None:
    """At a learning rate under which updates to nearest vanish."""
    losses = {}
    for name, dtype, options in (
        ("float32", torch.float32, {}),
        ("nearest", torch.bfloat16, {}),
        (precision, torch.bfloat16, {"precision": precision}),
    ):
        model, x, y = regression(dtype)
        losses[name] = final_loss(model, x, y, gradstep.torch.AdamW(model.parameters(), lr=3e-4, **options))
    assert losses[precision] < 1.1 * losses["float32"] + 1e-3
    assert losses["nearest"] > 1.3 * losses[precision]


def test_autocast_leaves_the_step_as_it_is() -> None:
    losses = []
    for cls in (gradstep.torch.AdamW, torch.optim.AdamW):
        model, x, y = regression(torch.float32)
        opt = cls(model.parameters(), lr=3e-3, weight_decay=0.1)
        losses.append(final_loss(model, x, y, opt, autocast=True))
        assert {p.grad.dtype for p in model.parameters()} == {torch.float32}
        if cls is gradstep.torch.AdamW:
            assert {s["exp_avg"].dtype for s in opt.state.values()} == {torch.float32}
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
