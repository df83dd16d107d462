"""Averages of parameters: their form, swapping them in and out, saving; against torch's and Polyak's."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest

import gradstep

from .stage_cases import MANY, case_of, make_grads, make_optimizer, make_params
from .test_skip import digest
from .test_values import assert_same_bits

SHAPES = [(6, 40), (33,), (), (2, 3, 5)]


def stepped(options: dict[str, Any], steps: int = 3, form: Any = list) -> tuple[Any, list[Any], list[list[Any]]]:
    """An optimizer, its parameters, and what they were after each step."""
    params = make_params(SHAPES, np.float32)
    opt = make_optimizer(case_of("adamw"), form(params), options)
    history = []
    for step in range(1, steps + 1):
        opt.step(form(make_grads(SHAPES, np.float32, step, {})[0][1]))
        history.append([p.copy() for p in params])
    return opt, params, history


def named(arrays: list[Any]) -> dict[str, Any]:
    return {f"p{i}": a for i, a in enumerate(arrays)}


@pytest.mark.parametrize("which", ["ema", "swa"])
def test_averages_have_the_form_of_the_parameters(which: str) -> None:
    options: dict[str, Any] = {"ema_decay": 0.9} if which == "ema" else {"swa": (0, 1)}
    opt, _, _ = stepped(options)
    averages = getattr(opt, which)
    assert isinstance(averages, list)
    assert len(averages) == len(SHAPES)
    for i, a in enumerate(averages):
        assert_same_bits(np.asarray(a), np.asarray(opt.state[i][which]), f"average {i}")
        assert a.shape == SHAPES[i]
    opt, _, _ = stepped(options, form=named)
    assert list(getattr(opt, which)) == [f"p{i}" for i in range(len(SHAPES))]
    for key, a in getattr(opt, which).items():
        assert_same_bits(np.asarray(a), np.asarray(opt.state[key][which]), key)
    p = make_params([(7,)], np.float64)[0]
    opt = gradstep.SGD(p, lr=0.1, **options)
    opt.step(np.ones(7))
    assert isinstance(getattr(opt, which), np.ndarray)
    assert_same_bits(getattr(opt, which), p, "array")


def test_averages_of_groups() -> None:
    params = make_params(SHAPES, np.float32)
    opt = gradstep.AdamW(
        [{"params": params[:2]}, {"params": {"c": params[2], "d": params[3]}}], ema_decay=0.9, weight_decay=0.1
    )
    grads = make_grads(SHAPES, np.float32, 1, {})[0][1]
    opt.step([grads[:2], {"c": grads[2], "d": grads[3]}])
    first, second = opt.ema
    assert isinstance(first, list)
    assert list(second) == ["c", "d"]
    for a, p in zip([*first, *second.values()], params, strict=True):
        assert_same_bits(np.asarray(a), p, "average of one")


def test_equal_average() -> None:
    """swa=(0, 1) is the mean of all iterates, swa=(2, 2) of every other after the second."""
    for (start, every), picked in (((0, 1), slice(None)), ((2, 2), slice(3, None, 2))):
        opt, _, history = stepped({"swa": (start, every)}, 8)
        for i, a in enumerate(opt.swa):
            mean = np.mean([ps[i].astype(np.float64) for ps in history[picked]], axis=0)
            np.testing.assert_allclose(a, mean, rtol=1e-5, atol=1e-6)
        assert opt.state[0]["swa_count"] == len(history[picked])


def test_exponential_averages() -> None:
    for correction in (None, "bias", "warmup"):
        opt, _, history = stepped({"ema_decay": 0.8, "ema_correction": correction}, 8)
        for i, a in enumerate(opt.ema):
            if correction == "bias":
                weights = 0.8 ** np.arange(8)[::-1]
                mean = np.tensordot(weights / weights.sum(), [ps[i].astype(np.float64) for ps in history], 1)
            else:
                mean = history[0][i].astype(np.float64)
                for n, ps in enumerate(history[1:], 2):
                    decay = min(0.8, (1 + n) / (10 + n)) if correction == "warmup" else 0.8
                    mean = decay * mean + (1 - decay) * ps[i]
            np.testing.assert_allclose(a, mean, rtol=1e-5, atol=1e-6)


def test_exponential_average_is_close_to_torch() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    opt, _, history = stepped({"ema_decay": 0.8}, 6)
    module = torch.nn.Linear(40, 6, bias=False)
    averaged = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(0.8))
    for ps in history:
        module.weight.data = torch.from_numpy(ps[0].copy())
        averaged.update_parameters(module)
    np.testing.assert_allclose(opt.ema[0], averaged.module.weight.detach().numpy(), rtol=1e-5, atol=1e-6)


def test_swap_exchanges_and_swaps_back() -> None:
    opt, params, _ = stepped({"ema_decay": 0.9})
    before, state = [p.copy() for p in params], digest(opt.state)
    averages = [np.array(a) for a in opt.ema]
    opt.swap_ema()
    for i, (p, a, b) in enumerate(zip(params, averages, before, strict=True)):
        assert_same_bits(p, a, f"parameter {i}")
        assert_same_bits(np.asarray(opt.ema[i]), b, f"average {i}")
        assert not np.array_equal(p, b)
    opt.swap_ema()
    for i, (p, b) in enumerate(zip(params, before, strict=True)):
        assert_same_bits(p, b, f"parameter {i}")
    assert digest(opt.state) == state


@pytest.mark.parametrize("which", ["ema", "swa"])
def test_averaged_holds_the_averages_inside(which: str) -> None:
    opt, params, _ = stepped({"ema_decay": 0.9} if which == "ema" else {"swa": (0, 1)})
    before, state = [p.copy() for p in params], digest(opt.state)
    averages = [np.array(a) for a in getattr(opt, which)]
    with opt.averaged(which):
        for i, (p, a) in enumerate(zip(params, averages, strict=True)):
            assert_same_bits(p, a, f"parameter {i} inside")
    for i, (p, b) in enumerate(zip(params, before, strict=True)):
        assert_same_bits(p, b, f"parameter {i} after")
    assert digest(opt.state) == state
    with pytest.raises(ZeroDivisionError), opt.averaged(which):
        assert 1 / 0
    for i, (p, b) in enumerate(zip(params, before, strict=True)):
        assert_same_bits(p, b, f"parameter {i} after a failure")
    assert digest(opt.state) == state


def test_averages_that_there_are_not() -> None:
    opt, params, _ = stepped({})
    before = [p.copy() for p in params]
    assert opt.ema == opt.swa == [None] * len(SHAPES)
    with pytest.raises(RuntimeError, match="there are no averages.*ema_decay"):
        opt.swap_ema()
    with pytest.raises(RuntimeError, match="there are no averages.*swa"), opt.averaged("swa"):
        pass
    for p, b in zip(params, before, strict=True):
        assert_same_bits(p, b, "parameter")


@pytest.mark.parametrize("how", ["state_dict", "pickle", "deepcopy"])
def test_saved_and_gone_on(how: str) -> None:
    """Averages, slow weights and counts are states like others."""
    options = {name: value for name, value in MANY["everything"].items() if name not in ("grad_scale", "weights", "zero_grad")}
    opt, params, _ = stepped(options, 3)
    if how == "state_dict":
        saved = copy.deepcopy(opt.state_dict())
        others = [p.copy() for p in params]
        twin = make_optimizer(case_of("adamw"), others, options)
        twin.load_state_dict(saved)
    else:
        twin = pickle.loads(pickle.dumps(opt)) if how == "pickle" else copy.deepcopy(opt)
        others = twin.param_groups[0]["params"]
    for step in (4, 5, 6):
        for o in (opt, twin):
            o.step(make_grads(SHAPES, np.float32, step, {})[0][1])
    for i, (p, q) in enumerate(zip(params, others, strict=True)):
        assert p is not q
        assert_same_bits(p, q, f"parameter {i}")
    assert digest(opt.state) == digest(twin.state)
    assert (twin.clip_norm, twin.on_nonfinite, twin.zero_grad) == (opt.clip_norm, opt.on_nonfinite, opt.zero_grad)


def test_averages_that_have_not_begun() -> None:
    """Parameters without an average stand as None, and are left alone."""
    params = make_params(SHAPES, np.float32)
    opt = make_optimizer(case_of("adamw"), params, {"swa": (1, 1)})
    grads = make_grads(SHAPES, np.float32, 1, {})[0][1]
    opt.step(grads)
    assert [a is None for a in opt.swa] == [True] * len(SHAPES)
    with pytest.raises(RuntimeError, match="there are no averages.*swa"), opt.averaged("swa"):
        pass
    opt.step([grads[0], None, None, None])
    before = [p.copy() for p in params]
    assert_same_bits(opt.swa[0], params[0], "the first average")
    assert [a is None for a in opt.swa] == [False] + [True] * (len(SHAPES) - 1)
    with opt.averaged("swa"):
        for p, b in zip(params, before, strict=True):
            assert_same_bits(p, b, "parameter")
