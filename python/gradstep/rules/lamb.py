"""LAMB: Adam with steps as long as the tensors that they move."""

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

_LAMB = _core.rules["lamb"]


def _trusting(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings with the trust ratio on, unless there is to be none."""
    adapt = check_flag("always_adapt", settings["always_adapt"]) or settings["weight_decay"] != 0
    check_flag("decay_in_ratio", settings["decay_in_ratio"])
    given = {name: value for name, value in settings.items() if name != "trust_ratio" or value is not None}
    return {"trust_ratio": adapt, **given} if adapt else {**given, "trust_ratio": False}


def lamb_(
    param: Arrays,
    grad: Arrays,
    *,
    exp_avg: Arrays,
    exp_avg_sq: Arrays,
    step: Steps,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
    weight_decay: float = 1e-2,
    bias_correction: bool = True,
    grad_averaging: bool = True,
    always_adapt: bool = True,
    decay_in_ratio: bool = True,
    maximize: bool = False,
    grad_scale: float = 1.0,
    **options: Unpack[FunctionOptions],
) -> bool | None:
    r"""Update parameters in place by one step of LAMB.

    .. code-block:: text

        m <- beta1 m + (1 - beta1) g                     (g is -g, if maximize)
        v <- beta2 v + (1 - beta2) g^2
        u  = m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps) + weight_decay p
        r  = norm(p) / norm(u)                           1 where either is 0; norms of the whole tensor
        p <- p - lr r u

    This is the paper's form, with the identity for its phi. The others:

    * Apex: ``clip_norm=1.0, always_adapt=False``;
    * NVIDIA's NVLAMB: ``clip_norm=1.0``;
    * DeepSpeed limits the ratio: ``trust_ratio=(0.01, 10)`` (and corrects the bias outside of it, which is not offered here);
    * optax: the default; Keras: ``decay_in_ratio=False``.

    Args:
        param: array of any shape, or a sequence of arrays; float64, float32, float16 or bfloat16. Updated in place.
        grad: of the shape of `param`, and any of these dtypes, as the states. Written by the option `zero_grad` alone.
        exp_avg: m, like `param`; zeros before step 1. Updated in place.
        exp_avg_sq: v, like `param`; zeros before step 1. Updated in place.
        step: t, the number of this step, from 1; an int, or one for each array.
        lr: learning rate: the length of the step, in units of the tensor's.
        betas: decay rates of m and v a step, each in [0, 1).
        eps: added to the root of the corrected v.
        weight_decay: the share of p that decays a step, in units of `lr`.
        bias_correction: divide m and v by 1 - beta^t.
        grad_averaging: the factor 1 - beta1 of g in m; without it 1.
        always_adapt: use the ratio without weight decay, too.
        decay_in_ratio: the decay is part of the update that the ratio looks at and scales; otherwise it stands beside.
        maximize: follow the gradient instead of descending along it.
        grad_scale: number that the gradient is multiplied by on its way into the update.
        options: what happens around the rule: see `gradstep.options.FunctionOptions`. `trust_ratio` may limit the ratio.

    Returns:
        None; with ``on_nonfinite="skip"`` or ``"raise"``, whether the step was carried out.

    Raises:
        TypeError: for other dtypes than these.
        ValueError: for settings out of range, different shapes or lengths, read-only, misaligned or overlapping memory. Nothing
            has been written then.

    Example:
        >>> import gradstep, numpy as np
        >>> p, m, v = np.array([3.0, 4.0]), np.zeros(2), np.zeros(2)
        >>> gradstep.lamb_(p, np.array([0.5, -0.5]), exp_avg=m, exp_avg_sq=v, step=1, lr=0.1, weight_decay=0.0)
        >>> p.round(6)  # a step of 0.1 times the length of p, which is 5
        array([2.646447, 4.353553])

    References:
        You et al., arXiv:1904.00962, Algorithm 2; `apex.optimizers.FusedLAMB`; `optax.lamb`.
    """
    settings = {
        "lr": lr,
        "betas": betas,
        "eps": eps,
        "weight_decay": weight_decay,
        "bias_correction": bias_correction,
        "grad_averaging": grad_averaging,
        "always_adapt": always_adapt,
        "decay_in_ratio": decay_in_ratio,
        "maximize": maximize,
    }
    return update("lamb_", LAMB, param, grad, (exp_avg, exp_avg_sq), step, settings, grad_scale, options)


class LAMB(Optimizer):
    """LAMB for NumPy loops. Formula and settings: see `lamb_`.

    Args:
        params: an array, a sequence of arrays, a dict of names to arrays, or a list of groups: dicts with `params` in any of
            these forms and settings of their own.
        lr: learning rate: a number, or a callable that takes the number of steps done and returns one.
        betas, eps, weight_decay, bias_correction, grad_averaging, always_adapt, decay_in_ratio, maximize: see `lamb_`.
        options: what happens around the rule: see `gradstep.options.Options`. `trust_ratio` may limit the ratio.

    Raises:
        TypeError: for parameters that are no arrays, unknown settings, settings of the wrong type.
        ValueError: for settings out of range.

    Example:
        >>> import gradstep, numpy as np
        >>> w = np.array([3.0, -2.0])
        >>> opt = gradstep.LAMB(w, lr=lambda step: 0.1 / (1 + 0.05 * step), weight_decay=0.0)
        >>> for _ in range(200):
        ...     opt.step(2 * w)  # the gradient of sum(w^2)
        >>> bool(np.abs(w).max() < 0.1)
        True
    """

    def __init__(
        self,
        params: Params,
        lr: LearningRate = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 1e-2,
        *,
        bias_correction: bool = True,
        grad_averaging: bool = True,
        always_adapt: bool = True,
        decay_in_ratio: bool = True,
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
                "bias_correction": bias_correction,
                "grad_averaging": grad_averaging,
                "always_adapt": always_adapt,
                "decay_in_ratio": decay_in_ratio,
                "maximize": maximize,
            },
            options,
        )

    @staticmethod
    def kernel(settings: Mapping[str, Any], grad_scale: float = 1.0) -> Kernel:
        """Return the kernel for the settings of a group."""
        betas = pair("betas", settings["betas"])
        stages = make_stages(_trusting(settings), decay="decoupled", grad_scale=grad_scale, momentum=betas[0] != 0)
        flags = (float(check_flag(name, settings[name])) for name in ("bias_correction", "grad_averaging"))
        return Kernel(_LAMB, (settings["lr"], *betas, settings["eps"], *flags), stages)
