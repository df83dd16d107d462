"""The memory of a case: parameters, gradients and states, which all contenders share."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .models import Shapes
from .rules import Rule

Array = NDArray[Any]

_ALIGNMENT = 64


def _arena(items: int, dtype: np.dtype[Any]) -> Array:
    memory = np.empty(items * dtype.itemsize + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + items * dtype.itemsize].view(dtype)


def _rounded(shape: tuple[int, ...], dtype: np.dtype[Any]) -> int:
    unit = _ALIGNMENT // dtype.itemsize
    return -(-math.prod(shape) // unit) * unit


def moved_bytes(rule: Rule, elements: int, dtype: np.dtype[Any]) -> int:
    """Return the bytes that a step has to move, at least."""
    return elements * dtype.itemsize * rule.streams


def memory_needed(rule: Rule, elements: int, dtype: np.dtype[Any]) -> int:
    """Return the bytes that a case takes with all contenders: the shared arrays, optax's, the NumPy expression's."""
    return elements * dtype.itemsize * (2 * (2 + len(rule.arrays)) + len(rule.arrays) + 4)


def memory_available() -> float:
    """Return the bytes of memory that are free; infinity where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return math.inf
    return next((1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), math.inf)


class Problem:
    """What a step works on. All tensors of one stream (parameters, gradients, a state) lie in one arena, aligned to 64 bytes."""

    def __init__(self, rule: Rule, shapes: Shapes, dtype: np.dtype[Any]) -> None:
        self.rule = rule
        self.shapes = shapes
        self.dtype = dtype
        items = sum(_rounded(shape, dtype) for shape in shapes)
        self.param_arena, self.grad_arena, *self.state_arenas = (_arena(items, dtype) for _ in range(2 + len(rule.arrays)))
        self.params = self._tensors(self.param_arena)
        self.grads = self._tensors(self.grad_arena)
        self.states = {name: self._tensors(arena) for name, arena in zip(rule.arrays, self.state_arenas, strict=True)}
        self.fill_params()
        self.fill_grads(0)
        for name, arena in zip(rule.arrays, self.state_arenas, strict=True):
            arena[...] = self.param_arena if name == "slow" else 0

    def _tensors(self, arena: Array) -> list[Array]:
        tensors, begin = [], 0
        for shape in self.shapes:
            tensors.append(arena[begin : begin + math.prod(shape)].reshape(shape))
            begin += _rounded(shape, self.dtype)
        return tensors

    def fill_params(self) -> None:
        """Set the parameters to normal random numbers."""
        _repeat(_pattern(self.param_arena, 1), self.param_arena)

    def fill_grads(self, step: int) -> None:
        """Set the gradients to normal random numbers, others for each `step`."""
        unit = self.grad_arena.dtype.type(self.rule.chain.grad_unit)
        self._grad_pattern = unit * _pattern(self.grad_arena, 2 + step)
        self.refill_grads()

    def refill_grads(self) -> None:
        """Set the gradients to what `fill_grads` made last."""
        _repeat(self._grad_pattern, self.grad_arena)

    def alone(self) -> Problem:
        """Return the same arrays as a problem of the rule with nothing around it."""
        other = copy.copy(self)
        other.rule = self.rule.alone()
        other.states = {name: self.states[name] for name in self.rule.states}
        other.state_arenas = self.state_arenas[: len(self.rule.states)]
        return other


def _pattern(arena: Array, seed: int) -> Array:
    # Repeats after 2^18 numbers: speed depends on no value, and drawing as many as there are takes longer than measuring.
    return np.random.default_rng(seed).standard_normal(min(arena.size, 1 << 18)).astype(arena.dtype)


def _repeat(pattern: Array, arena: Array) -> None:
    for begin in range(0, arena.size, pattern.size):
        part = arena[begin : begin + pattern.size]
        part[...] = pattern[: part.size]
