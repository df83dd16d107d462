"""The stages that tests of whole steps run over, and how an optimizer and the reference are taken through the same steps."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

import gradstep

from .cases import CASES, NORM_CASES, Case, gradients, parameters
from .stage_references import Stepper
from .test_values import assert_same_bits

LR = 0.01
STEPS = 5
SHAPES = [(33, 3), (1030,), (2, 3, 5, 5), (0, 3), (), (17, 40)]
RULES = ("adamw", "sgd_nesterov", "lion")

STAGES: dict[str, dict[str, Any]] = {
    "grad_scale": {"grad_scale": 0.3},
    "sources": {"weights": (0.75, -0.5, 0.3)},
    "zero nonfinite": {"on_nonfinite": "zero"},
    "clip_value": {"clip_value": 0.7},
    "agc": {"agc": 2.0, "agc_eps": 0.5},
    "clip_norm_per_tensor": {"clip_norm_per_tensor": 9.0},
    "clip_norm": {"clip_norm": 20.0},
    "centralize": {"centralize": True},
    "coupled": {"decay_mode": "coupled"},
    "decoupled": {"decay_mode": "decoupled"},
    "independent": {"decay_mode": "independent"},
    "no decay": {"weight_decay": 0.0},
    "cautious": {"cautious": True},
    "trust_ratio": {"trust_ratio": True},
    "limited trust_ratio": {"trust_ratio": (0.3, 0.95)},
    "l1": {"l1": 30.0},
    "l2": {"l2": 20.0},
    "bounds": {"bounds": (-0.6, 1.1)},
    "lower bound": {"bounds": (0, None)},
    "upper bound": {"bounds": (None, 0.7)},
    "group_lasso": {"group_lasso": 90.0},
    "max_norm": {"max_norm": 1.5},
    "lookahead": {"lookahead": (2, 0.4)},
    "ema": {"ema_decay": 0.9},
    "ema with bias": {"ema_decay": 0.9, "ema_correction": "bias"},
    "ema with warmup": {"ema_decay": 0.3, "ema_correction": "warmup"},
    "swa": {"swa": (1, 2)},
    "swa from the start": {"swa": (0, 1)},
    "zero_grad": {"zero_grad": True},
}


def together(*names: str) -> dict[str, Any] | None:
    """The options of several stages; None if they contradict each other."""
    options: dict[str, Any] = {}
    for name in names:
        if options.keys() & STAGES[name].keys():
            return None
        options.update(STAGES[name])
    return options


MANY: dict[str, dict[str, Any]] = {
    "a usual step": together("grad_scale", "clip_norm", "decoupled", "ema", "zero_grad") or {},
    "every gradient stage": together(
        "grad_scale", "sources", "zero nonfinite", "clip_value", "agc", "clip_norm_per_tensor", "clip_norm", "centralize"
    )
    or {},
    "every parameter stage": together(
        "cautious", "trust_ratio", "l1", "l2", "bounds", "group_lasso", "max_norm", "lookahead", "ema with bias", "swa"
    )
    or {},
    "every stage without norms": together(
        "sources", "grad_scale", "zero nonfinite", "clip_value", "independent", "l1", "l2", "bounds", "lookahead", "ema", "swa"
    )
    or {},
    "every stage by row": together("agc", "centralize", "group_lasso", "max_norm") or {},
    "every norm": together("clip_norm", "clip_norm_per_tensor", "limited trust_ratio", "cautious") or {},
}
MANY["everything"] = {**MANY["every gradient stage"], **MANY["every parameter stage"], "zero_grad": True}


def case_of(name: str) -> Case:
    return next(case for case in (*CASES, *NORM_CASES) if case.name == name)


def settings_of(case: Case) -> dict[str, Any]:
    """Settings of the rule; all rules learn at one rate, so that stages that depend on it do something."""
    return {**case.settings, "lr": LR}


def step_arguments(options: dict[str, Any]) -> tuple[dict[str, Any], float, tuple[float, ...] | None]:
    """The options apart: those of the constructor, and grad_scale and weights, which `step` takes."""
    rest = {name: value for name, value in options.items() if name not in ("grad_scale", "weights")}
    return rest, options.get("grad_scale", 1.0), options.get("weights")


@functools.lru_cache(maxsize=128)
def gradient(shape: tuple[int, ...], dtype: Any, seed: int) -> Any:
    return gradients(shape, dtype, seed)


def make_grads(
    shapes: list[tuple[int, ...]], dtype: Any, step: int, options: dict[str, Any], place: Any = None
) -> list[tuple[float, list[Any]]]:
    """Sources of step `step`. Some parameters have no gradient at some steps; some elements are not finite, if that is allowed."""
    sources = []
    for k, weight in enumerate(options.get("weights") or (1.0,)):
        grads: list[Any] = [np.array(gradient(shape, dtype, 1000 * step + 100 * k + i)) for i, shape in enumerate(shapes)]
        if options.get("on_nonfinite") == "zero":
            for g in grads:
                for at, value in ((step, np.nan), (11 + k, np.inf), (13, -np.inf)):
                    if g.size > at:
                        g.flat[at] = value
        if place:
            grads = [place(g) if g.ndim else g for g in grads]
        if len(shapes) > 4:
            grads[1] = None if step == 2 else grads[1]
            grads[4] = None if step == 1 else grads[4]
        sources.append((weight, grads))
    return sources


def make_params(shapes: list[tuple[int, ...]], dtype: Any, place: Any = None) -> list[Any]:
    params = [np.array(parameters(shape, dtype, i)) for i, shape in enumerate(shapes)]
    return [place(p) if place and p.ndim else p for p in params]


Expected = list[tuple[list[Any], dict[int, dict[str, Any]]]]


def expect(
    case: Case,
    dtype: Any,
    options: dict[str, Any],
    shapes: list[tuple[int, ...]] = SHAPES,
    steps: int = STEPS,
    place: Any = None,
) -> Expected:
    """Parameters and states after each step, as the reference has them."""
    of_constructor, scale, _ = step_arguments(options)
    overall = {name: of_constructor.pop(name) for name in ("clip_norm", "on_nonfinite", "zero_grad") if name in of_constructor}
    params = make_params(shapes, dtype, place)
    reference = Stepper(case.reference, case.start, params, {**settings_of(case), **of_constructor}, **overall)
    history = []
    for step in range(1, steps + 1):
        assert reference.step(make_grads(shapes, dtype, step, options), scale)
        history.append(([*reference.params], {i: dict(s) for i, s in reference.state.items()}))
    return history


def make_optimizer(case: Case, params: Any, options: dict[str, Any]) -> Any:
    return getattr(gradstep, case.optimizer)(params, **{**settings_of(case), **case.class_settings, **options})


def check(
    expected: Expected,
    case: Case,
    dtype: Any,
    options: dict[str, Any],
    shapes: list[tuple[int, ...]] = SHAPES,
    what: str = "",
    place: Any = None,
    place_grads: Any = None,
    same: Callable[[Any, Any, str], None] = assert_same_bits,
) -> None:
    """Take the same steps with gradstep and compare all that there is after each."""
    of_constructor, scale, weights = step_arguments(options)
    params = make_params(shapes, dtype, place)
    opt = make_optimizer(case, params, of_constructor)
    for step, (theirs, states) in enumerate(expected, 1):
        sources = make_grads(shapes, dtype, step, options, place_grads)
        opt.step(sources if weights else sources[0][1], grad_scale=scale)
        where = f"at step {step}, {case.name}, {np.dtype(dtype)} {what}"
        for i, q in enumerate(theirs):
            same(params[i], q, f"parameter {i} {where}")
        assert opt.state.keys() == states.keys(), where
        for i, state in states.items():
            assert opt.state[i].keys() == state.keys(), f"states of {i} {where}"
            for name, value in state.items():
                if name == "step" or name.endswith("_count"):
                    assert opt.state[i][name] == value, f"{name} {i} {where}"
                else:
                    same(opt.state[i][name], np.asarray(value), f"{name} {i} {where}")
        for (_, grads), (_, untouched) in zip(sources, make_grads(shapes, dtype, step, options), strict=True):
            for i, (g, h) in enumerate(zip(grads, untouched, strict=True)):
                if h is not None:
                    same_values = np.zeros_like(h) if options.get("zero_grad") else h
                    assert np.array_equal(g, same_values, equal_nan=True), f"gradient {i} {where}"
