"""CUDA devices: which there are, and the stream that steps on them go to. What works on them: docs/gpu.md.

Importing this module loads nothing of CUDA: that happens with the first step of an array on a device, and with the first question
here.

>>> import gradstep
>>> gradstep.cuda.is_available() == (gradstep.cuda.device_count() > 0)
True
"""

from __future__ import annotations

import importlib
import operator
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from gradstep import _core

__all__ = ["describe", "device_count", "is_available", "stream"]

_given: ContextVar[int | None] = ContextVar("gradstep.cuda.stream", default=None)


def is_available() -> bool:
    """Return whether there is a device that steps can run on."""
    return device_count() > 0


def device_count() -> int:
    """Return the number of devices; 0 also where this build has no CUDA, or the machine no driver: `describe` says what is missing."""
    try:
        return _core.device_count()
    except RuntimeError:
        return 0


def describe(device: int = 0) -> str:
    """Return name, memory, compute capability and driver of a device, in a line.

    Args:
        device: its number.

    Raises:
        RuntimeError: if there is no such device, with the reason.
    """
    return _core.describe_device(device)


@contextmanager
def stream(stream: Any) -> Iterator[None]:
    """Give steps to a stream, inside a ``with`` block of this thread or task.

    Without it a step goes to the current stream of the library whose arrays the parameters are, torch's or CuPy's, and to the legacy
    default stream for others. The stream has to be one of the device that the parameters are on, and only one device may have any.
    Memory that the step uses has to stay allocated until the stream has passed it: torch's allocator knows nothing of a stream that
    is not torch's current one (``Tensor.record_stream`` tells it).

    Args:
        stream: an object with ``cuda_stream`` (torch), ``ptr`` (CuPy) or ``__cuda_stream__``, or the address of a ``cudaStream_t`` as
            an int: 0 or 1 for the legacy default stream, 2 for that of the thread.

    Raises:
        TypeError: for anything else.
        ValueError: for a negative number.

    Example:
        >>> import gradstep
        >>> with gradstep.cuda.stream(0):
        ...     pass  # opt.step(grads)
    """
    token = _given.set(_address_of(stream))
    try:
        yield
    finally:
        _given.reset(token)


def _address_of(stream: Any) -> int:
    for name in ("cuda_stream", "ptr"):
        if hasattr(stream, name):
            stream = getattr(stream, name)
            break
    else:
        if hasattr(stream, "__cuda_stream__"):
            _, stream = stream.__cuda_stream__()
    if isinstance(stream, bool) or not hasattr(stream, "__index__"):
        raise TypeError(
            f"stream: stream must be an int, or an object with cuda_stream, ptr or __cuda_stream__, got {type(stream).__name__}"
        )
    address = operator.index(stream)
    if address < 0:
        raise ValueError(f"stream: stream must be an address, got {address}")
    return address


# ---- for the engine -------------------------------------------------------------------------------------------------------


def _load_driver() -> Any:
    """Return the driver, a capsule.

    Raises:
        RuntimeError: if this build has none, or it can't be loaded.
    """
    return _load_extension().driver


def _load_extension() -> Any:
    try:
        return importlib.import_module("gradstep._cuda")
    except ModuleNotFoundError as error:
        if error.name != "gradstep._cuda":
            raise
        raise RuntimeError(
            "this build of gradstep has no CUDA: install it from source where nvcc is, with -Ccmake.define.GRADSTEP_CUDA=ON"
        ) from None
    except ImportError as error:
        raise RuntimeError(f"gradstep's CUDA extension can't be loaded: {error}") from None


def _streams(device: int, array: Any, devices: int) -> tuple[int, int]:
    """Return the stream for a step on a device, and the one on which the library of its arrays works.

    Args:
        device: its number.
        array: a parameter on it.
        devices: number of devices of the step.

    Raises:
        ValueError: if one stream is given for several devices.
    """
    of_library = _current_stream(device, array)
    given = _given.get()
    if given is None:
        return of_library, of_library
    if devices > 1:
        raise ValueError("cuda.stream: a stream is one of a single device, the parameters are on several")
    return given, of_library


def _current_stream(device: int, array: Any) -> int:
    torch, cupy = sys.modules.get("torch"), sys.modules.get("cupy")
    if torch is not None and isinstance(array, torch.Tensor):
        current = getattr(torch._C, "_cuda_getCurrentRawStream", None)  # a torch that was built with CUDA
        return int(current(device)) if current is not None else 0
    if cupy is not None and isinstance(array, cupy.ndarray):
        return int(cupy.cuda.get_current_stream(device).ptr)
    return 0


def _summary() -> str:
    """Return what there is, in a line."""
    try:
        build = _load_extension().build
        built = f"{build['cuda']}, for {build['architectures']}"
    except Exception as error:  # noqa: BLE001 - whatever is broken, this only tells of it
        return "no" if "has no CUDA" in str(error) else str(error)
    try:
        return "; ".join([built, *(f"cuda:{i} is {describe(i)}" for i in range(_core.device_count()))])
    except Exception as error:  # noqa: BLE001
        return f"{built}; {str(error).removeprefix('device_count: ')}"
