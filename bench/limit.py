"""The loop without math: over which pieces of memory it goes, so that it moves the bytes of a rule and computes nothing."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

from gradstep import _core

from .formats import Format
from .models import Shapes
from .problem import Problem, stream_bytes
from .rules import Rule

_MOST = 5  # outputs of a loop, which has one input
_LEAST = 1 / 64  # of the gradients: what is smaller, padding in the main, is left out


class _Loop(NamedTuple):
    """Pieces of memory, all of one size."""

    outputs: Sequence[tuple[int, int]]
    """Those that are read and written: stream, first byte."""
    begin: int
    """First byte of the gradients, which are read."""
    size: int


def _cut(written: Sequence[int], read: int) -> list[_Loop]:
    """Return the loops over streams of so many bytes. Gradients are read anew for each five pieces that go along with them."""
    pieces = [(i, first, min(read, size - first)) for i, size in enumerate(written) for first in range(0, size, read)]
    loops, begin = [], 0
    for end in sorted({size for _, _, size in pieces}):
        outputs = [(i, first + begin) for i, first, size in pieces if size >= end]
        if end - begin >= _LEAST * read:
            loops += [_Loop(outputs[k : k + _MOST], begin, end - begin) for k in range(0, len(outputs), _MOST)]
        begin = end
    return loops


def limit_bytes(rule: Rule, shapes: Shapes, form: Format) -> int:
    """Return the bytes that the loop without math moves: those of the rule, with nothing around it."""
    read, *written = stream_bytes(rule, shapes, form)
    return sum((2 * len(loop.outputs) + 1) * loop.size for loop in _cut(written, read))


def loops(problem: Problem) -> list[Callable[[], None]]:
    """Return the loops over a problem's memory."""
    read, *written = problem.arenas
    made: list[Callable[[], None]] = []
    for loop in _cut([arena.size for arena in written], read.size):
        kind = problem.form.computing
        outputs = [written[i][first : first + loop.size].view(kind) for i, first in loop.outputs]
        inputs = [read[loop.begin : loop.begin + loop.size].view(kind)]
        made.append(functools.partial(_core.touch, outputs, inputs))
    return made
