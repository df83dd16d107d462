"""A large copy on the device, which shows the limit of its memory."""

from __future__ import annotations

from typing import Any

from ..formats import Format
from ..models import Shapes
from ..problem import Problem
from ..rules import Rule
from .base import Contender, Run


class DeviceCopy(Contender):
    """torch's `copy_` from one buffer to another, both far larger than any cache. They are made once, and kept."""

    name = "copy"
    about = "torch's copy_ of a large buffer on the device, read and written: the limit of its memory"
    package = "torch"
    is_limit = True

    def __init__(self, size: int = 2 << 30) -> None:
        self._size = size
        self._buffers: list[Any] = []

    @property
    def wanted(self) -> int:
        """How many bytes it has still to take."""
        return 0 if self._buffers else 2 * self._size

    def prepare(self, problem: Problem) -> Run:
        if not self._buffers:
            self._buffers = [problem.memory.empty(self._size).random_() for _ in range(2)]  # zeros might be copied faster
        source, target = self._buffers
        return Run(lambda: target.copy_(source), lambda: problem.params)

    def moved_bytes(self, rule: Rule, shapes: Shapes, form: Format) -> int:
        return 2 * self._size
