"""Instruction set, threads and denormals: what gradstep uses on this machine, and how to choose.

The environment is read once, on import: ``GRADSTEP_ISA`` (a name from `isas`) and ``GRADSTEP_NUM_THREADS`` (an integer). The
attribute ``denormals`` is ``"flush"`` or ``"keep"`` and may be assigned: whether numbers too small for the normal range (under
1.2e-38 in float32, 2.2e-308 in float64) become zero inside the kernels. Keeping them can make a step ten times slower.

No choice made here changes a result, except that of ``denormals`` for such numbers.

>>> import gradstep
>>> gradstep.config.denormals
'flush'
>>> gradstep.config.isa() in gradstep.config.isas()
True
"""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path
from types import ModuleType

from gradstep import _core, cuda

__all__ = ["denormals", "isa", "isas", "num_threads", "set_isa", "set_num_threads", "show"]

denormals: str
"""``"flush"`` (the default) or ``"keep"``."""

_DENORMALS = {"flush": True, "keep": False}


def isas() -> list[str]:
    """Return the names of the instruction sets that this processor can run, the widest last."""
    return _core.isas()


def isa() -> str:
    """Return the name of the instruction set in use. By default it is the widest."""
    return _core.isa()


def set_isa(name: str) -> None:
    """Use another instruction set from the next step on. Results are the same bits on each.

    Raises:
        ValueError: if `name` is not one of `isas`.
    """
    if not _core.set_isa(name):
        raise ValueError(f"set_isa: name must be one of {', '.join(isas())}, got {name!r}")


def num_threads() -> int:
    """Return how many threads a large step may use, the caller's included.

    By default that is the number of processors that the process may run on, or what its control group grants it, or
    ``OMP_NUM_THREADS``, whichever is least.
    """
    return _core.num_threads()


def set_num_threads(n: int) -> None:
    """Use up to `n` threads from the next step on. Results are the same bits for any number.

    Raises:
        TypeError: if `n` is not an integer.
        ValueError: if `n` is not from 1 to 4096.
    """
    if type(n) is not int:
        raise TypeError(f"set_num_threads: n must be an int, got {n!r}")
    if not 1 <= n <= 4096:
        raise ValueError(f"set_num_threads: n must be from 1 to 4096, got {n}")
    _core.set_num_threads(n)


def show() -> None:
    """Print version, build, instruction sets, threads and denormals."""
    for name, value in describe().items():
        print(f"{name + ':':<20} {value}")


def describe() -> dict[str, str]:
    """Return what `show` prints."""
    return {
        "gradstep": _core.__version__,
        "compiler": _core.build["compiler"],
        "build type": _core.build["build_type"],
        "flags": _core.build["flags"],
        "pybind11": _core.build["pybind11"],
        "instruction sets": ", ".join(name + (" (in use)" if name == isa() else "") for name in isas()),
        "threads": str(num_threads()),
        "denormals": sys.modules[__name__].denormals,
        "CUDA": cuda._summary(),
    }


def _cgroup_cpus(root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> float:
    """Return how many processors the process's control group and those above it grant; infinity if they don't limit it."""
    limit = math.inf
    try:
        paths = [line.split(":", 2) for line in membership.read_text().splitlines()]
    except OSError:
        return limit
    for _, controllers, path in paths:
        v2 = controllers == ""
        if not v2 and "cpu" not in controllers.split(","):
            continue
        base = root if v2 else root / "cpu"
        group = base / path.lstrip("/")
        for folder in (group, *group.parents):
            try:
                if v2:
                    quota, period = (folder / "cpu.max").read_text().split()
                else:
                    quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
                if quota != "max" and float(quota) > 0:
                    limit = min(limit, float(quota) / float(period))
            except (OSError, ValueError):
                pass
            if folder == base:
                break
    return limit


def _default_threads() -> int:
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS and Windows
    processors = len(affinity(0)) if affinity else (os.cpu_count() or 1)
    # Launchers that start a process for each processor tell it so by this variable, which torch and BLAS libraries follow.
    shared = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    return max(1, math.ceil(min(processors, _cgroup_cpus(), int(shared) if shared.isdecimal() and int(shared) else math.inf)))


def _read_environment() -> None:
    threads = os.environ.get("GRADSTEP_NUM_THREADS")
    if threads is None:
        set_num_threads(_default_threads())
    elif threads.isdecimal() and 1 <= int(threads) <= 4096:
        set_num_threads(int(threads))
    else:
        raise ValueError(f"GRADSTEP_NUM_THREADS must be an integer from 1 to 4096, got {threads!r}")
    name = os.environ.get("GRADSTEP_ISA")
    if name is not None and not _core.set_isa(name):
        raise ValueError(f"GRADSTEP_ISA must be one of {', '.join(isas())}, got {name!r}")


class _Config(ModuleType):
    """The type of this module: `denormals` is an attribute that the engine holds."""

    @property
    def denormals(self) -> str:
        return "flush" if _core.flush_denormals() else "keep"

    @denormals.setter
    def denormals(self, value: str) -> None:
        if value not in _DENORMALS:
            raise ValueError(f'denormals must be "flush" or "keep", got {value!r}')
        _core.set_flush_denormals(_DENORMALS[value])


sys.modules[__name__].__class__ = _Config
_read_environment()
