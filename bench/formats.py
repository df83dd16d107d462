"""The storage formats that are measured: of which dtypes parameters, gradients and states are, and what a step rounds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from gradstep.formats import Array, arrays_of_state, numpy_dtype

from .models import Shape, Shapes

_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "int16": 2, "uint8": 1}
_BESIDE = {"kahan": "compensation", "master": "master", "split": "remainder"}


@dataclass(frozen=True)
class Format:
    """A combination of dtypes, and of keywords of the optimizers."""

    name: str
    about: str
    dtype: str
    """Of parameters and gradients."""
    state_dtype: str = ""
    """Of the states; empty: the one that a step computes in."""
    precision: str = "nearest"

    def __str__(self) -> str:
        return self.name

    @property
    def plain(self) -> bool:
        """Whether all arrays have the dtype in which a step computes."""
        return not self.options and self.dtype in ("float32", "float64")

    @property
    def uniform(self) -> bool:
        """Whether all arrays have the same dtype, with nothing kept beside them and rounding to nearest."""
        return self.precision == "nearest" and (self.state_dtype or self.computing.name) == self.dtype

    @property
    def compressed(self) -> bool:
        """Whether states are codes."""
        return self.state_dtype in ("q8", "q4")

    @property
    def numpy(self) -> np.dtype[Any]:
        """The dtype of parameters and gradients.

        Raises:
            ImportError: for bfloat16, if ml_dtypes is not installed.
        """
        return numpy_dtype(self.dtype)

    @property
    def computing(self) -> np.dtype[Any]:
        """The dtype in which a step computes."""
        return np.dtype(np.float64 if self.dtype == "float64" else np.float32)

    @property
    def options(self) -> dict[str, str]:
        """Keywords of the optimizers' constructors."""
        given = {"state_dtype": self.state_dtype} if self.state_dtype else {}
        return given | ({"precision": self.precision} if self.precision != "nearest" else {})

    @property
    def beside(self) -> tuple[str, ...]:
        """Name of the array that `precision` keeps beside each parameter, if there is one."""
        return (_BESIDE[self.precision],) if self.precision in _BESIDE else ()

    def arrays(self, name: str, shape: Shape) -> dict[str, Array]:
        """Return the arrays that state `name` of a parameter consists of."""
        return arrays_of_state(name, {"state_dtype": self.state_dtype or None}, self.dtype, shape, 0.0)

    def stream_bytes(self, shapes: Shapes, state: str = "") -> int:
        """Return the bytes of a state of parameters of these shapes; without a name, of the parameters."""
        if not state:
            return _BYTES[self.dtype] * sum(map(math.prod, shapes))
        arrays = [array for shape in shapes for array in self.arrays(state, shape).values()]
        return sum(_BYTES[array.dtype] * math.prod(array.shape) for array in arrays)


FLOAT32 = Format("float32", "float32 throughout: what all others are compared with", "float32")

DTYPES = {form.name: form for form in (FLOAT32, Format("float64", "float64 throughout", "float64"))}
"""All arrays of one dtype, in which a step computes."""

_STORED = (
    Format("bf16", "bfloat16 parameters and gradients, float32 states", "bfloat16"),
    Format("bf16-master", "the same, with float32 masters of the parameters", "bfloat16", precision="master"),
    Format("bf16-all", "bfloat16 throughout", "bfloat16", "bfloat16"),
    Format("bf16-stochastic", "the same, parameters rounded by chance", "bfloat16", "bfloat16", "stochastic"),
    Format("bf16-kahan", "the same, with what rounding takes from the parameters", "bfloat16", "bfloat16", "kahan"),
    Format("bf16-split", "the same, with the lower 16 bits of float32 parameters", "bfloat16", "bfloat16", "split"),
    Format("bf16-states", "float32 parameters and gradients, bfloat16 states", "float32", "bfloat16"),
    Format("q8", "float32 parameters and gradients, states of 8 bits", "float32", "q8"),
    Format("q4", "float32 parameters and gradients, states of 4 bits", "float32", "q4"),
    Format("bf16-q8", "bfloat16 parameters and gradients, states of 8 bits", "bfloat16", "q8"),
    Format("f16", "float16 parameters and gradients, float32 states", "float16"),
)

FORMATS = DTYPES | {form.name: form for form in _STORED}
