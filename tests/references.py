"""The formulas' only other copy: each rule in plain NumPy, in the dtype of its arrays. In float64 they are the oracle of the rest.

A rule's update takes the gradient, a dict of states (updated in place) and the number of the step, and returns what is to be
subtracted from the parameter. Its reference does a whole step with it: it takes the parameter as well, and returns the new one;
`update` and `decay_mode` of the reference tell what it is made of. Constants are computed in double and rounded once, as the rules
do.

Rules that look at norms of whole tensors have no such whole: `Stepper` of `stage_references` puts them together.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

Reference = Callable[..., Any]


def sgd_update(g, s, step, *, lr, momentum=0.0, dampening=0.0, nesterov=False):
    t = g.dtype.type
    if momentum == 0:
        return t(lr) * g
    b = s["momentum_buffer"] = g.copy() if step == 1 else t(momentum) * s["momentum_buffer"] + t(1 - dampening) * g
    return t(lr) * (g + t(momentum) * b if nesterov else b)


def adam_update(g, s, step, *, lr, betas, eps):
    t = g.dtype.type
    m = s["exp_avg"] = t(betas[0]) * s["exp_avg"] + t(1 - betas[0]) * g
    v = s["exp_avg_sq"] = t(betas[1]) * s["exp_avg_sq"] + t(1 - betas[1]) * (g * g)
    if "max_exp_avg_sq" in s:
        v = s["max_exp_avg_sq"] = np.maximum(s["max_exp_avg_sq"], v)
    root = math.sqrt(1 - betas[1] ** step)
    return t(lr * root / (1 - betas[0] ** step)) * m / (np.sqrt(v) + t(eps * root))


def lion_update(g, s, step, *, lr, betas):
    t, m = g.dtype.type, s["exp_avg"]
    s["exp_avg"] = t(betas[1]) * m + t(1 - betas[1]) * g
    return t(lr) * np.sign(t(betas[0]) * m + t(1 - betas[0]) * g)


def adagrad_update(g, s, step, *, lr, lr_decay=0.0, eps):
    t = g.dtype.type
    s["sum"] = s["sum"] + g * g
    return t(lr / (1 + (step - 1) * lr_decay)) * g / (np.sqrt(s["sum"]) + t(eps))


def rmsprop_update(g, s, step, *, lr, alpha, eps, momentum=0.0, centered=False):
    t = g.dtype.type
    v = s["square_avg"] = t(alpha) * s["square_avg"] + t(1 - alpha) * (g * g)
    if centered:
        a = s["grad_avg"] = t(alpha) * s["grad_avg"] + t(1 - alpha) * g
        v = v - a * a
    d = g / (np.sqrt(v) + t(eps))
    if momentum:
        d = s["momentum_buffer"] = t(momentum) * s["momentum_buffer"] + d
    return t(lr) * d


def lamb_update(g, s, step, *, lr, betas, eps, bias_correction=True, grad_averaging=True):
    t = g.dtype.type
    m = s["exp_avg"] = t(betas[0]) * s["exp_avg"] + t(1 - betas[0] if grad_averaging else 1) * g
    v = s["exp_avg_sq"] = t(betas[1]) * s["exp_avg_sq"] + t(1 - betas[1]) * (g * g)
    corrections = [1 - beta**step if bias_correction else 1.0 for beta in betas]
    root = math.sqrt(corrections[1])
    return t(lr * root / corrections[0]) * m / (np.sqrt(v) + t(eps * root))


def lars_update(g, s, step, *, lr, momentum, dampening=0.0, nesterov=False, trust_coefficient, eps):
    return sgd_update(g, s, step, lr=lr, momentum=momentum, dampening=dampening, nesterov=nesterov)


def lars_factor(s, step, param_norm, grad_norm, weight_decay, *, trust_coefficient, eps, **_):
    if param_norm == 0 or grad_norm == 0:
        return 1.0
    return trust_coefficient * param_norm / (grad_norm + weight_decay * param_norm + eps)


def novograd_update(g, s, step, *, lr, betas, eps, grad_averaging=False):
    t = g.dtype.type
    m = s["exp_avg"] = t(betas[0]) * s["exp_avg"] + t(1 - betas[0] if grad_averaging else 1) * g
    return t(lr) * m


def novograd_factor(s, step, param_norm, grad_norm, weight_decay, *, betas, eps, **_):
    square = grad_norm * grad_norm
    s["grad_norm_sq"] = square if step == 1 else betas[1] * s["grad_norm_sq"] + (1 - betas[1]) * square
    return 1 / (math.sqrt(s["grad_norm_sq"]) + eps)


def coupled(p, g, weight_decay):
    return g + p.dtype.type(weight_decay) * p


def decoupled(p, u, rate):
    return p.dtype.type(rate) * p + u


def _whole(update: Reference, decay_mode: str) -> Reference:
    """The reference of a rule: its update between its own kind of decay and the subtraction."""

    def reference(p, g, s, step, *, weight_decay=0.0, maximize=False, **settings):
        g = -g if maximize else g
        if weight_decay and decay_mode == "coupled":
            g = coupled(p, g, weight_decay)
        u = update(g, s, step, **settings)
        if weight_decay and decay_mode == "decoupled":
            u = decoupled(p, u, settings["lr"] * weight_decay)
        return p - u

    reference.update, reference.decay_mode = update, decay_mode
    reference.factor, reference.factor_of_decay, reference.adapts = None, False, False
    return reference


sgd = _whole(sgd_update, "coupled")
adam = _whole(adam_update, "coupled")
adamw = _whole(adam_update, "decoupled")
lion = _whole(lion_update, "decoupled")
adagrad = _whole(adagrad_update, "coupled")
rmsprop = _whole(rmsprop_update, "coupled")


def _by_norms(
    update: Reference, decay_mode: str, *, factor: Any = None, factor_of_decay: bool = False, adapts: bool = False
) -> Any:
    """The parts of a rule that looks at norms of the whole tensor.

    Args:
        update, decay_mode: see above.
        factor: what the gradient is multiplied by, if that follows from the norms.
        factor_of_decay: coupled decay is multiplied by it as well.
        adapts: the trust ratio is on.
    """
    return SimpleNamespace(update=update, decay_mode=decay_mode, factor=factor, factor_of_decay=factor_of_decay, adapts=adapts)


lamb = _by_norms(lamb_update, "decoupled", adapts=True)
lars = _by_norms(lars_update, "coupled", factor=lars_factor, factor_of_decay=True)
novograd = _by_norms(novograd_update, "coupled", factor=novograd_factor)
