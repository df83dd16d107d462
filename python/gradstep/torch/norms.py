"""Clipping by the norm of all gradients, in the place of torch's function."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator

import torch

from gradstep import _core

_PLAIN = (torch.Tensor, torch.nn.Parameter)
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def clip_grad_norm_(
    parameters: torch.Tensor | Iterable[torch.Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> torch.Tensor:
    """Scale the gradients of parameters in place so that the norm of all of them together is at most `max_norm`.

    .. code-block:: text

        g <- g min(max_norm / (norm + 1e-6), 1)

    `torch.nn.utils.clip_grad_norm_`, in one sweep for the norm, in double, and one for the gradients if they are too long. The
    optimizers' option `clip_norm` saves the second. Other norms than the Euclidean, and gradients that are not dense float64,
    float32, float16 or bfloat16 tensors on the CPU, or that come twice, are left to torch's function.

    Gradients are clipped by the norm in double, where torch rounds the norm and the factor to the dtype of the norm first. So they
    are clipped where the norm is finite and only too large for that dtype (float16: from 65520 on), and `error_if_nonfinite` does
    not raise. Infinity is returned then.

    Args:
        parameters: tensors whose ``grad`` is clipped; those without one are passed over.
        max_norm: the largest norm.
        norm_type: the p of the norm.
        error_if_nonfinite: raise for a norm that is infinite or NaN. Otherwise gradients become zero or NaN.
        foreach: for torch's function, where that is called.

    Returns:
        The norm before, a tensor of one element, of the dtype of the gradients; of several, that which torch promotes them to
        (float32 of float16 and bfloat16).

    Raises:
        RuntimeError: see `error_if_nonfinite`. Nothing has been written then.
        ValueError: for gradients that share a part of their memory. Nothing has been written then.

    Example:
        >>> import torch, gradstep.torch
        >>> w = torch.nn.Parameter(torch.zeros(2))
        >>> w.grad = torch.tensor([3.0, 4.0])
        >>> gradstep.torch.clip_grad_norm_([w], 1.0)
        tensor(5.)
        >>> w.grad
        tensor([0.6000, 0.8000])

    References:
        `torch.nn.utils.clip_grad_norm_`.
    """
    params = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
    grads = [param.grad for param in params if param.grad is not None]
    if not grads or float(norm_type) != 2.0 or not all(map(_is_plain, grads)) or len(set(map(id, grads))) != len(grads):
        # A generator stays one: of an empty one torch warns.
        given = (param for param in params) if isinstance(parameters, Iterator) else params
        return torch.nn.utils.clip_grad_norm_(given, max_norm, norm_type, error_if_nonfinite, foreach)
    norm = math.sqrt(_core.sum_of_squares(grads, "clip_grad_norm_", "gradients"))
    if error_if_nonfinite and not math.isfinite(norm):
        raise RuntimeError(
            f"The total norm of order {float(norm_type)} for gradients from `parameters` is non-finite, so it cannot be clipped. "
            "To disable this error and scale the gradients by the non-finite norm anyway, set `error_if_nonfinite=False`"
        )
    factor = _core.clip_factor(float(max_norm), norm)
    if factor != 1:  # NaN, too
        _core.scale(grads, factor, "clip_grad_norm_", "gradients")
    return torch.tensor(norm, dtype=functools.reduce(torch.promote_types, {grad.dtype for grad in grads}))


def _is_plain(grad: torch.Tensor) -> bool:
    return type(grad) in _PLAIN and grad.layout == torch.strided and grad.device.type == "cpu" and grad.dtype in _DTYPES
