"""Arrays on devices, of whatever library: making them, filling them, bringing them to the host.

NumPy's own are never asked. Of others the library is found by ``__array_namespace__``, or is the module that the type comes from: CuPy,
torch, and what follows the array API standard.
"""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np

from gradstep import _core
from gradstep.formats import numpy_dtype


def is_on_device(array: Any) -> bool:
    """Return whether an array is on a CUDA device."""
    return not isinstance(array, np.ndarray) and _core.device_of(array) >= 0


def has_interface(value: Any) -> bool:
    """Return whether `value` is an array of another library than NumPy."""
    # In this order: of a tensor that requires grad, torch has no CUDA array interface but an error.
    return not isinstance(value, (np.ndarray, np.generic)) and (
        hasattr(value, "__dlpack__") or hasattr(value, "__cuda_array_interface__")
    )


def dtype_of(array: Any) -> str:
    """Return the dtype as NumPy and torch spell it."""
    dtype = array.dtype
    return str(getattr(dtype, "name", dtype)).removeprefix("torch.")


def empty(shape: tuple[int, ...], dtype: str, like: Any) -> Any:
    """Return a new array on the device of `like`, of its library; of its shape also in its order in memory.

    Raises:
        TypeError: if nothing is known of the library.
    """
    library = _library_of(like)
    kind = getattr(library, dtype, None) or numpy_dtype(dtype)
    with _on_device_of(like):
        if shape == tuple(like.shape):
            return library.empty_like(like, dtype=kind)
        try:
            return library.empty(shape, dtype=kind, device=like.device)
        except TypeError:  # CuPy's goes by the current device
            return library.empty(shape, dtype=kind)


def number(value: float, like: Any) -> Any:
    """Return an array of one number, in double, on the device of `like`."""
    made = empty((), "float64", like)
    assign(made, value)
    return made


def assign(target: Any, source: Any) -> None:
    """Write the elements of `source`, an array or a number, into `target`."""
    with _on_device_of(target):
        if isinstance(source, np.ndarray):
            source = _library_of(target).asarray(source)
        _plain(target)[...] = _plain(source)


def exchange(one: Any, other: Any) -> None:
    """Exchange the elements of two arrays of the same shape and dtype."""
    one, other = _plain(one), _plain(other)
    kept = empty(tuple(one.shape), dtype_of(one), one)
    assign(kept, one)
    assign(one, other)
    assign(other, kept)


def to_host(array: Any) -> np.ndarray[Any, Any]:
    """Return the elements as a NumPy array."""
    if isinstance(array, np.ndarray):
        return array
    if hasattr(array, "get"):  # CuPy's
        host: np.ndarray[Any, Any] = array.get()
    elif hasattr(array, "cpu"):  # torch's
        host = _plain(array).cpu().numpy()
    else:
        host = np.from_dlpack(array, device="cpu", copy=True)
    return host


def _library_of(array: Any) -> Any:
    if hasattr(array, "__array_namespace__"):
        return array.__array_namespace__()
    library = sys.modules.get(type(array).__module__.partition(".")[0])
    if hasattr(library, "empty_like") and hasattr(library, "empty"):
        return library
    raise TypeError(
        f"arrays like {type(array).__module__}.{type(array).__qualname__} can't be made: it has no __array_namespace__"
    )


def _plain(array: Any) -> Any:
    """Return the memory of this process, on which autograd has no eye."""
    array = array.detach() if hasattr(array, "detach") else array
    return array.to_local() if hasattr(array, "to_local") else array


def _on_device_of(array: Any) -> AbstractContextManager[Any]:
    device: Any = getattr(array, "device", None)
    context: AbstractContextManager[Any] = device if hasattr(device, "__enter__") else nullcontext()
    return context
