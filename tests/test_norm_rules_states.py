"""States and settings of LAMB, LARS, NovoGrad: saved, skipped and refused, NovoGrad's number above all."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest

import gradstep

from .cases import Case, gradients, parameters
from .format_cases import THE_THREE
from .norm_rule_cases import DTYPES, lists_of, norm_cases, same, the_three, torch_params, torch_step
from .stage_cases import SHAPES, make_grads, make_optimizer, make_params, settings_of
from .test_skip import digest
from .test_values import assert_same_bits

RUNS_ON_GPU = True


@norm_cases
@pytest.mark.parametrize("way", ["state_dict", "pickle", "deepcopy", "pickled state_dict"])
def test_states_go_round(case: Case, way: str) -> None:
    params, straight = make_params(SHAPES, np.float32), make_params(SHAPES, np.float32)
    opt, uncut = make_optimizer(case, params, {}), make_optimizer(case, straight, {})
    for step in (1, 2, 3, 4):
        if step == 3:
            if way == "pickle":
                opt = pickle.loads(pickle.dumps(opt))
            elif way == "deepcopy":
                opt = copy.deepcopy(opt)
            else:
                saved = opt.state_dict()
                saved = pickle.loads(pickle.dumps(saved)) if way == "pickled state_dict" else saved
                params = [p.copy() for p in params]
                opt = make_optimizer(case, params, {"clip_value": 1e-3})
                opt.load_state_dict({**saved, "param_groups": [{**g, "clip_value": None} for g in saved["param_groups"]]})
            params = opt.param_groups[0]["params"]
        opt.step(make_grads(SHAPES, np.float32, step, {})[0][1])
        uncut.step(make_grads(SHAPES, np.float32, step, {})[0][1])
    for i, (p, q) in enumerate(zip(params, straight, strict=True)):
        assert_same_bits(p, q, f"parameter {i}")
    assert opt.state.keys() == uncut.state.keys()
    for i, state in opt.state.items():
        assert digest(state) == digest(uncut.state[i])


def test_grad_norm_sq_is_a_number_of_the_state() -> None:
    p, g = np.array([3.0, 4.0], np.float32), np.array([0.6, 0.8], np.float32)
    opt = gradstep.NovoGrad([p], betas=(0.9, 0.75))
    opt.step([g])
    first = opt.state[0]["grad_norm_sq"]
    assert type(first) is float and first == pytest.approx(1.0, rel=1e-6)
    assert opt.state[0].keys() == {"step", "exp_avg", "grad_norm_sq"}
    opt.step([2 * g])
    assert opt.state[0]["grad_norm_sq"] == pytest.approx(0.75 + 0.25 * 4, rel=1e-6)


class Novograd:
    """Operands of `novograd_`: two parameters of 3."""

    def __init__(self) -> None:
        self.params, self.grads = ([make((3,), np.float32, i) for i in (0, 1)] for make in (parameters, gradients))
        self.exp_avg = [np.zeros(3, np.float32) for _ in range(2)]
        self.grad_norm_sq: Any = [np.full(1, 2.0) for _ in range(2)]

    def call(self, step: Any = 2, **more: Any) -> Any:
        return gradstep.novograd_(
            self.params, self.grads, exp_avg=self.exp_avg, grad_norm_sq=self.grad_norm_sq, step=step, **more
        )


def read_only(a: Any) -> Any:
    a.flags.writeable = False
    return a


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (2.0, TypeError, "novograd_: grad_norm_sq[1] must be an array of one number"),
        (2, TypeError, "novograd_: grad_norm_sq[1] must be an array of one number"),
        (np.zeros(2), ValueError, "novograd_: grad_norm_sq[1] has shape (2,), must hold one number"),
        (np.zeros(0), ValueError, "novograd_: grad_norm_sq[1] has shape (0,), must hold one number"),
        (np.zeros(1, np.int64), TypeError, "novograd_: grad_norm_sq[1] must be a float, or a float32 or float64 array"),
        (read_only(np.zeros(1)), ValueError, "novograd_: grad_norm_sq[1] is read-only"),
    ],
    ids=["float", "int", "two", "none", "int64", "read-only"],
)
def test_what_grad_norm_sq_can_not_be(value: Any, error: Any, message: str) -> None:
    operands = Novograd()
    operands.grad_norm_sq[1] = value
    before = digest(vars(operands))
    with pytest.raises(error) as caught:
        operands.call()
    assert str(caught.value) == message
    assert digest(vars(operands)) == before


@pytest.mark.parametrize("form", ["none", "one for two", "an array for a list", "missing"])
def test_grad_norm_sq_goes_by_the_parameters(form: str) -> None:
    operands = Novograd()
    if form == "missing":
        with pytest.raises(TypeError, match=r"^novograd_\(\) missing 1 required keyword-only argument: 'grad_norm_sq'$"):
            gradstep.novograd_(operands.params, operands.grads, exp_avg=operands.exp_avg, step=1)
        return
    operands.grad_norm_sq = {"none": None, "one for two": [np.zeros(1)], "an array for a list": np.zeros(2)}[form]
    message = {
        "none": "novograd_: grad_norm_sq must be a sequence, as params is, got NoneType",
        "one for two": "novograd_: grad_norm_sq has 1 numbers, params has 2",
        "an array for a list": "novograd_: grad_norm_sq must be a sequence, as params is, got numpy.ndarray",
    }[form]
    before = digest(vars(operands))
    with pytest.raises((TypeError, ValueError)) as caught:
        operands.call()
    assert str(caught.value) == message
    assert digest(vars(operands)) == before


def test_grad_norm_sq_may_be_float32(isa: str) -> None:
    single, double = Novograd(), Novograd()
    single.grad_norm_sq = [np.full((), 2.0, np.float32), np.full((1, 1), 2.0, np.float32)]
    for step in (2, 3):
        single.call(step)
        double.call(step)
    for i in range(2):
        assert single.grad_norm_sq[i].item() == pytest.approx(double.grad_norm_sq[i].item(), rel=1e-6)
        assert single.grad_norm_sq[i].item() != 2
        np.testing.assert_allclose(single.params[i], double.params[i], rtol=1e-6)


@pytest.mark.parametrize("how", ["skip", "raise"])
def test_a_skipped_step_leaves_grad_norm_sq(how: str, isa: str) -> None:
    for more in ({}, {"clip_norm": 0.1}):
        operands = Novograd()
        operands.grads[1][2] = np.inf
        before = digest(vars(operands))
        if how == "skip":
            assert operands.call(on_nonfinite=how, **more) is False
        else:
            with pytest.raises(FloatingPointError):
                operands.call(on_nonfinite=how, **more)
        assert digest(vars(operands)) == before
        operands.grads[1][2] = 0
        assert operands.call(on_nonfinite=how, **more) is True
        assert all(n != 2 for n in operands.grad_norm_sq)


@norm_cases
def test_optimizers_skip_in_full(case: Case, isa: str) -> None:
    params = make_params(SHAPES, np.float32)
    opt = make_optimizer(case, params, {"on_nonfinite": "skip"})
    for step in (3, 4, 5):
        before = digest([params, opt.state_dict()])
        grads = make_grads(SHAPES, np.float32, step, {})[0][1]
        grads[5].flat[-1] = np.nan
        opt.step(grads)
        assert digest([params, opt.state_dict()]) == before
        opt.step(make_grads(SHAPES, np.float32, step, {})[0][1])
        assert digest([params, opt.state_dict()]) != before


BAD_SETTINGS: list[tuple[str, dict[str, Any], str]] = [
    ("LAMB", {"lr": -1.0}, "lr must be >= 0, got -1.0"),
    ("LAMB", {"betas": (0.9, 1.0)}, "betas[1] must be in [0, 1), got 1.0"),
    ("LAMB", {"eps": -1.0}, "eps must be >= 0, got -1.0"),
    ("LAMB", {"weight_decay": -1.0}, "weight_decay must be >= 0, got -1.0"),
    ("LAMB", {"trust_ratio": (2, 1)}, "trust_ratio must be (low, high) with low <= high, got (2, 1)"),
    ("LARS", {"trust_coefficient": -1.0}, "trust_coefficient must be >= 0, got -1.0"),
    ("LARS", {"eps": float("nan")}, "eps must be >= 0, got nan"),
    ("LARS", {"momentum": 0.0, "nesterov": True}, "Nesterov momentum requires a momentum and zero dampening"),
    ("LARS", {"dampening": 0.1, "nesterov": True}, "Nesterov momentum requires a momentum and zero dampening"),
    ("NovoGrad", {"betas": (0.9, 1.0)}, "betas[1] must be in [0, 1), got 1.0"),
    ("NovoGrad", {"betas": (1.0, 0.9)}, "betas[0] must be in [0, 1), got 1.0"),
    ("NovoGrad", {"eps": -1.0}, "eps must be >= 0, got -1.0"),
]


@pytest.mark.parametrize(("name", "settings", "message"), BAD_SETTINGS)
def test_settings_out_of_range(name: str, settings: dict[str, Any], message: str) -> None:
    case = next(case for case in THE_THREE if case.optimizer == name)
    with pytest.raises(ValueError) as of_class:
        getattr(gradstep, name)([np.zeros(3)], **settings)
    lists, p = lists_of(case, [(3,)], np.float64), parameters((3,), np.float64)
    with pytest.raises(ValueError) as of_function:
        case.function([p], [np.ones(3)], **lists, step=1, **settings)
    assert message in str(of_class.value) and message in str(of_function.value)
    assert_same_bits(p, parameters((3,), np.float64), "parameter")


@the_three
@pytest.mark.parametrize("way", ["state_dict", "pickle"])
def test_torch_states_go_round(case: Case, way: str) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    import gradstep.torch

    for dtype in DTYPES:
        params, straight = torch_params(torch, dtype), torch_params(torch, dtype)
        make = getattr(gradstep.torch, case.optimizer)
        opt, uncut = make(params, **settings_of(case)), make(straight, **settings_of(case))
        for step in (1, 2, 3, 4):
            if step == 3 and way == "pickle":
                opt = pickle.loads(pickle.dumps(opt))
                params = opt.param_groups[0]["params"]
            elif step == 3:
                saved = copy.deepcopy(opt.state_dict())
                opt = make(params)
                opt.load_state_dict(saved)
            torch_step(torch, opt, params, dtype, step)
            torch_step(torch, uncut, straight, dtype, step)
        for i, (p, q) in enumerate(zip(params, straight, strict=True)):
            assert_same_bits(p.detach().numpy(), q.detach().numpy(), f"parameter {i}")
            for name in (*case.states, *case.numbers):
                same(opt.state[p][name], np.asarray(uncut.state[q][name]), f"{name} {i}")


def test_the_norm_that_a_function_keeps_lies_apart() -> None:
    p, g, m, n = (np.ones(3) for _ in range(4))
    first, second = n[:1], n[1:2]
    lists = {"exp_avg": [m[:1], m[1:2]], "step": 2}
    for norms, message in (([first, first], "shares memory with grad_norm_sq"), ([first, p[1:2]], "shares memory with params")):
        with pytest.raises(ValueError, match=message):
            gradstep.novograd_([p[:1], p[1:2]], [g[:1], g[1:2]], grad_norm_sq=norms, **lists)
    with pytest.raises(ValueError, match="shares memory with grad"):
        gradstep.novograd_(p, g, exp_avg=m, grad_norm_sq=g[:1], step=2)
    wrong = (
        (np.array([1.0], ">f8"), TypeError, "native byte order"),
        (np.frombuffer(bytearray(9), np.float64, 1, 1), ValueError, "misaligned"),
        (np.array([-1.0]), ValueError, ">= 0"),
    )
    for norm, error, message in wrong:
        with pytest.raises(error, match=f"grad_norm_sq.*{message}"):
            gradstep.novograd_(p, g, exp_avg=m, grad_norm_sq=norm, step=2)
    assert all((x == 1).all() for x in (p, g, m, n))
    gradstep.novograd_([p[:1], p[1:2]], [g[:1], g[1:2]], grad_norm_sq=[first, second], **lists)
    assert (p[:2] < 1).all()
