"""Offloading from a CUDA device, where there is one."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

import gradstep.torch

from .test_torch_offload import copies, parameters

SHAPES = [(300, 700), (33,), (129, 1030), (5,), (0, 3), (64, 16, 3, 3)]
OPTIONS: list[dict[str, Any]] = [{}, {"clip_norm": 1.0, "zero_grad": True}, {"on_nonfinite": "skip", "ema_decay": 0.9}]


def pairs(dtype: str, options: dict[str, Any], **how: Any) -> Any:
    """An offloaded optimizer of parameters on the device, and a plain one of the same on the host."""
    others = parameters(SHAPES, dtype)
    others[5] = torch.nn.Parameter(others[5].detach().contiguous(memory_format=torch.channels_last))
    params = [torch.nn.Parameter(p.detach().cuda()) for p in copies(others)]
    if dtype == "bfloat16":
        options = {"precision": "master", **options}
    opt = gradstep.torch.offload(gradstep.torch.AdamW(params, lr=0.01, **options), **{"chunk_bytes": 100_000, **how})
    return opt, params, gradstep.torch.AdamW(others, lr=0.01, **options), others


def assert_same(opt: Any, params: Any, other: Any, others: Any) -> None:
    for i, (p, q) in enumerate(zip(params, others, strict=True)):
        assert torch.equal(p.cpu(), q), i
        for name, value in other.state.get(q, {}).items():
            ours = opt.state[p][name]
            assert torch.equal(ours, value) if isinstance(value, torch.Tensor) else ours == value, (i, name)
            assert not isinstance(ours, torch.Tensor) or ours.device.type == "cpu"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_values(options: dict[str, Any], dtype: str) -> None:
    opt, params, other, others = pairs(dtype, options)
    for step in range(6):
        for p, q in zip(params, others, strict=True):
            p.grad = torch.randn_like(p)
            if options.get("on_nonfinite") and step == 2 and p.numel():
                p.grad.view(-1)[0] = torch.nan
            q.grad = p.grad.cpu()
        opt.step()
        other.step()
        assert_same(opt, params, other, others)


def test_pinned_memory() -> None:
    opt, params, *_ = pairs("float32", {})
    for p in params:
        p.grad = torch.ones_like(p)
    opt.step()
    assert all(mirror.copy.is_pinned() for mirror in opt._mirrors if mirror.copy.numel())
    assert opt._buffers and all(buffer.is_pinned() for buffer in opt._buffers.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_thousand_steps_on_a_side_stream(dtype: str) -> None:
    """Gradients follow from the parameters, and are freed at once; other work takes their memory meanwhile."""
    opt, params, other, others = pairs(dtype, {"clip_norm": 100.0}, chunk_bytes=65536, buffers=2)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for step in range(1000):
            for p in params:
                p.grad = p.detach() * 0.5
            opt.step()
            opt.zero_grad()
            noise = [torch.full_like(p, float("nan")) for p in params]  # in the memory of the gradients
            del noise
            if step % 10 == 0:
                torch.cuda._sleep(200_000)
    stream.synchronize()
    for _ in range(1000):
        for q in others:
            q.grad = q.detach() * 0.5
        other.step()
    assert_same(opt, params, other, others)


def test_state_dict_of_a_device() -> None:
    """States that are loaded stay on the host, wherever they have been."""
    opt, params, other, others = pairs("float32", {})
    for p, q in zip(params, others, strict=True):
        p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
    opt.step()
    other.step()
    states = other.state_dict()
    for state in states["state"].values():
        for name in state:
            state[name] = state[name].cuda()
    opt.load_state_dict(states)
    assert_same(opt, params, other, others)


def test_scaler() -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(100, 100).cuda()
    opt = gradstep.torch.offload(gradstep.torch.AdamW(model.parameters(), lr=0.01), chunk_bytes=8192)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**40, growth_interval=3)
    x = torch.randn(20, 100, device="cuda")
    losses = []
    for _ in range(60):
        opt.zero_grad()
        with torch.autocast("cuda", torch.float16):
            loss = (model(x) - x).square().mean()
        scaler.scale(loss).backward()
        scaler.step(opt)
        scaler.update()
        losses.append(loss.item())
    assert 0 < opt.steps < 60 and losses[-1] < losses[0] / 2
