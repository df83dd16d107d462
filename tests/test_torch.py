"""The torch classes: the values of `torch.optim`, its settings, errors and state dicts."""

from __future__ import annotations

import copy
import inspect
import io
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

import gradstep
import gradstep.torch
from gradstep import _core

from .cases import Case, gradients, parameters
from .test_values import assert_same_bits, cases
from .torch_optim_cases import ADAMW, NAMES, SHAPES, make_params, ours, run, set_grads, theirs, torch_cases


@cases
@pytest.mark.parametrize("api", [True, False], ids=["C table", "methods"])
def test_same_bits_as_the_numpy_optimizer(case: Case, api: bool) -> None:
    """Also where torch has no C table for DLPack, as before 2.13."""
    _core.set_use_exchange_api(api)
    try:
        params = make_params()
        opt = ours(case, params)
        run(opt, params, (1, 2, 3))
    finally:
        _core.set_use_exchange_api(True)
    arrays = [np.array(parameters(shape, np.float32, i)) for i, shape in enumerate(SHAPES)]
    other = getattr(gradstep, case.optimizer)(arrays, **case.settings, **case.class_settings)
    for step in (1, 2, 3):
        other.step([np.array(gradients(shape, np.float32, 100 * step + i)) for i, shape in enumerate(SHAPES)])
    for i, (p, q) in enumerate(zip(params, arrays, strict=True)):
        assert_same_bits(p.detach().numpy(), q, f"parameter {i}")
        for name in case.states:
            assert_same_bits(opt.state[p][name].numpy(), other.state[i][name], f"{name} {i}")


@torch_cases
def test_close_to_torch_in_float32(case: Case) -> None:
    """A step differs from torch's for-loop by a few units in the last place of the larger of parameter and update.

    Where average and gradient nearly cancel, what either rounded off is larger beside what is left: a few elements in 70,000.
    """
    params = make_params()
    opt = ours(case, params)
    errors = []
    for step in range(1, 6):
        others = [torch.nn.Parameter(p.detach().clone()) for p in params]
        other = theirs(case, others, foreach=False)
        other.load_state_dict(copy.deepcopy(opt.state_dict()))
        before = [p.detach().clone() for p in params]
        set_grads(params, step)
        set_grads(others, step)
        opt.step()
        other.step()
        for p, q, b in zip(params, others, before, strict=True):
            scale = torch.maximum(b.abs(), (p.detach() - b).abs()).numpy()
            errors.append(np.ravel(np.abs((p - q).detach().numpy()) / np.spacing(scale)))
    assert np.quantile(np.concatenate(errors), 0.999) <= 2
    assert np.max(np.concatenate(errors)) <= 64


@torch_cases
def test_as_torch_in_float64_over_a_thousand_steps(case: Case) -> None:
    params, others = make_params(torch.float64, [(50,)]), make_params(torch.float64, [(50,)])
    opt, other = ours(case, params), theirs(case, others, foreach=False)
    for step in range(1, 1001):
        set_grads(params, step)
        others[0].grad = params[0].grad.clone()
        opt.step()
        other.step()
    moved = (others[0].detach() - make_params(torch.float64, [(50,)])[0].detach()).abs().max()
    assert moved > 0.05
    error = (params[0] - others[0]).detach().abs() / others[0].detach().abs().clamp(min=1)
    assert error.max() < 1e-12


@pytest.mark.parametrize("name", ["Adam", "SGD", "RMSprop", "Adagrad"])
def test_complex_as_torch(name: str) -> None:
    results = []
    for module in (gradstep.torch, torch.optim):
        torch.manual_seed(0)
        p = torch.nn.Parameter(torch.randn(33, dtype=torch.complex128))
        opt = getattr(module, name)([p], lr=0.01, weight_decay=0.1)
        for _ in range(5):
            p.grad = torch.randn(33, dtype=torch.complex128)
            opt.step()
        results.append(p.detach())
    assert torch.allclose(*results, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("memory_format", ["channels_last", "transposed", "sliced"])
def test_layouts(memory_format: str) -> None:
    def place(values: Any) -> Any:
        if memory_format == "channels_last":
            return values.to(memory_format=torch.channels_last)
        if memory_format == "transposed":
            return values.transpose(0, 3).contiguous().transpose(0, 3)
        return torch.cat([values, values], 1)[:, :3]

    values = torch.from_numpy(parameters((4, 3, 6, 5), np.float32))
    p, q = torch.nn.Parameter(place(values)), torch.nn.Parameter(values.clone())
    assert not p.is_contiguous()
    opt, other = ours(ADAMW, [p]), ours(ADAMW, [q])
    for step in (1, 2):
        g = torch.from_numpy(gradients((4, 3, 6, 5), np.float32, step))
        p.grad, q.grad = (g if step == 1 else place(g)), g.clone()
        opt.step()
        other.step()
    assert torch.equal(p, q)


@pytest.mark.parametrize("name", NAMES)
def test_same_signature(name: str) -> None:
    ours, theirs = (inspect.signature(getattr(module, name)).parameters for module in (gradstep.torch, torch.optim))
    assert list(ours.items())[: len(theirs)] == list(theirs.items())
    assert list(ours)[len(theirs) :] == ["options"]
    assert issubclass(getattr(gradstep.torch, name), getattr(torch.optim, name))


BAD_SETTINGS: list[tuple[str, dict[str, Any]]] = [
    *[(name, {"lr": -1.0}) for name in NAMES],
    *[(name, {"weight_decay": -1.0}) for name in NAMES],
    *[(name, {"lr": torch.tensor([1.0, 2.0])}) for name in NAMES],
    ("Adam", {"betas": (1.0, 0.9)}),
    ("AdamW", {"betas": (0.9, -0.1)}),
    ("AdamW", {"eps": -1.0}),
    ("AdamW", {"fused": True, "foreach": True}),
    ("AdamW", {"lr": torch.tensor(0.1), "foreach": True}),
    ("SGD", {"momentum": -1.0}),
    ("SGD", {"nesterov": True}),
    ("RMSprop", {"alpha": -1.0}),
    ("Adagrad", {"lr_decay": -1.0}),
    ("Adagrad", {"initial_accumulator_value": -1.0}),
    ("AdamW", {"params": []}),
    ("AdamW", {"params": [torch.zeros(1)] * 2}),
    ("AdamW", {"params": torch.zeros(1)}),
    ("AdamW", {"params": [3.0]}),
]


@pytest.mark.parametrize(("name", "settings"), BAD_SETTINGS)
@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_torchs_own_errors(name: str, settings: dict[str, Any]) -> None:
    outcomes = []
    for module in (torch.optim, gradstep.torch):
        arguments = {"params": [torch.nn.Parameter(torch.zeros(2))], **settings}
        try:
            getattr(module, name)(**arguments)
            outcomes.append(None)
        except Exception as error:
            outcomes.append((type(error), str(error)))
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1.0}, "Invalid learning rate: -1.0"),
        ({"betas": (0.9, 1.0)}, "Invalid beta parameter at index 1: 1.0"),
        ({"weight_decay": -1.0}, "Invalid weight_decay value: -1.0"),
        ({"lr": torch.ones(2)}, "Tensor lr must be 1-element"),
    ],
)
def test_lion_speaks_as_torch_does(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        gradstep.torch.Lion(make_params(), **settings)


@torch_cases
@pytest.mark.parametrize("direction", ["from torch", "to torch"])
def test_state_dict_crosses_over_in_mid_training(case: Case, direction: str) -> None:
    first, second = (theirs, ours) if direction == "from torch" else (ours, theirs)
    params, straight = make_params(torch.float64), make_params(torch.float64)
    opt, uncrossed = first(case, params), theirs(case, straight)
    run(opt, params, (1, 2, 3))
    run(uncrossed, straight, range(1, 7))
    saved = io.BytesIO()
    torch.save(opt.state_dict(), saved)
    saved.seek(0)
    crossed = second(case, params)
    crossed.load_state_dict(torch.load(saved, weights_only=True))
    run(crossed, params, (4, 5, 6))
    for p, q in zip(params, straight, strict=True):
        assert torch.allclose(p, q, rtol=1e-12, atol=1e-13)
    theirs_state, ours_state = uncrossed.state_dict(), crossed.state_dict()
    assert theirs_state["param_groups"][0].keys() == ours_state["param_groups"][0].keys()
    for key in theirs_state["state"]:
        assert theirs_state["state"][key].keys() == ours_state["state"][key].keys()
        if "step" in theirs_state["state"][key]:
            assert ours_state["state"][key]["step"] == 6


@pytest.mark.parametrize("settings", [{"fused": True}, {"foreach": True}, {"fused": False}, {"foreach": False}])
def test_choices_of_implementation_change_nothing(settings: dict[str, Any]) -> None:
    params, others = make_params(), make_params()
    opt, other = ours(ADAMW, params, **settings), ours(ADAMW, others)
    run(opt, params, (1, 2))
    run(other, others, (1, 2))
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))
    reloaded = theirs(ADAMW, params)
    reloaded.load_state_dict(opt.state_dict())
    run(reloaded, params, (3,))


@pytest.mark.parametrize("name", ["AdamW", "SGD"])
@pytest.mark.parametrize("choice", ["capturable", "differentiable"])
def test_choices_that_cannot_be_honoured(name: str, choice: str) -> None:
    if choice not in inspect.signature(getattr(torch.optim, name)).parameters:
        return
    params = make_params()
    with pytest.raises(ValueError, match=f"^{name}: {choice}=True is not supported: "):
        getattr(gradstep.torch, name)(params, **{choice: True})
    opt = getattr(gradstep.torch, name)(params)
    with pytest.raises(ValueError, match=f"{choice}=True is not supported"):
        opt.add_param_group({"params": make_params(shapes=[(3,)]), choice: True})
    assert len(opt.param_groups) == 1
    opt.param_groups[0][choice] = True
    set_grads(params, 1)
    with pytest.raises(ValueError, match=f"{choice}=True is not supported"):
        opt.step()
    assert not opt.state


def test_decoupled_decay_of_adam() -> None:
    if "decoupled_weight_decay" not in inspect.signature(torch.optim.Adam).parameters:
        pytest.skip("this torch's Adam has no decoupled_weight_decay")
    params, others = make_params(), make_params()
    opt = gradstep.torch.Adam(params, weight_decay=0.1, decoupled_weight_decay=True)
    other = gradstep.torch.AdamW(others, weight_decay=0.1)
    run(opt, params, (1, 2))
    run(other, others, (1, 2))
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))


def test_named_parameters_and_groups() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    opt = gradstep.torch.AdamW(model.parameters())
    opt.add_param_group({"params": torch.nn.Parameter(torch.ones(2)), "lr": 0.5})
    assert [len(group["params"]) for group in opt.param_groups] == [4, 1]
    model(torch.ones(1, 3)).sum().backward()
    extra = opt.param_groups[1]["params"][0]
    extra.grad = torch.ones(2)
    opt.step()
    assert torch.allclose(extra, torch.full((2,), 1 - 0.5 * 0.01 - 0.5))
    try:
        named = gradstep.torch.AdamW(model.named_parameters())
    except TypeError:
        pytest.skip("this torch takes no named parameters")
    assert named.state_dict()["param_groups"][0]["param_names"][0] == "0.weight"


def test_tensor_learning_rate() -> None:
    params, others = make_params(), make_params()
    opt, other = ours(ADAMW, params, lr=torch.tensor(0.01, dtype=torch.float64)), ours(ADAMW, others, lr=0.01)
    run(opt, params, (1,))
    run(other, others, (1,))
    opt.param_groups[0]["lr"].fill_(0.5)
    other.param_groups[0]["lr"] = 0.5
    run(opt, params, (2,))
    run(other, others, (2,))
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize(
    ("name", "settings"), [("SGD", {}), ("SGD", {"momentum": 0.9}), ("Adagrad", {}), ("AdamW", {}), ("RMSprop", {})]
)
def test_sparse_gradients_are_right_or_torchs_error(name: str, settings: dict[str, Any]) -> None:
    outcomes = []
    for module in (torch.optim, gradstep.torch):
        torch.manual_seed(0)
        table, dense = torch.nn.Embedding(10, 4, sparse=True), torch.nn.Linear(4, 1)
        opt = getattr(module, name)([*table.parameters(), *dense.parameters()], lr=0.1, **settings)
        try:
            for _ in range(3):
                opt.zero_grad()
                dense(table(torch.tensor([1, 3, 3]))).sum().backward()
                opt.step()
            outcomes.append(torch.cat([table.weight.detach().ravel(), dense.weight.detach().ravel()]))
        except RuntimeError as error:
            outcomes.append(str(error))
    if isinstance(outcomes[0], str):
        assert outcomes[0] == outcomes[1] and "sparse" in outcomes[0]
    else:
        assert torch.equal(outcomes[0], outcomes[1])


def refused(params: Any, grads: Any = None) -> str:
    opt = ours(ADAMW, params)
    before = [p.detach().clone() for p in params]
    with pytest.raises((TypeError, ValueError)) as caught:
        opt.step()
    assert not opt.state
    for p, q in zip(params, before, strict=True):
        assert p.is_meta or torch.equal(
            torch.view_as_real(p) if p.is_complex() else p, torch.view_as_real(q) if q.is_complex() else q
        )
    return str(caught.value)


@pytest.mark.parametrize("api", [True, False], ids=["C table", "methods"])
def test_refused_with_nothing_written(api: bool) -> None:
    _core.set_use_exchange_api(api)
    try:
        good = make_params(shapes=[(3,), (4,)])
        set_grads(good, 1)

        small = torch.nn.Parameter(torch.zeros(3, dtype=torch.float8_e5m2))
        small.grad = torch.zeros(3, dtype=torch.float8_e5m2)
        assert refused([good[0], small]) == (
            "AdamW.step: params[1] has dtype float8_e5m2, must be float64, float32, float16 or bfloat16"
        )

        shared = torch.nn.Parameter(torch.zeros(3))
        shared.grad = good[0].data
        assert refused([good[0], shared]) == "AdamW.step: params[1].grad shares memory with params[0]"

        expanded = torch.nn.Parameter(torch.zeros(1).expand(3))
        expanded.grad = torch.zeros(3)
        assert refused([expanded]) == "AdamW.step: params[0] overlaps itself: shape (3,), strides (0,) in bytes"

        negated = torch.nn.Parameter(torch.zeros(3))
        negated.grad = torch.zeros(3, dtype=torch.complex64).conj().imag
        assert "params[0].grad is a conjugated or negated view of other memory" in refused([negated])

        conjugated = torch.nn.Parameter(torch.zeros(3, dtype=torch.complex64))
        conjugated.grad = torch.zeros(3, dtype=torch.complex64).conj()
        assert "params[0].grad is a conjugated or negated view of other memory" in refused([conjugated])

        meta = torch.nn.Parameter(torch.zeros(3, device="meta"))
        meta.grad = torch.zeros(3, device="meta")
        message = refused([good[0], meta])
        assert message.startswith("AdamW.step: params[1] ") and ("no strided memory" in message or "device meta" in message)
    finally:
        _core.set_use_exchange_api(True)


def test_a_late_error_leaves_no_state_behind() -> None:
    params = make_params(shapes=[(3,), (4,)])
    set_grads(params, 1)
    opt = gradstep.torch.SGD(params, lr=0.1, momentum=0.9, dampening=0.5)
    good, params[1].data = params[1].data, torch.zeros(4, dtype=torch.float8_e5m2)
    with pytest.raises(TypeError, match="has dtype float8_e5m2"):
        opt.step()
    assert not opt.state
    params[1].data = good
    opt.step()
    assert torch.equal(opt.state[params[0]]["momentum_buffer"], params[0].grad)
