"""The formulas' only other copy: each rule in plain NumPy, in the dtype of its arrays. In float64 they are the oracle of the rest.

A reference takes parameter, gradient, a dict of states (updated in place) and the number of the step, and returns the new
parameter. Constants are computed in double and rounded once, as the rules do.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

Reference = Callable[..., Any]


def coupled(p, g, t, weight_decay, maximize):
    g = -g if maximize else g
    return g + t(weight_decay) * p if weight_decay else g


def decoupled(p, update, t, lr, weight_decay):
    return p - (t(lr * weight_decay) * p + update) if weight_decay else p - update


def sgd(p, g, s, step, *, lr, momentum=0.0, dampening=0.0, weight_decay=0.0, nesterov=False, maximize=False):
    t = p.dtype.type
    g = coupled(p, g, t, weight_decay, maximize)
    if momentum == 0:
        return p - t(lr) * g
    b = s["momentum_buffer"] = g.copy() if step == 1 else t(momentum) * s["momentum_buffer"] + t(1 - dampening) * g
    return p - t(lr) * (g + t(momentum) * b if nesterov else b)


def adam_update(g, s, t, step, lr, betas, eps):
    m = s["exp_avg"] = t(betas[0]) * s["exp_avg"] + t(1 - betas[0]) * g
    v = s["exp_avg_sq"] = t(betas[1]) * s["exp_avg_sq"] + t(1 - betas[1]) * (g * g)
    if "max_exp_avg_sq" in s:
        v = s["max_exp_avg_sq"] = np.maximum(s["max_exp_avg_sq"], v)
    root = math.sqrt(1 - betas[1] ** step)
    return t(lr * root / (1 - betas[0] ** step)) * m / (np.sqrt(v) + t(eps * root))


def adam(p, g, s, step, *, lr, betas, eps, weight_decay=0.0, maximize=False):
    t = p.dtype.type
    return p - adam_update(coupled(p, g, t, weight_decay, maximize), s, t, step, lr, betas, eps)


def adamw(p, g, s, step, *, lr, betas, eps, weight_decay=0.0, maximize=False):
    t = p.dtype.type
    return decoupled(p, adam_update(-g if maximize else g, s, t, step, lr, betas, eps), t, lr, weight_decay)


def lion(p, g, s, step, *, lr, betas, weight_decay=0.0, maximize=False):
    t = p.dtype.type
    g, m = -g if maximize else g, s["exp_avg"]
    s["exp_avg"] = t(betas[1]) * m + t(1 - betas[1]) * g
    return decoupled(p, t(lr) * np.sign(t(betas[0]) * m + t(1 - betas[0]) * g), t, lr, weight_decay)


def adagrad(p, g, s, step, *, lr, lr_decay=0.0, weight_decay=0.0, eps, maximize=False):
    t = p.dtype.type
    g = coupled(p, g, t, weight_decay, maximize)
    s["sum"] = s["sum"] + g * g
    return p - t(lr / (1 + (step - 1) * lr_decay)) * g / (np.sqrt(s["sum"]) + t(eps))


def rmsprop(p, g, s, step, *, lr, alpha, eps, weight_decay=0.0, momentum=0.0, centered=False, maximize=False):
    t = p.dtype.type
    g = coupled(p, g, t, weight_decay, maximize)
    v = s["square_avg"] = t(alpha) * s["square_avg"] + t(1 - alpha) * (g * g)
    if centered:
        a = s["grad_avg"] = t(alpha) * s["grad_avg"] + t(1 - alpha) * g
        v = v - a * a
    d = g / (np.sqrt(v) + t(eps))
    if momentum:
        d = s["momentum_buffer"] = t(momentum) * s["momentum_buffer"] + d
    return p - t(lr) * d
