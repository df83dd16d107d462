"""The memory of a case: parameters, gradients and states, which all contenders share."""

from __future__ import annotations

import copy
import functools
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradstep.formats import numpy_dtype

from .formats import FLOAT32, Format
from .models import Shape, Shapes
from .rules import Rule

Array = NDArray[Any]

_ALIGNMENT = 64


def stream_bytes(rule: Rule, shapes: Shapes, form: Format) -> list[int]:
    """Return the bytes of gradients, parameters, and what a rule alone keeps of each parameter, stream by stream."""
    params = form.stream_bytes(shapes)
    return [params, params, *(form.stream_bytes(shapes, name) for name in (*rule.states, *form.beside))]


def moved_bytes(rule: Rule, shapes: Shapes, form: Format) -> int:
    """Return the bytes that a step has to move, at least."""
    read, *written = stream_bytes(rule, shapes, form)
    once = read + 2 * sum(written) if rule.optimizer else 0
    # What is read again, or stands around the rule: as many bytes as parameters and states have on average.
    return once + (rule.again + rule.chain.streams) * sum(written) // (1 + len(rule.states))


def memory_needed(rule: Rule, elements: int, form: Format) -> int:
    """Return the bytes that a case takes with all contenders: the shared arrays, optax's or those of float32, the NumPy expression's."""
    return elements * form.computing.itemsize * (2 * (2 + len(rule.arrays)) + len(rule.arrays) + 4)


def memory_available() -> float:
    """Return the bytes of memory that are free; infinity where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return math.inf
    return next((1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), math.inf)


class Problem:
    """What a step works on. All tensors of one stream (parameters, gradients, a state) lie in one arena, aligned to 64 bytes."""

    arenas: list[Array]
    """Memory as bytes: gradients, parameters, and what the rule alone keeps."""
    state: list[dict[str, Array]]
    """All arrays beside each parameter."""
    states: dict[str, list[Array]]
    """Those of the rule and of the chain, by name; of compressed ones the codes."""

    def __init__(self, rule: Rule, shapes: Shapes, form: Format) -> None:
        self.rule = rule
        self.shapes = shapes
        self.form = form
        kind = form.numpy
        params, self.params = _placed([(shape, kind) for shape in shapes])
        grads, self.grads = _placed([(shape, kind) for shape in shapes])
        self.arenas = [grads, params]
        self._numbers = grads.view(kind), params.view(kind)
        self.fill_params()
        self.fill_grads(0)
        self.state = [{} for _ in shapes]
        for name in (*rule.states, *form.beside, *rule.chain.states):
            arena = self._add_state(name)
            if name not in rule.chain.states:
                self.arenas.append(arena)
        self.states = {name: [state[name] for state in self.state] for name in rule.arrays}

    def _add_state(self, name: str) -> Array:
        wanted = [
            (i, part, array) for i, shape in enumerate(self.shapes) for part, array in self.form.arrays(name, shape).items()
        ]
        wanted.sort(key=lambda one: one[1] != name)  # scales behind all codes
        arena, arrays = _placed([(array.shape, numpy_dtype(array.dtype)) for _, _, array in wanted])
        arena[...] = 0
        for (i, part, array), made in zip(wanted, arrays, strict=True):
            self.state[i][part] = made
            if math.isnan(array.fill):
                made[...] = self.params[i]
        return arena

    @functools.cached_property
    def in_float32(self) -> Problem:
        """A problem of the same rule and shapes in float32 throughout."""
        return Problem(self.rule, self.shapes, FLOAT32)

    def fill_params(self) -> None:
        """Set the parameters to normal random numbers."""
        _repeat(_pattern(self._numbers[1], 1), self._numbers[1])

    def fill_grads(self, step: int) -> None:
        """Set the gradients to normal random numbers, others for each `step`."""
        unit = self.form.numpy.type(self.rule.chain.grad_unit)
        self._grad_pattern = unit * _pattern(self._numbers[0], 2 + step)
        self.refill_grads()

    def refill_grads(self) -> None:
        """Set the gradients to what `fill_grads` made last."""
        _repeat(self._grad_pattern, self._numbers[0])

    def alone(self) -> Problem:
        """Return the same arrays as a problem of the rule with nothing around it."""
        other = copy.copy(self)
        other.rule = self.rule.alone()
        kept = self.rule.chain.states
        other.state = [{name: array for name, array in state.items() if name not in kept} for state in self.state]
        other.states = {name: arrays for name, arrays in self.states.items() if name not in kept}
        return other


def _placed(wanted: Sequence[tuple[Shape, np.dtype[Any]]]) -> tuple[Array, list[Array]]:
    """Return memory for arrays of these shapes and dtypes, as bytes, and the arrays in it."""
    sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in wanted]
    *begins, total = itertools.accumulate((-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes), initial=0)
    memory = np.empty(total + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    arena = memory[start : start + total]
    places = zip(wanted, sizes, begins, strict=True)
    return arena, [arena[begin : begin + size].view(dtype).reshape(shape) for (shape, dtype), size, begin in places]


def _pattern(arena: Array, seed: int) -> Array:
    # Repeats after 2^18 numbers: speed depends on no value, and drawing as many as there are takes longer than measuring.
    return np.random.default_rng(seed).standard_normal(min(arena.size, 1 << 18)).astype(arena.dtype)


def _repeat(pattern: Array, arena: Array) -> None:
    for begin in range(0, arena.size, pattern.size):
        part = arena[begin : begin + pattern.size]
        part[...] = pattern[: part.size]
