"""Adam and AdamW, with their AMSGrad forms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from gradstep import _core
from gradstep.functional import update
from gradstep.kernel import Kernel
from gradstep.numpy import Optimizer
from gradstep.options import FunctionOptions, Options, make_stages, pair
from gradstep.typing import Arrays, LearningRate, Params, Steps

if TYPE_CHECKING:
    from typing_extensions import Unpack

_ADAM = _core.rules["adam"]
_AMSGRAD = _core.rules["adam_amsgrad"]


def _kernel(settings: Mapping[str, Any], decay: str, grad_scale: float) -> Kernel:
    betas = pair("betas", settings["betas"])
    stages = make_stages(settings, decay=decay, grad_scale=grad_scale, momentum=betas[0] != 0)
    return Kernel(_AMSGRAD if settings["amsgrad"] else _ADAM, (settings["lr"], *betas, settings["eps"]), stages)


def adam_(
    param: Arrays,
    grad: Arrays,
    *,
    exp_avg: Arrays,
    exp_avg_sq: Arrays,
    step: Steps,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    maximize: bool = False,
    max_exp_avg_sq: Arrays | None = None,
    grad_scale: float = 1.0,
    **options: Unpack[FunctionOptions],
) -> bool | None:
    r"""Update parameters in place by one step of Adam, with coupled weight decay.

    .. code-block:: text

        g <- g + weight_decay p                          (-g first, if maximize)
        m <- beta1 m + (1 - beta1) g
        v <- beta2 v + (1 - beta2) g^2
        w <- max(w, v)                                   AMSGrad; otherwise w is v
        p <- p - lr / (1 - beta1^t) m / (sqrt(w) / sqrt(1 - beta2^t) + eps)

    Args:
        param: array of any shape, or a sequence of arrays; float64, float32, float16 or bfloat16. Updated in place.
        grad: of the shape of `param`, and any of these dtypes, as the states. Written by the option `zero_grad` alone.
        exp_avg: m, like `param`; zeros before step 1. Updated in place.
        exp_avg_sq: v, like `param`; zeros before step 1. Updated in place.
        step: t, the number of this step, from 1; an int, or one for each array.
        lr: learning rate.
        betas: decay rates of m and v a step, each in [0, 1).
        eps: added to the root of the corrected v, as in torch and optax. (Keras adds it before the correction: there the same
            number is larger early in training.)
        weight_decay: factor of an L2 penalty. It passes through m and v: for decay that does not, see `adamw_`.
        maximize: follow the gradient instead of descending along it.
        max_exp_avg_sq: w, like `param`; zeros before step 1. Given, the step is AMSGrad's.

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
        >>> p, m, v = np.array([1.0, 2.0]), np.zeros(2), np.zeros(2)
        >>> gradstep.adam_(p, np.array([0.5, -0.5]), exp_avg=m, exp_avg_sq=v, step=1, lr=0.1)
        >>> p.round(6)
        array([0.9, 2.1])

    References:
        Kingma and Ba, arXiv:1412.6980; Reddi et al., arXiv:1904.09237; `torch.optim.Adam`.
    """
    amsgrad = max_exp_avg_sq is not None
    return update(
        "adam_",
        Adam,
        param,
        grad,
        (exp_avg, exp_avg_sq, max_exp_avg_sq) if amsgrad else (exp_avg, exp_avg_sq),
        step,
        {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "amsgrad": amsgrad, "maximize": maximize},
        grad_scale,
        options,
    )


def adamw_(
    param: Arrays,
    grad: Arrays,
    *,
    exp_avg: Arrays,
    exp_avg_sq: Arrays,
    step: Steps,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    maximize: bool = False,
    max_exp_avg_sq: Arrays | None = None,
    grad_scale: float = 1.0,
    **options: Unpack[FunctionOptions],
) -> bool | None:
    r"""Update parameters in place by one step of AdamW: Adam with decoupled weight decay.

    .. code-block:: text

        m <- beta1 m + (1 - beta1) g                     (g is -g, if maximize)
        v <- beta2 v + (1 - beta2) g^2
        w <- max(w, v)                                   AMSGrad; otherwise w is v
        p <- p - (lr weight_decay p + lr / (1 - beta1^t) m / (sqrt(w) / sqrt(1 - beta2^t) + eps))

    torch computes ``p (1 - lr weight_decay) - update``, which is the same but for rounding: here p is rounded once a step.

    Args:
        param: array of any shape, or a sequence of arrays; float64, float32, float16 or bfloat16. Updated in place.
        grad: of the shape of `param`, and any of these dtypes, as the states. Written by the option `zero_grad` alone.
        exp_avg: m, like `param`; zeros before step 1. Updated in place.
        exp_avg_sq: v, like `param`; zeros before step 1. Updated in place.
        step: t, the number of this step, from 1; an int, or one for each array.
        lr: learning rate.
        betas: decay rates of m and v a step, each in [0, 1).
        eps: added to the root of the corrected v, as in torch and optax.
        weight_decay: the share of p that decays a step, in units of `lr`. (The default is torch's; optax has 1e-4, Keras 4e-3.)
        maximize: follow the gradient instead of descending along it.
        max_exp_avg_sq: w, like `param`; zeros before step 1. Given, the step is AMSGrad's.

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
        >>> p, m, v = np.array([1.0, 2.0]), np.zeros(2), np.zeros(2)
        >>> gradstep.adamw_(p, np.array([0.5, -0.5]), exp_avg=m, exp_avg_sq=v, step=1, lr=0.1)
        >>> p.round(6)
        array([0.899, 2.098])

    References:
        Loshchilov and Hutter, arXiv:1711.05101; `torch.optim.AdamW`.
    """
    amsgrad = max_exp_avg_sq is not None
    return update(
        "adamw_",
        AdamW,
        param,
        grad,
        (exp_avg, exp_avg_sq, max_exp_avg_sq) if amsgrad else (exp_avg, exp_avg_sq),
        step,
        {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "amsgrad": amsgrad, "maximize": maximize},
        grad_scale,
        options,
    )


class Adam(Optimizer):
    """Adam with coupled weight decay, for NumPy loops. Formula and settings: see `adam_`.

    Args:
        params: an array, a sequence of arrays, a dict of names to arrays, or a list of groups: dicts with `params` in any of
            these forms and settings of their own.
        lr: learning rate: a number, or a callable that takes the number of steps done and returns one.
        betas, eps, weight_decay, maximize: see `adam_`.
        amsgrad: divide by the largest second moment so far.
        options: what happens around the rule: see `gradstep.options.Options`.

    Raises:
        TypeError: for parameters that are no arrays, unknown settings, settings of the wrong type.
        ValueError: for settings out of range.

    Example:
        >>> import gradstep, numpy as np
        >>> w = np.array([3.0, -2.0])
        >>> opt = gradstep.Adam(w, lr=0.1)
        >>> for _ in range(200):
        ...     opt.step(2 * w)  # the gradient of sum(w^2)
        >>> bool(np.abs(w).max() < 1e-3)
        True
    """

    def __init__(
        self,
        params: Params,
        lr: LearningRate = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(
            params,
            {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "amsgrad": amsgrad, "maximize": maximize},
            options,
        )

    @staticmethod
    def kernel(settings: Mapping[str, Any], grad_scale: float = 1.0) -> Kernel:
        """Return the kernel for the settings of a group."""
        return _kernel(settings, "coupled", grad_scale)


class AdamW(Optimizer):
    """AdamW, Adam with decoupled weight decay, for NumPy loops. Formula and settings: see `adamw_`.

    Args:
        params: an array, a sequence of arrays, a dict of names to arrays, or a list of groups: dicts with `params` in any of
            these forms and settings of their own.
        lr: learning rate: a number, or a callable that takes the number of steps done and returns one.
        betas, eps, weight_decay, maximize: see `adamw_`.
        amsgrad: divide by the largest second moment so far.
        options: what happens around the rule: see `gradstep.options.Options`.

    Raises:
        TypeError: for parameters that are no arrays, unknown settings, settings of the wrong type.
        ValueError: for settings out of range.

    Example:
        >>> import gradstep, numpy as np
        >>> params = {"weight": np.ones((2, 3), np.float32), "bias": np.zeros(3, np.float32)}
        >>> opt = gradstep.AdamW(params, lr=0.1)
        >>> opt.step({"weight": np.ones((2, 3), np.float32), "bias": None})
        >>> params["weight"][0].round(3)
        array([0.899, 0.899, 0.899], dtype=float32)
        >>> sorted(opt.state["weight"])
        ['exp_avg', 'exp_avg_sq', 'step']
    """

    def __init__(
        self,
        params: Params,
        lr: LearningRate = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(
            params,
            {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "amsgrad": amsgrad, "maximize": maximize},
            options,
        )

    @staticmethod
    def kernel(settings: Mapping[str, Any], grad_scale: float = 1.0) -> Kernel:
        """Return the kernel for the settings of a group."""
        return _kernel(settings, "decoupled", grad_scale)
