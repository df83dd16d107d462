"""Arrays on devices that come by DLPack: capsules of NumPy's arrays that say they were elsewhere."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest

import gradstep
from gradstep import _core

from .device_cases import emulated_fixture

__all__ = ["emulated_fixture"]

CPU, CUDA, HOST, ROCM, MANAGED = 1, 2, 3, 10, 13
pytestmark = pytest.mark.usefixtures("emulated")

_pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
_pointer_of.restype, _pointer_of.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]


def moved(capsule: Any, name: bytes, kind: int, device: int) -> Any:
    """The capsule, with another device in its tensor."""
    at = _pointer_of(capsule, name) + (32 if name == b"dltensor_versioned" else 0) + 8
    ctypes.c_int32.from_address(at).value = kind
    ctypes.c_int32.from_address(at + 4).value = device
    return capsule


class Exporter:
    """An array that only DLPack reads."""

    keywords: tuple[str, ...] = ("stream", "max_version")

    def __init__(self, array: Any, kind: int = CUDA, device: int = 0) -> None:
        self.array, self.kind, self.device = array, kind, device
        self.asked: list[dict[str, Any]] = []

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.kind, self.device

    def __dlpack__(self, **keywords: Any) -> Any:
        self.asked.append(keywords)
        if not set(keywords) <= set(self.keywords):
            raise TypeError("unexpected keyword")
        if "max_version" in keywords:
            return moved(self.array.__dlpack__(max_version=(1, 0)), b"dltensor_versioned", self.kind, self.device)
        return moved(self.array.__dlpack__(), b"dltensor", self.kind, self.device)


class OldExporter(Exporter):
    keywords = ("stream",)


class OlderExporter(Exporter):
    keywords = ()


@pytest.mark.parametrize(("kind", "place"), [(CPU, -1), (HOST, -1), (CUDA, 1), (MANAGED, 1)])
def test_where_an_array_is(kind: int, place: int) -> None:
    assert _core.device_of(Exporter(np.ones(3), kind, 1)) == place
    assert _core.devices_of([Exporter(np.ones(3), kind, 1), np.ones(3)]) == {place, -1}


def test_a_step() -> None:
    ours, theirs, g = np.ones(50, np.float32), np.ones(50, np.float32), np.linspace(-1, 1, 50, dtype=np.float32)
    average, other = np.zeros_like(ours), np.zeros_like(ours)
    param = Exporter(ours)
    gradstep.lion_(param, OldExporter(g), exp_avg=Exporter(average))
    gradstep.lion_(theirs, g, exp_avg=other)
    assert np.array_equal(ours, theirs) and np.array_equal(average, other)
    assert param.asked == [{"max_version": (1, 0), "stream": -1}]  # no stream is to wait for another


def test_owners_of_other_ages() -> None:
    for cls, asked in (
        (OldExporter, [{"max_version": (1, 0), "stream": -1}, {"stream": -1}]),
        (OlderExporter, [{"max_version": (1, 0), "stream": -1}, {"stream": -1}, {"max_version": (1, 0)}, {}]),
    ):
        exporter = cls(np.ones(3))
        assert _core.device_of(exporter) == 0
        assert exporter.asked == asked
    on_host = OlderExporter(np.ones(3), CPU)
    assert _core.device_of(on_host) == -1 and on_host.asked == [{"max_version": (1, 0)}, {}]


def test_refused() -> None:
    with pytest.raises(ValueError) as caught:
        gradstep.sgd_(Exporter(np.ones(3), ROCM), Exporter(np.ones(3), ROCM), lr=0.1)
    assert str(caught.value) == (
        "sgd_: param is on a device of DLPack's type 10: gradstep updates arrays in CPU memory and on CUDA devices"
    )
    with pytest.raises(ValueError, match="sgd_: param is read-only"):
        gradstep.sgd_(OldExporter(np.ones(3)), Exporter(np.ones(3)), lr=0.1)
