"""Kernels: a compiled rule with its settings and the stages around it, as the engine takes them.

Each optimizer turns its settings into a `Kernel` in one place, whichever face (function, NumPy object, torch class) they came by.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from gradstep import _core

Stages = tuple[tuple[Any, ...], ...]


class Kernel(NamedTuple):
    """What the engine needs to know for one step of a group of parameters."""

    rule: _core.Rule
    values: tuple[float, ...]
    """The rule's settings, in the order of its fields."""
    stages: Stages
    """Tuples (name, value, ...) in the order in which the gradient passes them."""


def make_stages(maximize: bool, *, coupled_decay: float = 0.0, decoupled_decay: float = 0.0, grad_scale: float = 1.0) -> Stages:
    """Return the stages of one step; those that would change nothing are left out."""
    stages: Stages = ()
    if maximize or grad_scale != 1:
        stages += (("scale", -grad_scale if maximize else grad_scale),)
    if coupled_decay != 0:
        stages += (("coupled_decay", coupled_decay),)
    if decoupled_decay != 0:
        stages += (("decoupled_decay", decoupled_decay),)
    return stages


def pair(name: str, values: tuple[float, float]) -> tuple[float, float]:
    """Return `values` if there are two."""
    try:
        first, second = values
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be two numbers, got {values!r}") from None
    return first, second
