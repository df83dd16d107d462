"""What stands around a step of the torch classes with options: autograd, schedulers, hooks, sparse gradients."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from torch.optim.optimizer import register_optimizer_step_post_hook

import gradstep
import gradstep.torch

from .stage_cases import case_of, make_grads, make_optimizer, make_params
from .torch_cases import (
    ADAMW,
    RULES,
    SMALL,
    USUAL,
    assert_all_same,
    assert_same,
    assert_unchanged,
    make,
    run,
    set_grads,
    snapshot,
    tensors,
)


def test_the_keyword_and_the_method_zero_grad() -> None:
    params = tensors(SMALL)
    opt = make(ADAMW, params, {"zero_grad": True})
    run(opt, params, (1,))
    assert not any(p.grad.any() for p in params)
    set_grads(params, 2)
    opt.zero_grad(set_to_none=False)
    assert all(p.grad is not None and not p.grad.any() for p in params)
    opt.zero_grad()
    assert all(p.grad is None for p in params)
    plain = make(ADAMW, params, {})
    run(plain, params, (3,))
    assert all(p.grad.any() for p in params)
    assert opt.zeroes_grad is True and plain.zeroes_grad is False and callable(plain.zero_grad)


def test_version_counters_rise() -> None:
    p, unused = tensors([(6, 40), (33,)])
    opt = make(ADAMW, [p, unused], {"ema_decay": 0.9, "swa": (0, 1), "lookahead": (1, 0.5), "zero_grad": True})
    for step in (1, 2):
        p.grad = torch.ones(6, 40)
        states = {name: state for name, state in opt.state.get(p, {}).items() if isinstance(state, torch.Tensor)}
        watched = {"parameter": p, "gradient": p.grad, **(states if step == 2 else {})}
        before = {name: tensor._version for name, tensor in watched.items()}
        opt.step()
        for name, tensor in watched.items():
            assert tensor._version > before[name] or name == "step", name
    assert {"exp_avg", "exp_avg_sq", "ema", "swa", "slow"} <= watched.keys()
    assert unused._version == 0 and unused not in opt.state
    average = opt.ema[0]
    before = p._version, average._version
    opt.swap_ema()
    assert p._version > before[0] and average._version > before[1]


def test_autograd_notices_that_a_gradient_was_zeroed() -> None:
    p = torch.nn.Parameter(torch.ones(5))
    (p**3).sum().backward(create_graph=False)
    g = p.grad.requires_grad_()
    loss = (g**2).sum()
    p.grad = g.detach()
    gradstep.torch.SGD([p], lr=0.1, zero_grad=True).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda opt: torch.optim.lr_scheduler.LambdaLR(opt, lambda epoch: 0.9**epoch),
    "OneCycleLR": lambda opt: torch.optim.lr_scheduler.OneCycleLR(opt, 0.1, total_steps=20),  # edits betas and momentum
}


@pytest.mark.parametrize("schedule", SCHEDULERS)
@pytest.mark.parametrize("rule", RULES)
def test_schedulers(rule: str, schedule: str) -> None:
    case, params, arrays = case_of(rule), tensors(SMALL), make_params(SMALL, np.float32)
    options = {**USUAL, "group_lasso": 9.0, "decay_mode": "decoupled"}
    opt, other = make(case, params, options), make_optimizer(case, arrays, options)
    scheduler, rates = SCHEDULERS[schedule](opt), set()
    for step in range(1, 6):
        group = opt.param_groups[0]
        other.param_groups[0].update({name: group[name] for name in ("lr", "betas", "momentum") if name in group})
        rates.add(group["lr"])
        set_grads(params, step)
        seen = opt.step(stats=step == 3)
        assert (seen is not None) == (step == 3)
        other.step(make_grads(SMALL, np.float32, step, {})[0][1])
        scheduler.step()
    assert len(rates) == 5
    for i, (p, q) in enumerate(zip(params, arrays, strict=True)):
        assert_same(p, q, f"parameter {i}")


@pytest.mark.parametrize("around", ["hooks", "global hooks", "profiler", "compiler"])
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_what_watches_a_step_changes_nothing(around: str) -> None:
    params, others = tensors(SMALL), tensors(SMALL)
    opt, other = make(ADAMW, params, USUAL), make(ADAMW, others, USUAL)
    calls: list[Any] = []
    hooks = []
    if around == "hooks":
        hooks = [opt.register_step_pre_hook(lambda *args: calls.append(args[0]))]
        hooks.append(opt.register_step_post_hook(lambda *args: calls.append(args[0])))
    elif around == "global hooks":
        hooks = [register_optimizer_step_post_hook(lambda *args: calls.append(args[0]))]
    try:
        for step in (1, 2):
            set_grads(params, step)
            if around == "profiler":
                with torch.autograd.profiler.profile() as profile:
                    seen = opt.step(grad_scale=0.5, stats=True)
                assert any("Optimizer.step#AdamW.step" in event.name for event in profile.function_events)
            elif around == "compiler":
                opt_step = torch.compile(lambda: opt.step(grad_scale=0.5, stats=True), backend="eager")
                seen = opt_step()
            else:
                seen = opt.step(grad_scale=0.5, stats=True)
            assert seen.step == step and seen.grad_norm > 0
    finally:
        for hook in hooks:
            hook.remove()
    assert calls == {"hooks": [opt] * 4, "global hooks": [opt] * 2}.get(around, [])
    for step in (1, 2):
        set_grads(others, step)
        other.step(grad_scale=0.5)
    assert_all_same(params, others, opt, other)
    if around == "hooks":
        opt.register_step_pre_hook(lambda *args: calls.append(args[0]))
        extra = [(1.0, [torch.ones_like(p) for p in params])]
        assert opt.step(grads=extra) is None and len(calls) == 5
        other.step(grads=[(1.0, [torch.ones_like(p) for p in others])])
        assert_all_same(params, others)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize(
    "options",
    [
        *({name: value} for name, value in USUAL.items()),
        {"clip_value": 0.1},
        {"bounds": (0, None)},
        {"on_nonfinite": "skip"},
        {"on_nonfinite": "raise"},
        {"on_nonfinite": "zero"},
        {"decay_mode": "decoupled"},
    ],
    ids=str,
)
def test_sparse_gradients_go_without_options(options: dict[str, Any]) -> None:
    """SGD and Adagrad take sparse gradients, as torch's do; options would be lost on the way."""
    for name in ("SGD", "Adagrad"):
        table, dense = torch.nn.Embedding(10, 4, sparse=True), torch.nn.Linear(4, 1)
        params = [*table.parameters(), *dense.parameters()]
        opt = getattr(gradstep.torch, name)(params, lr=0.1, **options)
        dense(table(torch.tensor([1, 3, 3]))).sum().backward()
        before, grads = snapshot(opt, params), [p.grad.to_dense().clone() for p in params]
        with pytest.raises((TypeError, ValueError, RuntimeError), match="sparse"):
            opt.step()
        assert_unchanged(opt, params, before)
        assert all(torch.equal(p.grad.to_dense(), g) for p, g in zip(params, grads, strict=True))


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_sparse_gradients_and_what_step_takes() -> None:
    """Statistics and weighted gradients are refused; a scale is used."""
    table = torch.nn.Embedding(10, 4, sparse=True)
    opt = gradstep.torch.SGD(table.parameters(), lr=0.5)
    table(torch.tensor([1, 3, 3])).sum().backward()
    start = table.weight.detach().clone()
    for more in ({"stats": True}, {"grads": [(1.0, [table.weight.grad])]}):
        with pytest.raises((TypeError, ValueError), match="sparse"):
            opt.step(**more)
        assert torch.equal(table.weight, start)
    opt.step(grad_scale=0.25)
    expected = start.clone()
    expected[1] -= 0.125
    expected[3] -= 0.25
    assert torch.allclose(table.weight, expected)


def test_a_sparse_gradient_is_given_back_as_it_was() -> None:
    table = torch.nn.Embedding.from_pretrained(torch.ones(5, 3), freeze=False, sparse=True)
    table(torch.tensor([1])).sum().backward()
    grad = table.weight.grad
    opt = gradstep.torch.AdamW(table.parameters())
    with pytest.raises(RuntimeError, match="sparse"):
        opt.step(grad_scale=0.5)
    sgd = gradstep.torch.SGD(table.parameters(), lr=1.0)
    sgd.step(grad_scale=0.5)
    assert table.weight.grad is grad and torch.equal(grad.to_dense()[1], torch.ones(3))
    assert torch.equal(table.weight[1], torch.full((3,), 0.5)) and sgd.steps == 1


@pytest.mark.parametrize("how", ["skip", "raise"])
def test_a_step_that_is_left_out_raises_no_version(how: str) -> None:
    p = torch.nn.Parameter(torch.ones(3))
    opt = gradstep.torch.AdamW([p], on_nonfinite=how)
    loss = (p**2).sum()
    p.grad = torch.tensor([1.0, float("nan"), 1.0])
    with pytest.raises(FloatingPointError) if how == "raise" else contextlib.nullcontext():
        opt.step()
    assert p._version == 0
    p.grad = None
    loss.backward()
    assert torch.equal(p.grad, torch.full((3,), 2.0))
