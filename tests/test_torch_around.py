"""What stands around a step of the torch classes: schedulers, closures, hooks, autograd, copies, a scaler."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

import gradstep
import gradstep.torch

from .torch_optim_cases import ADAMW, make_params, ours, run, set_grads, theirs

SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda opt: torch.optim.lr_scheduler.LambdaLR(opt, lambda epoch: 0.9**epoch),
    "OneCycleLR, which edits betas": lambda opt: torch.optim.lr_scheduler.OneCycleLR(opt, 0.1, total_steps=20),
    "CyclicLR, which edits betas": lambda opt: torch.optim.lr_scheduler.CyclicLR(opt, 0.001, 0.1, step_size_up=3),
    "CosineAnnealingLR": lambda opt: torch.optim.lr_scheduler.CosineAnnealingLR(opt, 10),
}


@pytest.mark.parametrize("schedule", SCHEDULERS)
def test_schedulers(schedule: str) -> None:
    params, others = make_params(torch.float64), make_params(torch.float64)
    opt, other = ours(ADAMW, params), theirs(ADAMW, others)
    schedulers = [SCHEDULERS[schedule](opt), SCHEDULERS[schedule](other)]
    for step in range(1, 8):
        run(opt, params, (step,))
        run(other, others, (step,))
        for scheduler in schedulers:
            scheduler.step()
        assert opt.param_groups[0]["lr"] == other.param_groups[0]["lr"]
    for p, q in zip(params, others, strict=True):
        assert torch.allclose(p, q, rtol=1e-12, atol=1e-13)


def test_momentum_scheduler() -> None:
    params, others = make_params(torch.float64), make_params(torch.float64)
    pair = [gradstep.torch.SGD(params, lr=0.1, momentum=0.9), torch.optim.SGD(others, lr=0.1, momentum=0.9)]
    schedulers = [torch.optim.lr_scheduler.OneCycleLR(opt, 0.1, total_steps=20) for opt in pair]
    for step in range(1, 8):
        run(pair[0], params, (step,))
        run(pair[1], others, (step,))
        for scheduler in schedulers:
            scheduler.step()
    for p, q in zip(params, others, strict=True):
        assert torch.allclose(p, q, rtol=1e-12, atol=1e-13)


def test_closure() -> None:
    w = torch.nn.Parameter(torch.tensor([3.0]))
    opt = gradstep.torch.SGD([w], lr=0.1)

    def closure() -> Any:
        opt.zero_grad()
        loss = (w**2).sum()
        loss.backward()
        return loss

    with torch.no_grad():
        assert opt.step(closure).item() == 9
    assert w.item() == pytest.approx(2.4)
    assert opt.step() is None


@pytest.mark.parametrize("scope", ["one optimizer", "all optimizers"])
def test_hooks_run_once_around_the_step(scope: str) -> None:
    params = make_params(shapes=[(3,)])
    opt, seen = ours(ADAMW, params), []
    if scope == "one optimizer":
        handles = [
            opt.register_step_pre_hook(lambda *args: seen.append(("pre", params[0].detach().clone()))),
            opt.register_step_post_hook(lambda *args: seen.append(("post", params[0].detach().clone()))),
        ]
    else:
        from torch.optim import optimizer

        handles = [
            optimizer.register_optimizer_step_pre_hook(lambda *args: seen.append(("pre", params[0].detach().clone()))),
            optimizer.register_optimizer_step_post_hook(lambda *args: seen.append(("post", params[0].detach().clone()))),
        ]
    try:
        run(opt, params, (1,))
    finally:
        for handle in handles:
            handle.remove()
    run(opt, params, (2,))
    assert [name for name, _ in seen] == ["pre", "post"]
    assert torch.equal(seen[0][1], make_params(shapes=[(3,)])[0]) and not torch.equal(seen[0][1], seen[1][1])


def test_profiler_sees_the_step() -> None:
    params = make_params(shapes=[(3,)])
    opt = ours(ADAMW, params)
    run(opt, params, (1,))
    with torch.autograd.profiler.profile() as profile:
        run(opt, params, (2,))
    assert any("Optimizer.step#AdamW.step" in event.name for event in profile.function_events)


def test_version_counters() -> None:
    p, unused = make_params(shapes=[(3,), (4,)])
    opt = ours(ADAMW, [p, unused])
    loss = (p**2).sum()
    p.grad = torch.ones(3)
    before = p._version
    opt.step()
    assert p._version > before and unused._version == 0
    state = opt.state[p]["exp_avg"]._version
    opt.step()
    assert opt.state[p]["exp_avg"]._version > state
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_functions_take_tensors_and_tell_autograd() -> None:
    p = torch.nn.Parameter(torch.ones(5))
    loss = (p**2).sum()
    gradstep.sgd_(p, torch.ones(5), lr=0.5)
    assert torch.equal(p.detach(), torch.full((5,), 0.5))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("how", ["pickle", "deepcopy"])
def test_copies_go_on_alike(how: str) -> None:
    params = make_params()
    opt = ours(ADAMW, params)
    run(opt, params, (1,))
    twin = pickle.loads(pickle.dumps(opt)) if how == "pickle" else copy.deepcopy(opt)
    run(opt, params, (2,))
    copies = twin.param_groups[0]["params"]
    run(twin, copies, (2,))
    assert all(torch.equal(p, q) and p is not q for p, q in zip(params, copies, strict=True))


def test_zero_grad_and_missing_gradients() -> None:
    params = make_params()
    opt = ours(ADAMW, params)
    set_grads(params, 1)
    params[1].grad = None
    opt.step()
    assert params[1] not in opt.state and opt.state[params[0]]["step"] == 1
    opt.zero_grad(set_to_none=False)
    assert params[0].grad.abs().sum() == 0 and params[1].grad is None
    opt.zero_grad()
    assert params[0].grad is None
    before = [p.detach().clone() for p in params]
    opt.step()
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
    run(opt, params, (2,))
    assert opt.state[params[0]]["step"] == 2 and opt.state[params[1]]["step"] == 1


def test_memory_that_moves_between_steps() -> None:
    params, others = make_params(), make_params()
    opt, other = ours(ADAMW, params), ours(ADAMW, others)
    run(opt, params, (1,))
    run(other, others, (1,))
    params[0].data = params[0].data.clone()
    params[1].data = torch.cat([params[1].data, torch.zeros(7)])[:-7]
    state = opt.state[params[0]]
    state["exp_avg"] = state["exp_avg"].clone()
    state["exp_avg_sq"].set_(state["exp_avg_sq"].clone())
    opt.state[params[1]] = {name: value.clone() for name, value in opt.state[params[1]].items()}
    opt.state[params[4]]["step"].share_memory_()
    opt.state = opt.state.__class__(dict, reversed(list(opt.state.items())))
    run(opt, params, (2, 3))
    run(other, others, (2, 3))
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))


def test_grad_scaler_unscales_for_it() -> None:
    """Also with `fused=True`, by which torch's own classes take the unscaling upon themselves."""
    results = []
    for cls in (gradstep.torch.AdamW, torch.optim.AdamW):
        params = make_params(torch.float32, [(50,)])
        opt = cls(params, lr=0.1, fused=True)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for step in (1, 2, 3):
            opt.zero_grad()
            scale = torch.inf if step == 2 else 1.0
            scaler.scale((params[0] ** 2).sum() * scale).backward()
            scaler.step(opt)
            scaler.update()
        results.append(params[0].detach())
    assert torch.allclose(*results, rtol=1e-6)
    assert not torch.allclose(results[0], make_params(torch.float32, [(50,)])[0])


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_code_around_a_step() -> None:
    params, others = make_params(shapes=[(30,), (4, 5)]), make_params(shapes=[(30,), (4, 5)])
    opt, other = ours(ADAMW, params), ours(ADAMW, others)

    def train(opt: Any, params: list[Any]) -> Any:
        loss = sum((p**2).sum() for p in params)
        loss.backward()
        opt.step()
        opt.zero_grad()
        return loss

    compiled = torch.compile(train, backend="eager")
    for _ in range(3):
        assert torch.allclose(compiled(opt, params), train(other, others))
    for p, q in zip(params, others, strict=True):
        assert torch.allclose(p, q) and opt.state[p]["step"] == 3
