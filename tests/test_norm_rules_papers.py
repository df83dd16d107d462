"""LAMB, LARS, NovoGrad: the values of the papers and of other implementations, in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import gradstep

from .cases import Case
from .child import run_in_child
from .norm_rule_cases import norm_cases
from .stage_cases import make_grads, make_optimizer, make_params, settings_of


def lamb_of_the_paper(torch: Any, p: Any, g: Any, s: dict[str, Any], t: int, o: dict[str, Any]) -> Any:
    """arXiv:1904.00962, Algorithm 2."""
    (beta1, beta2), zero = o["betas"], torch.zeros_like(p)
    g = -g if o.get("maximize") else g
    s["m"] = beta1 * s.get("m", zero) + (1 - beta1 if o.get("grad_averaging", True) else 1) * g
    s["v"] = beta2 * s.get("v", zero) + (1 - beta2) * g**2
    m, v = s["m"], s["v"]
    if o.get("bias_correction", True):
        m, v = m / (1 - beta1**t), v / (1 - beta2**t)
    r, beside = m / (v.sqrt() + o["eps"]), torch.zeros_like(p)
    if o.get("decay_in_ratio", True):
        r = r + o["weight_decay"] * p
    else:
        beside = o["weight_decay"] * p
    low, high = o.get("trust_ratio", (0.0, float("inf")))
    norms = [torch.linalg.vector_norm(x).item() for x in (p, r)]
    adapts = all(norms) and (o["weight_decay"] != 0 or o.get("always_adapt", True))
    return p - o["lr"] * ((min(max(norms[0] / norms[1], low), high) if adapts else 1.0) * r + beside)


def lars_of_the_paper(torch: Any, p: Any, g: Any, s: dict[str, Any], t: int, o: dict[str, Any]) -> Any:
    """arXiv:1708.03888, Algorithm 1, with lr outside the buffer."""
    g = -g if o.get("maximize") else g
    decay, decoupled = o["weight_decay"], o.get("decay_mode") == "decoupled"
    p_norm, g_norm = (torch.linalg.vector_norm(x) for x in (p, g))
    rate = o["trust_coefficient"] * p_norm / (g_norm + (0 if decoupled else decay * p_norm) + o["eps"])
    g = rate * (g if decoupled else g + decay * p)
    b = s["b"] = g if t == 1 else o["momentum"] * s["b"] + (1 - o["dampening"]) * g
    u = g + o["momentum"] * b if o.get("nesterov") else b
    return p - o["lr"] * (u + decay * p if decoupled else u)


def novograd_of_the_paper(torch: Any, p: Any, g: Any, s: dict[str, Any], t: int, o: dict[str, Any]) -> Any:
    """arXiv:1905.11286, Algorithm 1."""
    beta1, beta2 = o["betas"]
    g = -g if o.get("maximize") else g
    square = (g**2).sum()
    s["v"] = square if t == 1 else beta2 * s["v"] + (1 - beta2) * square
    term = g / (s["v"].sqrt() + o["eps"]) + o["weight_decay"] * p
    s["m"] = beta1 * s.get("m", 0) + (1 - beta1 if o.get("grad_averaging") else 1) * term
    return p - o["lr"] * s["m"]


PAPERS = {"LAMB": lamb_of_the_paper, "LARS": lars_of_the_paper, "NovoGrad": novograd_of_the_paper}


@norm_cases
def test_as_the_papers_have_it(case: Case) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    shapes = [(33, 7), (1030,), (3, 4, 5, 5)]
    params, settings = make_params(shapes, np.float64), settings_of(case)
    opt = make_optimizer(case, params, {})
    theirs, states = [torch.from_numpy(p.copy()) for p in params], [{} for _ in shapes]
    for step in range(1, 21):
        grads = make_grads(shapes, np.float64, step, {})[0][1]
        opt.step(grads)
        for i, g in enumerate(grads):
            theirs[i] = PAPERS[case.optimizer](torch, theirs[i], torch.from_numpy(g), states[i], step, settings)
    for i, (p, start) in enumerate(zip(params, make_params(shapes, np.float64), strict=True)):
        assert np.abs(p - start).max() > 0.01
        np.testing.assert_allclose(p, theirs[i].numpy(), rtol=1e-12, atol=1e-13)


def test_without_momentum_the_papers_numbers() -> None:
    """Steps that can be done by hand: lengths of 5 and 10."""
    p, g = np.array([3.0, 4.0]), np.array([6.0, -8.0])
    gradstep.lars_(p, g, momentum_buffer=np.zeros(2), lr=0.5, momentum=0.0, weight_decay=0.5, trust_coefficient=0.1, eps=2.5)
    np.testing.assert_allclose(p, np.array([3.0, 4.0]) - 0.5 * (0.1 * 5 / 15) * np.array([7.5, -6.0]), rtol=1e-15)
    p, n = np.array([3.0, 4.0]), np.array([16.0])
    gradstep.novograd_(p, g, exp_avg=np.ones(2), grad_norm_sq=n, step=2, lr=0.5, betas=(0.5, 0.75), eps=0.5, weight_decay=2.0)
    assert n == 0.75 * 16 + 0.25 * 100
    m = 0.5 + np.array([6.0, -8.0]) / (np.sqrt(37) + 0.5) + 2 * np.array([3.0, 4.0])
    np.testing.assert_allclose(p, np.array([3.0, 4.0]) - 0.5 * m, rtol=1e-15)
    p = np.array([3.0, 4.0])
    gradstep.lamb_(p, g, exp_avg=np.zeros(2), exp_avg_sq=np.zeros(2), step=1, lr=0.5, eps=0.0, weight_decay=0.25)
    u = np.array([1.75, 0.0])
    np.testing.assert_allclose(p, np.array([3.0, 4.0]) - 0.5 * 5 / 1.75 * u, rtol=1e-15)


@pytest.mark.parametrize(
    ("name", "settings", "of_theirs"),
    [
        (
            "Lamb",
            {"lr": 0.02, "betas": (0.85, 0.97), "eps": 1e-12, "weight_decay": 0.07, "bias_correction": False},
            {"weight_decouple": False, "adam_debias": True},
        ),
        (
            "Lamb",
            {"lr": 0.02, "eps": 1e-12, "weight_decay": 0.07, "bias_correction": False, "grad_averaging": False},
            {"weight_decouple": False, "adam_debias": True},
        ),
        ("LARS", {"lr": 0.3, "momentum": 0.85, "weight_decay": 0.07, "trust_coefficient": 0.1}, {}),
        ("LARS", {"lr": 0.3, "momentum": 0.85, "weight_decay": 0.07, "trust_coefficient": 0.1, "nesterov": True}, {}),
        ("NovoGrad", {"lr": 0.02, "betas": (0.85, 0.9), "eps": 0.01, "weight_decay": 0.07}, {}),
    ],
)
def test_as_pytorch_optimizer(name: str, settings: dict[str, Any], of_theirs: dict[str, Any]) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    theirs = pytest.importorskip("pytorch_optimizer", reason="pytorch_optimizer is not installed")
    if not hasattr(theirs, name):
        pytest.skip(f"this pytorch_optimizer has no {name}")
    shapes = [(8, 7), (3, 5)]  # shorter than 10: theirs limits the norm of a parameter in LAMB
    params = make_params(shapes, np.float64)
    others = [torch.nn.Parameter(torch.from_numpy(p.copy())) for p in params]
    opt = getattr(gradstep, "LAMB" if name == "Lamb" else name)(params, **settings)
    shared = {name: value for name, value in settings.items() if name != "bias_correction"}
    other = getattr(theirs, name)(others, **shared, **of_theirs)
    for step in range(1, 11):
        grads = make_grads(shapes, np.float64, step, {})[0][1]
        for q, g in zip(others, grads, strict=True):
            q.grad = torch.from_numpy(g.copy())
        opt.step(grads)
        other.step()
    for p, q, start in zip(params, others, make_params(shapes, np.float64), strict=True):
        assert np.abs(p - start).max() > 0.01
        np.testing.assert_allclose(p, q.detach().numpy(), rtol=1e-9)


def as_optax() -> None:
    """In a process of its own: JAX starts threads, and warns of forks ever after."""
    import jax
    import optax

    jax.config.update("jax_enable_x64", True)
    shapes = [(8, 7), (1030,)]
    pairs = [
        (
            gradstep.LAMB,
            {"lr": 0.02, "betas": (0.85, 0.97), "eps": 1e-5, "weight_decay": 0.07},
            optax.lamb(0.02, b1=0.85, b2=0.97, eps=1e-5, weight_decay=0.07),
        ),
        (
            gradstep.LARS,
            {"lr": 0.3, "momentum": 0.85, "weight_decay": 0.0, "trust_coefficient": 0.1, "eps": 0.3, "nesterov": True},
            optax.lars(0.3, weight_decay=0.0, trust_coefficient=0.1, eps=0.3, momentum=0.85, nesterov=True),
        ),
        (
            gradstep.NovoGrad,
            {"lr": 0.02, "betas": (0.85, 0.9), "eps": 0.01, "weight_decay": 0.07},
            optax.novograd(0.02, b1=0.85, b2=0.9, eps=0.01, weight_decay=0.07),
        ),
    ]
    for cls, settings, theirs in pairs:
        params = make_params(shapes, np.float64)
        others = [jax.numpy.asarray(p.copy()) for p in params]
        opt, state = cls(params, **settings), theirs.init(others)
        for step in range(1, 6):
            grads = make_grads(shapes, np.float64, step, {})[0][1]
            updates, state = theirs.update([jax.numpy.asarray(g) for g in grads], state, others)
            others = optax.apply_updates(others, updates)
            opt.step(grads)
        for p, q, start in zip(params, others, make_params(shapes, np.float64), strict=True):
            assert np.abs(p - start).max() > 0.01
            np.testing.assert_allclose(p, np.asarray(q), rtol=1e-12, atol=1e-13, err_msg=cls.__name__)


def test_as_optax() -> None:
    pytest.importorskip("optax", reason="optax is not installed")
    run_in_child(as_optax)
