"""Sharing torch's threads, so that a step does not have to compete with them."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import torch

from gradstep import _core


def share_torch_threads() -> bool:
    """Run large steps on the OpenMP threads that torch's operations run on, where torch runs on GNU's OpenMP.

    Those threads go on spinning for some milliseconds after each operation. A thread of ours would have to share a processor with
    one of them; handed the same threads, a step starts at once.

    Returns:
        Whether there are such threads to share.
    """
    if not sys.platform.startswith("linux"):
        return False
    folder = Path(torch.__file__).parent
    homes = (folder / "lib", folder.parent / "torch.libs")
    for line in Path("/proc/self/maps").read_text().splitlines():
        path = Path(line.split(maxsplit=5)[-1])
        if path.name.startswith("libgomp") and path.parent in homes:
            library = ctypes.CDLL(str(path))  # loaded by torch already: this only asks for its address
            address = ctypes.cast(library.GOMP_parallel, ctypes.c_void_p).value
            _core.set_openmp(address or 0)
            return True
    return False
