"""Norms: the tree of docs/stages.md to the last bit, close to NumPy in float64, finite wherever the norm is; and clipping by them."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest

import gradstep
from gradstep import _core, config

from .cases import gradients, parameters
from .stage_references import clip_factor, global_norm
from .test_layouts import LAYOUTS
from .test_values import assert_same_bits, dtypes

SIZES = [1, 2, 31, 32, 33, 63, 65, 1000, 1023, 1024, 1025, 2049, 16_383, 16_384, 16_385, 33_000, 100_003]
SHAPES = [(3, 7), (), (0, 4), (70_001,), (130, 1030), (2, 3, 5, 5), (1, 20_000), (5470, 3)]


def exact_norm(arrays: list[Any]) -> float:
    """By NumPy in float64, scaled so that no square overflows."""
    largest = max((float(np.abs(a).max()) for a in arrays if a.size), default=0.0)
    if largest == 0 or not math.isfinite(largest):
        return largest
    return largest * math.sqrt(math.fsum(float(np.square(a.astype(np.float64) / largest).sum()) for a in arrays))


def many(dtype: Any) -> list[Any]:
    return [np.array(gradients(shape, dtype, i)) for i, shape in enumerate(SHAPES)]


@dtypes
def test_norm_of_one_array_of_any_size(dtype: Any, isa: str) -> None:
    for size in SIZES:
        g = gradients((size,), dtype, size)
        assert gradstep.global_norm([g]) == global_norm([g]), size
        assert gradstep.global_norm([g]) == pytest.approx(exact_norm([g]), rel=1e-13), size


def test_norm_of_more_blocks_than_are_added_in_one_go(isa: str) -> None:
    g = gradients((9_000_007,), np.float32, 3)  # 550 blocks
    assert gradstep.global_norm([g]) == global_norm([g])


@dtypes
def test_norm_of_many_arrays_for_any_number_of_threads(dtype: Any, isa: str) -> None:
    grads = many(dtype)
    expected = global_norm(grads)
    assert expected == pytest.approx(exact_norm(grads), rel=1e-13)
    for threads in (1, 2, 3, 7):
        config.set_num_threads(threads)
        assert gradstep.global_norm(grads) == expected, threads


@pytest.mark.parametrize("layout", LAYOUTS)
def test_norms_in_any_layout(layout: str, isa: str) -> None:
    """Arrays are summed as they lie in memory."""
    for shape in ((5, 67, 71), (150, 131)):
        g = LAYOUTS[layout](gradients(shape, np.float32, 1))
        assert gradstep.global_norm([g]) == global_norm([g])


@pytest.mark.parametrize(
    ("dtype", "value"), [("f4", 1e19), ("f4", 3e38), ("f4", 1e-37), ("f4", 6e-5), ("f4", 65504), ("f8", 1e150), ("f8", 1e-150)]
)
def test_extremes_have_finite_norms(dtype: str, value: float, isa: str) -> None:
    g = np.full(5000, value, dtype)
    g[::2] *= -1
    assert gradstep.global_norm([g]) == pytest.approx(math.sqrt(5000) * float(np.dtype(dtype).type(value)), rel=1e-13)
    assert gradstep.global_norm([g]) == global_norm([g])


def test_norms_that_are_not_finite(isa: str) -> None:
    assert gradstep.global_norm([np.ones(3), np.array([1.0, np.inf])]) == math.inf
    assert math.isnan(gradstep.global_norm([np.ones(2000), np.array([1.0, np.nan])]))
    assert math.isnan(gradstep.global_norm([np.array([np.inf]), np.array([np.nan])]))
    assert gradstep.global_norm([np.full(2, 1e200)]) == math.inf  # squares of float64 are taken in float64


def test_norm_of_nothing() -> None:
    assert gradstep.global_norm([]) == 0
    assert gradstep.global_norm([np.zeros((0, 3)), np.zeros(4, np.float32)]) == 0
    assert isinstance(gradstep.global_norm([np.ones(4, np.float32)]), float)


@dtypes
def test_clip_grad_norm(dtype: Any, isa: str) -> None:
    """Gradients are multiplied in place by min(max_norm / (norm + 1e-6), 1); the norm before that is returned."""
    for threads in (1, 3):
        config.set_num_threads(threads)
        for max_norm in (0.5, 300.0, 1e9):
            grads, before = many(dtype), many(dtype)
            norm = gradstep.clip_grad_norm_(grads, max_norm)
            assert isinstance(norm, float)
            assert norm == global_norm(before)
            factor = np.dtype(dtype).type(clip_factor(max_norm, norm))
            assert (factor < 1) == (max_norm < 1e9)
            for i, (g, b) in enumerate(zip(grads, before, strict=True)):
                assert_same_bits(g, factor * b, f"gradient {i}")


def test_the_factor_of_clipping() -> None:
    for limit, norm in itertools.product(
        (0.0, 1e-300, 0.5, 1.0, 300.0, math.inf), (0.0, 1e-6, 0.5, 1 - 1e-6, 1e300, math.inf, math.nan)
    ):
        found, expected = _core.clip_factor(limit, norm), clip_factor(limit, norm)
        assert found == expected or (math.isnan(found) and math.isnan(expected)), (limit, norm)


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.int64, int])
def test_a_limit_of_any_kind_of_number_is_taken_in_double(kind: Any) -> None:
    grads, others = many(np.float64), many(np.float64)
    assert gradstep.clip_grad_norm_(grads, kind(3)) == gradstep.clip_grad_norm_(others, 3.0)
    for i, (g, other) in enumerate(zip(grads, others, strict=True)):
        assert_same_bits(g, other, f"gradient {i}")


def test_clip_grad_norm_in_any_layout(isa: str) -> None:
    for layout, place in LAYOUTS.items():
        grads, before = ([place(gradients((5, 67, 71), np.float32, 1)), gradients((9,), np.float32, 2)] for _ in range(2))
        norm = gradstep.clip_grad_norm_(grads, 1.5)
        for g, b in zip(grads, before, strict=True):
            assert_same_bits(np.ascontiguousarray(g), np.ascontiguousarray(np.float32(clip_factor(1.5, norm)) * b), layout)


def test_clip_grad_norm_is_close_to_torch() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    for max_norm in (0.5, 300.0, 1e9):
        grads = many(np.float64)
        theirs = [torch.zeros(shape, dtype=torch.float64, requires_grad=True) for shape in SHAPES]
        for tensor, g in zip(theirs, grads, strict=True):
            tensor.grad = torch.from_numpy(g.copy())
        norm = torch.nn.utils.clip_grad_norm_(theirs, max_norm)
        assert gradstep.clip_grad_norm_(grads, max_norm) == pytest.approx(float(norm), rel=1e-12)
        for tensor, g in zip(theirs, grads, strict=True):
            np.testing.assert_allclose(g, tensor.grad.numpy(), rtol=1e-12)


def test_clip_grad_norm_by_a_norm_that_is_not_finite() -> None:
    grads = [np.ones(3), np.array([1.0, np.inf])]
    assert gradstep.clip_grad_norm_(grads, 1.0) == math.inf
    assert (grads[0] == 0).all()
    assert grads[1][0] == 0
    assert np.isnan(grads[1][1])
    grads = [np.ones(3), np.array([1.0, np.nan])]
    assert math.isnan(gradstep.clip_grad_norm_(grads, 1.0))
    assert all(np.isnan(g).all() for g in grads)


@dtypes
def test_clip_norm_of_a_step_is_clip_grad_norm_before_it(dtype: Any, isa: str) -> None:
    params, others = ([np.array(parameters(shape, dtype, i)) for i, shape in enumerate(SHAPES)] for _ in range(2))
    opt, other = gradstep.SGD(params, lr=0.1, momentum=0.9, clip_norm=2.0), gradstep.SGD(others, lr=0.1, momentum=0.9)
    for _ in range(2):
        opt.step(many(dtype))
        clipped = many(dtype)
        gradstep.clip_grad_norm_(clipped, 2.0)
        other.step(clipped)
    for i, (p, q) in enumerate(zip(params, others, strict=True)):
        assert_same_bits(p, q, f"parameter {i}")


def test_refused_with_nothing_written() -> None:
    g = gradients((5,), np.float32, 1)
    frozen = g.copy()
    frozen.flags.writeable = False
    for max_norm, error in ((-1.0, ValueError), (math.nan, ValueError), ("1", TypeError), (None, TypeError)):
        grads = [g.copy()]
        with pytest.raises(error, match="max_norm"):
            gradstep.clip_grad_norm_(grads, max_norm)  # type: ignore[arg-type]
        assert np.array_equal(grads[0], g)
    for bad, error, message in (
        (frozen, ValueError, "read-only"),
        (np.ones(3, int), TypeError, "int64"),
        (3.5, TypeError, "must be an array"),
    ):
        grads = [g.copy(), bad]
        with pytest.raises(error, match=message):
            gradstep.clip_grad_norm_(grads, 0.1)
        assert np.array_equal(grads[0], g)
    with pytest.raises(TypeError, match="int64"):
        gradstep.global_norm([np.ones(3, int)])


def test_arrays_that_share_memory_are_refused() -> None:
    a = np.full(10, 3.0)
    for grads in ([a, a], [a[:6], a[4:]]):
        with pytest.raises(ValueError, match=r"clip_grad_norm_: grads\[1\] shares memory with grads\[0\]"):
            gradstep.clip_grad_norm_(grads, 1.0)
    assert (a == 3).all()
    assert gradstep.global_norm([a, a]) == pytest.approx(math.sqrt(180))
