"""What can't be right is refused, with the exact message, before anything is written."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import gradstep

from .cases import gradients, parameters


def f32(*shape: int) -> Any:
    return np.zeros(shape, np.float32)


class Operands:
    """Three parameters of shape (4, 3) with gradients and AdamW's states, all zeros but for the parameters and gradients."""

    def __init__(self) -> None:
        self.params = [parameters((4, 3), np.float32, i) for i in range(3)]
        self.grads = [gradients((4, 3), np.float32, i) for i in range(3)]
        self.exp_avg = [f32(4, 3) for _ in range(3)]
        self.exp_avg_sq = [f32(4, 3) for _ in range(3)]
        self.step: Any = 1
        self.settings: dict[str, Any] = {}

    def call(self) -> None:
        gradstep.adamw_(
            self.params, self.grads, exp_avg=self.exp_avg, exp_avg_sq=self.exp_avg_sq, step=self.step, **self.settings
        )

    def first(self) -> None:
        gradstep.adamw_(
            self.params[0],
            self.grads[0],
            exp_avg=self.exp_avg[0],
            exp_avg_sq=self.exp_avg_sq[0],
            step=self.step,
            **self.settings,
        )


def read_only(a: Any) -> Any:
    a = a.copy()
    a.flags.writeable = False
    return a


def misaligned(a: Any) -> Any:
    block = np.zeros(a.nbytes + 1, np.uint8)[1:]
    return block.view(a.dtype).reshape(a.shape)


def put(name: str, index: int, make: Callable[[Operands], Any]) -> Callable[[Operands], None]:
    def change(operands: Operands) -> None:
        getattr(operands, name)[index] = make(operands)

    return change


def setting(**settings: Any) -> Callable[[Operands], None]:
    return lambda operands: operands.settings.update(settings)


def step(value: Any) -> Callable[[Operands], None]:
    def change(operands: Operands) -> None:
        operands.step = value

    return change


def shorten(name: str) -> Callable[[Operands], None]:
    return lambda operands: getattr(operands, name).pop()


def interleaved(operands: Operands) -> Any:
    return operands.params[0].ravel()[1:11:3]


REFUSED: list[tuple[str, Callable[[Operands], None], type[Exception], str]] = [
    ("shape", put("grads", 1, lambda o: f32(3, 4)), ValueError, "grads[1] has shape (3, 4), its parameter has (4, 3)"),
    ("no broadcasting", put("grads", 2, lambda o: f32(3)), ValueError, "grads[2] has shape (3,), its parameter has (4, 3)"),
    (
        "state shape",
        put("exp_avg_sq", 2, lambda o: f32(4)),
        ValueError,
        "exp_avg_sq[2] has shape (4,), its parameter has (4, 3)",
    ),
    (
        "dtype",
        put("params", 1, lambda o: np.zeros((4, 3), int)),
        TypeError,
        "params[1] has dtype int64, must be float64, float32, float16 or bfloat16",
    ),
    (
        "long double",
        put("params", 0, lambda o: np.zeros((4, 3), np.longdouble)),
        TypeError,
        f"params[0] has dtype {np.dtype(np.longdouble)}, must be float64, float32, float16 or bfloat16",
    ),
    (
        "integers",
        put("grads", 1, lambda o: np.zeros((4, 3), np.int32)),
        TypeError,
        "grads[1] has dtype int32, must be float64, float32, float16 or bfloat16",
    ),
    (
        "flags",
        put("grads", 1, lambda o: np.zeros((4, 3), bool)),
        TypeError,
        "grads[1] has dtype bool, must be float64, float32, float16 or bfloat16",
    ),
    (
        "codes without scales",
        put("exp_avg", 0, lambda o: np.zeros((4, 3), np.uint8)),
        TypeError,
        "exp_avg[0] has dtype uint8, and there is no 'exp_avg_scale' beside it",
    ),
    (
        "complex gradient",
        put("grads", 1, lambda o: np.zeros((4, 3), np.complex64)),
        TypeError,
        "grads[1] has dtype complex64, its parameter has float32",
    ),
    (
        "byte order",
        put("grads", 2, lambda o: np.zeros((4, 3), ">f4")),
        TypeError,
        "grads[2] has dtype >f4, must be in native byte order",
    ),
    ("no array", put("grads", 1, lambda o: 3.5), TypeError, "grads[1] must be an array, got float"),
    ("None", put("exp_avg", 1, lambda o: None), TypeError, "exp_avg[1] must be an array, got NoneType"),
    ("read-only", put("params", 2, lambda o: read_only(o.params[2])), ValueError, "params[2] is read-only"),
    ("read-only state", put("exp_avg", 2, lambda o: read_only(f32(4, 3))), ValueError, "exp_avg[2] is read-only"),
    (
        "self-overlap",
        put("params", 1, lambda o: np.lib.stride_tricks.as_strided(f32(12), (4, 3), (4, 4))),
        ValueError,
        "params[1] overlaps itself: shape (4, 3), strides (4, 4) in bytes",
    ),
    (
        "broadcast state",
        put("exp_avg", 1, lambda o: np.lib.stride_tricks.as_strided(f32(12), (4, 3), (0, 4))),
        ValueError,
        "exp_avg[1] overlaps itself: shape (4, 3), strides (0, 4) in bytes",
    ),
    (
        "given twice",
        put("params", 2, lambda o: o.params[0]),
        ValueError,
        "params[2] is params[0] again: a parameter may be given once",
    ),
    ("view twice", put("params", 2, lambda o: o.params[0][:]), ValueError, "params[2] shares memory with params[0]"),
    ("gradient is state", put("grads", 1, lambda o: o.exp_avg[2]), ValueError, "grads[1] shares memory with exp_avg[2]"),
    ("gradient is parameter", put("grads", 0, lambda o: o.params[0]), ValueError, "grads[0] shares memory with params[0]"),
    ("states are one", put("exp_avg_sq", 1, lambda o: o.exp_avg[1]), ValueError, "exp_avg_sq[1] shares memory with exp_avg[1]"),
    (
        "partly",
        put("exp_avg", 0, lambda o: o.params[1].reshape(3, 4)[:, ::-1].T),
        ValueError,
        "params[1] shares memory with exp_avg[0]",
    ),
    ("list length", shorten("grads"), ValueError, "grads has 2 arrays, params has 3"),
    ("state list length", shorten("exp_avg_sq"), ValueError, "exp_avg_sq has 2 arrays, params has 3"),
    ("step list length", step([1, 2]), ValueError, "step has 2 numbers, params has 3"),
    ("step zero", step(0), ValueError, "step[0] must be from 1 to 2^53, got 0"),
    ("step of one", step([1, -3, 1]), ValueError, "step[1] must be from 1 to 2^53, got -3"),
    ("step too large", step(2**53 + 1), ValueError, "step[0] must be from 1 to 2^53, got 9007199254740993"),
    ("step no int", step([1, 2, 2.5]), TypeError, "step[2] must be an int, got 2.5"),
    ("step text", step("1"), TypeError, "step must be a sequence, as params is, got str"),
    ("lr", setting(lr=-1.0), ValueError, "lr must be >= 0, got -1.0"),
    ("lr NaN", setting(lr=float("nan")), ValueError, "lr must be >= 0, got nan"),
    ("lr infinite", setting(lr=float("inf")), ValueError, "lr must be finite, got inf"),
    ("lr text", setting(lr="fast"), TypeError, "lr must be a number, got 'fast'"),
    ("beta", setting(betas=(1.0, 0.9)), ValueError, "betas[0] must be in [0, 1), got 1.0"),
    ("second beta", setting(betas=(0.9, -0.1)), ValueError, "betas[1] must be in [0, 1), got -0.1"),
    ("eps", setting(eps=-1e-8), ValueError, "eps must be >= 0, got -1e-08"),
    ("weight decay", setting(weight_decay=-0.5), ValueError, "weight_decay must be >= 0, got -0.5"),
]


@pytest.mark.parametrize(("change", "error", "message"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED])
def test_refused_with_nothing_written(change: Callable[[Operands], None], error: type[Exception], message: str) -> None:
    operands = Operands()
    change(operands)
    before = copy.deepcopy(operands.__dict__)
    with pytest.raises(error) as caught:
        operands.call()
    assert str(caught.value) == f"adamw_: {message}"
    for name in ("params", "grads", "exp_avg", "exp_avg_sq"):
        for now, then in zip(getattr(operands, name), before[name], strict=True):
            assert np.array_equal(now, then)


def test_names_of_single_arrays() -> None:
    operands = Operands()
    operands.exp_avg_sq[0] = f32(2)
    with pytest.raises(ValueError, match=r"^adamw_: exp_avg_sq has shape \(2,\), its parameter has \(4, 3\)$"):
        operands.first()


def test_misaligned() -> None:
    operands = Operands()
    operands.grads[1] = misaligned(operands.grads[1])
    with pytest.raises(
        ValueError, match=r"^adamw_: grads\[1\] is misaligned: address \d+ and strides \(12, 4\) must be multiples of 4 bytes$"
    ):
        operands.call()


def test_misaligned_strides() -> None:
    records = np.zeros(5, np.dtype([("value", "f4"), ("tag", "i2")], align=False))
    p, states = records["value"], {"exp_avg": f32(5), "exp_avg_sq": f32(5)}
    with pytest.raises(ValueError, match=r"is misaligned: address \d+ and strides \(6,\) must be multiples of 4 bytes"):
        gradstep.adamw_(p, f32(5), **states, step=1)


def test_nothing_that_is_no_sequence() -> None:
    with pytest.raises(TypeError, match=r"^adamw_: params must be an array or a sequence of arrays, got float$"):
        gradstep.adamw_(3.0, f32(1), exp_avg=f32(1), exp_avg_sq=f32(1), step=1)
    with pytest.raises(TypeError, match=r"^adamw_: grads must be a sequence, as params is, got numpy.ndarray$"):
        gradstep.adamw_([f32(1)], f32(1), exp_avg=[f32(1)], exp_avg_sq=[f32(1)], step=1)


def test_betas_of_another_number() -> None:
    with pytest.raises(TypeError, match=r"^adamw_: betas must be two numbers, got \(0.9,\)$"):
        gradstep.adamw_(f32(1), f32(1), exp_avg=f32(1), exp_avg_sq=f32(1), step=1, betas=(0.9,))  # type: ignore[arg-type]


def test_missing_states() -> None:
    with pytest.raises(TypeError, match="^sgd_: momentum needs a momentum_buffer$"):
        gradstep.sgd_(f32(1), f32(1), momentum=0.9)
    with pytest.raises(TypeError, match="^rmsprop_: momentum needs a momentum_buffer$"):
        gradstep.rmsprop_(f32(1), f32(1), square_avg=f32(1), momentum=0.9)
    with pytest.raises(TypeError, match="^rmsprop_: centered needs a grad_avg$"):
        gradstep.rmsprop_(f32(1), f32(1), square_avg=f32(1), centered=True)
    with pytest.raises(TypeError, match="^adagrad_: lr_decay needs step$"):
        gradstep.adagrad_(f32(1), f32(1), sum=f32(1), lr_decay=0.1)
    with pytest.raises(TypeError, match="missing 1 required keyword-only argument: 'step'"):
        gradstep.adamw_(f32(1), f32(1), exp_avg=f32(1), exp_avg_sq=f32(1))  # type: ignore[call-arg]


def test_nesterov_without_momentum() -> None:
    for settings in ({"momentum": 0.0}, {"momentum": 0.9, "dampening": 0.1}):
        with pytest.raises(ValueError, match="^sgd_: Nesterov momentum requires a momentum and zero dampening$"):
            gradstep.sgd_(f32(1), f32(1), momentum_buffer=f32(1), nesterov=True, **settings)


def test_a_refusal_is_not_forgotten() -> None:
    """What one step refused, the next refuses as well, and a mended one runs."""
    params = [parameters((70,), np.float32, i) for i in range(2)]
    opt = gradstep.AdamW(params)
    grads: list[Any] = [gradients((70,), np.float32, i) for i in range(2)]
    for _ in range(2):
        with pytest.raises(ValueError, match=r"^AdamW.step: grads\[1\] shares memory with params\[0\]$"):
            opt.step([grads[0], params[0]])
    with pytest.raises(ValueError, match=r"^AdamW.step: grads\[1\] has shape \(69,\), its parameter has \(70,\)$"):
        opt.step([params[1], grads[1][1:]])
    with pytest.raises(ValueError, match=r"^AdamW.step: grads\[0\] shares memory with params\[1\]$"):
        opt.step([params[1], grads[1]])
    assert opt.state == {} and opt.steps == 0
    opt.step(grads)
    assert opt.steps == 1 and all(state["step"] == 1 for state in opt.state.values())
