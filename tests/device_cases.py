"""What tests of devices share: stand-ins for arrays on a device, whose memory is the host's, as that of the emulated devices is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from gradstep import _core


class DeviceArray:
    """An array on a device: as CuPy's, it has the CUDA array interface and nothing that NumPy could read it by."""

    def __init__(self, array: Any, device: int = 0, **interface: Any) -> None:
        self.host = np.asarray(array)
        self.device = SimpleNamespace(id=device)
        self.changes = interface

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        theirs = self.host.__array_interface__
        strides = None if self.host.flags.c_contiguous else self.host.strides
        interface = {name: theirs[name] for name in ("shape", "typestr", "data", "descr")}
        return {**interface, "strides": strides, "version": 3, "stream": None, **self.changes}

    def __array_namespace__(self) -> Any:
        id_of = self.device.id

        def empty_like(like: DeviceArray, dtype: Any = None) -> DeviceArray:
            return DeviceArray(np.empty_like(like.host, dtype=dtype), like.device.id)

        return SimpleNamespace(
            empty_like=empty_like,
            empty=lambda shape, dtype: DeviceArray(np.empty(shape, dtype), id_of),
            asarray=lambda array: DeviceArray(np.asarray(array), id_of),
        )

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise TypeError("implicit conversion to a NumPy array is not allowed")

    def __getitem__(self, key: Any) -> DeviceArray:
        return DeviceArray(self.host[key], self.device.id)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.host[key] = value.host if isinstance(value, DeviceArray) else value

    def __bool__(self) -> bool:
        return bool(self.host)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.host.shape

    @property
    def ndim(self) -> int:
        return self.host.ndim

    @property
    def dtype(self) -> Any:
        return self.host.dtype

    def reshape(self, shape: Any) -> DeviceArray:
        return DeviceArray(self.host.reshape(shape), self.device.id)

    def item(self) -> Any:
        return self.host.item()

    def get(self) -> Any:
        return self.host.copy()

    def copy(self) -> DeviceArray:
        return DeviceArray(self.host.copy(), self.device.id)


@pytest.fixture(name="emulated")
def emulated_fixture() -> Iterator[None]:
    """Devices that are emulated on the host."""
    _core.emulate_gpu(True)
    yield
    _core.emulate_gpu(False)


@contextmanager
def pretending(device: int) -> Iterator[None]:
    """Take arrays in CPU memory for ones on a device."""
    _core.set_pretend_device(device)
    try:
        yield
    finally:
        _core.set_pretend_device(-1)
