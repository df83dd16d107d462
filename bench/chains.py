"""Chains: what stands around the rule in a whole step (scaling, clipping, averaging, zeroing, ...)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_STATES = {"ema_decay": "ema", "swa": "swa", "lookahead": "slow"}

COUNTS = {"ema": "ema_count", "swa": "swa_count"}
"""Numbers that averages come with."""

# In other units or shapes than in a measurement, where that tells right from wrong better. Noise has no reference: only that it
# stands where it should.
_DEMANDING = {"ema_decay": 0.7, "lookahead": (2, 0.5), "noise": 1e-30}

_WRITE_GRADS = {"grad_scale", "clip_value", "agc", "clip_norm_per_tensor", "clip_norm", "centralize", "zero_grad"}


@dataclass(frozen=True)
class Chain:
    """Stages around a rule."""

    name: str
    about: str
    options: Mapping[str, Any] = field(default_factory=dict)
    """Keywords of the optimizers' constructors."""
    call: Mapping[str, Any] = field(default_factory=dict)
    """Keywords of their `step`."""
    again: int = 0
    """How many arrays have to be read twice: a norm must be known before what it scales can be used."""

    def __bool__(self) -> bool:
        """Whether there is anything around the rule."""
        return bool(self.name)

    @property
    def active(self) -> dict[str, Any]:
        """Options and keywords that change something."""
        given = {**self.options, **self.call}
        return {
            name: value
            for name, value in given.items()
            if value not in (None, False, "propagate") and (name, value) != ("grad_scale", 1)
        }

    @property
    def states(self) -> tuple[str, ...]:
        """Names of the arrays that are kept beside the rule's states."""
        return tuple(state for option, state in _STATES.items() if option in self.active)

    @property
    def streams(self) -> int:
        """How many arrays have to be read or written beside those of the rule, at least."""
        return self.again + 2 * len(self.states) + ("zero_grad" in self.active)

    @property
    def writes_grads(self) -> bool:
        """Whether somebody's step changes the gradients, so that each needs new ones."""
        return not _WRITE_GRADS.isdisjoint(self.active)

    @property
    def grad_unit(self) -> float:
        """What the gradients are multiplied by before they come: the loss scale."""
        return 1 / float(self.call.get("grad_scale", 1.0))

    def demanding(self) -> Chain:
        """Return the chain with options that tell a right contender from a wrong one."""
        return dataclasses.replace(self, options={name: _DEMANDING.get(name, value) for name, value in self.options.items()})


NO_CHAIN = Chain("", "the rule alone")

_SCALE = {"grad_scale": 1 / 1024}

_WHOLE = (
    Chain("full", "unscale, clip by the global norm, rule, average, zero", {"clip_norm": 1.0, "ema_decay": 0.999, "zero_grad": True}, _SCALE, 1),
    Chain("clip", "clip by the global norm, rule", {"clip_norm": 1.0}, {}, 1),
    Chain("unscale-clip", "unscale, clip by the global norm, rule", {"clip_norm": 1.0}, _SCALE, 1),
    Chain("stats", "statistics", {}, {"stats": True}),
    Chain(
        "off",
        "every stage named and switched off",
        {
            "clip_norm": None, "clip_norm_per_tensor": None, "clip_value": None, "agc": None, "on_nonfinite": "propagate", "l1": None,
            "bounds": None, "ema_decay": None, "centralize": False, "cautious": False, "trust_ratio": False, "zero_grad": False,
        },
        {"grad_scale": 1.0, "stats": False},
    ),
)  # fmt: skip

_EACH = (
    Chain("scale", "grad_scale", {}, _SCALE),
    Chain("skip", 'on_nonfinite="skip"', {"on_nonfinite": "skip"}, {}, 1),
    Chain("zero-nonfinite", 'on_nonfinite="zero"', {"on_nonfinite": "zero"}),
    Chain("clip-value", "clip_value", {"clip_value": 0.5}),
    Chain("agc", "adaptive gradient clipping", {"agc": 0.01}),
    Chain("clip-tensor", "clip_norm_per_tensor", {"clip_norm_per_tensor": 1.0}, {}, 1),
    Chain("centralize", "centralization of the gradient", {"centralize": True}),
    Chain("noise", "noise on the gradient", {"noise": 0.01}),
    Chain("cautious", "cautious updates", {"cautious": True}, {}, 3),
    Chain("trust-ratio", "trust ratio of the update", {"trust_ratio": True}, {}, 3),
    Chain("elastic-net", "l1 and l2", {"l1": 0.1, "l2": 0.1}),
    Chain("bounds", "bounds", {"bounds": (-1.0, 1.0)}),
    Chain("group-lasso", "group_lasso", {"group_lasso": 0.1}),
    Chain("max-norm", "max_norm", {"max_norm": 1.0}),
    Chain("lookahead", "lookahead, moving at each step", {"lookahead": (1, 0.5)}),
    Chain("ema", "exponential moving average of the parameters", {"ema_decay": 0.999}),
    Chain("swa", "equal average of the parameters", {"swa": (0, 1)}),
    Chain("zero", "zero_grad", {"zero_grad": True}),
)

CHAINS = {chain.name: chain for chain in (*_WHOLE, *_EACH)}

EACH = tuple(chain.name for chain in _EACH)
"""One stage each."""
