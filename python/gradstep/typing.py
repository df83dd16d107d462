"""Types that gradstep's interfaces share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[np.float32] | NDArray[np.float64] | Any
"""A NumPy array, a torch tensor, or anything with the buffer protocol, DLPack or ``__cuda_array_interface__``, in CPU memory or on a
CUDA device; float64, float32, float16 or bfloat16."""

Arrays: TypeAlias = Array | Sequence[Array]
"""One array, or a sequence of arrays."""

Steps: TypeAlias = int | Sequence[int]
"""The number of a step, from 1; for a sequence of arrays, one for all or one for each."""

Params: TypeAlias = Array | Sequence[Array] | Mapping[str, Array] | Sequence[dict[str, Any]]
"""What a NumPy optimizer takes: an array, a sequence of arrays, a dict of names to arrays, or a list of group dicts."""

LearningRate: TypeAlias = float | Callable[[int], float]
"""A number, or a callable that takes the number of steps done so far (0 before the first) and returns one."""
