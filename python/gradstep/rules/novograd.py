"""NovoGrad: momentum of gradients, each divided by the root of an average of its squared norms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from gradstep import _core
from gradstep.functional import update
from gradstep.kernel import Kernel
from gradstep.numpy import Optimizer
from gradstep.options import FunctionOptions, Options, check_flag, make_stages, pair
from gradstep.typing import Arrays, LearningRate, Params, Steps

if TYPE_CHECKING:
    from typing_extensions import Unpack

_NOVOGRAD = _core.rules["novograd"]


def novograd_(
    param: Arrays,
    grad: Arrays,
    *,
    exp_avg: Arrays,
    grad_norm_sq: Arrays,
    step: Steps,
    lr: float = 1e-2,
    betas: tuple[float, float] = (0.95, 0.98),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    grad_averaging: bool = False,
    maximize: bool = False,
    grad_scale: float = 1.0,
    **options: Unpack[FunctionOptions],
) -> bool | None:
    r"""Update parameters in place by one step of NovoGrad.

    .. code-block:: text

        n <- norm(g)^2                                   at step 1; the norm of the whole tensor
        n <- beta2 n + (1 - beta2) norm(g)^2             later
        m <- beta1 m + (g / (sqrt(n) + eps) + weight_decay p)      (-g first, if maximize)
        p <- p - lr m

    This is the paper's form. With `grad_averaging` the new term of m is multiplied by 1 - beta1, as in the authors' later code.
    (optax has the paper's form with beta2 = 0.25; Apex corrects the bias of n and m and decays outside m, which is not offered.)

    Args:
        param: array of any shape, or a sequence of arrays; float64, float32, float16 or bfloat16. Updated in place.
        grad: of the shape of `param`, and any of these dtypes, as the states. Written by the option `zero_grad` alone.
        exp_avg: m, like `param`; zeros before step 1. Updated in place.
        grad_norm_sq: n, an array of one number, or a sequence of them. What it holds before step 1 does not matter. Updated in
            place.
        step: the number of this step, from 1; an int, or one for each array.
        lr: learning rate.
        betas: decay rates of m and n a step, each in [0, 1).
        eps: added to the root of n.
        weight_decay: factor of an L2 penalty on the divided gradient.
        grad_averaging: see above.
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
        >>> p, m, n = np.array([3.0, 4.0]), np.zeros(2), np.zeros(1)
        >>> gradstep.novograd_(p, np.array([0.6, 0.8]), exp_avg=m, grad_norm_sq=n, step=1, lr=0.5)
        >>> p.round(6), n.round(6)
        (array([2.7, 3.6]), array([1.]))

    References:
        Ginsburg et al., arXiv:1905.11286, Algorithm 1; `optax.novograd`.
    """
    settings = {
        "lr": lr,
        "betas": betas,
        "eps": eps,
        "weight_decay": weight_decay,
        "grad_averaging": grad_averaging,
        "maximize": maximize,
    }
    return update("novograd_", NovoGrad, param, grad, (exp_avg, grad_norm_sq), step, settings, grad_scale, options)


class NovoGrad(Optimizer):
    """NovoGrad for NumPy loops. Formula and settings: see `novograd_`.

    Args:
        params: an array, a sequence of arrays, a dict of names to arrays, or a list of groups: dicts with `params` in any of
            these forms and settings of their own.
        lr: learning rate: a number, or a callable that takes the number of steps done and returns one.
        betas, eps, weight_decay, grad_averaging, maximize: see `novograd_`.
        options: what happens around the rule: see `gradstep.options.Options`.

    Raises:
        TypeError: for parameters that are no arrays, unknown settings, settings of the wrong type.
        ValueError: for settings out of range.

    Example:
        >>> import gradstep, numpy as np
        >>> w = np.array([3.0, -2.0])
        >>> opt = gradstep.NovoGrad(w, lr=lambda step: 0.05 / (1 + 0.05 * step), betas=(0.5, 0.9))
        >>> for _ in range(200):
        ...     opt.step(2 * w)  # the gradient of sum(w^2)
        >>> bool(np.abs(w).max() < 0.1)
        True
    """

    def __init__(
        self,
        params: Params,
        lr: LearningRate = 1e-2,
        betas: tuple[float, float] = (0.95, 0.98),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        grad_averaging: bool = False,
        maximize: bool = False,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "grad_averaging": grad_averaging,
                "maximize": maximize,
            },
            options,
        )

    @staticmethod
    def kernel(settings: Mapping[str, Any], grad_scale: float = 1.0) -> Kernel:
        """Return the kernel for the settings of a group."""
        beta1, beta2 = pair("betas", settings["betas"])
        stages = make_stages(settings, decay="coupled", grad_scale=grad_scale, momentum=beta1 != 0)
        averaging = float(check_flag("grad_averaging", settings["grad_averaging"]))
        return Kernel(_NOVOGRAD, (settings["lr"], beta1, averaging), (*stages, ("novograd", beta2, settings["eps"])))
