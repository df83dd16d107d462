"""State dicts of the torch classes: loaded with the dtypes that they have, theirs and torch's own."""

from __future__ import annotations

import copy
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

import gradstep.torch

from .format_cases import formats_of
from .saving_cases import ADAMW, Torch, assert_all_same

FACE = Torch()
KINDS: list[tuple[str, dict[str, Any], dict[str, str]]] = [
    ("bfloat16", {}, {"exp_avg": "float32", "exp_avg_sq": "float32"}),
    ("bfloat16", {"state_dtype": "bfloat16"}, {"exp_avg": "bfloat16"}),
    (
        "bfloat16",
        {"precision": "split", "state_dtype": "q8"},
        {"exp_avg": "uint8", "exp_avg_scale": "float32", "remainder": "int16"},
    ),
    ("float16", {"precision": "master", "ema_decay": 0.9}, {"master": "float32", "ema": "float32", "step": "float64"}),
    ("float16", {"precision": "kahan"}, {"compensation": "float16"}),
    ("float32", {"state_dtype": {"exp_avg": "q4", "exp_avg_sq": "float64"}}, {"exp_avg": "uint8", "exp_avg_sq": "float64"}),
    ("float64", {"state_dtype": "float32"}, {"exp_avg": "float32"}),
    ("bfloat16", formats_of(precision="stochastic", state_rounding="stochastic", state_dtype="q4"), {"exp_avg": "uint8"}),
]


@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize(("dtype", "options", "expected"), KINDS, ids=str)
def test_states_keep_their_dtypes(dtype: str, options: dict[str, Any], expected: dict[str, str], fused: bool | None) -> None:
    """With `fused`, too, by which torch has step counts of float32."""
    params = FACE.params(dtype=dtype)
    opt = FACE.make(ADAMW, params, **options, fused=fused)
    FACE.step(opt, params, (1, 2), {})
    large = opt.state[params[5]]
    assert {name: str(large[name].dtype).removeprefix("torch.") for name in expected} == expected
    large["step"] += 2**24 + 1  # more than a float32 can count
    others = FACE.copy(params)
    other = FACE.make(ADAMW, others, **options, fused=fused)
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    other.steps = opt.steps
    assert_all_same(FACE, opt, params, other, others)
    for o, p in ((opt, params), (other, others)):
        FACE.step(o, p, (3, 4), {})
    assert_all_same(FACE, opt, params, other, others)


def test_state_dicts_of_torch_have_their_own_dtype() -> None:
    params, others, thirds = (FACE.params(dtype="bfloat16") for _ in range(3))
    theirs = torch.optim.AdamW(params, lr=0.1)
    for p in params:
        p.grad = torch.ones_like(p)
    theirs.step()
    opt = gradstep.torch.AdamW(others, lr=0.1)
    opt.load_state_dict(theirs.state_dict())
    for p in others:
        assert opt.state[p]["exp_avg"].dtype == torch.bfloat16
        p.grad = torch.ones_like(p)
    opt.step()
    assert all(opt.state[p]["exp_avg"].dtype == torch.bfloat16 and opt.state[p]["step"] == 2 for p in others)
    back = torch.optim.AdamW(thirds, lr=0.1)
    back.load_state_dict(opt.state_dict())
    for p in thirds:
        p.grad = torch.ones_like(p)
    back.step()
    assert all(back.state[p]["step"] == 3 for p in thirds)


def test_states_of_one_dtype_for_parameters_of_another() -> None:
    """A model in another dtype than before: torch would round the states, or make more of them."""
    params, others = FACE.params(), FACE.params(dtype="float64")
    opt = FACE.make(ADAMW, params)
    FACE.step(opt, params, (1, 2), {})
    other = FACE.make(ADAMW, others)
    other.load_state_dict(opt.state_dict())
    assert all(other.state[p]["exp_avg"].dtype == torch.float32 for p in others)
    FACE.step(other, others, (3,), {})
    assert all(other.state[p]["exp_avg"].dtype == torch.float32 for p in others)


def test_hooks_see_what_they_have_always_seen() -> None:
    params, others = FACE.params(dtype="bfloat16"), FACE.params(dtype="bfloat16")
    opt = FACE.make(ADAMW, params)
    FACE.step(opt, params, (1,), {})
    other = FACE.make(ADAMW, others)
    seen: list[Any] = []

    def before(_: Any, state_dict: Any) -> Any:
        seen.append(type(state_dict["state"][0]["exp_avg"]))
        changed = copy.deepcopy(state_dict)
        changed["state"][0]["exp_avg"] = changed["state"][0]["exp_avg"].double() + 1
        return changed

    def after(optimizer: Any) -> None:
        seen.append(optimizer.state[others[0]]["exp_avg"].dtype)

    handles = [other.register_load_state_dict_pre_hook(before), other.register_load_state_dict_post_hook(after)]
    other.load_state_dict(opt.state_dict())
    assert seen == [torch.Tensor, torch.float64]
    assert torch.equal(other.state[others[0]]["exp_avg"], opt.state[params[0]]["exp_avg"].double() + 1)
    for handle in handles:
        handle.remove()
    assert not other._optimizer_load_state_dict_pre_hooks and not other._optimizer_load_state_dict_post_hooks


def test_a_state_dict_that_does_not_fit() -> None:
    """Torch's errors, and no hook of ours left behind."""
    params = FACE.params()
    opt = FACE.make(ADAMW, params)
    with pytest.raises(ValueError, match="doesn't match the size"):
        opt.load_state_dict(FACE.make(ADAMW, params[:2]).state_dict())
    assert not opt._optimizer_load_state_dict_pre_hooks and not opt._optimizer_load_state_dict_post_hooks


def test_what_is_no_tensor_stays_as_it_is() -> None:
    p, q = (torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16)) for _ in range(2))
    opt, other = gradstep.torch.SGD([p], momentum=0.9), gradstep.torch.SGD([q], momentum=0.9)
    state_dict = opt.state_dict()
    state_dict["state"][0] = {"momentum_buffer": None, "mine": {"nested": torch.ones(2)}, "n": 3}
    other.load_state_dict(state_dict)
    assert other.state[q]["momentum_buffer"] is None and other.state[q]["n"] == 3
    assert other.state[q]["mine"]["nested"].dtype == torch.bfloat16  # torch's way with what it does not know
