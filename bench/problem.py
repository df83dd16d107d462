"""The memory of a case: parameters, gradients and states, which all contenders share."""

from __future__ import annotations

import copy
import functools
import math
from pathlib import Path
from typing import Any

import numpy as np

from .formats import FLOAT32, Format
from .memory import HOST, Array, Memory
from .models import Shapes
from .rules import Rule


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
    """What a step works on. All tensors of one stream (parameters, gradients, a state) lie in one arena, aligned."""

    arenas: list[Any]
    """Memory as bytes: gradients, parameters, and what the rule alone keeps."""
    state: list[dict[str, Any]]
    """All arrays beside each parameter."""
    states: dict[str, list[Any]]
    """Those of the rule and of the chain, by name; of compressed ones the codes."""

    def __init__(self, rule: Rule, shapes: Shapes, form: Format, memory: Memory = HOST) -> None:
        self.rule = rule
        self.shapes = shapes
        self.form = form
        self.memory = memory
        wanted = [(shape, form.dtype) for shape in shapes]
        params, self.params = memory.placed(wanted)
        grads, self.grads = memory.placed(wanted)
        self.arenas = [grads, params]
        self._numbers = memory.view(grads, form.dtype), memory.view(params, form.dtype)
        self.fill_params()
        self.fill_grads(0)
        self.state = [{} for _ in shapes]
        for name in (*rule.states, *form.beside, *rule.chain.states):
            arena = self._add_state(name)
            if name not in rule.chain.states:
                self.arenas.append(arena)
        self.states = {name: [state[name] for state in self.state] for name in rule.arrays}

    def _add_state(self, name: str) -> Any:
        wanted = [
            (i, part, array) for i, shape in enumerate(self.shapes) for part, array in self.form.arrays(name, shape).items()
        ]
        wanted.sort(key=lambda one: one[1] != name)  # scales behind all codes
        arena, arrays = self.memory.placed([(array.shape, array.dtype) for _, _, array in wanted])
        arena[...] = 0
        for (i, part, array), made in zip(wanted, arrays, strict=True):
            self.state[i][part] = made
            if math.isnan(array.fill):
                made[...] = self.params[i]
        return arena

    @functools.cached_property
    def in_float32(self) -> Problem:
        """A problem of the same rule and shapes in float32 throughout."""
        return Problem(self.rule, self.shapes, FLOAT32, self.memory)

    def fill_params(self) -> None:
        """Set the parameters to normal random numbers."""
        _repeat(self._pattern(1), self._numbers[1])

    def fill_grads(self, step: int) -> None:
        """Set the gradients to normal random numbers, others for each `step`."""
        self._grad_pattern = self._pattern(2 + step, self.rule.chain.grad_unit)
        self.refill_grads()

    def set_grad(self, i: int, numbers: Array) -> None:
        """Set a gradient to numbers of the host."""
        self.memory.write(self.grads[i], numbers, self.form.dtype)

    def _pattern(self, seed: int, unit: float = 1.0) -> Any:
        numbers = np.random.default_rng(seed).standard_normal(min(len(self._numbers[0]), self.memory.period))
        return self.memory.adopt(unit * numbers, self.form.dtype)

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


def _repeat(pattern: Any, numbers: Any) -> None:
    for begin in range(0, len(numbers), len(pattern)):
        part = numbers[begin : begin + len(pattern)]
        part[...] = pattern[: len(part)]
