"""What tests of LAMB, LARS and NovoGrad share, whose factors follow from norms of whole tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from .cases import NORM_CASES, Case
from .format_cases import THE_THREE
from .stage_cases import SHAPES, make_grads, make_params
from .test_values import assert_same_bits

DTYPES = (np.float32, np.float64)

norm_cases = pytest.mark.parametrize("case", NORM_CASES, ids=lambda case: case.name)
the_three = pytest.mark.parametrize("case", THE_THREE, ids=lambda case: case.name)


def same(ours: Any, theirs: Any, what: str) -> None:
    assert_same_bits(np.asarray(ours), theirs, what)


def lists_of(case: Case, shapes: list[Any], dtype: Any) -> dict[str, list[Any]]:
    """States of all arrays, as the functions take them; what a number begins as does not matter."""
    arrays = {name: [np.zeros(shape, dtype) for shape in shapes] for name in case.states}
    return arrays | {name: [np.full(1, 7.0) for _ in shapes] for name in case.numbers}


def torch_params(torch: Any, dtype: Any) -> list[Any]:
    return [torch.nn.Parameter(torch.from_numpy(p)) for p in make_params(SHAPES, dtype)]


def torch_step(torch: Any, opt: Any, params: list[Any], dtype: Any, step: int) -> None:
    for p, g in zip(params, make_grads(SHAPES, dtype, step, {})[0][1], strict=True):
        p.grad = None if g is None else torch.from_numpy(g)
    opt.step()
