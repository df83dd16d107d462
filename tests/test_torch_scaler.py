"""`torch.amp.GradScaler` with the torch classes: as with torch's optimizers, and what it makes of options and statistics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

import gradstep.torch

from .torch_cases import (
    ADAMW,
    SMALL,
    USUAL,
    assert_all_same,
    assert_unchanged,
    make,
    run,
    set_grads,
    snapshot,
    sources,
    tensors,
)


def amp(case: str, dtype: Any = np.float32) -> dict[str, Any]:
    name, settings = {
        "AdamW": ("AdamW", {"lr": 0.02, "weight_decay": 0.07}),
        "SGD": ("SGD", {"lr": 0.02, "momentum": 0.85, "weight_decay": 0.07}),
    }[case]
    params, others = tensors(SMALL, dtype), tensors(SMALL, dtype)
    return {
        "ours": (getattr(gradstep.torch, name)(params, **settings), params),
        "theirs": (getattr(torch.optim, name)(others, foreach=False, **settings), others),
    }


def backward(scaler: Any, params: list[Any], step: int, overflow: bool = False) -> None:
    """Gradients of a scaled loss; with `overflow`, one element is infinite."""
    dtype = np.float64 if params[0].dtype == torch.float64 else np.float32
    grads = sources([tuple(p.shape) for p in params], step, {}, dtype)[0][1]
    loss = sum((p * g / 100).sum() for p, g in zip(params, grads, strict=True))
    scaler.scale(loss + (params[1][5] * torch.inf if overflow else 0)).backward()


def close(params: list[Any], others: list[Any]) -> None:
    for p, q, start in zip(params, others, tensors(SMALL), strict=True):
        assert (p.double() - start.double()).abs().max() > 0.005
        assert torch.allclose(p, q, rtol=2e-6, atol=2e-6)


def counts(opt: Any) -> list[float]:
    return [float(state["step"]) for state in opt.state.values() if "step" in state]


BETWEEN: dict[str, Callable[[Any, Any, list[Any]], None]] = {
    "nothing": lambda scaler, opt, params: None,
    "unscale_": lambda scaler, opt, params: scaler.unscale_(opt),
    "unscale_ and clip": lambda scaler, opt, params: (
        scaler.unscale_(opt),
        torch.nn.utils.clip_grad_norm_(params, 0.5),
    ),
    "unscale_ and our clip": lambda scaler, opt, params: (
        scaler.unscale_(opt),
        gradstep.torch.clip_grad_norm_(params, 0.5),
    ),
}


@pytest.mark.parametrize("name", ["AdamW", "SGD"])
@pytest.mark.parametrize("between", BETWEEN)
@pytest.mark.parametrize("overflows", [(), (1,), (1, 2), (3,), (1, 4, 5)], ids=str)
@pytest.mark.parametrize("scale", [1024.0, 1000.0, 3.7])
def test_scaler_as_with_torchs_optimizer(name: str, between: str, overflows: tuple[int, ...], scale: float) -> None:
    scales: dict[str, list[float]] = {"ours": [], "theirs": []}
    pairs = amp(name)
    for which, (opt, params) in pairs.items():
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_factor=3.0, backoff_factor=0.25, growth_interval=2)
        keys = vars(opt).keys() - {"_plan"}
        for step in range(1, 7):
            opt.zero_grad()
            backward(scaler, params, step, step in overflows)
            before = [p.detach().clone() for p in params]
            BETWEEN[between](scaler, opt, params)
            assert scaler.step(opt) is None
            scaler.update()
            scales[which].append(scaler.get_scale())
            assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True)) == (step in overflows)
            if overflows[:step] == tuple(range(1, step + 1)):
                assert not opt.state and opt.state_dict()["state"] == {}
            assert vars(opt).keys() - {"_plan"} <= keys | {"steps"}
            assert which == "theirs" or opt.steps == step - sum(at <= step for at in overflows)
    assert scales["ours"] == scales["theirs"] and len(set(scales["ours"])) > 1
    close(pairs["ours"][1], pairs["theirs"][1])
    assert counts(pairs["ours"][0]) == counts(pairs["theirs"][0]) == [6.0 - len(overflows)] * (3 if name == "AdamW" else 0)


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_the_option_clips_what_was_unscaled(name: str, unscale: bool) -> None:
    """As torch's unscale_, clip_grad_norm_, step; in float64, with a scale of a power of two, to the last digits."""
    pairs = amp(name, np.float64)
    pairs["ours"][0].clip_norm = 0.5
    for which, (opt, params) in pairs.items():
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14)
        for step in range(1, 6):
            opt.zero_grad()
            backward(scaler, params, step, step == 3)
            if unscale or which == "theirs":
                scaler.unscale_(opt)
            if which == "theirs":
                norm = torch.nn.utils.clip_grad_norm_(params, 0.5)
                assert norm > 1
            scaler.step(opt)
            scaler.update()
    for p, q in zip(pairs["ours"][1], pairs["theirs"][1], strict=True):
        assert torch.allclose(p, q, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("how", ["propagate", "skip", "raise", "zero"])
def test_the_scaler_comes_before_on_nonfinite(how: str, unscale: bool) -> None:
    """What the scaler saw overflow is left out, whatever the option says."""
    params = tensors(SMALL)
    opt = make(ADAMW, params, {"on_nonfinite": how, "ema_decay": 0.9, "clip_norm": 3.0})
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=100)
    for step in (1, 2, 3, 4):
        opt.zero_grad()
        backward(scaler, params, step, overflow=step in (1, 3))
        if unscale:
            scaler.unscale_(opt)
        before = snapshot(opt, params)
        scaler.step(opt)
        scaler.update()
        if step in (1, 3):
            assert_unchanged(opt, params, before)
        else:
            assert opt.steps == step // 2 and opt.state[params[0]]["ema_count"] == step // 2
    assert scaler.get_scale() == 16


@pytest.mark.parametrize("unscale", [True, False])
def test_what_turns_bad_after_unscale_is_for_the_option(unscale: bool) -> None:
    """The loop goes on after an error, too, whether or not it calls unscale_ again."""
    results = []
    for how in ("skip", "raise"):
        params = tensors(SMALL)
        opt = make(ADAMW, params, {"on_nonfinite": how})
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        for step in (1, 2, 3):
            opt.zero_grad()
            backward(scaler, params, step)
            if unscale or step == 2:
                scaler.unscale_(opt)
            before = snapshot(opt, params)
            if step == 2:
                params[0].grad[1, 1] = torch.nan
            if step == 2 and how == "raise":
                with pytest.raises(FloatingPointError):
                    scaler.step(opt)
            else:
                scaler.step(opt)
            scaler.update()
            if step == 2:
                assert_unchanged(opt, params, before)
        assert opt.steps == 2
        results.append(params)
    assert_all_same(*results)


@pytest.mark.parametrize("unscale", [False, True])
def test_statistics_with_a_scaler(unscale: bool) -> None:
    params = tensors(SMALL)
    opt = make(ADAMW, params, {"clip_norm": 0.5})
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=100)
    for step in (1, 2, 3):
        opt.zero_grad()
        backward(scaler, params, step, overflow=step == 2)
        true = torch.cat([p.grad.ravel().double() for p in params]) / scaler.get_scale()
        if unscale:
            scaler.unscale_(opt)
        before = snapshot(opt, params)
        seen = scaler.step(opt, stats=True)
        scaler.update()
        assert seen.skipped == (step == 2) and seen.grad_infs == (step == 2)
        assert seen.step == min(step, 2)
        if step == 2:
            assert_unchanged(opt, params, before)
            assert seen.grad_norm == float("inf") and seen.update_norm == 0
        else:
            assert seen.grad_norm == pytest.approx(float(true.norm()), rel=1e-6)
            assert seen.clip_factor == pytest.approx(0.5 / float(true.norm()), rel=1e-5)
            assert seen.grad_norm_clipped == pytest.approx(0.5, rel=1e-5)


@pytest.mark.parametrize("stats", [False, True])
def test_found_inf_skips_also_where_gradients_were_mended(stats: bool) -> None:
    """As with torch's optimizers: what the scaler found counts."""
    params = tensors(SMALL)
    opt = make(ADAMW, params, {})
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    backward(scaler, params, 1, overflow=True)
    scaler.unscale_(opt)
    for p in params:
        p.grad.nan_to_num_(0.0, 0.0, 0.0)
    before = snapshot(opt, params)
    seen = scaler.step(opt, stats=stats)
    assert_unchanged(opt, params, before)
    assert seen is None or seen.skipped


@pytest.mark.parametrize("stats", [False, True])
@pytest.mark.parametrize("unscale", [False, True])
def test_zero_grad_with_a_scaler(unscale: bool, stats: bool) -> None:
    """Gradients are zeroed by steps that are left out, too: else they would stay infinite."""
    pairs = amp("AdamW")
    pairs["ours"][0].zeroes_grad = True
    for which, (opt, params) in pairs.items():
        scaler = torch.amp.GradScaler("cpu", init_scale=128.0)
        for step in (1, 2, 3, 4):
            if which == "theirs":
                opt.zero_grad()
            backward(scaler, params, step, overflow=step in (1, 3))
            if unscale:
                scaler.unscale_(opt)
            more = {"stats": True} if stats and which == "ours" else {}
            scaler.step(opt, **more)
            scaler.update()
            assert which == "theirs" or all(p.grad is not None and not p.grad.any() for p in params)
    close(pairs["ours"][1], pairs["theirs"][1])


def test_several_optimizers_on_one_scaler() -> None:
    """Each is left out for what is its own; the scale is common."""
    results = []
    for which in ("ours", "theirs"):
        made = [amp(name)[which] for name in ("AdamW", "SGD")]
        scaler, scales = torch.amp.GradScaler("cpu", init_scale=512.0, growth_interval=2), []
        for step in range(1, 7):
            for k, (opt, params) in enumerate(made):
                opt.zero_grad()
                backward(scaler, params, 10 * step + k, overflow=(step, k) in ((1, 0), (3, 1), (4, 0)))
            if step % 2:
                scaler.unscale_(made[1][0])
            for opt, _ in made:
                scaler.step(opt)
            scaler.update()
            scales.append(scaler.get_scale())
        results.append((made, scales))
    (ours, our_scales), (theirs, their_scales) = results
    assert our_scales == their_scales
    for (_, params), (_, others) in zip(ours, theirs, strict=True):
        close(params, others)
    assert [opt.steps for opt, _ in ours] == [4, 5] and counts(ours[0][0]) == counts(theirs[0][0]) == [4.0] * 3


def test_a_disabled_scaler_does_nothing() -> None:
    params, others = tensors(SMALL), tensors(SMALL)
    opt, other = make(ADAMW, params, USUAL), make(ADAMW, others, USUAL)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    for step in (1, 2):
        set_grads(params, step)
        scaler.unscale_(opt)
        scaler.step(opt)
        scaler.update()
    run(other, others, (1, 2))
    assert_all_same(params, others, opt, other)


def test_scaled_twice() -> None:
    """`grad_scale` of a step and the scaler's are two factors."""
    params, others = tensors(SMALL, np.float64), tensors(SMALL, np.float64)
    opt, other = (gradstep.torch.SGD(each, lr=0.1) for each in (params, others))
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    backward(scaler, params, 1)
    scaler.step(opt, grad_scale=0.5)
    for p, q in zip(params, others, strict=True):
        q.grad = p.grad / 128
    other.step()
    assert_all_same(params, others)


def sparse_step(opt: Any, table: Any, scaler: Any) -> None:
    scaler.scale(table(torch.tensor([1, 2])).sum()).backward()
    scaler.step(opt)
    scaler.update()


def test_sparse_gradients_with_a_scaler() -> None:
    tables = [torch.nn.Embedding.from_pretrained(torch.ones(5, 3), freeze=False, sparse=True) for _ in range(2)]
    for table, cls in zip(tables, (gradstep.torch.SGD, torch.optim.SGD), strict=True):
        opt, scaler = cls(table.parameters(), lr=0.5), torch.amp.GradScaler("cpu", init_scale=8.0)
        for _ in range(2):
            opt.zero_grad()
            sparse_step(opt, table, scaler)
    assert torch.equal(tables[0].weight, tables[1].weight)
    assert not torch.equal(tables[0].weight, torch.ones(5, 3))


@pytest.mark.parametrize("wrong", ["clip_norm", "grads"])
def test_an_error_leaves_no_loss_scale_to_the_next_step(wrong: str) -> None:
    p = torch.nn.Parameter(torch.zeros(3))
    opt, scaler = gradstep.torch.SGD([p], lr=1.0), torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(p.sum()).backward()
    if wrong == "clip_norm":
        opt.clip_norm = -1.0
    with pytest.raises((TypeError, ValueError), match=wrong):
        scaler.step(opt, **({"grads": []} if wrong == "grads" else {}))
    opt.clip_norm = None
    p.grad = torch.ones(3)
    opt.step()
    assert (p == -1).all()
