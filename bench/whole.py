"""A whole step in plain NumPy, stage after stage, as docs/stages.md has it: a contender, and in float64 the reference."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from .memory import Array
from .rules import Rule


def whole_step(
    rule: Rule,
    step: int,
    constants: Sequence[Any],
    params: Sequence[Array],
    grads: Sequence[Array],
    states: Sequence[list[Array]],
    kept: Mapping[str, Sequence[Array]],
    formula: Callable[..., Any] | None = None,
) -> None:
    """Perform a step in place, changing the gradients as well.

    Args:
        rule: with its chain.
        step: its number, from 1.
        constants: last arguments of the formula.
        params, grads: the tensors.
        states: of the rule, a list for each tensor; replaced in it.
        kept: averages and slow weights, by name.
        formula: in the place of the rule's.
    """
    options, formula = rule.chain.active, formula or rule.formula
    for param, grad in zip(params, grads, strict=True):
        _limit(options, param, grad)
    if "clip_norm" in options:
        _scale_to(options["clip_norm"], grads)
    for i, (param, grad, state) in enumerate(zip(params, grads, states, strict=True)):
        if "centralize" in options and (rows := _rows(grad)) is not None:
            rows -= rows.mean(axis=1, keepdims=True)
        update, *state[:] = formula(param, grad, *state, *constants)
        update = _changed(options, rule.settings, rule.decoupled, param, grad, update)
        param -= update
        _constrain(options, rule.settings["lr"], param)
        _keep(options, step, param, {name: tensors[i] for name, tensors in kept.items()})
        if "zero_grad" in options:
            grad.fill(0)


def _rows(array: Array) -> Array | None:
    return array.reshape(len(array), -1) if array.ndim > 1 else None


def _norms(rows: Array) -> Any:
    return np.linalg.norm(rows, axis=1, keepdims=True)


def _scale_to(limit: float, grads: Sequence[Array]) -> None:
    norm = np.sqrt(sum(float(np.vdot(grad, grad)) for grad in grads))
    factor = min(limit / (norm + 1e-6), 1.0)
    for grad in grads:
        grad *= factor


def _limit(options: Mapping[str, Any], param: Array, grad: Array) -> None:
    """Gradient stages that look at one tensor."""
    if "grad_scale" in options:
        grad *= options["grad_scale"]
    if options.get("on_nonfinite") == "zero":
        np.nan_to_num(grad, copy=False, nan=0, posinf=0, neginf=0)
    if "clip_value" in options:
        np.clip(grad, -options["clip_value"], options["clip_value"], out=grad)
    if "agc" in options:
        rows, norms = (
            grad.reshape(len(grad) if grad.ndim > 1 else 1, -1),
            _norms(param.reshape(len(param) if param.ndim > 1 else 1, -1)),
        )
        rows *= np.minimum(options["agc"] * np.maximum(norms, 1e-3) / np.maximum(_norms(rows), 1e-6), 1)
    if "clip_norm_per_tensor" in options:
        _scale_to(options["clip_norm_per_tensor"], [grad])


def _changed(
    options: Mapping[str, Any], settings: Mapping[str, Any], decoupled: bool, param: Array, grad: Array, update: Array
) -> Any:
    """Return the update after the stages between rule and parameter."""
    if "cautious" in options:
        decay = settings["weight_decay"] * param
        along, shrink = (grad, settings["lr"] * decay) if decoupled else (grad + decay, 0)
        agrees = (update - shrink) * along > 0
        update = np.where(agrees, (update - shrink) * (agrees.size / max(agrees.sum(), agrees.size / 1000)), 0) + shrink
    if "trust_ratio" in options:
        norms = np.linalg.norm(param), np.linalg.norm(update)
        update = update * (settings["lr"] * norms[0] / norms[1] if all(norms) else 1)
    return update


def _constrain(options: Mapping[str, Any], lr: float, param: Array) -> None:
    """Parameter stages."""
    if "l1" in options:
        param[...] = np.sign(param) * np.maximum(np.abs(param) - lr * options["l1"], 0) / (1 + lr * options["l2"])
    if "bounds" in options:
        np.clip(param, *options["bounds"], out=param)
    rows = _rows(param)
    if rows is not None and "group_lasso" in options:
        rows *= np.maximum(1 - lr * options["group_lasso"] / _norms(rows), 0)
    if rows is not None and "max_norm" in options:
        rows *= np.minimum(options["max_norm"] / _norms(rows), 1)


def _keep(options: Mapping[str, Any], step: int, param: Array, kept: Mapping[str, Array]) -> None:
    """Arrays beside the parameter."""
    if "slow" in kept:
        every, alpha = options["lookahead"]
        if step % every == 0:
            kept["slow"][...] += alpha * (param - kept["slow"])
            param[...] = kept["slow"]
    if "ema" in kept:
        kept["ema"][...] += (1 if step == 1 else 1 - options["ema_decay"]) * (param - kept["ema"])
    if "swa" in kept:
        kept["swa"][...] += (param - kept["swa"]) / step
