"""What checkpoints and state files need to know of arrays: the same questions, of NumPy's arrays and of torch's tensors."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from gradstep import device_arrays
from gradstep.files import Bytes
from gradstep.formats import numpy_dtype
from gradstep.saved import NUMBERS, read_count, read_float


class Arrays(Protocol):
    """The arrays of one face."""

    interface: str
    """Name of the face."""

    def is_array(self, value: Any) -> bool:
        """Return whether `value` is such an array."""

    def dtype_of(self, array: Any) -> str:
        """Return the dtype as NumPy and torch spell it."""

    def shape_of(self, array: Any) -> tuple[int, ...]:
        """Return the shape."""

    def strides_of(self, array: Any) -> tuple[int, ...]:
        """Return the strides in bytes."""

    def address_of(self, array: Any) -> int:
        """Return where the first element lies."""

    def bytes_of(self, array: Any) -> Bytes:
        """Return the elements in the order of C: the memory itself if it has them in this order on the CPU, else a copy."""

    def room_in(self, array: Any) -> Bytes | None:
        """Return the memory that `bytes_of` returns if that is no copy, else None."""

    def flat(self, dtype: str, size: int) -> Any:
        """Return a new array of one dimension on the CPU, of anything."""

    def copy(self, target: Any, source: Any) -> None:
        """Write the elements of `source` into `target`, each in the order of C."""

    def over(self, memory: Any, dtype: str, shape: tuple[int, ...], strides: tuple[int, ...]) -> Any:
        """Return the array that lies in `memory`, an object with the buffer protocol."""

    def number(self, what: str, name: str, value: Any, param: Any) -> Any:
        """Return a number as the state `name` of a parameter: of one on a device, on the device.

        Raises:
            ValueError: if it is none that the state can have, named by `what`.
        """


class NumpyArrays:
    """Those of NumPy, and of others where parameters are on a device."""

    interface = "numpy"

    def is_array(self, value: Any) -> bool:
        """Return whether `value` is an array; NumPy's scalars are numbers."""
        return isinstance(value, np.ndarray) or device_arrays.has_interface(value)

    def dtype_of(self, array: Any) -> str:
        """Return the dtype; one of another byte order with its sign."""
        if device_arrays.is_on_device(array):
            return device_arrays.dtype_of(array)
        dtype = np.asarray(array).dtype  # parameters may be others' arrays
        return str(dtype.name if dtype.isnative else dtype.str)

    def shape_of(self, array: Any) -> tuple[int, ...]:
        """Return the shape."""
        return tuple(array.shape)

    def strides_of(self, array: Any) -> tuple[int, ...]:
        """Return the strides in bytes."""
        return tuple(array.strides)

    def address_of(self, array: Any) -> int:
        """Return where the first element lies."""
        return int(array.__array_interface__["data"][0])

    def bytes_of(self, array: Any) -> Bytes:
        """Return the elements in the order of C."""
        host = device_arrays.to_host(array) if device_arrays.is_on_device(array) else array
        return np.ascontiguousarray(host).reshape(-1).view(np.uint8)

    def room_in(self, array: Any) -> Bytes | None:
        """Return the memory, if it has the order of C and is the CPU's."""
        if device_arrays.is_on_device(array):
            return None
        return array.reshape(-1).view(np.uint8) if array.flags.c_contiguous else None

    def flat(self, dtype: str, size: int) -> Any:
        """Return a new array of one dimension."""
        return np.empty(size, numpy_dtype(dtype))

    def copy(self, target: Any, source: Any) -> None:
        """Write the elements of `source` into `target`."""
        if device_arrays.is_on_device(target):
            device_arrays.assign(target, source.reshape(target.shape))
        else:
            target[...] = device_arrays.to_host(source).reshape(target.shape)

    def over(self, memory: Any, dtype: str, shape: tuple[int, ...], strides: tuple[int, ...]) -> Any:
        """Return the array that lies in `memory`."""
        return np.ndarray(shape, numpy_dtype(dtype), memory, strides=strides)

    def number(self, what: str, name: str, value: Any, param: Any) -> Any:
        """Return counts as int, norms as float, on a device both as an array; others as they are."""
        if name not in NUMBERS:
            return value
        read = read_count(what, value) if isinstance(NUMBERS[name], int) else read_float(what, value)
        return device_arrays.number(read, param) if device_arrays.is_on_device(param) else read
