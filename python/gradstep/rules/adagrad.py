"""Adagrad."""

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

_ADAGRAD = _core.rules["adagrad"]


def adagrad_(
    param: Arrays,
    grad: Arrays,
    *,
    sum: Arrays,  # noqa: A002  (torch's name of the state)
    step: Steps | None = None,
    lr: float = 1e-2,
    lr_decay: float = 0.0,
    weight_decay: float = 0.0,
    eps: float = 1e-10,
    maximize: bool = False,
    grad_scale: float = 1.0,
    **options: Unpack[FunctionOptions],
) -> bool | None:
    r"""Update parameters in place by one step of Adagrad.

    .. code-block:: text

        g <- g + weight_decay p                          (-g first, if maximize)
        s <- s + g^2
        p <- p - lr / (1 + (t - 1) lr_decay) g / (sqrt(s) + eps)

    Args:
        param: array of any shape, or a sequence of arrays; float64, float32, float16 or bfloat16. Updated in place.
        grad: of the shape of `param`, and any of these dtypes, as the states. Written by the option `zero_grad` alone.
        sum: s, like `param`; zeros, or another initial value, before step 1 (Keras and optax begin with 0.1). Updated in place.
        step: t, the number of this step, from 1; an int, or one for each array. Needed with `lr_decay`.
        lr: learning rate.
        lr_decay: growth of the divisor of `lr` a step.
        weight_decay: factor of an L2 penalty.
        eps: added to the root, as in torch (Keras and optax: inside the root).
        maximize: follow the gradient instead of descending along it.

        grad_scale: number that the gradient is multiplied by on its way into the update.
        options: what happens around the rule: see `gradstep.options.FunctionOptions`.

    Returns:
        None; with ``on_nonfinite="skip"`` or ``"raise"``, whether the step was carried out.

    Raises:
        TypeError: for other dtypes than these; for `lr_decay` without `step`.
        ValueError: for settings out of range, different shapes or lengths, read-only, misaligned or overlapping memory. Nothing
            has been written then.

    Example:
        >>> import gradstep, numpy as np
        >>> p, s = np.array([1.0, 2.0]), np.zeros(2)
        >>> gradstep.adagrad_(p, np.array([0.5, -0.5]), sum=s, lr=0.1)
        >>> p.round(6), s
        (array([0.9, 2.1]), array([0.25, 0.25]))

    References:
        Duchi, Hazan and Singer, JMLR 12 (2011); `torch.optim.Adagrad`.
    """
    if lr_decay != 0 and step is None:
        raise TypeError("adagrad_: lr_decay needs step")
    settings = {"lr": lr, "lr_decay": lr_decay, "weight_decay": weight_decay, "eps": eps, "maximize": maximize}
    return update("adagrad_", Adagrad, param, grad, (sum,), step, settings, grad_scale, options)


class Adagrad(Optimizer):
    """Adagrad for NumPy loops. Formula and settings: see `adagrad_`.

    Args:
        params: an array, a sequence of arrays, a dict of names to arrays, or a list of groups: dicts with `params` in any of
            these forms and settings of their own.
        lr: learning rate: a number, or a callable that takes the number of steps done and returns one.
        lr_decay, weight_decay, eps, maximize: see `adagrad_`.
        initial_accumulator_value: what the sum of squares begins with.
        options: what happens around the rule: see `gradstep.options.Options`.

    Raises:
        TypeError: for parameters that are no arrays, unknown settings, settings of the wrong type.
        ValueError: for settings out of range.

    Example:
        >>> import gradstep, numpy as np
        >>> w = np.array([3.0, -2.0])
        >>> opt = gradstep.Adagrad(w, lr=1.0, initial_accumulator_value=0.1)
        >>> for _ in range(200):
        ...     opt.step(2 * w)  # the gradient of sum(w^2)
        >>> bool(np.abs(w).max() < 1e-3)
        True
    """

    def __init__(
        self,
        params: Params,
        lr: LearningRate = 1e-2,
        lr_decay: float = 0.0,
        weight_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
        *,
        maximize: bool = False,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "lr_decay": lr_decay,
                "weight_decay": weight_decay,
                "initial_accumulator_value": initial_accumulator_value,
                "eps": eps,
                "maximize": maximize,
            },
            options,
        )

    @staticmethod
    def kernel(settings: Mapping[str, Any], grad_scale: float = 1.0) -> Kernel:
        """Return the kernel for the settings of a group."""
        initial = settings.get("initial_accumulator_value", 0.0)
        if not check_number("initial_accumulator_value", initial) >= 0:
            raise ValueError(f"initial_accumulator_value must be >= 0, got {initial!r}")
        stages = make_stages(settings, decay="coupled", grad_scale=grad_scale, momentum=False)
        return Kernel(_ADAGRAD, (settings["lr"], settings["lr_decay"], settings["eps"]), stages)

    @classmethod
    def initial_state(cls, name: str, settings: Mapping[str, Any]) -> float:  # noqa: ARG003
        """Return the number that every element of state `name` begins with."""
        return float(settings["initial_accumulator_value"])
