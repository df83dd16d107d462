"""What tests of states in files share: optimizers in a folder, what must lie there, and how opening is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gradstep

from .cases import Case
from .saving_cases import Numpy, assert_all_same, case_options
from .stage_cases import step_arguments


def in_files(opt: Any, folder: Path) -> None:
    """Assert that every array of a state is all of a file in `folder`, and no file is left over."""
    found = set()
    for state in opt.state.values():
        for name, value in state.items():
            if name != "step" and hasattr(value, "shape") and 0 not in value.shape:
                placed = opt._placed_at(opt._work, value)
                assert placed is not None, name
                found.add(placed.file.name)
    assert {path.name for path in folder.glob("*.state")} == found


def check_goes_on(face: Numpy, folder: Path, case: Case, options: dict[str, Any], dtype: str = "float32") -> None:
    """Two steps, flush, two steps, close; open and take two more: all as in memory."""
    of_constructor, _, _ = step_arguments(case_options(case, options))
    params, others = face.params(dtype=dtype), face.params(dtype=dtype)
    expected = face.make(case, params, **of_constructor)
    opt = face.make(case, others, **of_constructor, state_dir=folder)
    for o, p in ((expected, params), (opt, others)):
        face.step(o, p, (1, 2), options)
    assert_all_same(face, expected, params, opt, others)
    opt.flush()
    in_files(opt, folder)
    for o, p in ((expected, params), (opt, others)):
        face.step(o, p, (3, 4), options)
    opt.close()
    resumed = face.make(case, others, **of_constructor, state_dir=folder)
    in_files(resumed, folder)
    assert_all_same(face, expected, params, resumed, others)
    for o, p in ((expected, params), (resumed, others)):
        face.step(o, p, (5, 6), options)
    assert_all_same(face, expected, params, resumed, others)
    in_files(resumed, folder)
    resumed.close()
    shutil.rmtree(folder)


def some() -> dict[str, Any]:
    return {"a": np.linspace(0.5, 1.5, 30, dtype=np.float32), "b": np.ones((3, 4), np.float32)}


def opened(path: Path, steps: int = 0, **options: Any) -> Any:
    opt = gradstep.AdamW(some(), **options, state_dir=path)
    for _ in range(steps):
        opt.step(some())
    return opt


def refuse(path: Path, error: type[Exception], message: str, make: Any = None) -> None:
    """Assert that opening is refused, and leaves everything as it was."""
    before = {p.name: p.read_bytes() for p in path.iterdir() if p.is_file()}
    with pytest.raises(error) as caught:
        (make or (lambda: opened(path)))()
    assert message.format(path) in str(caught.value), str(caught.value)
    assert {p.name: p.read_bytes() for p in path.iterdir() if p.is_file()} == before
