"""The optimizers for NumPy loops: forms of parameters, groups, states, saving, and the same bits as the functions."""

from __future__ import annotations

import copy
import json
import pickle
from typing import Any

import numpy as np
import pytest

import gradstep

from .cases import CASES, Case, gradients, parameters
from .test_values import assert_same_bits, cases

SHAPES = [(5, 7), (1030,), (), (0, 3), (70_001,)]


def make(case: Case, params: Any) -> Any:
    return getattr(gradstep, case.optimizer)(params, **case.settings, **case.class_settings)


def arrays(dtype: Any = np.float32) -> list[Any]:
    return [np.array(parameters(shape, dtype, i)) for i, shape in enumerate(SHAPES)]


def grads(step: int, dtype: Any = np.float32) -> list[Any]:
    return [np.array(gradients(shape, dtype, 100 * step + i)) for i, shape in enumerate(SHAPES)]


@cases
@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["float32", "float64"])
def test_same_bits_as_the_reference(case: Case, dtype: Any) -> None:
    params, expected = arrays(dtype), arrays(dtype)
    states = [case.start(shape, dtype) for shape in SHAPES]
    opt = make(case, params)
    for step in range(1, 5):
        opt.step(grads(step, dtype))
        for i, g in enumerate(grads(step, dtype)):
            expected[i] = np.asarray(case.reference(expected[i], g, states[i], step, **case.settings), dtype)
    for i, (p, q) in enumerate(zip(params, expected, strict=True)):
        assert_same_bits(p, q, f"parameter {i}")
        assert opt.state[i]["step"] == 4
        assert opt.state[i].keys() == {"step", *case.states}
        for name in case.states:
            assert_same_bits(opt.state[i][name], np.asarray(states[i][name], dtype), f"{name} {i}")


def test_forms_of_parameters() -> None:
    results = []
    for form in ("array", "list", "tuple", "dict", "groups", "flat groups", "group dicts", "named groups"):
        p, g = parameters((40,), np.float64), gradients((40,), np.float64, 1)
        if form == "array":
            gradstep.AdamW(p, lr=0.1).step(g)
        elif form in ("list", "tuple"):
            kind = list if form == "list" else tuple
            gradstep.AdamW(kind([p]), lr=0.1).step(kind([g]))
        elif form == "dict":
            gradstep.AdamW({"w": p}, lr=0.1).step({"w": g})
        else:
            q = p.copy()
            names = form == "named groups"
            groups = [{"params": {"a": p} if names else [p]}, {"params": {"b": q} if names else [q], "lr": 0.2}]
            opt = gradstep.AdamW(groups, lr=0.1)
            nested = [{"a": g}, {"b": g}] if names else [[g], [g]]
            opt.step(
                {"groups": nested, "flat groups": [g, g], "group dicts": [{"params": [g]}, {"params": [g]}]}.get(form, nested)
            )
            other = parameters((40,), np.float64)
            gradstep.AdamW(other, lr=0.2).step(g)
            assert np.array_equal(q, other)
        results.append(p)
    assert all(np.array_equal(results[0], p) for p in results)
    assert not np.array_equal(results[0], parameters((40,), np.float64))


def test_none_leaves_a_parameter_alone() -> None:
    case = next(case for case in CASES if case.name == "adamw")
    params, g = arrays(), grads(1)
    opt = make(case, params)
    opt.step([g[0], None, g[2], g[3], None])
    assert np.array_equal(params[1], arrays()[1]) and 1 not in opt.state and 4 not in opt.state
    opt.step(g)
    opt.step([None, g[1], None, None, g[4]])
    assert [opt.state[i]["step"] for i in range(5)] == [2, 2, 2, 2, 2]
    alone = arrays()[1]
    other = make(case, alone)
    other.step(g[1])
    other.step(g[1])
    assert_same_bits(params[1], alone, "parameter that missed a step")


def test_settings_edited_between_steps() -> None:
    case = next(case for case in CASES if case.name == "adamw")
    params, expected, states = arrays(), arrays(), [case.start(shape, np.float32) for shape in SHAPES]
    opt = make(case, params)
    for step, lr in ((1, 0.1), (2, 0.02), (3, 0.5)):
        opt.param_groups[0]["lr"] = lr
        opt.param_groups[0]["betas"] = (0.8, 0.9 + step / 100)
        opt.step(grads(step))
        settings = {**case.settings, "lr": lr, "betas": (0.8, 0.9 + step / 100)}
        expected = [case.reference(p, g, s, step, **settings) for p, g, s in zip(expected, grads(step), states, strict=True)]
    for p, q in zip(params, expected, strict=True):
        assert_same_bits(p, np.asarray(q), "parameter")
    opt.param_groups[0]["lr"] = -1.0
    with pytest.raises(ValueError, match=r"^AdamW.step: lr must be >= 0, got -1.0$"):
        opt.step(grads(4))
    assert opt.state[0]["step"] == 3


def test_amsgrad_and_momentum_switched_on_later() -> None:
    p = parameters((30,), np.float32)
    opt = gradstep.AdamW(p)
    opt.step(gradients((30,), np.float32, 1))
    opt.param_groups[0]["amsgrad"] = True
    opt.step(gradients((30,), np.float32, 2))
    assert_same_bits(opt.state[0]["max_exp_avg_sq"], opt.state[0]["exp_avg_sq"], "largest so far")
    sgd = gradstep.SGD(p, dampening=0.5)
    sgd.step(gradients((30,), np.float32, 1))
    sgd.param_groups[0]["momentum"] = 0.9
    sgd.step(gradients((30,), np.float32, 2))
    assert_same_bits(sgd.state[0]["momentum_buffer"], gradients((30,), np.float32, 2), "buffer, begun undampened")


def test_learning_rate_as_a_callable_of_the_step() -> None:
    seen = []

    def rate(step: int) -> float:
        seen.append(step)
        return 0.5 / (1 + step)

    p, q = parameters((9,), np.float64), parameters((9,), np.float64)
    opt, other = gradstep.SGD(p, lr=rate), gradstep.SGD(q)
    seen.clear()
    for step in range(3):
        opt.step(gradients((9,), np.float64, step))
        other.param_groups[0]["lr"] = 0.5 / (1 + step)
        other.step(gradients((9,), np.float64, step))
    assert seen == [0, 1, 2] and np.array_equal(p, q)
    opt.param_groups[0]["lr"] = lambda step: -0.1
    with pytest.raises(ValueError, match=r"^SGD.step: lr must be >= 0, got -0.1$"):
        opt.step(gradients((9,), np.float64, 4))
    assert opt.steps == 3


def test_grad_scale() -> None:
    for maximize in (False, True):
        p, q, g = parameters((1030,), np.float32), parameters((1030,), np.float32), gradients((1030,), np.float32, 1)
        gradstep.SGD(p, lr=0.1, weight_decay=0.1, maximize=maximize).step(g, grad_scale=0.125)
        gradstep.SGD(q, lr=0.1, weight_decay=0.1, maximize=maximize).step(g * np.float32(0.125))
        assert_same_bits(p, q, "parameter")
    with pytest.raises(ValueError, match="^SGD.step: grad_scale must be finite, got nan$"):
        gradstep.SGD(p).step(g, grad_scale=float("nan"))


@cases
def test_state_dict_round_trip(case: Case) -> None:
    params, copies = arrays(), arrays()
    opt, other = make(case, params), make(case, copies)
    for step in (1, 2):
        opt.step(grads(step))
    saved = copy.deepcopy(opt.state_dict())
    for p, q in zip(params, copies, strict=True):
        q[...] = p
    other.load_state_dict(saved)
    assert other.steps == 2
    for o in (opt, other):
        o.step(grads(3))
        o.step(grads(4))
    for p, q in zip(params, copies, strict=True):
        assert_same_bits(p, q, "parameter")
    assert saved["state"][0]["step"] == 2 and other.state[0]["step"] == 4


@pytest.mark.parametrize("how", ["pickle", "deepcopy"])
def test_copies_go_on_alike(how: str) -> None:
    params = arrays()
    opt = gradstep.AdamW(params, lr=0.1)
    opt.step(grads(1))
    twin = pickle.loads(pickle.dumps(opt)) if how == "pickle" else copy.deepcopy(opt)
    opt.step(grads(2))
    assert twin.state[0]["step"] == 1
    twin.step(grads(2))
    for p, q in zip(params, twin.param_groups[0]["params"], strict=True):
        assert p is not q
        assert_same_bits(p, q, "parameter")


def test_groups_have_settings_of_their_own() -> None:
    p, q = parameters((8,), np.float64), parameters((8,), np.float64)
    opt = gradstep.SGD([{"params": p, "lr": 0.5}], lr=0.1, momentum=0.9)
    opt.add_param_group({"params": {"late": q}, "weight_decay": 0.1})
    assert [group["lr"] for group in opt.param_groups] == [0.5, 0.1]
    g = gradients((8,), np.float64, 1)
    opt.step([g, {"late": g}])
    assert np.array_equal(p, parameters((8,), np.float64) - 0.5 * g)
    assert list(opt.state) == [0, "late"]


def test_repr() -> None:
    assert repr(gradstep.SGD(np.zeros(2), lr=0.5)) == (
        "SGD (\nParameter Group 0\n    dampening: 0.0\n    lr: 0.5\n    maximize: False\n    momentum: 0.0\n"
        "    nesterov: False\n    weight_decay: 0.0\n)"
    )


def test_states_are_plain_data() -> None:
    opt = gradstep.Lion({"w": parameters((3,), np.float32)})
    opt.step({"w": gradients((3,), np.float32, 1)})
    assert json.dumps({k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in opt.state_dict()["state"]["w"].items()})


REFUSED: list[tuple[Any, type[Exception], str]] = [
    (
        lambda: gradstep.AdamW(3.0),
        TypeError,
        "AdamW: params must be an array, a sequence of arrays or a dict of arrays, got float",
    ),
    (
        lambda: gradstep.AdamW("w"),
        TypeError,
        "AdamW: params must be an array, a sequence of arrays or a dict of arrays, got str",
    ),
    (lambda: gradstep.AdamW([1.0]), TypeError, "AdamW: params[0] must be an array, got float"),
    (lambda: gradstep.AdamW({"w": [1.0]}), TypeError, "AdamW: params['w'] must be an array, got list"),
    (lambda: gradstep.AdamW(np.zeros(2), lr=-1), ValueError, "AdamW: lr must be >= 0, got -1.0"),
    (lambda: gradstep.AdamW(np.zeros(2), betas=(0.9, 1.0)), ValueError, "AdamW: betas[1] must be in [0, 1), got 1.0"),
    (lambda: gradstep.AdamW(np.zeros(2), lr="fast"), TypeError, "AdamW: lr must be a number, got 'fast'"),
    (
        lambda: gradstep.Adagrad(np.zeros(2), initial_accumulator_value=-1),
        ValueError,
        "Adagrad: initial_accumulator_value must be >= 0, got -1",
    ),
    (
        lambda: gradstep.Adagrad(np.zeros(2), initial_accumulator_value="1"),
        TypeError,
        "Adagrad: initial_accumulator_value must be a number, got '1'",
    ),
    (
        lambda: gradstep.LAMB(np.zeros(2), bias_correction="no"),
        TypeError,
        "LAMB: bias_correction must be True or False, got 'no'",
    ),
    (
        lambda: gradstep.LAMB(np.zeros(2), always_adapt=0),
        TypeError,
        "LAMB: always_adapt must be True or False, got 0",
    ),
    (
        lambda: gradstep.NovoGrad(np.zeros(2), grad_averaging=None),
        TypeError,
        "NovoGrad: grad_averaging must be True or False, got None",
    ),
    (
        lambda: gradstep.SGD(np.zeros(2), momentum=None, nesterov=True),
        TypeError,
        "SGD: momentum must be a number, got None",
    ),
    (
        lambda: gradstep.SGD(np.zeros(2), weight_decay=np.zeros(2)),
        TypeError,
        "SGD: weight_decay must be no array, got array([0., 0.])",
    ),
    (
        lambda: gradstep.SGD(np.zeros(2), nesterov=True),
        ValueError,
        "SGD: Nesterov momentum requires a momentum and zero dampening",
    ),
    (lambda: gradstep.SGD([{"params": np.zeros(2), "beta": 1}]), TypeError, "SGD: param_groups[0] has no setting 'beta'"),
    (lambda: gradstep.SGD([{"lr": 1}]), TypeError, "SGD: param_groups[0] must be a dict with params, got {'lr': 1}"),
    (
        lambda: gradstep.SGD([{"params": {"w": np.zeros(2)}}, {"params": {"w": np.zeros(2)}}]),
        ValueError,
        "SGD: param_groups[1] has the name 'w', which another group has",
    ),
    (lambda: gradstep.SGD([np.zeros(2)]).step([np.zeros(2)] * 2), ValueError, "SGD.step: grads has 2 arrays, params has 1"),
    (
        lambda: gradstep.SGD([np.zeros(2)]).step(np.zeros(2)),
        TypeError,
        "SGD.step: grads must be a sequence of arrays, as params is, got ndarray",
    ),
    (
        lambda: gradstep.SGD({"w": np.zeros(2)}).step({"v": np.zeros(2)}),
        ValueError,
        "SGD.step: grads must have the parameters' names: missing 'w', unknown 'v'",
    ),
    (
        lambda: gradstep.SGD({"w": np.zeros(2)}).step([np.zeros(2)]),
        TypeError,
        "SGD.step: grads must be a dict of the parameters' names, got list",
    ),
    (
        lambda: gradstep.SGD([{"params": [np.zeros(2)] * 2}, {"params": np.zeros(2)}]).step([np.zeros(2)]),
        ValueError,
        "SGD.step: grads has 1 items, there are 2 groups of 3 parameters",
    ),
    (
        lambda: gradstep.SGD([w := np.zeros(2), w]).step([np.ones(2)] * 2),
        ValueError,
        "SGD.step: params[1] is params[0] again: a parameter may be given once",
    ),
    (
        lambda: gradstep.SGD({"w": np.zeros(2)}).step({"w": np.zeros(3)}),
        ValueError,
        "SGD.step: grads['w'] has shape (3,), its parameter has (2,)",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), REFUSED, ids=[r[2][:50] for r in REFUSED])
def test_refused(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == message


def test_damaged_states_are_refused() -> None:
    p = parameters((6,), np.float32)
    opt = gradstep.AdamW({"w": p})
    g = {"w": gradients((6,), np.float32, 1)}
    opt.step(g)
    good, before = copy.deepcopy(opt.state["w"]), p.copy()
    for name, value, message in (
        ("exp_avg", np.zeros(5, np.float32), r"state\['w'\]\['exp_avg'\] has shape \(5,\), its parameter has \(6,\)"),
        ("step", 1.5, r"state\['w'\]\['step'\] must be a whole number from 0 to 2\^53 - 1, got 1.5"),
        ("step", -1, r"state\['w'\]\['step'\] must be a whole number"),
        ("step", np.zeros(2), r"state\['w'\]\['step'\] has shape \(2,\), must hold one number"),
        (
            "step",
            np.full((), 2**24, np.float32),
            r"state\['w'\]\['step'\] stands at 16777216, beyond which its dtype float32 cannot count",
        ),
    ):
        opt.state["w"] = {**copy.deepcopy(good), name: value}
        with pytest.raises(ValueError, match=message):
            opt.step(g)
        assert np.array_equal(p, before)
    for counter in (np.zeros((), np.int64), np.zeros((1,), np.float32), np.array(7.0)):
        start = float(counter.item())
        opt.state["w"] = {**copy.deepcopy(good), "step": counter}
        opt.step(g)
        assert counter.item() == start + 1
