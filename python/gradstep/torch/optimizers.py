"""The torch classes. Each is torch's own, with another step; those that torch has not are written out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.optimizer import ParamsT

from gradstep import rules
from gradstep.numpy import Optimizer as Rule
from gradstep.options import Options
from gradstep.torch.one_sweep import OneSweep

if TYPE_CHECKING:
    from typing_extensions import Unpack


class SGD(OneSweep, torch.optim.SGD):
    """`torch.optim.SGD`, in one sweep. Formula: see `gradstep.sgd_`."""

    rule = rules.SGD
    counts_steps = False


class Adam(OneSweep, torch.optim.Adam):
    """`torch.optim.Adam`, in one sweep. Formula: see `gradstep.adam_`; with ``decoupled_weight_decay`` that of `gradstep.adamw_`."""

    rule = rules.Adam

    def rule_of(self, group: Mapping[str, Any]) -> type[Rule]:
        """Return AdamW's rule for a group with decoupled decay, Adam's otherwise."""
        return rules.AdamW if group.get("decoupled_weight_decay") else rules.Adam


class AdamW(OneSweep, torch.optim.AdamW):
    """`torch.optim.AdamW`, in one sweep. Formula: see `gradstep.adamw_`."""

    rule = rules.AdamW


class Adagrad(OneSweep, torch.optim.Adagrad):
    """`torch.optim.Adagrad`, in one sweep. Formula: see `gradstep.adagrad_`."""

    rule = rules.Adagrad


class RMSprop(OneSweep, torch.optim.RMSprop):
    """`torch.optim.RMSprop`, in one sweep. Formula: see `gradstep.rmsprop_`."""

    rule = rules.RMSprop


class Lion(OneSweep):
    """Lion, in one sweep, as a `torch.optim.Optimizer`. Formula: see `gradstep.lion_`.

    Args:
        params: parameters, named parameters or groups, as for every torch optimizer.
        lr: learning rate, a number or a tensor of one element.
        betas: weight of the average in the update, and its decay rate a step, each in [0, 1).
        weight_decay: the share of a parameter that decays a step, in units of `lr`.
        maximize: follow the gradient instead of descending along it.
        options: what happens around the rule: see `gradstep.options.Options`.

    Raises:
        ValueError: for settings out of range.

    Example:
        >>> import torch, gradstep.torch
        >>> w = torch.nn.Parameter(torch.tensor([1.0, -1.0]))
        >>> opt = gradstep.torch.Lion([w], lr=0.25)
        >>> (w**2).sum().backward()
        >>> opt.step()
        >>> w.data
        tensor([ 0.7500, -0.7500])

    References:
        Chen et al., arXiv:2302.06675, Algorithm 2; lucidrains/lion-pytorch.
    """

    rule = rules.Lion
    counts_steps = False

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        **options: Unpack[Options],
    ) -> None:
        _check_lr(lr)
        for i, beta in enumerate(betas):
            if not 0.0 <= beta < 1.0:
                raise ValueError(f"Invalid beta parameter at index {i}: {beta}")
        if not weight_decay >= 0.0:
            raise ValueError(f"Invalid weight_decay value: {weight_decay}")
        defaults: dict[str, Any] = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, defaults, **options)


class LAMB(OneSweep):
    """LAMB, as a `torch.optim.Optimizer`. Formula and settings: see `gradstep.lamb_`.

    Args:
        params: parameters, named parameters or groups, as for every torch optimizer.
        lr: learning rate, a number or a tensor of one element.
        betas, eps, weight_decay, bias_correction, grad_averaging, always_adapt, decay_in_ratio, maximize: see `gradstep.lamb_`.
        options: what happens around the rule: see `gradstep.options.Options`.

    Raises:
        TypeError, ValueError: for settings of the wrong type, or out of range.

    Example:
        >>> import torch, gradstep.torch
        >>> w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> opt = gradstep.torch.LAMB([w], lr=0.1, weight_decay=0.0)
        >>> (w * torch.tensor([0.5, -0.5])).sum().backward()
        >>> opt.step()
        >>> w.data
        tensor([2.6464, 4.3536])

    References:
        You et al., arXiv:1904.00962, Algorithm 2.
    """

    rule = rules.LAMB

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 1e-3,
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
        _check_lr(lr)
        defaults: dict[str, Any] = {
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
        super().__init__(params, defaults, **options)


class LARS(OneSweep):
    """LARS, as a `torch.optim.Optimizer`. Formula and settings: see `gradstep.lars_`.

    Args:
        params: parameters, named parameters or groups, as for every torch optimizer.
        lr: learning rate, a number or a tensor of one element.
        momentum, dampening, weight_decay, nesterov, trust_coefficient, eps, maximize: see `gradstep.lars_`.
        options: what happens around the rule: see `gradstep.options.Options`.

    Raises:
        TypeError, ValueError: for settings of the wrong type, or out of range; for Nesterov momentum without momentum, or with
            dampening.

    Example:
        >>> import torch, gradstep.torch
        >>> w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> opt = gradstep.torch.LARS([w], lr=1.0, weight_decay=0.0, trust_coefficient=0.1)
        >>> (8 * w[1]).backward()
        >>> opt.step()
        >>> w.data
        tensor([3.0000, 3.5000])

    References:
        You et al., arXiv:1708.03888, Algorithm 1.
    """

    rule = rules.LARS
    counts_steps = False

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 1e-3,
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
        _check_lr(lr)
        defaults: dict[str, Any] = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "trust_coefficient": trust_coefficient,
            "eps": eps,
            "maximize": maximize,
        }
        super().__init__(params, defaults, **options)


class NovoGrad(OneSweep):
    """NovoGrad, as a `torch.optim.Optimizer`. Formula and settings: see `gradstep.novograd_`.

    Args:
        params: parameters, named parameters or groups, as for every torch optimizer.
        lr: learning rate, a number or a tensor of one element.
        betas, eps, weight_decay, grad_averaging, maximize: see `gradstep.novograd_`.
        options: what happens around the rule: see `gradstep.options.Options`.

    Raises:
        TypeError, ValueError: for settings of the wrong type, or out of range.

    Example:
        >>> import torch, gradstep.torch
        >>> w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> opt = gradstep.torch.NovoGrad([w], lr=0.5)
        >>> (w * torch.tensor([0.6, 0.8])).sum().backward()
        >>> opt.step()
        >>> w.data
        tensor([2.7000, 3.6000])

    References:
        Ginsburg et al., arXiv:1905.11286, Algorithm 1.
    """

    rule = rules.NovoGrad

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 1e-2,
        betas: tuple[float, float] = (0.95, 0.98),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        grad_averaging: bool = False,
        maximize: bool = False,
        **options: Unpack[Options],
    ) -> None:
        _check_lr(lr)
        defaults: dict[str, Any] = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "grad_averaging": grad_averaging,
            "maximize": maximize,
        }
        super().__init__(params, defaults, **options)


def _check_lr(lr: float | torch.Tensor) -> None:
    if isinstance(lr, torch.Tensor) and lr.numel() != 1:
        raise ValueError("Tensor lr must be 1-element")
    if not lr >= 0.0:
        raise ValueError(f"Invalid learning rate: {lr}")
