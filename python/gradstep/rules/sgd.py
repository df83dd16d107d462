"""Stochastic gradient descent, with and without momentum."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from gradstep import _core
from gradstep.functional import update
from gradstep.kernel import Kernel
from gradstep.numpy import Optimizer
from gradstep.options import FunctionOptions, Options, check_number, make_stages
from gradstep.typing import Arrays, LearningRate, Params, Steps

if TYPE_CHECKING:
    from typing_extensions import Unpack

_PLAIN = _core.rules["sgd"]
_MOMENTUM = _core.rules["sgd_momentum"]
_NESTEROV = _core.rules["sgd_nesterov"]


def momentum_rule(settings: Mapping[str, Any]) -> tuple[_core.Rule, tuple[float, ...]]:
    """Return the rule with a momentum buffer that the settings ask for, and the values of its fields."""
    momentum, dampening, nesterov = settings["momentum"], settings["dampening"], settings["nesterov"]
    if nesterov and (check_number("momentum", momentum) <= 0 or dampening != 0):
        raise ValueError("Nesterov momentum requires a momentum and zero dampening")
    return _NESTEROV if nesterov else _MOMENTUM, (settings["lr"], momentum, dampening)


def sgd_(
    param: Arrays,
    grad: Arrays,
    *,
    momentum_buffer: Arrays | None = None,
    step: Steps | None = None,
    lr: float = 1e-3,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    grad_scale: float = 1.0,
    **options: Unpack[FunctionOptions],
) -> bool | None:
    r"""Update parameters in place by one step of stochastic gradient descent.

    .. code-block:: text

        g <- g + weight_decay p                          (-g first, if maximize)
        b <- g                                           at step 1
        b <- momentum b + (1 - dampening) g              later
        p <- p - lr g                                    without momentum
        p <- p - lr b                                    with momentum
        p <- p - lr (g + momentum b)                     with Nesterov momentum

    Args:
        param: array of any shape, or a sequence of arrays; float64, float32, float16 or bfloat16. Updated in place.
        grad: of the shape of `param`, and any of these dtypes, as the states. Written by the option `zero_grad` alone.
        momentum_buffer: b, like `param`; needed with momentum. What it holds before step 1 does not matter. Updated in place.
        step: the number of this step, from 1; an int, or one for each array. At step 1 the buffer becomes the gradient, not
            dampened, as in torch. None stands for any later step: with a buffer of zeros, that is how Keras and optax begin.
        lr: learning rate; as in torch it stands outside the buffer (in Keras inside: there a change acts with a delay).
        momentum: share of the buffer that is kept a step.
        dampening: share of the gradient that is kept out of the buffer.
        weight_decay: factor of an L2 penalty.
        nesterov: look ahead by one step of the buffer.
        maximize: follow the gradient instead of descending along it.

        grad_scale: number that the gradient is multiplied by on its way into the update.
        options: what happens around the rule: see `gradstep.options.FunctionOptions`.

    Returns:
        None; with ``on_nonfinite="skip"`` or ``"raise"``, whether the step was carried out.

    Raises:
        TypeError: for other dtypes than these; for momentum without a buffer.
        ValueError: for settings out of range, different shapes or lengths, read-only, misaligned or overlapping memory. Nothing
            has been written then.

    Example:
        >>> import gradstep, numpy as np
        >>> p, b = np.array([1.0, 2.0]), np.empty(2)
        >>> gradstep.sgd_(p, np.array([0.5, -0.5]), momentum_buffer=b, step=1, lr=0.1, momentum=0.9)
        >>> gradstep.sgd_(p, np.array([0.5, -0.5]), momentum_buffer=b, step=2, lr=0.1, momentum=0.9)
        >>> p.round(6)
        array([0.855, 2.145])

    References:
        Sutskever et al., "On the importance of initialization and momentum in deep learning", ICML 2013; `torch.optim.SGD`.
    """
    if momentum != 0 and momentum_buffer is None:
        raise TypeError("sgd_: momentum needs a momentum_buffer")
    settings = {
        "lr": lr,
        "momentum": momentum,
        "dampening": dampening,
        "weight_decay": weight_decay,
        "nesterov": nesterov,
        "maximize": maximize,
    }
    states = () if momentum == 0 else (momentum_buffer,)
    return update("sgd_", SGD, param, grad, states, step, settings, grad_scale, options)


class SGD(Optimizer):
    """Stochastic gradient descent for NumPy loops. Formula and settings: see `sgd_`.

    Args:
        params: an array, a sequence of arrays, a dict of names to arrays, or a list of groups: dicts with `params` in any of
            these forms and settings of their own.
        lr: learning rate: a number, or a callable that takes the number of steps done and returns one.
        momentum, dampening, weight_decay, nesterov, maximize: see `sgd_`.
        options: what happens around the rule: see `gradstep.options.Options`.

    Raises:
        TypeError: for parameters that are no arrays, unknown settings, settings of the wrong type.
        ValueError: for settings out of range; for Nesterov momentum without momentum, or with dampening.

    Example:
        >>> import gradstep, numpy as np
        >>> w = np.array([3.0, -2.0])
        >>> opt = gradstep.SGD(w, lr=0.1, momentum=0.9, nesterov=True)
        >>> for _ in range(200):
        ...     opt.step(2 * w)  # the gradient of sum(w^2)
        >>> bool(np.abs(w).max() < 1e-3)
        True
    """

    def __init__(
        self,
        params: Params,
        lr: LearningRate = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "momentum": momentum,
                "dampening": dampening,
                "weight_decay": weight_decay,
                "nesterov": nesterov,
                "maximize": maximize,
            },
            options,
        )

    @staticmethod
    def kernel(settings: Mapping[str, Any], grad_scale: float = 1.0) -> Kernel:
        """Return the kernel for the settings of a group."""
        momentum = settings["momentum"] != 0
        stages = make_stages(settings, decay="coupled", grad_scale=grad_scale, momentum=momentum)
        if momentum or settings["nesterov"]:
            return Kernel(*momentum_rule(settings), stages)
        return Kernel(_PLAIN, (settings["lr"],), stages)
