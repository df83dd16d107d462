"""What tests of checkpoints share: small parameters, and an optimizer of them saved and loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

import gradstep


def some(n: int = 2) -> list[Any]:
    return [np.linspace(0.5, 1.5, 3 + i, dtype=np.float32) for i in range(n)]


def saved(path: Path, **options: Any) -> Any:
    """An optimizer after a step, saved."""
    opt = gradstep.AdamW(dict(zip("ab", some(), strict=True)), **options)
    opt.step(dict(zip("ab", some(), strict=True)))
    opt.save(path)
    return opt


def load(path: Path, **options: Any) -> Any:
    return gradstep.AdamW.load(path, dict(zip("ab", some(), strict=True)), **options)
