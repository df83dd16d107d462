"""DTensors, as FSDP2 has them: each process updates its part. Here on the CPU, in a group of one process."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("torch.distributed.tensor", reason="torch has no DTensor")

import gradstep.torch
from gradstep import _core

from .cases import gradients, parameters
from .child import run_in_child
from .device_cases import pretending

SHAPES = [(8, 6), (7,), (3, 4, 5)]
pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch has no torch.distributed")


def start_group() -> Any:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    return torch.distributed.device_mesh.init_device_mesh("cpu", (1,))


def spread(array: Any, mesh: Any, placement: Any = None) -> Any:
    from torch.distributed.tensor import DTensor, Shard

    return DTensor.from_local(torch.from_numpy(array.copy()), mesh, [placement or Shard(0)])


def make_params(mesh: Any, placement: Any = None) -> tuple[list[Any], list[Any]]:
    arrays = [parameters(shape, np.float32, i) for i, shape in enumerate(SHAPES)]
    return (
        [torch.nn.Parameter(spread(array, mesh, placement)) for array in arrays],
        [torch.nn.Parameter(torch.from_numpy(array.copy())) for array in arrays],
    )


def set_grads(params: list[Any], others: list[Any], mesh: Any, step: int, placement: Any = None) -> None:
    for i, (p, q) in enumerate(zip(params, others, strict=True)):
        g = gradients(tuple(q.shape), np.float32, 10 * step + i)
        p.grad, q.grad = spread(g, mesh, placement), torch.from_numpy(g.copy())


def local(tensor: Any) -> Any:
    tensor = tensor.detach()
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def assert_same(params: list[Any], others: list[Any]) -> None:
    assert all(torch.equal(local(p), local(q)) for p, q in zip(params, others, strict=True))


def check_values(device: int, api: bool) -> None:
    mesh = start_group()
    from torch.distributed.tensor import DTensor, Replicate, Shard

    _core.emulate_gpu(True)
    _core.set_use_exchange_api(api)
    for name, options, placement in (
        ("AdamW", {}, Shard(0)),
        (
            "AdamW",
            {"ema_decay": 0.9, "swa": (0, 1), "lookahead": (2, 0.5), "l1": 0.1, "centralize": True, "zero_grad": True},
            Shard(0),
        ),
        ("SGD", {"momentum": 0.9}, Shard(0)),
        ("Lion", {}, Shard(0)),
        ("LAMB", {}, Replicate()),
        ("AdamW", {"clip_norm": 1.0, "on_nonfinite": "skip"}, Replicate()),
    ):
        params, others = make_params(mesh, placement)
        with pretending(device):
            opt, other = (getattr(gradstep.torch, name)(each, lr=0.05, **options) for each in (params, others))
            for step in (1, 2, 3):
                set_grads(params, others, mesh, step, placement)
                before = params[0]._version
                opt.step()
                other.step()
                assert params[0]._version > before
                assert_same(params, others)
            for state, theirs in zip(opt.state.values(), other.state.values(), strict=True):
                for label, value in state.items():
                    if isinstance(value, torch.Tensor) and value.shape:
                        assert isinstance(value, DTensor) and value.placements == (placement,)
                    assert torch.equal(local(torch.as_tensor(value)), local(torch.as_tensor(theirs[label])))
            if "ema_decay" in options:
                for which in (opt, other):
                    which.swap_ema()
                assert_same(params, others)
            again = getattr(gradstep.torch, name)(params, lr=0.05, **options)
            again.load_state_dict(opt.state_dict())
            set_grads(params, others, mesh, 4, placement)
            again.step()
            other.step()
            assert_same(params, others)
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("device", [-1, 0])
@pytest.mark.parametrize("api", [True, False], ids=["C table", "methods"])
def test_each_part_as_a_tensor_of_its_own(device: int, api: bool) -> None:
    run_in_child(check_values, device, api)


def check_refusals(folder: str) -> None:
    mesh = start_group()
    from torch.distributed.tensor import DTensor, Replicate, Shard

    sharded = "(Shard(dim=0),)"

    def refused(options: dict[str, Any], name: str = "AdamW", change: Any = None, stats: bool = False) -> str:
        params, others = make_params(mesh)
        opt = getattr(gradstep.torch, name)(params, lr=0.1, **options)
        set_grads(params, others, mesh, 1)
        if change:
            change(params, opt)
        with pytest.raises(ValueError) as caught:
            opt.step(stats=stats)
        assert_same(params, others)
        assert not any(opt.state.values()) or change
        return str(caught.value).removeprefix(f"{name}.step: ")

    for options, what in (
        ({"clip_norm": 1.0}, "clip_norm"),
        ({"on_nonfinite": "skip"}, "on_nonfinite"),
        ({"on_nonfinite": "raise"}, "on_nonfinite"),
        ({"clip_norm_per_tensor": 1.0}, "clip_norm_per_tensor"),
        ({"trust_ratio": True}, "trust_ratio"),
        ({"cautious": True}, "cautious"),
        ({"noise": 0.1}, "what is drawn at random"),
    ):
        assert refused(options) == f"params[0] has the placements {sharded}: {what} takes whole tensors only", what
    assert refused({"agc": 0.1}) == f"params[1] has the placements {sharded}: agc takes whole tensors only"
    assert refused({}, stats=True) == f"params[0] has the placements {sharded}: stats takes whole tensors only"
    for name, what in (("LAMB", "trust_ratio"), ("LARS", "a norm for each tensor"), ("NovoGrad", "a norm for each tensor")):
        assert refused({}, name) == f"params[0] has the placements {sharded}: {what} takes whole tensors only"

    def replicated(params: Any, opt: Any) -> None:
        params[1].grad = DTensor.from_local(torch.zeros(7), mesh, [Replicate()])

    def plain(params: Any, opt: Any) -> None:
        params[1].data = params[1].data  # keeps its kind
        opt.state[params[1]] = {
            "step": torch.zeros((), dtype=torch.float64),
            "exp_avg": torch.zeros(7),
            "exp_avg_sq": torch.zeros(7),
        }

    assert refused({}, change=replicated) == f"params[1].grad has the placements (Replicate(),), its parameter has {sharded}"
    assert refused({}, change=plain) == "state[params[1]]['exp_avg'] is no DTensor, its parameter is"

    across = torch.nn.Parameter(spread(np.ones((4, 6), np.float32), mesh, Shard(1)))
    across.grad = spread(np.ones((4, 6), np.float32), mesh, Shard(1))
    for options, what in (({"max_norm": 1.0}, "a stage that goes by rows"), ({"agc": 0.1}, "agc")):
        with pytest.raises(ValueError, match=rf"has the placements \(Shard\(dim=1\),\): {what} takes whole tensors only"):
            gradstep.torch.AdamW([across], **options).step()
    gradstep.torch.AdamW([across], l1=0.1).step()

    big = torch.nn.Parameter(spread(np.ones((80, 80), np.float32), mesh))
    big.grad = spread(np.ones((80, 80), np.float32), mesh)
    opt = gradstep.torch.AdamW([big], state_dtype="q8")
    with pytest.raises(ValueError, match="AdamW: a DTensor's states can't be compressed: state_dtype must be of floats"):
        opt.step()
    opt = gradstep.torch.AdamW([big], lr=0.1)
    message = r"params\[0\] is a DTensor, which torch.distributed.checkpoint saves and loads, by state_dict\(\)"
    with pytest.raises(ValueError, match=f"AdamW.save: {message}"):
        opt.save(Path(folder) / "opt")
    whole = torch.nn.Parameter(torch.ones(80, 80))
    gradstep.torch.AdamW([whole], lr=0.1).save(Path(folder) / "opt")
    with pytest.raises(ValueError, match=f"AdamW.load: {message}"):
        gradstep.torch.AdamW.load(Path(folder) / "opt", [big])
    with pytest.raises(ValueError, match=r"AdamW: params\[0\] is a DTensor: state_dir is for tensors that are whole"):
        gradstep.torch.AdamW([big], state_dir=Path(folder) / "states")
    torch.distributed.destroy_process_group()


def test_what_needs_whole_tensors(tmp_path: Path) -> None:
    run_in_child(check_refusals, str(tmp_path))


def check_fsdp() -> None:
    mesh = start_group()
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
    from torch.distributed.fsdp import fully_shard

    results = []
    for module in (gradstep.torch, torch.optim):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 2)).double()
        fully_shard(model, mesh=mesh)
        opt = module.AdamW(model.parameters(), lr=0.05)
        for step in range(4):
            if step == 2:
                state = get_optimizer_state_dict(model, opt)
                opt = module.AdamW(model.parameters(), lr=0.05)
                set_optimizer_state_dict(model, opt, state)
            opt.zero_grad()
            torch.manual_seed(step + 1)
            model(torch.randn(3, 6, dtype=torch.float64)).square().sum().backward()
            opt.step()
        results.append([local(p).clone() for p in model.parameters()])
    assert all(torch.allclose(p, q, rtol=1e-10, atol=1e-12) for p, q in zip(*results, strict=True))
    torch.distributed.destroy_process_group()


def test_in_the_place_of_torchs_class_with_fsdp() -> None:
    run_in_child(check_fsdp)
