"""What checkpoints and state files need to know of tensors: see `gradstep.arrays.Arrays`."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from gradstep import _core
from gradstep.files import Bytes
from gradstep.saved import NUMBERS, read_count, read_float

_CARRIERS = {"bfloat16": "int16"}  # what NumPy has of the same size


class TorchArrays:
    """Tensors."""

    interface = "torch"

    def is_array(self, value: Any) -> bool:
        """Return whether `value` is a tensor."""
        return isinstance(value, torch.Tensor)

    def dtype_of(self, array: torch.Tensor) -> str:
        """Return the dtype."""
        return str(array.dtype).removeprefix("torch.")

    def shape_of(self, array: torch.Tensor) -> tuple[int, ...]:
        """Return the shape."""
        return tuple(array.shape)

    def strides_of(self, array: torch.Tensor) -> tuple[int, ...]:
        """Return the strides in bytes."""
        return tuple(stride * array.element_size() for stride in array.stride())

    def address_of(self, array: torch.Tensor) -> int:
        """Return where the first element lies."""
        return array.data_ptr()

    def bytes_of(self, array: torch.Tensor) -> Bytes:
        """Return the elements in the order of C."""
        plain = array.detach().resolve_conj().resolve_neg()
        in_order: Bytes = plain.to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy()
        return in_order

    def room_in(self, array: torch.Tensor) -> Bytes | None:
        """Return the memory, if it has the order of C and is the CPU's."""
        if array.device.type != "cpu" or not array.is_contiguous():
            return None
        return self.bytes_of(array)

    def flat(self, dtype: str, size: int) -> torch.Tensor:
        """Return a new tensor of one dimension."""
        return torch.empty(size, dtype=getattr(torch, dtype))

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Write the elements of `source` into `target`."""
        target.detach().copy_(source.reshape(target.shape))

    def over(self, memory: Any, dtype: str, shape: tuple[int, ...], strides: tuple[int, ...]) -> torch.Tensor:
        """Return the tensor that lies in `memory`."""
        array: np.ndarray[Any, Any] = np.ndarray(shape, _CARRIERS.get(dtype, dtype), memory, strides=strides)
        return torch.from_numpy(array).view(getattr(torch, dtype))

    def number(self, what: str, name: str, value: Any, param: torch.Tensor) -> Any:
        """Return step counts as a tensor of float64, other counts as int, norms as float, others as they are.

        Of a parameter on a device all of these numbers are tensors beside it.
        """
        if name not in NUMBERS:
            return value
        read = read_count(what, value) if isinstance(NUMBERS[name], int) else read_float(what, value)
        on_device = _core.device_of(param) >= 0
        if name == "step" or on_device:
            return torch.tensor(read, dtype=torch.float64, device=param.device if on_device else "cpu")
        return read
