"""Kernels: a compiled rule with its settings and the stages around it, as the engine takes them.

Each optimizer turns its settings into a `Kernel` in one place, whichever face (function, NumPy object, torch class) they came by.
"""

from __future__ import annotations

from typing import NamedTuple

from gradstep import _core
from gradstep.options import Stages


class Kernel(NamedTuple):
    """What the engine needs to know for one step of a group of parameters."""

    rule: _core.Rule
    values: tuple[float, ...]
    """The rule's settings, in the order of its fields."""
    stages: Stages
    """Tuples (name, value, ...)."""
