"""State dicts of the NumPy optimizers that can't be right: a clear error before anything changes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest

import gradstep

from .cases import gradients, parameters
from .test_skip import digest

HUGE = 10**400
COUNT = "must be a whole number from 0 to 2^53 - 1, got"


def stepped(make: Any = gradstep.AdamW, **settings: Any) -> Any:
    opt = make({"a": parameters((3,), np.float32), "b": parameters((4,), np.float32)}, **settings)
    opt.step({"a": gradients((3,), np.float32, 1), "b": gradients((4,), np.float32, 2)})
    return opt


def averaging() -> Any:
    return stepped(ema_decay=0.9, swa=(0, 1))


def check_refused(opt: Any, state_dict: Any, error: type[Exception], message: str) -> None:
    before = digest([opt.state_dict(), opt.param_groups, opt.state])
    given = digest(state_dict)
    with pytest.raises(error) as caught:
        opt.load_state_dict(state_dict)
    assert type(caught.value) is error
    assert str(caught.value) == f"{type(opt).__name__}.load_state_dict: {message}"
    assert digest([opt.state_dict(), opt.param_groups, opt.state]) == before
    assert digest(state_dict) == given


@pytest.mark.parametrize("given", [None, 3, "state", [], [("steps", 1)]], ids=repr)
def test_no_dict(given: Any) -> None:
    check_refused(averaging(), given, TypeError, f"state_dict must be a dict, got {type(given).__name__}")


@pytest.mark.parametrize("key", ["state", "param_groups", "steps"])
def test_a_key_is_missing(key: str) -> None:
    opt = averaging()
    saved = opt.state_dict()
    del saved[key]
    check_refused(opt, saved, ValueError, f"state_dict has no {key!r}")


# where something is put, what, error, message
WRONG: list[tuple[tuple[Any, ...], Any, type[Exception], str]] = [
    (("state",), None, TypeError, "state must be a dict, got NoneType"),
    (("state",), [{}], TypeError, "state must be a dict, got list"),
    (("param_groups",), None, TypeError, "param_groups must be a list, got NoneType"),
    (("param_groups",), {"lr": 0.1}, TypeError, "param_groups must be a list, got dict"),
    (("param_groups",), "ab", TypeError, "param_groups must be a list, got str"),
    (("param_groups",), [], ValueError, "state_dict has 0 groups, the optimizer has 1"),
    (("param_groups",), [{"params": []}] * 2, ValueError, "state_dict has 2 groups, the optimizer has 1"),
    (("param_groups", 0), None, TypeError, "param_groups[0] must be a dict, got NoneType"),
    (("param_groups", 0), {"lr": 0.1}, ValueError, "param_groups[0] has no 'params'"),
    (("param_groups", 0, "params"), None, TypeError, "param_groups[0]['params'] must be a list, got NoneType"),
    (("param_groups", 0, "params"), "ab", TypeError, "param_groups[0]['params'] must be a list, got str"),
    (("param_groups", 0, "params"), ["a"], ValueError, "param_groups[0] has parameters ['a'], the optimizer has ['a', 'b']"),
    (
        ("param_groups", 0, "params"),
        [np.zeros(2), "b"],
        ValueError,
        "param_groups[0] has parameters [array([0., 0.]), 'b'], the optimizer has ['a', 'b']",
    ),
    (("param_groups", 0, "color"), 1, ValueError, "param_groups[0] has no setting 'color'"),
    (("param_groups", 0, "clip_norm"), 1.0, ValueError, "param_groups[0] has no setting 'clip_norm'"),
    (("param_groups", 0, 3), 1, ValueError, "param_groups[0] has no setting 3"),
    (("param_groups", 0, "lr"), -2.0, ValueError, "param_groups[0]: lr must be >= 0, got -2.0"),
    (("param_groups", 0, "lr"), None, TypeError, "param_groups[0]: lr must be a number, got None"),
    (("param_groups", 0, "lr"), HUGE, TypeError, f"param_groups[0]: lr must be a number, got {HUGE}"),
    (("param_groups", 0, "betas"), 0.9, TypeError, "param_groups[0]: betas must be two numbers, got 0.9"),
    (("param_groups", 0, "betas"), (0.9, "b"), TypeError, "param_groups[0]: betas[1] must be a number, got 'b'"),
    (
        ("param_groups", 0, "weight_decay"),
        np.zeros(2),
        TypeError,
        "param_groups[0]: weight_decay must be no array, got array([0., 0.])",
    ),
    (("param_groups", 0, "centralize"), "no", TypeError, "param_groups[0]: centralize must be True or False, got 'no'"),
    (("param_groups", 0, "bounds"), (0, HUGE), TypeError, f"param_groups[0]: bounds[1] must be a number, got {HUGE}"),
    (("param_groups", 0, "swa"), (0.5, 1), TypeError, "param_groups[0]: swa[0] must be an integer, got 0.5"),
    (("steps",), None, ValueError, f"steps {COUNT} None"),
    (("steps",), "3", ValueError, f"steps {COUNT} '3'"),
    (("steps",), True, ValueError, f"steps {COUNT} True"),
    (("steps",), 1.5, ValueError, f"steps {COUNT} 1.5"),
    (("steps",), float("nan"), ValueError, f"steps {COUNT} nan"),
    (("steps",), float("inf"), ValueError, f"steps {COUNT} inf"),
    (("steps",), -1, ValueError, f"steps {COUNT} -1"),
    (("steps",), 2**53, ValueError, f"steps {COUNT} {2**53}"),
    (("steps",), HUGE, ValueError, f"steps {COUNT} {HUGE}"),
    (("clip_norm",), "1", TypeError, "clip_norm must be a number, got '1'"),
    (("clip_norm",), HUGE, TypeError, f"clip_norm must be a number, got {HUGE}"),
    (("clip_norm",), -1.0, ValueError, "clip_norm must be >= 0 and finite, got -1.0"),
    (("on_nonfinite",), 3, ValueError, "on_nonfinite must be 'propagate', 'skip', 'raise' or 'zero', got 3"),
    (("on_nonfinite",), np.zeros(2), TypeError, "on_nonfinite must be no array, got array([0., 0.])"),
    (("zero_grad",), None, TypeError, "zero_grad must be True or False, got None"),
    (("state", "b"), None, TypeError, "state['b'] must be a dict, got NoneType"),
    (("state", "b"), np.zeros(4), TypeError, "state['b'] must be a dict, got ndarray"),
    (("state", "b"), {"exp_avg": np.zeros(4, "f")}, ValueError, "state['b'] has no 'step'"),
    (("state", "c"), {}, ValueError, "state has 'c', the optimizer has no such parameter"),
    (("state", "b", "step"), None, ValueError, f"state['b']['step'] {COUNT} None"),
    (("state", "b", "step"), 1.5, ValueError, f"state['b']['step'] {COUNT} 1.5"),
    (("state", "b", "step"), -1, ValueError, f"state['b']['step'] {COUNT} -1"),
    (("state", "b", "step"), np.zeros(2), ValueError, f"state['b']['step'] {COUNT} array([0., 0.])"),
    (("state", "b", "step"), HUGE, ValueError, f"state['b']['step'] {COUNT} {HUGE}"),
    (("state", "b", "ema_count"), HUGE, ValueError, f"state['b']['ema_count'] {COUNT} {HUGE}"),
    (("state", "b", "swa_count"), HUGE, ValueError, f"state['b']['swa_count'] {COUNT} {HUGE}"),
    (("state", "b", "exp_avg"), None, TypeError, "state['b']['exp_avg'] must be an array, got NoneType"),
    (("state", "b", "exp_avg"), [0.0] * 4, TypeError, "state['b']['exp_avg'] must be an array, got list"),
    (("state", "b", "ema"), 0.0, TypeError, "state['b']['ema'] must be an array, got float"),
    (
        ("state", "b", "exp_avg"),
        np.zeros(3, "f"),
        ValueError,
        "state['b']['exp_avg'] has shape (3,), its parameter has (4,)",
    ),
    (
        ("state", "b", "exp_avg"),
        np.zeros(4, np.int32),
        ValueError,
        "state['b']['exp_avg'] has dtype int32, must be float64 or float32 or bfloat16 or float16",
    ),
    (
        ("state", "b", "swa"),
        np.zeros(4, object),
        ValueError,
        "state['b']['swa'] has dtype object, must be float64 or float32 or bfloat16 or float16",
    ),
]


@pytest.mark.parametrize(
    ("path", "value", "error", "message"), WRONG, ids=[f"{'.'.join(map(str, r[0]))}: {r[3][-30:]}" for r in WRONG]
)
def test_something_is_wrong(path: tuple[Any, ...], value: Any, error: type[Exception], message: str) -> None:
    opt = averaging()
    saved = copy.deepcopy(opt.state_dict())
    at: Any = saved
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    check_refused(opt, saved, error, message)


@pytest.mark.parametrize("value", [None, "0", HUGE, -1.0, [0.0], np.zeros(2)], ids=lambda value: repr(value)[:20])
def test_a_norm_that_is_none(value: Any) -> None:
    opt = stepped(gradstep.NovoGrad)
    saved = copy.deepcopy(opt.state_dict())
    saved["state"]["b"]["grad_norm_sq"] = value
    check_refused(opt, saved, ValueError, f"state['b']['grad_norm_sq'] must be a float >= 0, got {value!r}")


@pytest.mark.parametrize("value", [0.5, float("inf"), float("nan"), np.float32(0.5), np.array([0.5])], ids=repr)
def test_norms_that_gradients_can_have(value: Any) -> None:
    opt = stepped(gradstep.NovoGrad)
    saved = opt.state_dict()
    saved["state"]["b"]["grad_norm_sq"] = value
    opt.load_state_dict(saved)
    norm = opt.state["b"]["grad_norm_sq"]
    assert type(norm) is float
    assert np.array_equal(norm, float(np.asarray(value).item()), equal_nan=True)


@pytest.mark.parametrize("make", [int, float, np.int64, np.float32, np.array, lambda n: np.array([n])])
def test_counts_as_other_formats_hold_them(make: Callable[[int], Any]) -> None:
    opt = averaging()
    saved = opt.state_dict()
    saved["steps"] = make(7)
    saved["state"]["b"].update(step=make(6), ema_count=make(5), swa_count=make(4))
    opt.load_state_dict(saved)
    counts = [opt.steps, *(opt.state["b"][name] for name in ("step", "ema_count", "swa_count"))]
    assert counts == [7, 6, 5, 4]
    assert all(type(count) is int for count in counts)


def test_other_kinds_of_dicts_and_lists() -> None:
    opt, other = averaging(), averaging()
    saved = opt.state_dict()
    groups = tuple(MappingProxyType({**group, "params": tuple(group["params"])}) for group in saved["param_groups"])
    other.load_state_dict(MappingProxyType({**saved, "param_groups": groups}))
    assert digest(other.state_dict()) == digest(opt.state_dict())


@pytest.mark.parametrize("make", [gradstep.SGD, gradstep.RMSprop, gradstep.LARS])
@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_settings_that_are_arrays_of_one(make: Any, momentum: float) -> None:
    opt, other = stepped(make, momentum=momentum), stepped(make, momentum=momentum)
    saved = opt.state_dict()
    saved["param_groups"][0]["momentum"] = np.array(momentum)
    other.load_state_dict(saved)
    for o in (opt, other):
        o.step({"a": np.ones(3, "f"), "b": np.ones(4, "f")})
    assert digest([o["params"] for o in opt.param_groups]) == digest([o["params"] for o in other.param_groups])
