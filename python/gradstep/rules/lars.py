"""LARS: momentum, with steps in proportion to the tensors that they move."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from gradstep.functional import update
from gradstep.kernel import Kernel
from gradstep.numpy import Optimizer
from gradstep.options import FunctionOptions, Options, make_stages
from gradstep.rules.sgd import momentum_rule
from gradstep.typing import Arrays, LearningRate, Params, Steps

if TYPE_CHECKING:
    from typing_extensions import Unpack


def lars_(
    param: Arrays,
    grad: Arrays,
    *,
    momentum_buffer: Arrays,
    step: Steps | None = None,
    lr: float = 1e-3,
    momentum: float = 0.9,
    dampening: float = 0.0,
    weight_decay: float = 1e-4,
    nesterov: bool = False,
    trust_coefficient: float = 1e-3,
    eps: float = 0.0,
    maximize: bool = False,
    grad_scale: float = 1.0,
    **options: Unpack[FunctionOptions],
) -> bool | None:
    r"""Update parameters in place by one step of LARS.

    .. code-block:: text

        r  = trust_coefficient norm(p) / (norm(g) + weight_decay norm(p) + eps)    1 where norm(p) or norm(g) is 0
        g <- r (g + weight_decay p)                      (-g first, if maximize)
        b <- g                                           at step 1
        b <- momentum b + (1 - dampening) g              later
        p <- p - lr b                                    with Nesterov momentum: p - lr (g + momentum b)

    The norms are those of the whole tensor. As in torch's SGD, lr stands outside the buffer (in the paper and in optax inside: there
    a change acts with a delay).

    Args:
        param: array of any shape, or a sequence of arrays; float64, float32, float16 or bfloat16. Updated in place.
        grad: of the shape of `param`, and any of these dtypes, as the states. Written by the option `zero_grad` alone.
        momentum_buffer: b, like `param`. What it holds before step 1 does not matter. Updated in place.
        step: the number of this step, from 1; an int, or one for each array. None stands for any but the first.
        lr: learning rate.
        momentum: share of the buffer that is kept a step.
        dampening: share of the gradient that is kept out of the buffer.
        weight_decay: factor of an L2 penalty. (With another `decay_mode` it is no part of r.)
        nesterov: look ahead by one step of the buffer.
        trust_coefficient: length of a gradient, in units of the tensor's.
        eps: added to the denominator.
        maximize: follow the gradient instead of descending along it.
        grad_scale: number that the gradient is multiplied by on its way into the update.
        options: what happens around the rule: see `gradstep.options.FunctionOptions`.

    Returns:
        None; with ``on_nonfinite="skip"`` or ``"raise"``, whether the step was carried out.

    Raises:
        TypeError: for other dtypes than these.
        ValueError: for settings out of range, different shapes or lengths, read-only, misaligned or overlapping memory. Nothing
            has been written then.

    Example:
        >>> import gradstep, numpy as np
        >>> p, b = np.array([3.0, 4.0]), np.empty(2)
        >>> gradstep.lars_(p, np.array([0.0, 8.0]), momentum_buffer=b, step=1, lr=1.0, weight_decay=0.0, trust_coefficient=0.1)
        >>> p.round(6)  # a step of 0.1 times the length of p, which is 5
        array([3. , 3.5])

    References:
        You et al., arXiv:1708.03888, Algorithm 1.
    """
    settings = {
        "lr": lr,
        "momentum": momentum,
        "dampening": dampening,
        "weight_decay": weight_decay,
        "nesterov": nesterov,
        "trust_coefficient": trust_coefficient,
        "eps": eps,
        "maximize": maximize,
    }
    return update("lars_", LARS, param, grad, (momentum_buffer,), step, settings, grad_scale, options)


class LARS(Optimizer):
    """LARS for NumPy loops. Formula and settings: see `lars_`.

    Args:
        params: an array, a sequence of arrays, a dict of names to arrays, or a list of groups: dicts with `params` in any of
            these forms and settings of their own.
        lr: learning rate: a number, or a callable that takes the number of steps done and returns one.
        momentum, dampening, weight_decay, nesterov, trust_coefficient, eps, maximize: see `lars_`.
        options: what happens around the rule: see `gradstep.options.Options`.

    Raises:
        TypeError: for parameters that are no arrays, unknown settings, settings of the wrong type.
        ValueError: for settings out of range; for Nesterov momentum without momentum, or with dampening.

    Example:
        >>> import gradstep, numpy as np
        >>> w = np.array([3.0, -2.0])
        >>> opt = gradstep.LARS(w, lr=1.0, momentum=0.5, trust_coefficient=0.05)
        >>> for _ in range(200):
        ...     opt.step(2 * w)  # the gradient of sum(w^2)
        >>> bool(np.abs(w).max() < 0.01)
        True
    """

    def __init__(
        self,
        params: Params,
        lr: LearningRate = 1e-3,
        momentum: float = 0.9,
        dampening: float = 0.0,
        weight_decay: float = 1e-4,
        nesterov: bool = False,
        *,
        trust_coefficient: float = 1e-3,
        eps: float = 0.0,
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
                "trust_coefficient": trust_coefficient,
                "eps": eps,
                "maximize": maximize,
            },
            options,
        )

    @staticmethod
    def kernel(settings: Mapping[str, Any], grad_scale: float = 1.0) -> Kernel:
        """Return the kernel for the settings of a group."""
        stages = make_stages(settings, decay="coupled", grad_scale=grad_scale, momentum=settings["momentum"] != 0)
        rule, values = momentum_rule(settings)
        return Kernel(rule, values, (*stages, ("lars", settings["trust_coefficient"], settings["eps"])))
