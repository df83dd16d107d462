"""Where the arrays of a problem lie: NumPy's memory, or torch's on a device."""

from __future__ import annotations

import functools
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradstep.formats import numpy_dtype

from .models import Shape

Array = NDArray[Any]


class Memory(ABC):
    """Makes arrays of one kind. What is common to NumPy's arrays and torch's tensors is used of both without asking which it is."""

    alignment: int
    """Bytes; that of the library's own arrays."""
    period: int
    """Elements after which random numbers repeat: speed depends on no value, and drawing more takes longer than measuring."""

    @abstractmethod
    def empty(self, size: int) -> Any:
        """Return so many bytes, aligned."""

    @abstractmethod
    def view(self, part: Any, dtype: str) -> Any:
        """Return bytes as numbers of a dtype."""

    @abstractmethod
    def adopt(self, numbers: Array, dtype: str) -> Any:
        """Return numbers of the host as an array in this memory."""

    def write(self, array: Any, numbers: Array, dtype: str) -> None:
        """Set `array`, of that dtype, to numbers of the host."""
        array[...] = self.adopt(numbers, dtype)

    def placed(self, wanted: Sequence[tuple[Shape, str]]) -> tuple[Any, list[Any]]:
        """Return memory for arrays of these shapes and dtypes, as bytes, and the arrays in it."""
        sizes = [math.prod(shape) * itemsize(dtype) for shape, dtype in wanted]
        *begins, total = itertools.accumulate((-(-size // self.alignment) * self.alignment for size in sizes), initial=0)
        arena = self.empty(total)
        places = zip(wanted, sizes, begins, strict=True)
        return arena, [self.view(arena[begin : begin + size], dtype).reshape(shape) for (shape, dtype), size, begin in places]


class HostMemory(Memory):
    """NumPy's arrays, aligned to 64 bytes as torch allocates them."""

    alignment = 64
    period = 1 << 18

    def empty(self, size: int) -> Array:
        memory = np.empty(size + self.alignment, np.uint8)
        start = -memory.ctypes.data % self.alignment
        return memory[start : start + size]

    def view(self, part: Any, dtype: str) -> Array:
        viewed: Array = part.view(numpy_dtype(dtype))
        return viewed

    def adopt(self, numbers: Array, dtype: str) -> Array:
        return numbers.astype(numpy_dtype(dtype))


class TorchMemory(Memory):
    """torch's tensors on a device, aligned as its allocator for CUDA does it."""

    alignment = 512
    period = 1 << 22

    def __init__(self, device: str) -> None:
        self._device = device

    def empty(self, size: int) -> Any:
        import torch

        return torch.empty(size, dtype=torch.uint8, device=self._device)

    def view(self, part: Any, dtype: str) -> Any:
        import torch

        return part.view(getattr(torch, dtype))

    def adopt(self, numbers: Array, dtype: str) -> Any:
        import torch

        return torch.from_numpy(numbers).to(getattr(torch, dtype)).to(self._device)


HOST = HostMemory()


@functools.cache
def itemsize(dtype: str) -> int:
    """Return the bytes of an element."""
    return 2 if dtype == "bfloat16" else np.dtype(dtype).itemsize


def as_numpy(array: Any) -> Array:
    """Return a NumPy array as it is, and a tensor as one on the host; bfloat16, which NumPy has not, as float32."""
    if isinstance(array, np.ndarray):
        return array
    plain = array.detach().cpu()
    copied: Array = (plain.float() if plain.is_floating_point() and plain.itemsize < 4 else plain).numpy()
    return copied
