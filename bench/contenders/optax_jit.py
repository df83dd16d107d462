"""optax, compiled by XLA, with parameters and states donated, so that it may update them in place."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from ..cases import Case
from ..memory import Array
from ..problem import Problem
from ..rules import NORM, Rule
from .base import Contender, Run, UnsupportedError


def _transform(rule: Rule) -> Any:
    import optax

    if rule.name == NORM.name:
        raise UnsupportedError("measured for rules only")
    settings = dict(rule.settings)
    lr, decay = settings["lr"], settings["weight_decay"]
    b1, b2 = settings.get("betas", (0.0, 0.0))
    momentum = settings.get("momentum")
    if rule.name == "adamw":
        return optax.adamw(lr, b1, b2, eps=settings["eps"], weight_decay=decay)
    if rule.name == "lion":
        return optax.lion(lr, b1, b2, weight_decay=decay)
    if rule.name == "lamb":
        return optax.lamb(lr, b1, b2, eps=settings["eps"], weight_decay=decay)
    if rule.name == "adam":
        plain = optax.adam(lr, b1, b2, eps=settings["eps"])
    elif rule.optimizer == "SGD":
        plain = optax.sgd(lr, momentum, nesterov=settings.get("nesterov", False))
    elif rule.optimizer == "RMSprop":
        centered = settings.get("centered", False)
        plain = optax.rmsprop(lr, settings["alpha"], settings["eps"], eps_in_sqrt=False, centered=centered, momentum=momentum)
    else:
        raise UnsupportedError(f"optax has another formula for {rule.name}")
    return optax.chain(optax.add_decayed_weights(decay), plain)


class OptaxJit(Contender):
    """A compiled function of parameters, states and gradients; waited for at the end of a block."""

    name = "optax"
    about = "optax in a function compiled by XLA, buffers donated"
    package = "optax"

    def slow_start(self, rule: Rule, case: Case) -> bool:
        return rule.name not in ("adamw", NORM.name) or len(case.shapes) > 100

    def note(self, rule: Rule, threads: int) -> str:
        return "" if threads == os.cpu_count() else "as many threads as XLA takes"

    def prepare(self, problem: Problem) -> Run:
        import jax
        import optax

        if problem.form.dtype == "float64":
            jax.config.update("jax_enable_x64", True)
        transform = _transform(problem.rule)
        processor = jax.devices("cpu")[0]

        def copied(arrays: list[Array]) -> Any:
            return [jax.device_put(jax.numpy.array(array, copy=True), processor) for array in arrays]

        def update(params: Any, state: Any, grads: Any) -> Any:
            updates, state = transform.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        compiled = jax.jit(update, donate_argnums=(0, 1))
        params, grads = copied(problem.params), copied(problem.grads)
        state = jax.device_put(transform.init(params), processor)

        def step() -> None:
            nonlocal params, state
            params, state = compiled(params, state, grads)

        def refresh() -> None:
            nonlocal grads
            grads = copied(problem.grads)

        return Run(step, lambda: [np.asarray(param) for param in params], refresh, lambda: jax.block_until_ready(params))
