"""What a result depends on besides the code: the machine, the versions, the configuration."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import time
from pathlib import Path
from typing import Any

from gradstep import config

_PACKAGES = (
    "gradstep", "numpy", "torch", "triton", "numba", "jax", "optax", "deepspeed", "pytorch_optimizer", "apex", "bitsandbytes", "torchao",
)  # fmt: skip


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Return the name of the processor."""
    try:
        found = re.search(r"^(?:model name|Model)\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def caches(folder: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> dict[str, int]:
    """Return the bytes of the data caches that the first core has or shares, such as {"L1": 49152, ...}; {} if unknown."""
    sizes = {}
    for index in sorted(folder.glob("index*")):
        try:
            level, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
        except OSError:
            continue
        match = re.fullmatch(r"(\d+)([KMG]?)", size)
        if kind != "Instruction" and match:
            sizes[f"L{level}"] = int(match[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[match[2]]
    return sizes


def memory() -> int | None:
    """Return the bytes of memory; None if unknown."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


def busy_cores(seconds: float = 0.2, stat: Path = Path("/proc/stat")) -> float | None:
    """Return how many cores other programs keep busy now, watching for some time; None if unknown."""

    def times() -> tuple[int, int]:
        fields = [int(field) for field in stat.read_text().split("\n", 1)[0].split()[1:9]]
        return sum(fields), fields[3] + fields[4]  # all, and idle or waiting for a device

    try:
        before = times()
        time.sleep(seconds)
        after = times()
    except (OSError, IndexError, ValueError):
        return None
    passed = after[0] - before[0]
    return (os.cpu_count() or 1) * (1 - (after[1] - before[1]) / passed) if passed > 0 else None


def machine() -> dict[str, Any]:
    """Return the description of the machine. It names no host and no user."""
    return {
        "processor": processor(),
        "architecture": platform.machine(),
        "system": platform.system(),
        "cores": os.cpu_count(),
        "caches": caches(),
        "memory": memory(),
    }


def versions() -> dict[str, str | None]:
    """Return the versions of Python and of the packages that take part; None for those that are not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def configuration() -> dict[str, Any]:
    """Return gradstep's configuration and build."""
    return {**config.describe(), "isa": config.isa(), "threads": config.num_threads()}
