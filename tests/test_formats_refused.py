"""Formats that can't be: a clear error, with nothing written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import gradstep
from gradstep import formats

ml_dtypes = pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed")

from .test_skip import digest

FORMATS = "'float64', 'float32', 'bfloat16', 'float16', 'q8', 'q4'"
FLOATS = "'float64', 'float32', 'bfloat16', 'float16'"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"state_dtype": "q2"}, ValueError, f"AdamW: state_dtype must be one of {FORMATS}, got 'q2'"),
        ({"state_dtype": 8}, TypeError, "AdamW: state_dtype must be a format or a dict of formats, got 8"),
        (
            {"state_dtype": {"exp_avg": "int8"}},
            ValueError,
            f"AdamW: state_dtype['exp_avg'] must be one of {FORMATS}, got 'int8'",
        ),
        ({"state_dtype": {"ema": "q8"}}, ValueError, f"AdamW: state_dtype['ema'] must be one of {FLOATS}, got 'q8'"),
        (
            {"state_dtype": {"momentum": "q8"}},
            ValueError,
            "AdamW: state_dtype['momentum']: there is no such state, there are 'exp_avg', 'exp_avg_sq', 'ema', 'swa', 'slow'",
        ),
        (
            {"precision": "double"},
            ValueError,
            "AdamW: precision must be one of 'nearest', 'stochastic', 'kahan', 'master', 'split', got 'double'",
        ),
        ({"state_rounding": "up"}, ValueError, "AdamW: state_rounding must be 'nearest' or 'stochastic', got 'up'"),
        (
            {"seed": 3},
            ValueError,
            "AdamW: seed needs noise, precision or state_rounding",
        ),
        ({"seed": -1, "precision": "stochastic"}, ValueError, "AdamW: seed must be at least 0, got -1"),
        ({"seed": 2**53, "precision": "stochastic"}, ValueError, "AdamW: seed must be below 2^53, got 9007199254740992"),
        ({"seed": 0.5, "precision": "stochastic"}, TypeError, "AdamW: seed must be an integer, got 0.5"),
    ],
)
def test_options_that_can_not_be(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        gradstep.AdamW([np.ones(3, np.float32)], **options)
    assert str(caught.value) == message


@pytest.mark.parametrize("state", ["square_avg", "grad_avg", None])
def test_centered_rmsprop_refuses_compressed_states(state: str | None) -> None:
    chosen: Any = {state: "q8"} if state else "q8"
    with pytest.raises(ValueError, match="centered RMSprop subtracts states"):
        gradstep.RMSprop([np.ones(3)], centered=True, state_dtype=chosen)
    gradstep.RMSprop([np.ones(3)], centered=False, state_dtype="q8")
    gradstep.RMSprop([np.ones(3)], centered=True, momentum=0.9, state_dtype={"momentum_buffer": "q8"})


@pytest.mark.parametrize("precision", ["kahan", "master", "split"])
def test_functions_keep_nothing(precision: Any) -> None:
    p, g, m, v = (np.ones(3, ml_dtypes.bfloat16) for _ in range(4))
    with pytest.raises(ValueError) as caught:
        gradstep.adamw_(p, g, exp_avg=m, exp_avg_sq=v, step=1, precision=precision)
    assert str(caught.value) == f"adamw_: precision={precision!r} keeps an array beside the parameter: take an optimizer"
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'state_dtype'"):
        gradstep.adamw_(p, g, exp_avg=m, exp_avg_sq=v, step=1, state_dtype="q8")  # type: ignore[call-arg]


def test_chance_needs_the_number_of_the_step() -> None:
    p, g, total = np.ones(3, np.float16), np.ones(3, np.float16), np.zeros(3, np.float16)
    for options in ({"precision": "stochastic"}, {"state_rounding": "stochastic"}):
        with pytest.raises(TypeError, match="adagrad_: stochastic rounding needs the number of the step"):
            gradstep.adagrad_(p, g, sum=total, **options)  # type: ignore[arg-type]


def test_split_is_for_bfloat16() -> None:
    opt = gradstep.SGD({"w": np.ones(3, np.float16)}, precision="split")
    with pytest.raises(TypeError) as caught:
        opt.step({"w": np.ones(3, np.float16)})
    assert str(caught.value) == "SGD.step: params['w'] has dtype float16: precision='split' is for bfloat16"
    assert not opt.state


def test_complex_parameters_have_states_of_their_own() -> None:
    opt = gradstep.AdamW([np.ones(3, np.complex64)], state_dtype="bfloat16")
    with pytest.raises(ValueError) as caught:
        opt.step([np.ones(3, np.complex64)])
    assert str(caught.value) == "state_dtype is for real parameters: the states of complex ones have their dtype"


def damage(name: str, value: Callable[[Any], Any]) -> Callable[[dict[str, Any]], None]:
    return lambda state: state.update({name: value(state[name])})


DAMAGED: list[tuple[str, dict[str, Any], Callable[[dict[str, Any]], None], type[Exception], str]] = [
    (
        "codes cut short",
        {"state_dtype": "q8"},
        damage("exp_avg", lambda a: a[:-1].copy()),
        ValueError,
        "state[0]['exp_avg'] has shape (5999,), the codes of its parameter are contiguous of shape (6000,) or (3000,)",
    ),
    (
        "codes of two dimensions",
        {"state_dtype": "q8"},
        damage("exp_avg", lambda a: a.reshape(60, 100)),
        ValueError,
        "state[0]['exp_avg'] has shape (60, 100), the codes of its parameter are contiguous of shape (6000,) or (3000,)",
    ),
    (
        "every second code",
        {"state_dtype": "q8"},
        damage("exp_avg_sq", lambda a: np.repeat(a, 2)[::2]),
        ValueError,
        "state[0]['exp_avg_sq'] has shape (6000,), the codes of its parameter are contiguous of shape (6000,) or (3000,)",
    ),
    (
        "a scale less",
        {"state_dtype": "q8"},
        damage("exp_avg_scale", lambda a: a[:-1].copy()),
        ValueError,
        "state[0]['exp_avg_scale'] has shape (23,), the scales of its parameter are contiguous of shape (24,)",
    ),
    (
        "scales of q8 for q4",
        {"state_dtype": "q4"},
        damage("exp_avg_scale", lambda a: a[:24].copy()),
        ValueError,
        "state[0]['exp_avg_scale'] has shape (24,), the scales of its parameter are contiguous of shape (47,)",
    ),
    (
        "wide scales",
        {"state_dtype": "q8"},
        damage("exp_avg_sq_scale", lambda a: a.astype(np.float64)),
        TypeError,
        "state[0]['exp_avg_sq_scale'] has dtype float64, must be float32",
    ),
    (
        "no scale",
        {"state_dtype": "q8"},
        lambda state: state.pop("exp_avg_scale"),
        TypeError,
        "state[0]['exp_avg'] has dtype uint8, and there is no 'exp_avg_scale' beside it",
    ),
    (
        "read-only scales",
        {"state_dtype": "q8"},
        lambda state: state["exp_avg_scale"].setflags(write=False),
        ValueError,
        "state[0]['exp_avg_scale'] is read-only",
    ),
    (
        "scales that are codes",
        {"state_dtype": "q8"},
        damage("exp_avg_sq_scale", lambda a: a) and (lambda s: s.update(exp_avg_sq_scale=s["exp_avg_scale"])),
        ValueError,
        "state[0]['exp_avg_sq_scale'] shares memory with state[0]['exp_avg_scale']",
    ),
    (
        "a remainder of another type",
        {"precision": "split"},
        damage("remainder", lambda a: a.astype(np.int32)),
        TypeError,
        "state[0]['remainder'] has dtype int32, must be int16",
    ),
    (
        "a remainder of another shape",
        {"precision": "split"},
        damage("remainder", lambda a: a[1:].copy()),
        ValueError,
        "state[0]['remainder'] has shape (59, 100), its parameter has (60, 100)",
    ),
    (
        "a compensation of another type",
        {"precision": "kahan"},
        damage("compensation", lambda a: a.astype(np.float16)),
        TypeError,
        "state[0]['compensation'] has dtype float16, must be bfloat16",
    ),
    (
        "a master of another type",
        {"precision": "master"},
        damage("master", lambda a: a.astype(ml_dtypes.bfloat16)),
        TypeError,
        "state[0]['master'] has dtype bfloat16, must be float32",
    ),
    (
        "a master that is the state",
        {"precision": "master"},
        lambda state: state.update(master=state["exp_avg"]),
        ValueError,
        "state[0]['master'] shares memory with state[0]['exp_avg']",
    ),
    (
        "rows that do not fill blocks",
        {"state_dtype": "q8", "max_norm": None},
        lambda state: None,
        ValueError,
        (
            "state[0]['exp_avg'] is compressed in blocks of 256 elements: stages by row need rows of a multiple, "
            "its parameter has rows of 100"
        ),
    ),
]


@pytest.mark.parametrize(("options", "spoil", "error", "message"), [d[1:] for d in DAMAGED], ids=[d[0] for d in DAMAGED])
def test_damaged_states_are_refused(options: Any, spoil: Any, error: type[Exception], message: str) -> None:
    p = np.ones((60, 100), ml_dtypes.bfloat16)
    g = np.full((60, 100), 0.5, ml_dtypes.bfloat16)
    opt = gradstep.AdamW([p], **{name: value for name, value in options.items() if name != "max_norm"})
    opt.step([g])
    spoil(opt.state[0])
    if "max_norm" in options:
        opt.param_groups[0]["max_norm"] = 1.0
    before = digest([p, opt.state])
    with pytest.raises(error) as caught:
        opt.step([g])
    assert str(caught.value) == f"AdamW.step: {message}"
    assert digest([p, opt.state]) == before


def test_averages_of_another_dtype_are_lent_and_not_exchanged() -> None:
    p = np.linspace(0.5, 1.5, 600).astype(ml_dtypes.bfloat16)
    opt = gradstep.AdamW([p], lr=0.1, ema_decay=0.9)
    for _ in range(3):
        opt.step([np.ones(600, ml_dtypes.bfloat16)])
    before, average = p.copy(), opt.ema[0].copy()
    with pytest.raises(ValueError) as caught:
        opt.swap_ema()
    assert str(caught.value) == (
        "AdamW.swap_ema: an average is float32, its parameter bfloat16: exchanging would round it; averaged() leaves it as it is"
    )
    with opt.averaged():
        assert np.array_equal(p, average.astype(ml_dtypes.bfloat16))
        assert not np.array_equal(p, before)
    assert np.array_equal(p, before)
    assert np.array_equal(opt.ema[0], average)


def test_conversions_that_can_not_be() -> None:
    x = np.ones(4, np.float32)
    for call, error, message in (
        (lambda: formats.quantize(x, "q2"), ValueError, "the format must be 'q8' or 'q4', got 'q2'"),  # type: ignore[arg-type]
        (lambda: formats.quantize(x[:1], "q4"), ValueError, "q4 is for arrays of 2 elements at least, got 1"),
        (
            lambda: formats.convert_(np.empty(3, np.float16), x),
            ValueError,
            "convert_: target has shape (3,), source has (4,)",
        ),
        (
            lambda: formats.convert_(np.empty(4, np.int8), x),
            TypeError,
            "convert_: target has dtype int8, must be float64, float32, float16 or bfloat16",
        ),
        (lambda: formats.convert_(x, x), ValueError, "convert_: target shares memory with source"),
        (
            lambda: formats.dequantize(np.zeros(3, np.uint8), np.ones(1, np.float32), (4,), "q8"),
            ValueError,
            "dequantize: codes has shape (3,), q8 of shape (4,) has other codes",
        ),
        (
            lambda: formats.dequantize(np.zeros(4, np.uint8), np.ones(2, np.float32), (4,), "q8"),
            ValueError,
            "dequantize: scale has shape (2,), the scales of target are contiguous of shape (1,)",
        ),
    ):
        with pytest.raises(error) as caught:
            call()
        assert str(caught.value) == message
