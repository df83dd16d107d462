"""What offloading refuses, word for word, and what it leaves as it was."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

import gradstep.torch

from .test_torch_offload import parameters, set_grads


def refused(kind: type[Exception], message: str, call: Callable[[], Any]) -> None:
    with pytest.raises(kind) as caught:
        call()
    assert str(caught.value) == message


def adamw(params: Any = None, **options: Any) -> Any:
    return gradstep.torch.AdamW(parameters([(5,), (6, 2)]) if params is None else params, **options)


def test_other_optimizers() -> None:
    params = parameters([(5,)])
    opt = torch.optim.AdamW(params)
    message = "offload: optimizer must be one of gradstep.torch, got torch.optim.adamw.AdamW"
    refused(TypeError, message, lambda: gradstep.torch.offload(opt))
    opt = gradstep.torch.offload(adamw(params))
    message = "offload: optimizer must be one of gradstep.torch, got gradstep.torch.offload.optimizer.Offloaded"
    refused(TypeError, message, lambda: gradstep.torch.offload(opt))


@pytest.mark.parametrize("name", ["chunk_bytes", "buffers"])
def test_numbers(name: str) -> None:
    for value, kind, message in (
        (0, ValueError, f"offload: {name} must be at least 1, got 0"),
        (-3, ValueError, f"offload: {name} must be at least 1, got -3"),
        (1.5, TypeError, f"offload: {name} must be an integer, got 1.5"),
        (True, TypeError, f"offload: {name} must be an integer, got True"),
    ):
        given: Any = adamw()
        refused(kind, message, lambda v=value, g=given: gradstep.torch.offload(g, **{name: v}))


def test_state_dir(tmp_path: Any) -> None:
    given = adamw(state_dir=tmp_path)
    refused(
        ValueError,
        "offload: optimizer has state_dir: offloaded states are in memory",
        lambda: gradstep.torch.offload(given),
    )
    given.close()


def test_parameters() -> None:
    base = torch.zeros(10, 6)
    whole, part, columns, others = base, base[3:5], base[:, :3], base[:, 3:]

    def of(*tensors: Any) -> Callable[[], Any]:
        params = [t if isinstance(t, torch.nn.Parameter) else torch.nn.Parameter(t) for t in tensors]
        return lambda: gradstep.torch.offload(adamw(params))

    refused(ValueError, "offload: params[1] shares memory with params[0]", of(whole, part))
    refused(ValueError, "offload: params[2] shares memory with params[0]", of(columns, others, part))
    of(columns, others)()
    meta = torch.nn.Parameter(torch.zeros(3, device="meta"))
    refused(ValueError, "offload: params[1] is on device meta: offloading is from CUDA devices", of(torch.zeros(3), meta))
    p = torch.nn.Parameter(torch.zeros(3))
    with pytest.warns(UserWarning, match="duplicate parameters"):
        given = adamw([p, p])
    message = "offload: params[1] is params[0] again: a parameter may be given once"
    refused(ValueError, message, lambda: gradstep.torch.offload(given))


def test_what_is_refused_is_left_as_it_was() -> None:
    base = torch.zeros(6, dtype=torch.bfloat16)
    given = adamw([torch.nn.Parameter(base), torch.nn.Parameter(base[2:])])
    with pytest.raises(ValueError, match="shares memory"):
        gradstep.torch.offload(given)
    assert "precision" not in given.param_groups[0] and "step" not in vars(given)


def test_parameters_of_later_groups() -> None:
    params = parameters([(5,), (6, 2)])
    opt = gradstep.torch.offload(adamw(params))
    for bad, kind, message in (
        (
            {"params": [torch.nn.Parameter(params[1].detach()[2:])]},
            ValueError,
            "AdamW.add_param_group: params[2] shares memory with params[1]",
        ),
        ({"params": params[:1]}, ValueError, "some parameters appear in more than one parameter group"),
        ({"params": parameters([(3,)]), "max_norm": -1.0}, ValueError, "AdamW: max_norm must be >= 0, got -1"),
        ({"params": parameters([(3,)]), "clip_norm": 1.0}, TypeError, None),
    ):
        with pytest.raises(kind) as caught:
            opt.add_param_group(dict(bad))
        assert message is None or str(caught.value).startswith(message), caught.value
        assert len(opt.param_groups) == 1
    set_grads(params, 1)
    opt.step()
    assert len(opt.state) == 2


def test_the_optimizer_that_was_given_takes_no_steps() -> None:
    given = adamw()
    gradstep.torch.offload(given)
    message = "AdamW.step: this optimizer has been offloaded: step what offload() has returned"
    refused(RuntimeError, message, given.step)
    assert not given.state


def test_copies() -> None:
    opt = gradstep.torch.offload(adamw())
    message = "an offloaded optimizer can't be copied or pickled: save its state_dict()"
    for make in (copy.copy, copy.deepcopy, pickle.dumps):
        refused(TypeError, message, lambda make=make: make(opt))


def test_steps() -> None:
    params = parameters([(5,), (6, 2)])
    opt = gradstep.torch.offload(adamw(params))
    set_grads(params, 3)
    before = [p.detach().clone() for p in params]

    def check(kind: type[Exception], message: str, **arguments: Any) -> None:
        refused(kind, message, lambda: opt.step(**arguments))
        assert not opt.state and opt.steps == 0
        assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))

    message = "AdamW.step: an offloaded optimizer takes no grads: add them up in the parameters'"
    check(ValueError, message, grads=[(1.0, [None, None])])
    check(ValueError, "AdamW.step: grad_scale must be finite, got inf", grad_scale=float("inf"))
    opt.param_groups[0]["weight_decay"] = -1.0
    check(ValueError, "AdamW.step: weight_decay must be >= 0, got -1.0")
    opt.param_groups[0]["weight_decay"] = 0.0
    opt.param_groups[0]["capturable"] = True
    check(ValueError, "AdamW: capturable=True is not supported: no CUDA graph can capture a step on the CPU")
    opt.param_groups[0]["capturable"] = False
    opt.on_nonfinite = "stop"
    check(ValueError, "AdamW: on_nonfinite must be 'propagate', 'skip', 'raise' or 'zero', got 'stop'")
    opt.on_nonfinite = "propagate"
    params[1].grad = torch.ones(6, 2).to_sparse()
    check(ValueError, "AdamW.step: params[1].grad is sparse: an offloaded optimizer takes dense gradients")
    params[1].grad = None
    params[1].data = torch.ones(3, 4)
    params[1].grad = torch.ones(3, 4)
    before[1] = params[1].detach().clone()
    message = "AdamW.step: params[1] is float32 of shape (3, 4), and was float32 of shape (6, 2) when it was offloaded"
    check(ValueError, message)


@pytest.mark.parametrize("option", [{"clip_value": 0.5}, {"agc": 0.1}, {"clip_norm_per_tensor": 1.0}], ids=str)
def test_clipping_after_other_stages(option: dict[str, float]) -> None:
    params = parameters([(5,)])
    opt = gradstep.torch.offload(adamw(params, clip_norm=1.0, **option))
    set_grads(params, 1)
    message = (
        f"AdamW.step: clip_norm together with {next(iter(option))} is not supported by an offloaded optimizer: it takes the norm of "
        "the gradients as they are"
    )
    refused(ValueError, message, opt.step)
    opt.clip_norm = None
    opt.step()
    assert opt.steps == 1


def test_memory_that_is_shared_later() -> None:
    params = parameters([(5,), (6, 2)])
    opt = gradstep.torch.offload(adamw(params))
    set_grads(params, 1)
    params[0].data = params[1].data.view(-1)[:5]
    refused(ValueError, "AdamW.step: params[1] shares memory with params[0]", opt.step)


def test_averages_of_another_dtype() -> None:
    params = parameters([(5,)], "bfloat16")
    opt = gradstep.torch.offload(adamw(params, ema_decay=0.5))
    message = "AdamW: there are no averages yet; the option ema_decay keeps them, step by step"
    refused(RuntimeError, message, opt.swap_ema)
    set_grads(params, 1)
    opt.step()
    with pytest.raises(ValueError, match=r"^AdamW.swap_ema: an average is torch.float32, its parameter torch.bfloat16"):
        opt.swap_ema()


def test_state_dicts_that_do_not_fit() -> None:
    opt = gradstep.torch.offload(adamw())
    other = adamw(parameters([(5,)]))
    with pytest.raises(ValueError, match="doesn't match the size"):
        opt.load_state_dict(other.state_dict())
