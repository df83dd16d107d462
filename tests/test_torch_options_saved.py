"""Options of the torch classes when saved, loaded and taken over from torch; averages."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

import gradstep
import gradstep.torch
from gradstep.options import GROUP_OPTIONS

from .stage_cases import case_of
from .torch_cases import ADAMW, RULES, SMALL, USUAL, assert_all_same, make, run, tensors


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("way", ["state_dict", "file", "pickle", "deepcopy"])
def test_options_go_round(rule: str, way: str) -> None:
    case, params, straight = case_of(rule), tensors(SMALL), tensors(SMALL)
    opt, uncut = make(case, params, USUAL), make(case, straight, USUAL)
    run(opt, params, (1, 2, 3))
    run(uncut, straight, (1, 2, 3, 4, 5, 6))
    assert opt.state[params[0]].keys() >= {"ema", "ema_count", "swa", "swa_count", "slow"}
    if way in ("pickle", "deepcopy"):
        opt = pickle.loads(pickle.dumps(opt)) if way == "pickle" else copy.deepcopy(opt)
        params = opt.param_groups[0]["params"]
        assert opt.clip_norm == 3.0 and opt.zeroes_grad is True and opt.steps == 3
    else:
        saved = opt.state_dict()
        if way == "file":
            file = io.BytesIO()
            torch.save(saved, file)
            file.seek(0)
            saved = torch.load(file, weights_only=True)
        saved = copy.deepcopy(saved)
        opt = getattr(gradstep.torch, case.optimizer)(params, lr=7.0, clip_norm=3.0, zero_grad=True, l2=4.0, ema_decay=0.1)
        opt.load_state_dict({**saved, "param_groups": [{**group, "l2": None} for group in saved["param_groups"]]})
    group = opt.param_groups[0]
    assert {name: group[name] for name in USUAL if name in GROUP_OPTIONS} == {
        name: value for name, value in USUAL.items() if name in GROUP_OPTIONS
    }
    run(opt, params, (4, 5, 6))
    assert_all_same(params, straight, opt, uncut)
    opt.add_param_group({"params": tensors([(3,)])})
    assert opt.param_groups[1]["ema_decay"] == (0.9 if way in ("pickle", "deepcopy") else 0.1)


@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_from_torch_and_back_in_mid_training(name: str) -> None:
    """Torch's optimizer has no options; ours keeps those that it was made with."""
    settings = {"lr": 0.01, "weight_decay": 0.07, **({"momentum": 0.9} if name == "SGD" else {})}
    theirs, ours = getattr(torch.optim, name), getattr(gradstep.torch, name)
    params, straight = tensors(SMALL, np.float64), tensors(SMALL, np.float64)
    uncut = theirs(straight, foreach=False, **settings)
    run(uncut, straight, range(1, 10))
    opt = theirs(params, foreach=False, **settings)
    run(opt, params, (1, 2, 3))
    crossed = ours(params, ema_decay=0.9, swa=(4, 1), **settings)
    crossed.load_state_dict(opt.state_dict())
    assert crossed.param_groups[0]["ema_decay"] == 0.9
    run(crossed, params, (4, 5, 6))
    assert crossed.ema[0] is not None
    if name == "AdamW":
        assert crossed.state[params[0]]["step"] == 6 and crossed.state[params[0]]["swa_count"] == 2
    back = theirs(params, foreach=False, **settings)
    back.load_state_dict(crossed.state_dict())
    run(back, params, (7, 8, 9))
    for p, q in zip(params, straight, strict=True):
        assert torch.allclose(p, q, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("options", [{"swa": (0, 1)}, {"lookahead": (9, 0.5)}, {"noise": 1e-30}], ids=lambda o: next(iter(o)))
def test_momentum_stays_where_an_option_comes_later(options: dict[str, Any]) -> None:
    """Options that count steps: torch's SGD does not, and its buffer is no less there."""
    for way in ("loaded", "edited"):
        params, straight = tensors(SMALL, np.float64), tensors(SMALL, np.float64)
        opt, uncut = (gradstep.torch.SGD(each, lr=0.01, momentum=0.9, dampening=0.5) for each in (params, straight))
        run(opt, params, (1, 2))
        if way == "loaded":
            saved = opt.state_dict()
            opt = gradstep.torch.SGD(params, **options)
            opt.load_state_dict(saved)
        else:
            opt.param_groups[0].update(options)
        run(opt, params, (3,))
        run(uncut, straight, (1, 2, 3))
        for i, (p, q) in enumerate(zip(params, straight, strict=True)):
            assert torch.allclose(p, q, rtol=1e-9), f"{i} {way}"


def test_averages_and_their_exchange() -> None:
    params = tensors(SMALL)
    opt = make(ADAMW, params, {"ema_decay": 0.5, "swa": (1, 1)})
    assert opt.ema == opt.swa == [None] * 3
    for swap in (opt.swap_ema, lambda: opt.averaged().__enter__(), lambda: opt.averaged("swa").__enter__()):
        with pytest.raises(RuntimeError, match="^AdamW: there are no averages yet"):
            swap()
    run(opt, params, (1,))
    assert opt.swa == [None] * 3 and all(torch.equal(a, p) for a, p in zip(opt.ema, params, strict=True))
    run(opt, params, (2, 3))
    points = [p.detach().clone() for p in params]
    ema, swa = ([a.clone() for a in averages] for averages in (opt.ema, opt.swa))
    assert not any(torch.equal(a, p) for a, p in zip([*ema, *swa], points * 2, strict=True))
    pointers = [p.data_ptr() for p in params]
    opt.swap_ema()
    assert all(torch.equal(p, a) for p, a in zip(params, ema, strict=True))
    assert all(torch.equal(a, p) for a, p in zip(opt.ema, points, strict=True))
    opt.swap_ema()
    for name, averages in ((None, ema), ("ema", ema), ("swa", swa)):
        with opt.averaged(name):
            assert all(torch.equal(p, a) for p, a in zip(params, averages, strict=True))
        assert all(torch.equal(p, q) for p, q in zip(params, points, strict=True))
    with pytest.raises(KeyError), opt.averaged("swa"):
        raise KeyError
    assert all(torch.equal(p, q) for p, q in zip(params, points, strict=True))
    assert [p.data_ptr() for p in params] == pointers


def test_the_average_is_that_of_torch() -> None:
    params = tensors(SMALL, np.float64)
    model = torch.nn.ParameterList(params)
    theirs = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.8))
    equal = torch.optim.swa_utils.AveragedModel(model)
    opt = make(ADAMW, params, {"ema_decay": 0.8, "swa": (0, 1)})
    for step in (1, 2, 3, 4):
        run(opt, params, (step,))
        theirs.update_parameters(model)
        equal.update_parameters(model)
    for averages, averaged in ((opt.ema, theirs), (opt.swa, equal)):
        for a, b in zip(averages, averaged.module, strict=True):
            assert torch.allclose(a, b, rtol=1e-12)
            assert not a.requires_grad
