"""The torch classes with parameters on a device: tensors in CPU memory that are taken for ones on an emulated device."""

from __future__ import annotations

import copy
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

import gradstep.torch
from gradstep import _core

from .cases import Case
from .device_cases import emulated_fixture, pretending
from .test_torch_scaler import amp, backward
from .test_values import cases
from .torch_cases import ADAMW, SMALL, USUAL, assert_all_same, make, run, set_grads, sources, tensors

__all__ = ["emulated_fixture"]

pytestmark = pytest.mark.usefixtures("emulated")


@pytest.fixture(params=[True, False], ids=["C table", "methods"])
def _api(request: pytest.FixtureRequest) -> Iterator[None]:
    _core.set_use_exchange_api(request.param)
    yield
    _core.set_use_exchange_api(True)


def counts_of(opt: Any) -> list[dict[str, Any]]:
    names = ("step", "ema_count", "swa_count", "grad_norm_sq")
    return [{name: state[name] for name in names if name in state} for state in opt.state.values()]


def assert_as_on_the_host(params: Any, others: Any, opt: Any, other: Any) -> None:
    """The same bits; numbers are tensors beside the states."""
    for numbers, theirs in zip(counts_of(opt), counts_of(other), strict=True):
        assert numbers == theirs
        assert all(isinstance(number, torch.Tensor) and number.dtype == torch.float64 for number in numbers.values())
    arrays = [copy.copy(dict(state)) for state in other.state.values()]
    for state, theirs in zip(opt.state.values(), arrays, strict=True):
        theirs.update({name: state[name] for name in ("step", "ema_count", "swa_count", "grad_norm_sq") if name in state})
        assert state.keys() == theirs.keys() and all(torch.equal(state[name], theirs[name]) for name in state)
    assert_all_same(params, others)


@cases
@pytest.mark.parametrize("options", [{}, USUAL], ids=["plain", "usual"])
@pytest.mark.usefixtures("_api")
def test_same_bits_as_on_the_host(case: Case, options: dict[str, Any]) -> None:
    params, others = tensors(SMALL), tensors(SMALL)
    opt, other = make(case, params, options), make(case, others, options)
    for step in (1, 2, 3, 4):
        set_grads(others, step)
        expected = other.step(stats=True)
        with pretending(0):
            set_grads(params, step)
            seen = opt.step(stats=True)
            assert seen == expected and opt.steps == other.steps == step
    assert_as_on_the_host(params, others, opt, other)


@pytest.mark.parametrize("name", ["AdamW", "SGD"])
@pytest.mark.parametrize("overflows", [(), (1,), (1, 2), (3,), (1, 4, 5)], ids=str)
def test_scaler_is_not_read_by_the_host(name: str, overflows: tuple[int, ...]) -> None:
    results = []
    for device in (-1, 0):
        opt, params = amp(name)["ours"]
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_factor=4.0, backoff_factor=0.25, growth_interval=2)
        for step in range(1, 7):
            opt.zero_grad()
            backward(scaler, params, step, step in overflows)
            with pretending(device):
                assert scaler.step(opt) is None
            scaler.update()
            if set(range(1, step + 1)) <= set(overflows):
                assert not opt.state
        assert opt.steps == 6 - len(overflows) and "_undecided" not in vars(opt)
        assert "grad_scale" not in vars(opt) and "found_inf" not in vars(opt)
        results.append((opt, params))
    assert_all_same(results[0][1], results[1][1], results[0][0], results[1][0])


def test_scaler_with_statistics() -> None:
    opt, params = amp("AdamW")["ours"]
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    seen = []
    for step in (1, 2, 3):
        opt.zero_grad()
        backward(scaler, params, step, step == 2)
        with pretending(0):
            seen.append(scaler.step(opt, stats=True))
        scaler.update()
    assert [(stats.step, stats.skipped) for stats in seen] == [(1, False), (2, True), (2, False)]


def test_a_rate_on_the_device() -> None:
    rate = torch.tensor(0.1)
    params, others = tensors(SMALL), tensors(SMALL)
    opt, other = gradstep.torch.AdamW(params, lr=rate, capturable=False), gradstep.torch.AdamW(others, lr=0.1)
    for step, value in ((1, 0.1), (2, 0.3), (3, 0.05)):
        rate.fill_(value)
        other.param_groups[0]["lr"] = float(rate)
        set_grads(others, step)
        set_grads(params, step)
        other.step()
        with pretending(0):
            opt.step()
    assert opt.param_groups[0]["lr"] is rate
    assert_all_same(params, others)


def test_capturable_is_for_devices() -> None:
    params, others = tensors(SMALL), tensors(SMALL)
    with pytest.raises(ValueError) as caught:
        gradstep.torch.AdamW(params, capturable=True)
    message = "AdamW: capturable=True is not supported: no CUDA graph can capture a step on the CPU"
    assert str(caught.value) == message
    with pretending(1):
        opt = gradstep.torch.AdamW(params, capturable=True, lr=torch.tensor(0.1, dtype=torch.float64))
        run(opt, params, (1, 2, 3))
    other = gradstep.torch.AdamW(others, lr=0.1)
    run(other, others, (1, 2, 3))
    assert_all_same(params, others)
    set_grads(params, 4)
    with pytest.raises(ValueError) as caught:
        opt.step()
    assert str(caught.value) == message


@pytest.mark.parametrize("capturable", [False, True])
def test_while_a_graph_is_captured(capturable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules[gradstep.torch.optimizers.OneSweep.__module__]
    params = tensors(SMALL)
    with pretending(0):
        opt = gradstep.torch.AdamW(params, capturable=capturable, on_nonfinite="skip")
        set_grads(params, 1)
        monkeypatch.setattr(module, "_WITH_CUDA", True)
        monkeypatch.setattr(module, "_is_capturing", lambda: True)
        where = "AdamW.step: a CUDA graph is being captured, and "
        if not capturable:
            with pytest.raises(RuntimeError) as caught:
                opt.step()
            assert str(caught.value) == where + "capturable=False: make the optimizer with capturable=True"
            return
        with pytest.raises(RuntimeError, match="states are made by the first step, which has to come before a CUDA graph is"):
            opt.step()
        with pytest.raises(RuntimeError, match=where + "stats asks for what only a step that has been carried out can tell"):
            opt.step(stats=True)
        monkeypatch.setattr(module, "_is_capturing", lambda: False)
        opt.step()
        monkeypatch.setattr(module, "_is_capturing", lambda: True)
        opt.step()  # the emulated device carries it out, but it is none that counts
        assert opt.steps == 1 and "_undecided" not in vars(opt) and opt.state[params[0]]["step"] == 2
        opt.on_nonfinite = "raise"
        with pytest.raises(RuntimeError, match=where + "on_nonfinite='raise' asks for"):
            opt.step()


@pytest.mark.parametrize("way", ["state_dict", "checkpoint", "pickle"])
@pytest.mark.parametrize("source", [-1, 0])
@pytest.mark.parametrize("target", [-1, 0])
def test_a_run_goes_on_anywhere(way: str, source: int, target: int, tmp_path: Path) -> None:
    options = {**USUAL, "on_nonfinite": "skip"}
    straight, params = tensors(SMALL), tensors(SMALL)
    run(make(ADAMW, straight, options), straight, range(1, 7))
    with pretending(source):
        opt = make(ADAMW, params, options)
        run(opt, params, (1, 2, 3))
        if way == "checkpoint":
            opt.save(tmp_path / "opt")
    with pretending(target):
        if way == "checkpoint":
            other = gradstep.torch.AdamW.load(tmp_path / "opt", params)
        elif way == "state_dict":
            other = make(ADAMW, params, options)
            saved = io.BytesIO()
            torch.save(opt.state_dict(), saved)
            saved.seek(0)
            other.load_state_dict(torch.load(saved, weights_only=True))
        else:
            other = copy.deepcopy(opt)
            params = other.param_groups[0]["params"]
        if target == 0 and way != "pickle":
            assert all(isinstance(number, torch.Tensor) for numbers in counts_of(other) for number in numbers.values())
        run(other, params, (4, 5, 6))
        assert other.steps == (3 if way == "state_dict" else 6)
    assert_all_same(params, straight)


def test_no_state_dir(tmp_path: Path) -> None:
    with pretending(0), pytest.raises(ValueError) as caught:
        gradstep.torch.AdamW(tensors(SMALL), state_dir=tmp_path / "states")
    assert str(caught.value) == (
        "AdamW: params[0] is on cuda:0: state_dir keeps states in files, which are for parameters in CPU memory"
    )
    params = tensors(SMALL)
    opt = gradstep.torch.AdamW(params, state_dir=tmp_path / "states")
    set_grads(params, 1)
    with pretending(0), pytest.raises(ValueError, match="AdamW: a parameter is on cuda:0: state_dir keeps states in files"):
        opt.step()


def test_several_gradients() -> None:
    params, others = tensors(SMALL), tensors(SMALL)
    opt, other = make(ADAMW, params, {}), make(ADAMW, others, {})
    for step in (1, 2):
        given = [(0.25, sources(SMALL, step, {})[0][1]), (0.75, sources(SMALL, step + 9, {})[0][1])]
        other.step(grads=given)
        with pretending(0):
            opt.step(grads=given)
    assert_all_same(params, others)


def test_averages_change_places() -> None:
    params, others = tensors(SMALL), tensors(SMALL)
    opt, other = make(ADAMW, params, {"ema_decay": 0.5}), make(ADAMW, others, {"ema_decay": 0.5})
    run(other, others, (1, 2))
    with pretending(0):
        run(opt, params, (1, 2))
        opt.swap_ema()
        other_values = [p.detach().clone() for p in others]
    other.swap_ema()
    assert_all_same(params, others)
    with pretending(0), opt.averaged():
        assert all(torch.equal(p, q) for p, q in zip(params, other_values, strict=True))
    assert_all_same(params, others)


def test_counts_of_torch_go_to_the_device() -> None:
    """A state dict of torch's class has counts in float32 on the CPU."""
    params, others = tensors(SMALL), tensors(SMALL)
    theirs = torch.optim.AdamW(params, lr=0.02)
    ours, reference = gradstep.torch.AdamW(params, lr=0.02), gradstep.torch.AdamW(others, lr=0.02)
    run(theirs, params, (1, 2))
    for p, q in zip(params, others, strict=True):
        q.data.copy_(p.data)
    reference.load_state_dict(copy.deepcopy(theirs.state_dict()))
    with pretending(0):
        ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
        assert ours.state[params[0]]["step"].dtype == torch.float64
        run(ours, params, (3, 4))
    run(reference, others, (3, 4))
    assert_all_same(params, others, ours, reference)


def test_version_counters_rise() -> None:
    (param,) = tensors([(5,)])
    opt = gradstep.torch.AdamW([param], on_nonfinite="skip")
    with pretending(0):
        for step in (1, 2):
            set_grads([param], step)
            before = param._version
            opt.step()
            assert param._version > before


def test_devices_that_gradstep_has_no_engine_for() -> None:
    param = torch.nn.Parameter(torch.zeros(3, device="meta"))
    param.grad = torch.zeros(3, device="meta")
    _core.set_use_exchange_api(False)
    try:
        with pytest.raises(ValueError, match="is on device meta: gradstep updates arrays in CPU memory and on CUDA devices"):
            gradstep.torch.SGD([param]).step()
    finally:
        _core.set_use_exchange_api(True)


def test_float64_and_low_precision() -> None:
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        results = []
        for device in (-1, 0):
            torch.manual_seed(0)
            param = torch.nn.Parameter(torch.randn(5000).to(dtype))
            opt = gradstep.torch.AdamW([param], lr=0.01, precision="kahan", state_dtype="q8")
            for _ in range(3):
                param.grad = torch.randn(5000).to(dtype)
                with pretending(device):
                    opt.step()
            results.append((param.detach(), opt.state[param]))
        assert torch.equal(results[0][0], results[1][0])
        assert results[0][1].keys() == results[1][1].keys()
        assert np.array_equal(*(result[1]["exp_avg"].numpy() for result in results))
