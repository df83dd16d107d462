"""Norms of all gradients together, and clipping by them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from gradstep import _core
from gradstep.device_arrays import has_interface
from gradstep.typing import Array, Arrays


def _as_list(arrays: Any) -> list[Any]:
    if hasattr(arrays, "__array_interface__") or has_interface(arrays) or not isinstance(arrays, Iterable):
        return [arrays]
    return list(arrays)


def global_norm(arrays: Arrays) -> float:
    """Return the Euclidean norm of all elements of all arrays, as if they were one vector.

    .. code-block:: text

        sqrt(sum over arrays of sum over elements of x^2)

    Elements are squared and added in double, along a fixed tree: float32 gradients of 1e19 have a finite norm, and the result has
    the same bits on every instruction set and any number of threads. (Squares of float64 numbers over 1e154 overflow, as in torch.)

    Args:
        arrays: an array, or a sequence of arrays; float64, float32, float16 or bfloat16. Only read.

    Raises:
        TypeError: for what is no array, or of another dtype.

    Example:
        >>> import gradstep, numpy as np
        >>> gradstep.global_norm([np.array([3.0, 0.0]), np.array([[4.0]])])
        5.0

    References:
        `torch.nn.utils.get_total_norm`, `optax.global_norm`.
    """
    return math.sqrt(_core.sum_of_squares(_as_list(arrays), "global_norm", "arrays"))


def clip_grad_norm_(grads: Array | Iterable[Array], max_norm: float, *, error_if_nonfinite: bool = False) -> float:
    """Scale gradients in place so that the norm of all of them together is at most `max_norm`.

    .. code-block:: text

        g <- g min(max_norm / (norm + 1e-6), 1)

    The optimizers' option `clip_norm` does the same on the way, without writing the gradients.

    Args:
        grads: an array, or a sequence of arrays; float64, float32, float16 or bfloat16. Updated in place.
        max_norm: the largest norm.
        error_if_nonfinite: raise for a norm that is infinite or NaN. Otherwise gradients become zero or NaN, as in torch.

    Returns:
        The norm before.

    Raises:
        TypeError: for what is no array, or of another dtype.
        ValueError: for a negative `max_norm`, for read-only memory.
        FloatingPointError: see `error_if_nonfinite`. Nothing has been written then.

    Example:
        >>> import gradstep, numpy as np
        >>> g = np.array([3.0, 4.0])
        >>> gradstep.clip_grad_norm_(g, 1.0)
        5.0
        >>> g.round(5)
        array([0.6, 0.8])

    References:
        `torch.nn.utils.clip_grad_norm_`.
    """
    if isinstance(max_norm, (str, bool)) or not hasattr(max_norm, "__float__"):
        raise TypeError(f"clip_grad_norm_: max_norm must be a number, got {max_norm!r}")
    if not max_norm >= 0:
        raise ValueError(f"clip_grad_norm_: max_norm must be >= 0, got {max_norm!r}")
    arrays = _as_list(grads)
    norm = math.sqrt(_core.sum_of_squares(arrays, "clip_grad_norm_", "grads"))
    if error_if_nonfinite and not math.isfinite(norm):
        raise FloatingPointError(f"clip_grad_norm_: the norm of the gradients is {norm}")
    factor = _core.clip_factor(float(max_norm), norm)
    if factor != 1:  # NaN, too
        _core.scale(arrays, factor, "clip_grad_norm_", "grads")
    return norm
