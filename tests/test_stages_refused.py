"""Options that can't be right are refused by the constructor, what a step is given by the step, before anything is written."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

import gradstep

from .cases import gradients, parameters
from .test_skip import digest

NAN, INF = math.nan, math.inf
ADAMW, SGD, LION = gradstep.AdamW, gradstep.SGD, gradstep.Lion

# optimizer, options, error, what the message has in it
OPTIONS: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
    (ADAMW, {"clip_nrom": 1.0}, TypeError, "clip_nrom"),
    *[
        (ADAMW, {name: value}, ValueError, name)
        for name in ("clip_norm", "clip_norm_per_tensor", "clip_value", "agc", "noise", "l1", "l2", "group_lasso", "max_norm")
        for value in (-1.0, NAN)
    ],
    *[
        (ADAMW, {name: value}, TypeError, name)
        for name in ("clip_norm", "clip_norm_per_tensor", "clip_value", "agc", "noise", "l1", "l2", "group_lasso", "max_norm")
        for value in ("1", [1.0])
    ],
    *[(ADAMW, {name: INF}, ValueError, name) for name in ("agc", "noise", "l1", "l2", "group_lasso")],
    (ADAMW, {"clip_norm": INF}, ValueError, "clip_norm"),
    (ADAMW, {"agc_eps": 0.1}, ValueError, "agc_eps needs agc"),
    (ADAMW, {"noise_decay": 0.5}, ValueError, "noise_decay needs noise"),
    (ADAMW, {"seed": 3}, ValueError, "seed needs noise, precision or state_rounding"),
    (ADAMW, {"centralize": 1}, TypeError, "centralize"),
    (ADAMW, {"cautious": "yes"}, TypeError, "cautious"),
    (ADAMW, {"zero_grad": 1}, TypeError, "zero_grad"),
    (ADAMW, {"agc": 0.1, "agc_eps": -1e-3}, ValueError, "agc_eps"),
    (ADAMW, {"agc": 0.1, "agc_eps": NAN}, ValueError, "agc_eps"),
    (ADAMW, {"noise": 0.1, "noise_decay": NAN}, ValueError, "noise_decay"),
    (ADAMW, {"noise": 0.1, "noise_decay": -1.0}, ValueError, "noise_decay"),
    (ADAMW, {"noise": 0.1, "seed": 1.5}, TypeError, "seed"),
    (ADAMW, {"noise": 0.1, "seed": "a"}, TypeError, "seed"),
    (ADAMW, {"noise": 0.1, "seed": -1}, ValueError, "seed"),
    (ADAMW, {"on_nonfinite": "ignore"}, ValueError, "on_nonfinite"),
    (ADAMW, {"on_nonfinite": None}, (TypeError, ValueError), "on_nonfinite"),
    (ADAMW, {"decay_mode": "l2"}, ValueError, "decay_mode"),
    (ADAMW, {"decay_mode": ""}, ValueError, "decay_mode"),
    (ADAMW, {"decay_mode": 1}, (TypeError, ValueError), "decay_mode"),
    (SGD, {"cautious": True}, ValueError, "cautious"),
    (gradstep.Adagrad, {"cautious": True}, ValueError, "cautious"),
    (gradstep.RMSprop, {"cautious": True}, ValueError, "cautious"),
    (gradstep.LARS, {"cautious": True, "momentum": 0}, ValueError, "cautious"),
    *[
        (make, {"cautious": True, "betas": (0.0, 0.9)}, ValueError, "cautious")
        for make in (gradstep.Adam, ADAMW, LION, gradstep.LAMB, gradstep.NovoGrad)
    ],
    (ADAMW, {"trust_ratio": (2.0, 1.0)}, ValueError, "trust_ratio"),
    (ADAMW, {"trust_ratio": (-1.0, 1.0)}, ValueError, "trust_ratio"),
    (ADAMW, {"trust_ratio": (NAN, 1.0)}, ValueError, "trust_ratio"),
    (ADAMW, {"trust_ratio": (0.0, NAN)}, ValueError, "trust_ratio"),
    (ADAMW, {"trust_ratio": (1.0,)}, TypeError, "trust_ratio"),
    (ADAMW, {"trust_ratio": "yes"}, TypeError, "trust_ratio"),
    (ADAMW, {"bounds": (1.0, -1.0)}, ValueError, "bounds"),
    (ADAMW, {"bounds": (NAN, 1.0)}, ValueError, "bounds"),
    (ADAMW, {"bounds": (0.0, NAN)}, ValueError, "bounds"),
    (ADAMW, {"bounds": (0.0, 1.0, 2.0)}, TypeError, "bounds"),
    (ADAMW, {"bounds": 1.0}, TypeError, "bounds"),
    (ADAMW, {"bounds": ("0", None)}, TypeError, "bounds"),
    (ADAMW, {"lookahead": (0, 0.5)}, ValueError, "lookahead"),
    (ADAMW, {"lookahead": (-5, 0.5)}, ValueError, "lookahead"),
    (ADAMW, {"lookahead": (2.5, 0.5)}, TypeError, "lookahead"),
    (ADAMW, {"lookahead": (5, -0.5)}, ValueError, "lookahead"),
    (ADAMW, {"lookahead": (5, 1.5)}, ValueError, "lookahead"),
    (ADAMW, {"lookahead": (5, NAN)}, ValueError, "lookahead"),
    (ADAMW, {"lookahead": 5}, TypeError, "lookahead"),
    (ADAMW, {"ema_decay": -0.1}, ValueError, "ema_decay"),
    (ADAMW, {"ema_decay": 1.0}, ValueError, "ema_decay"),
    (ADAMW, {"ema_decay": NAN}, ValueError, "ema_decay"),
    (ADAMW, {"ema_decay": "0.9"}, TypeError, "ema_decay"),
    (ADAMW, {"ema_decay": 0.9, "ema_correction": "linear"}, ValueError, "ema_correction"),
    (ADAMW, {"ema_correction": "bias"}, ValueError, "ema_correction needs ema_decay"),
    (ADAMW, {"swa": (-1, 1)}, ValueError, "swa"),
    (ADAMW, {"swa": (0, 0)}, ValueError, "swa"),
    (ADAMW, {"swa": (0, -2)}, ValueError, "swa"),
    (ADAMW, {"swa": (0.5, 1)}, TypeError, "swa"),
    (ADAMW, {"swa": 10}, TypeError, "swa"),
]


@pytest.mark.parametrize(("make", "options", "error", "message"), OPTIONS, ids=[f"{r[0].__name__} {r[1]}" for r in OPTIONS])
def test_refused_by_the_constructor(make: Any, options: dict[str, Any], error: Any, message: str) -> None:
    p = parameters((5, 4), np.float32)
    before = p.copy()
    with pytest.raises(error, match=message):
        make([p], **options)
    assert np.array_equal(p, before)


@pytest.mark.parametrize(
    ("make", "options", "error", "message"),
    [row for row in OPTIONS if not row[1].keys() & {"clip_norm", "on_nonfinite", "zero_grad"}],
    ids=lambda value: str(value)[:40],
)
def test_refused_in_a_group_and_by_the_step_after_an_edit(make: Any, options: dict[str, Any], error: Any, message: str) -> None:
    params = [parameters((5, 4), np.float32, i) for i in range(2)]
    grads = [gradients((5, 4), np.float32, i) for i in range(2)]
    with pytest.raises(error, match=message):
        make([{"params": params[:1]}, {"params": params[1:], **options}])
    if "clip_nrom" in options:
        return
    opt = make([{"params": params[:1]}, {"params": params[1:]}])
    for first in (True, False):
        opt.param_groups[1].update(options)
        before = digest([params, grads, opt.state, opt.steps])
        with pytest.raises(error, match=message):
            opt.step(grads)
        assert digest([params, grads, opt.state, opt.steps]) == before
        for name in options:
            if name in opt.param_groups[0]:
                opt.param_groups[1][name] = opt.param_groups[0][name]
            else:
                del opt.param_groups[1][name]
        if first:
            opt.step(grads)
            assert digest([params, grads, opt.state, opt.steps]) != before


@pytest.mark.parametrize("name", ["clip_norm", "on_nonfinite", "zero_grad"])
def test_options_of_the_optimizer_are_no_options_of_groups(name: str) -> None:
    with pytest.raises(TypeError, match=name):
        ADAMW([{"params": np.zeros(3), name: 1.0}])


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("clip_norm", -1.0, ValueError),
        ("clip_norm", NAN, ValueError),
        ("clip_norm", "1", TypeError),
        ("on_nonfinite", "no", ValueError),
    ],
)
def test_attributes_are_checked_by_the_step(name: str, value: Any, error: type[Exception]) -> None:
    params, grads = [parameters((5, 4), np.float32)], [gradients((5, 4), np.float32, 1)]
    opt = ADAMW(params)
    good = getattr(opt, name)
    for _ in range(2):
        before = digest([params, opt.state, opt.steps])
        setattr(opt, name, value)
        with pytest.raises(error, match=name):
            opt.step(grads)
        assert digest([params, opt.state, opt.steps]) == before
        setattr(opt, name, good)
        opt.step(grads)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"clip_nrom": 1.0}, TypeError, "sgd_.*clip_nrom"),
        ({"ema_decay": 0.9}, TypeError, "sgd_.*ema_decay"),
        ({"clip_norm": -1.0}, ValueError, "^sgd_: clip_norm"),
        ({"clip_value": NAN}, ValueError, "^sgd_: clip_value"),
        ({"bounds": (1, 0)}, ValueError, "^sgd_: bounds"),
        ({"cautious": True}, ValueError, "^sgd_: cautious"),
        ({"noise": 0.1}, TypeError, "^sgd_: noise needs"),
        ({"grad_scale": NAN}, ValueError, "grad_scale"),
    ],
    ids=str,
)
def test_refused_by_functions(options: dict[str, Any], error: type[Exception], message: str) -> None:
    p = parameters((5, 4), np.float32)
    before = p.copy()
    with pytest.raises(error, match=message):
        gradstep.sgd_(p, gradients((5, 4), np.float32, 1), **options)
    assert np.array_equal(p, before)


@pytest.mark.parametrize(
    ("function", "settings", "states"),
    [
        (gradstep.sgd_, {}, ()),
        (gradstep.lars_, {"momentum": 0.0}, ("momentum_buffer",)),
        (gradstep.adagrad_, {}, ("sum",)),
        (gradstep.rmsprop_, {}, ("square_avg",)),
        (gradstep.lion_, {"betas": (0.0, 0.9)}, ("exp_avg",)),
        (gradstep.adam_, {"betas": (0.0, 0.9), "step": 1}, ("exp_avg", "exp_avg_sq")),
        (gradstep.adamw_, {"betas": (0.0, 0.9), "step": 1}, ("exp_avg", "exp_avg_sq")),
        (gradstep.lamb_, {"betas": (0.0, 0.9), "step": 1}, ("exp_avg", "exp_avg_sq")),
        (gradstep.novograd_, {"betas": (0.0, 0.9), "step": 1}, ("exp_avg", "grad_norm_sq")),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_functions_without_momentum_are_not_cautious(function: Any, settings: dict[str, Any], states: tuple[str, ...]) -> None:
    p = parameters((5, 4), np.float32)
    arrays = {name: np.zeros(1 if name == "grad_norm_sq" else p.shape, np.float32) for name in states}
    before = digest([p, arrays])
    with pytest.raises(ValueError) as caught:
        function(p, gradients((5, 4), np.float32, 1), **arrays, **settings, cautious=True)
    assert str(caught.value) == (
        f"{function.__name__}: cautious needs a rule with momentum: without, an update always goes along its gradient"
    )
    assert digest([p, arrays]) == before
    function(p, gradients((5, 4), np.float32, 1), **arrays, **settings)


G = gradients((5, 4), np.float32, 1)

# arguments of step for a list of two parameters of shape (5, 4), error, what the message has in it
ARGUMENTS: list[tuple[str, Any, dict[str, Any], Any, str]] = [
    ("NaN scale", [G, G], {"grad_scale": NAN}, ValueError, "grad_scale"),
    ("infinite scale", [G, G], {"grad_scale": INF}, ValueError, "grad_scale"),
    ("scale of text", [G, G], {"grad_scale": "1"}, TypeError, "grad_scale"),
    ("no sources", [], {}, ValueError, "grads"),
    ("NaN weight", [(1.0, [G, G]), (NAN, [G.copy(), G.copy()])], {}, ValueError, "weight"),
    ("infinite weight", [(INF, [G, G])], {}, ValueError, "weight"),
    ("weight of text", [(1.0, [G, G]), ("1", [G.copy(), G.copy()])], {}, TypeError, "weight|number"),
    ("no weight", [(1.0, [G, G]), [G.copy(), G.copy()]], {}, TypeError, "grads"),
    ("a source with a gradient less", [(1.0, [G, G]), (1.0, [G.copy()])], {}, ValueError, "1 arrays"),
    ("a source with a gradient more", [(1.0, [G, G]), (1.0, [G.copy()] * 3)], {}, ValueError, "3 arrays"),
    ("another shape", [(1.0, [G, G]), (1.0, [G.copy(), G.T.copy()])], {}, ValueError, r"\(4, 5\)"),
    ("another dtype", [(1.0, [G, G]), (1.0, [G.copy(), G.astype("i4")])], {}, TypeError, "int32"),
    ("a form of its own", [(1.0, [G, G]), (1.0, {"a": G, "b": G})], {}, TypeError, "grads"),
    ("no arrays", [(1.0, [G, G]), (1.0, [3.5, G])], {}, TypeError, "must be an array"),
]


@pytest.mark.parametrize(
    ("grads", "more", "error", "message"), [row[1:] for row in ARGUMENTS], ids=[row[0] for row in ARGUMENTS]
)
@pytest.mark.parametrize("options", [{}, {"clip_norm": 1.0, "ema_decay": 0.9, "agc": 0.1}], ids=["plain", "staged"])
def test_refused_by_the_step(grads: Any, more: dict[str, Any], error: Any, message: str, options: dict[str, Any]) -> None:
    params = [parameters((5, 4), np.float32, i) for i in range(2)]
    opt = ADAMW(params, **options)
    for _ in range(2):
        before = digest([params, opt.state, opt.steps])
        with pytest.raises(error, match=message):
            opt.step(grads, **more)
        assert digest([params, opt.state, opt.steps]) == before
        opt.step([G, G.copy()])


def test_sources_that_share_memory_with_what_is_written() -> None:
    params = [parameters((5, 4), np.float32)]
    opt = ADAMW(params, ema_decay=0.9)
    opt.step([G])
    for shared in (params[0], opt.state[0]["exp_avg"], opt.state[0]["ema"]):
        before = digest([params, opt.state])
        with pytest.raises(ValueError, match="shares memory"):
            opt.step([(1.0, [G]), (1.0, [shared])])
        assert digest([params, opt.state]) == before


def test_zero_grad_needs_gradients_that_can_be_written() -> None:
    frozen = G.copy()
    frozen.flags.writeable = False
    p = parameters((5, 4), np.float32)
    opt = ADAMW([p], zero_grad=True)
    before = digest([p, opt.state])
    with pytest.raises(ValueError, match="read-only"):
        opt.step([frozen])
    with pytest.raises(ValueError, match="read-only"):
        opt.step([(1.0, [G.copy()]), (1.0, [frozen])])
    assert digest([p, opt.state]) == before
    opt.zero_grad = False
    opt.step([frozen])


def test_damaged_averages_are_refused() -> None:
    p = parameters((6,), np.float32)
    opt = ADAMW({"w": p}, ema_decay=0.9, lookahead=(2, 0.5), swa=(0, 1))
    g = {"w": gradients((6,), np.float32, 1)}
    opt.step(g)
    good = dict(opt.state["w"])
    for name, value in (
        ("ema", np.zeros(5, np.float32)),
        ("slow", np.zeros(6, np.int32)),
        ("ema_count", -1),
        ("swa_count", 1.5),
    ):
        opt.state["w"] = {**good, name: value}
        before = digest([p, opt.state])
        with pytest.raises((TypeError, ValueError), match=name):
            opt.step(g)
        assert digest([p, opt.state]) == before


def test_noise_needs_the_number_of_the_step() -> None:
    p, g, total = np.ones(3), np.ones(3), np.zeros(3)
    with pytest.raises(TypeError, match="adagrad_: noise needs the number of the step"):
        gradstep.adagrad_(p, g, sum=total, noise=0.1)
    gradstep.adagrad_(p, g, sum=total, noise=0.1, step=1)
    assert (p != 1).all()


def test_an_option_can_be_off_in_a_group() -> None:
    a, b = np.ones((2, 3)), np.ones((2, 3))
    opt = ADAMW([{"params": a}, {"params": b, "agc": None}], agc=0.01, agc_eps=1e-2, ema_decay=0.9, ema_correction="bias")
    opt.param_groups[1]["ema_decay"] = None
    opt.step([np.ones((2, 3)), np.ones((2, 3))])
    assert opt.ema[0] is not None and opt.ema[1] is None


def test_complex_rows_have_no_real_mean() -> None:
    p = np.ones((2, 3), np.complex64)
    opt = ADAMW([p], centralize=True)
    with pytest.raises(TypeError, match="is complex: centralize takes real parameters"):
        opt.step([np.ones((2, 3), np.complex64)])
    assert (p == 1).all() and opt.state == {}
