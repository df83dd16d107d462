"""Runs a function of a test module in a Python process of its own, for what may crash, fork or fill memory."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def run_in_child(function: Callable[..., None], *args: Any, timeout: float = 300, **environment: str) -> None:
    """Call `function`, which must be at the top level of its module, with `args`, whose `repr` must be Python."""
    call = f"{function.__name__}({', '.join(map(repr, args))})"
    code = f"from {function.__module__} import {function.__name__}; {call}; print('ran to its end')"
    process = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", code],
        cwd=ROOT,
        env={**os.environ, **environment},
        text=True,
        capture_output=True,
        timeout=timeout,
        check=False,
    )
    output = process.stdout + process.stderr
    assert process.returncode == 0, f"{call} ended with status {process.returncode}:\n{output}"
    assert "ran to its end" in process.stdout, f"{call} ended early:\n{output}"
