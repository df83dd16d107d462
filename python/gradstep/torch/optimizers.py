"""The torch classes. Each is torch's own, with another step; Lion, which torch has not, is written out."""

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
        if isinstance(lr, torch.Tensor) and lr.numel() != 1:
            raise ValueError("Tensor lr must be 1-element")
        if not lr >= 0.0:
            raise ValueError(f"Invalid learning rate: {lr}")
        for i, beta in enumerate(betas):
            if not 0.0 <= beta < 1.0:
                raise ValueError(f"Invalid beta parameter at index {i}: {beta}")
        if not weight_decay >= 0.0:
            raise ValueError(f"Invalid weight_decay value: {weight_decay}")
        defaults: dict[str, Any] = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, defaults, **options)
