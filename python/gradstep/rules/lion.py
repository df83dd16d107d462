"""Lion."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from gradstep import _core
from gradstep.functional import update
from gradstep.kernel import Kernel
from gradstep.numpy import Optimizer
from gradstep.options import FunctionOptions, Options, make_stages, pair
from gradstep.typing import Arrays, LearningRate, Params

if TYPE_CHECKING:
    from typing_extensions import Unpack

_LION = _core.rules["lion"]


def lion_(
    param: Arrays,
    grad: Arrays,
    *,
    exp_avg: Arrays,
    lr: float = 1e-4,
    betas: tuple[float, float] = (0.9, 0.99),
    weight_decay: float = 0.0,
    maximize: bool = False,
    grad_scale: float = 1.0,
    **options: Unpack[FunctionOptions],
) -> bool | None:
    r"""Update parameters in place by one step of Lion.

    .. code-block:: text

        c <- beta1 m + (1 - beta1) g                     (g is -g, if maximize)
        m <- beta2 m + (1 - beta2) g
        p <- p - (lr weight_decay p + lr sign(c))

    The sign of 0 is 0, that of NaN is NaN.

    Args:
        param: array of any shape, or a sequence of arrays; float64, float32, float16 or bfloat16. Updated in place.
        grad: of the shape of `param`, and any of these dtypes, as the states. Written by the option `zero_grad` alone.
        exp_avg: m, like `param`; zeros before step 1. Updated in place.
        lr: learning rate: every element moves by it; 3 to 10 times smaller than AdamW's.
        betas: weight of m in the update, and its decay rate a step, each in [0, 1).
        weight_decay: the share of p that decays a step, in units of `lr` (optax's default is 1e-3).
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
        >>> p, m = np.array([1.0, 2.0, 3.0]), np.zeros(3)
        >>> gradstep.lion_(p, np.array([0.5, -0.1, 0.0]), exp_avg=m, lr=0.1)
        >>> p
        array([0.9, 2.1, 3. ])

    References:
        Chen et al., arXiv:2302.06675, Algorithm 2; lucidrains/lion-pytorch; `optax.lion`.
    """
    settings = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize}
    return update("lion_", Lion, param, grad, (exp_avg,), None, settings, grad_scale, options)


class Lion(Optimizer):
    """Lion for NumPy loops. Formula and settings: see `lion_`.

    Args:
        params: an array, a sequence of arrays, a dict of names to arrays, or a list of groups: dicts with `params` in any of
            these forms and settings of their own.
        lr: learning rate: a number, or a callable that takes the number of steps done and returns one.
        betas, weight_decay, maximize: see `lion_`.
        options: what happens around the rule: see `gradstep.options.Options`.

    Raises:
        TypeError: for parameters that are no arrays, unknown settings, settings of the wrong type.
        ValueError: for settings out of range.

    Example:
        >>> import gradstep, numpy as np
        >>> w = np.array([3.0, -2.0])
        >>> opt = gradstep.Lion(w, lr=lambda step: 0.1 / (1 + 0.02 * step))
        >>> for _ in range(200):
        ...     opt.step(2 * w)  # the gradient of sum(w^2)
        >>> bool(np.abs(w).max() < 0.1)
        True
    """

    def __init__(
        self,
        params: Params,
        lr: LearningRate = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize}, options)

    @staticmethod
    def kernel(settings: Mapping[str, Any], grad_scale: float = 1.0) -> Kernel:
        """Return the kernel for the settings of a group."""
        betas = pair("betas", settings["betas"])
        stages = make_stages(settings, decay="decoupled", grad_scale=grad_scale, momentum=betas[0] != 0)
        return Kernel(_LION, (settings["lr"], *betas), stages)
