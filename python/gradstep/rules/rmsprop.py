"""RMSprop: plain, with momentum, centered, and both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from gradstep import _core
from gradstep.functional import update
from gradstep.kernel import Kernel
from gradstep.numpy import Optimizer
from gradstep.options import FunctionOptions, Options, make_stages
from gradstep.typing import Arrays, LearningRate, Params

if TYPE_CHECKING:
    from typing_extensions import Unpack

_RULES = {
    (False, False): _core.rules["rmsprop"],
    (True, False): _core.rules["rmsprop_momentum"],
    (False, True): _core.rules["rmsprop_centered"],
    (True, True): _core.rules["rmsprop_momentum_centered"],
}


def rmsprop_(
    param: Arrays,
    grad: Arrays,
    *,
    square_avg: Arrays,
    momentum_buffer: Arrays | None = None,
    grad_avg: Arrays | None = None,
    lr: float = 1e-2,
    alpha: float = 0.99,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    momentum: float = 0.0,
    centered: bool = False,
    maximize: bool = False,
    grad_scale: float = 1.0,
    **options: Unpack[FunctionOptions],
) -> bool | None:
    r"""Update parameters in place by one step of RMSprop.

    .. code-block:: text

        g <- g + weight_decay p                          (-g first, if maximize)
        v <- alpha v + (1 - alpha) g^2
        a <- alpha a + (1 - alpha) g                     centered
        d  = g / (sqrt(v) + eps)                         centered: sqrt(v - a^2)
        b <- momentum b + d                              with momentum; otherwise b is d
        p <- p - lr b

    Args:
        param: array of any shape, or a sequence of arrays; float64, float32, float16 or bfloat16. Updated in place.
        grad: of the shape of `param`, and any of these dtypes, as the states. Written by the option `zero_grad` alone.
        square_avg: v, like `param`; zeros before step 1. Updated in place.
        momentum_buffer: b, like `param`; zeros before step 1; needed with momentum. Updated in place.
        grad_avg: a, like `param`; zeros before step 1; needed if centered. Updated in place.
        lr: learning rate; as in torch it stands outside the momentum (in Keras inside).
        alpha: decay rate of the averages a step.
        eps: added to the root, as in torch (Keras and, by default, optax: inside the root).
        weight_decay: factor of an L2 penalty.
        momentum: share of the buffer that is kept a step.
        centered: divide by an estimate of the standard deviation. As in torch, rounding can make v - a^2 negative where gradients
            hardly change; the element becomes NaN then.
        maximize: follow the gradient instead of descending along it.

        grad_scale: number that the gradient is multiplied by on its way into the update.
        options: what happens around the rule: see `gradstep.options.FunctionOptions`.

    Returns:
        None; with ``on_nonfinite="skip"`` or ``"raise"``, whether the step was carried out.

    Raises:
        TypeError: for other dtypes than these; for a state that is missing.
        ValueError: for settings out of range, different shapes or lengths, read-only, misaligned or overlapping memory. Nothing
            has been written then.

    Example:
        >>> import gradstep, numpy as np
        >>> p, v = np.array([1.0, 2.0]), np.zeros(2)
        >>> gradstep.rmsprop_(p, np.array([0.5, -0.5]), square_avg=v, lr=0.01)
        >>> p.round(6)
        array([0.9, 2.1])

    References:
        Hinton, "Neural Networks for Machine Learning", lecture 6.5; centered: Graves, arXiv:1308.0850, section 4.2;
        `torch.optim.RMSprop`.
    """
    states: tuple[Any, ...] = (square_avg,)
    if momentum != 0:
        if momentum_buffer is None:
            raise TypeError("rmsprop_: momentum needs a momentum_buffer")
        states += (momentum_buffer,)
    if centered:
        if grad_avg is None:
            raise TypeError("rmsprop_: centered needs a grad_avg")
        states += (grad_avg,)
    settings = {
        "lr": lr,
        "alpha": alpha,
        "eps": eps,
        "weight_decay": weight_decay,
        "momentum": momentum,
        "centered": centered,
        "maximize": maximize,
    }
    return update("rmsprop_", RMSprop, param, grad, states, None, settings, grad_scale, options)


class RMSprop(Optimizer):
    """RMSprop for NumPy loops. Formula and settings: see `rmsprop_`.

    Args:
        params: an array, a sequence of arrays, a dict of names to arrays, or a list of groups: dicts with `params` in any of
            these forms and settings of their own.
        lr: learning rate: a number, or a callable that takes the number of steps done and returns one.
        alpha, eps, weight_decay, momentum, centered, maximize: see `rmsprop_`.
        options: what happens around the rule: see `gradstep.options.Options`.

    Raises:
        TypeError: for parameters that are no arrays, unknown settings, settings of the wrong type.
        ValueError: for settings out of range.

    Example:
        >>> import gradstep, numpy as np
        >>> w = np.array([3.0, -2.0])
        >>> opt = gradstep.RMSprop(w, lr=lambda step: 0.1 / (1 + 0.05 * step), momentum=0.5)
        >>> for _ in range(200):
        ...     opt.step(2 * w)  # the gradient of sum(w^2)
        >>> bool(np.abs(w).max() < 0.1)
        True
    """

    def __init__(
        self,
        params: Params,
        lr: LearningRate = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        centered: bool = False,
        *,
        maximize: bool = False,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "alpha": alpha,
                "eps": eps,
                "weight_decay": weight_decay,
                "momentum": momentum,
                "centered": centered,
                "maximize": maximize,
            },
            options,
        )

    @staticmethod
    def kernel(settings: Mapping[str, Any], grad_scale: float = 1.0) -> Kernel:
        """Return the kernel for the settings of a group."""
        get = settings.__getitem__
        has_momentum = bool(get("momentum") != 0)
        stages = make_stages(settings, decay="coupled", grad_scale=grad_scale, momentum=has_momentum)
        rule = _RULES[has_momentum, bool(get("centered"))]
        return Kernel(rule, (get("lr"), get("alpha"), get("eps"), get("momentum")), stages)
