"""The rules in plain NumPy, as users write them: a contender, and in float64 the reference that all must agree with.

A formula takes the parameter, the gradient, the states, the settings that it needs by name (`rest1` is 1 - beta1) and, in the
Adam family, last the two bias corrections, 1 - beta^t. It returns what to subtract from the parameter, and the new states. It
takes arrays; compiled by numba, numbers (not LAMB's, which takes norms).
"""

from __future__ import annotations

from typing import Any

import numpy as np


def sgd(p: Any, g: Any, lr: Any, weight_decay: Any) -> Any:
    return (lr * (g + weight_decay * p),)


def sgd_momentum(p: Any, g: Any, b: Any, lr: Any, momentum: Any, weight_decay: Any) -> Any:
    b = momentum * b + g + weight_decay * p
    return lr * b, b


def sgd_nesterov(p: Any, g: Any, b: Any, lr: Any, momentum: Any, weight_decay: Any) -> Any:
    g = g + weight_decay * p
    b = momentum * b + g
    return lr * (g + momentum * b), b


def adam(
    p: Any, g: Any, m: Any, v: Any,
    lr: Any, beta1: Any, rest1: Any, beta2: Any, rest2: Any, eps: Any, weight_decay: Any, correction1: Any, correction2: Any,
) -> Any:  # fmt: skip
    g = g + weight_decay * p
    m = beta1 * m + rest1 * g
    v = beta2 * v + rest2 * (g * g)
    return lr * (m / correction1) / (np.sqrt(v / correction2) + eps), m, v


def adamw(
    p: Any, g: Any, m: Any, v: Any,
    lr: Any, beta1: Any, rest1: Any, beta2: Any, rest2: Any, eps: Any, weight_decay: Any, correction1: Any, correction2: Any,
) -> Any:  # fmt: skip
    m = beta1 * m + rest1 * g
    v = beta2 * v + rest2 * (g * g)
    return lr * (m / correction1 / (np.sqrt(v / correction2) + eps) + weight_decay * p), m, v


def adamw_decayed_last(
    p: Any, g: Any, m: Any, v: Any,
    lr: Any, beta1: Any, rest1: Any, beta2: Any, rest2: Any, eps: Any, weight_decay: Any, correction1: Any, correction2: Any,
) -> Any:  # fmt: skip
    update, m, v = adamw(p, g, m, v, lr, beta1, rest1, beta2, rest2, eps, 0.0, correction1, correction2)
    return update + lr * weight_decay * (p - update), m, v


def amsgrad(
    p: Any, g: Any, m: Any, v: Any, w: Any,
    lr: Any, beta1: Any, rest1: Any, beta2: Any, rest2: Any, eps: Any, weight_decay: Any, correction1: Any, correction2: Any,
) -> Any:  # fmt: skip
    m = beta1 * m + rest1 * g
    v = beta2 * v + rest2 * (g * g)
    w = np.maximum(w, v)
    return lr * (m / correction1 / (np.sqrt(w / correction2) + eps) + weight_decay * p), m, v, w


def lion(p: Any, g: Any, m: Any, lr: Any, beta1: Any, rest1: Any, beta2: Any, rest2: Any, weight_decay: Any) -> Any:
    c = beta1 * m + rest1 * g
    m = beta2 * m + rest2 * g
    return lr * (np.sign(c) + weight_decay * p), m


def adagrad(p: Any, g: Any, s: Any, lr: Any, eps: Any, weight_decay: Any) -> Any:
    g = g + weight_decay * p
    s = s + g * g
    return lr * g / (np.sqrt(s) + eps), s


def rmsprop(p: Any, g: Any, v: Any, lr: Any, alpha: Any, rest: Any, eps: Any, weight_decay: Any) -> Any:
    g = g + weight_decay * p
    v = alpha * v + rest * (g * g)
    return lr * g / (np.sqrt(v) + eps), v


def rmsprop_momentum(
    p: Any, g: Any, v: Any, b: Any, lr: Any, alpha: Any, rest: Any, eps: Any, weight_decay: Any, momentum: Any
) -> Any:
    g = g + weight_decay * p
    v = alpha * v + rest * (g * g)
    b = momentum * b + g / (np.sqrt(v) + eps)
    return lr * b, v, b


def rmsprop_centered(p: Any, g: Any, v: Any, a: Any, lr: Any, alpha: Any, rest: Any, eps: Any, weight_decay: Any) -> Any:
    g = g + weight_decay * p
    v = alpha * v + rest * (g * g)
    a = alpha * a + rest * g
    return lr * g / (np.sqrt(v - a * a) + eps), v, a


def rmsprop_momentum_centered(
    p: Any, g: Any, v: Any, b: Any, a: Any, lr: Any, alpha: Any, rest: Any, eps: Any, weight_decay: Any, momentum: Any
) -> Any:
    g = g + weight_decay * p
    v = alpha * v + rest * (g * g)
    a = alpha * a + rest * g
    b = momentum * b + g / (np.sqrt(v - a * a) + eps)
    return lr * b, v, b, a


def lamb(
    p: Any, g: Any, m: Any, v: Any,
    lr: Any, beta1: Any, rest1: Any, beta2: Any, rest2: Any, eps: Any, weight_decay: Any, correction1: Any, correction2: Any,
) -> Any:  # fmt: skip
    m = beta1 * m + rest1 * g
    v = beta2 * v + rest2 * (g * g)
    u = m / correction1 / (np.sqrt(v / correction2) + eps) + weight_decay * p
    p_norm, u_norm = np.linalg.norm(p), np.linalg.norm(u)
    return lr * (p_norm / u_norm if p_norm > 0 and u_norm > 0 else 1) * u, m, v


def lamb_of_pytorch_optimizer(
    p: Any, g: Any, m: Any, v: Any,
    lr: Any, beta1: Any, rest1: Any, beta2: Any, rest2: Any, eps: Any, weight_decay: Any, correction1: Any, correction2: Any,
) -> Any:  # fmt: skip
    m = beta1 * m + rest1 * g
    v = beta2 * v + rest2 * (g * g)
    u = m / (np.sqrt(v) + eps) + weight_decay * p
    del correction2  # it leaves v as it is
    return lr / correction1 * min(np.linalg.norm(p), 10) / (np.linalg.norm(u) + eps) * u, m, v


def norm(grads: Any) -> Any:
    return np.sqrt(sum(np.vdot(g, g) for g in grads))
