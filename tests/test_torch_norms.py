"""`gradstep.torch.clip_grad_norm_`: norms, gradients and errors of torch's function, and finite where its norm overflows."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

import gradstep.torch

from .torch_cases import SMALL, set_grads, sources, tensors

CLIP_SHAPES = [(33, 7), (), (1030,), (0, 3), (2, 3, 5, 5)]
HALVES = [torch.float16, torch.bfloat16]
FLOATS = [torch.float64, torch.float32, *HALVES]


def with_grads(dtype: Any = torch.float32, scale: float = 1.0) -> list[Any]:
    params = tensors(CLIP_SHAPES)
    for p, g in zip(params, sources(CLIP_SHAPES, 3, {})[0][1], strict=True):
        p.data = p.data.to(dtype)
        p.grad = None if g is None else (g.double() * scale).to(dtype)
    return params


def clip_both(params: list[Any], *args: Any, **kwargs: Any) -> tuple[Any, Any, list[Any]]:
    """Norms by ours and torch's function, and torch's gradients; ours are left in `params`."""
    others = [torch.nn.Parameter(p.detach().clone()) for p in params]
    for p, q in zip(params, others, strict=True):
        q.grad = None if p.grad is None else p.grad.clone()
    norm = gradstep.torch.clip_grad_norm_(params, *args, **kwargs)
    expected = torch.nn.utils.clip_grad_norm_(others, *args, **kwargs)
    assert type(norm) is torch.Tensor and norm.shape == () and norm.dtype == expected.dtype and not norm.requires_grad
    for p, q in zip(params, others, strict=True):
        assert (p.grad is None) == (q.grad is None)
        assert p.grad is None or (p.grad.dtype == q.grad.dtype and p.grad.layout == q.grad.layout)
    return norm, expected, [q.grad for q in others]


def assert_clipped(params: list[Any], grads: list[Any], rtol: float) -> None:
    for p, g in zip(params, grads, strict=True):
        if g is not None:
            assert torch.allclose(p.grad.to_dense(), g.to_dense(), rtol=rtol, atol=0, equal_nan=True)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 3e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("max_norm", [1.0, 30, torch.tensor(2.5), 1e9, 0.0])
def test_clip_as_torch(dtype: Any, rtol: float, max_norm: Any) -> None:
    params = with_grads(dtype)
    params[2].grad = None
    before = [None if p.grad is None else p.grad.clone() for p in params]
    norm, expected, grads = clip_both(params, max_norm)
    assert norm > 100 and torch.allclose(norm, expected, rtol=rtol)
    assert_clipped(params, grads, rtol)
    changed = any(p.grad is not None and not torch.equal(p.grad, b) for p, b in zip(params, before, strict=True))
    assert changed == (float(max_norm) < 1e9)


def test_clip_keywords_and_order_are_torchs() -> None:
    params = with_grads()
    norm = gradstep.torch.clip_grad_norm_(parameters=params, max_norm=1.0, norm_type=2, error_if_nonfinite=True, foreach=False)
    assert norm > 100
    assert gradstep.torch.clip_grad_norm_(params, 1.0, 2.0, True, None) == pytest.approx(1.0, rel=1e-5)


def test_clip_a_generator_and_a_tensor() -> None:
    params = with_grads()
    listed = with_grads()
    norms = [gradstep.torch.clip_grad_norm_(p, 1.0) for p in ((q for q in params), listed)]
    assert torch.equal(*norms) and all(torch.equal(p.grad, q.grad) for p, q in zip(params, listed, strict=True))
    w = torch.nn.Parameter(torch.zeros(2))
    w.grad = torch.tensor([3.0, 4.0])
    assert gradstep.torch.clip_grad_norm_(w, 1.0) == 5
    assert torch.allclose(w.grad, torch.tensor([0.6, 0.8]))


@pytest.mark.parametrize("params", [[], "without"], ids=["no parameters", "no gradients"])
def test_clip_nothing(params: Any) -> None:
    params = tensors(SMALL) if params == "without" else params
    norm, expected, _ = clip_both(params, 1.0)
    assert torch.equal(norm, expected) and norm == 0


def test_clip_an_empty_generator_warns_as_torch_does() -> None:
    for module in (torch.nn.utils, gradstep.torch):
        with pytest.warns(UserWarning, match="empty generator"):
            module.clip_grad_norm_((p for p in []), 1.0)


@pytest.mark.parametrize("norm_type", [float("inf"), "inf", 1, 0, 3.5, "2"])
def test_clip_other_norms(norm_type: Any) -> None:
    params = with_grads(torch.float64)
    del params[3]  # torch's infinity norm of nothing is an error
    norm, expected, grads = clip_both(params, 1.5, norm_type)
    assert torch.allclose(norm, expected, rtol=1e-12)
    assert_clipped(params, grads, 1e-12)
    assert not torch.equal(params[0].grad, with_grads(torch.float64)[0].grad)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("norm_type", [2.0, 1.0])
def test_clip_what_is_not_finite(value: float, norm_type: float) -> None:
    params = with_grads()
    params[2].grad[7] = value
    texts = []
    for module in (torch.nn.utils, gradstep.torch):
        before = [p.grad.clone() for p in params]
        with pytest.raises(RuntimeError) as caught:
            module.clip_grad_norm_(params, 1.0, norm_type, error_if_nonfinite=True)
        texts.append(str(caught.value))
        assert all(torch.allclose(p.grad, b, equal_nan=True, rtol=0) for p, b in zip(params, before, strict=True))
    assert texts[0] == texts[1]
    norm, expected, grads = clip_both(params, 1.0, norm_type)
    assert torch.allclose(norm, expected, equal_nan=True)
    assert_clipped(params, grads, 0.0)


def test_clip_norms_beyond_float32() -> None:
    """Torch's norm of float32 gradients of 1e25 is infinite, and its gradients zero; ours is what it is."""
    params, plain = with_grads(scale=1e25), with_grads()
    norm = gradstep.torch.clip_grad_norm_(params, 1.0, error_if_nonfinite=True)
    assert norm == pytest.approx(1e25 * float(gradstep.torch.clip_grad_norm_(plain, 1.0)), rel=1e-6)
    for p, q in zip(params, plain, strict=True):
        assert torch.allclose(p.grad, q.grad, rtol=1e-5)


def test_clip_mixed_dtypes() -> None:
    params = with_grads()
    params[0].data, params[0].grad = params[0].data.double(), None
    params[0].grad = torch.ones(33, 7, dtype=torch.float64)
    norm, expected, grads = clip_both(params, 1.0)
    assert torch.allclose(norm, expected, rtol=1e-6)
    assert_clipped(params, grads, 3e-6)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("kind", ["transposed", "every second", "complex"])
def test_clip_other_gradients(kind: str) -> None:
    params = with_grads(torch.float64)
    w = torch.nn.Parameter(torch.ones(8, 6, dtype=torch.float64))
    values = torch.arange(48.0, dtype=torch.float64).reshape(8, 6) - 20
    if kind == "complex":
        w = torch.nn.Parameter(torch.ones(8, 3, dtype=torch.complex128))
        w.grad = torch.view_as_complex(values.reshape(8, 3, 2)).clone()
        params = [w]
    else:
        w.grad = values.T.contiguous().T if kind == "transposed" else torch.cat([values, values], 1)[:, ::2]
        assert not w.grad.is_contiguous()
        params = [*params, w]
    norm, expected, grads = clip_both(params, 1.5)
    assert norm > 1.6 and torch.allclose(norm, expected, rtol=1e-12)
    assert_clipped(params, grads, 1e-12)


def dtypes_of(number: int) -> list[Any]:
    return [pytest.param(of, id=" ".join(map(str, of)).replace("torch.", "")) for of in itertools.permutations(FLOATS, number)]


def with_grads_of(dtypes: Any, layout: str = "as it is") -> list[Any]:
    """Gradients of these dtypes in turn, on parameters of the same."""
    params = with_grads(torch.float64, 0.5)
    for p, dtype in zip(params, itertools.cycle(dtypes)):
        grad = p.grad.to(dtype)
        p.grad, p.data = None, p.data.to(dtype)
        if layout == "transposed":
            grad = grad.T.contiguous().T if grad.ndim == 2 else grad
        elif layout == "every second" and grad.ndim > 0:
            grad = torch.stack([grad, grad], -1)[..., 0]
        p.grad = grad
    return params


def assert_clipped_exactly(params: list[Any], norm: Any, max_norm: float, before: list[Any]) -> None:
    """Norm and gradients are those of float64; 16-bit ones to half a unit in the last place, the others but for a rounding more."""
    exact = math.sqrt(math.fsum(float(x) ** 2 for b in before for x in b.double().ravel()))
    assert torch.allclose(norm, torch.tensor(exact, dtype=torch.float64).to(norm.dtype), rtol=1e-13, atol=0)
    factor = min(max_norm / (exact + 1e-6), 1.0)
    for p, b in zip(params, before, strict=True):
        kind = torch.finfo(p.grad.dtype)
        half_a_unit = {"rtol": kind.eps / 2 * (1 + 1e-3), "atol": kind.smallest_normal * kind.eps / 2 * (1 + 1e-3)}
        if p.grad.dtype in HALVES:
            torch.testing.assert_close(p.grad.double(), factor * b.double(), **half_a_unit)
        else:  # the factor is rounded, too
            torch.testing.assert_close(p.grad.double(), factor * b.double(), rtol=max(kind.eps * 1.01, 1e-13), atol=0)


@pytest.mark.parametrize("dtypes", [of for number in (1, 2, 3, 4) for of in dtypes_of(number)])
def test_clip_dtypes_as_torch(dtypes: Any) -> None:
    """Of any dtypes together: torch's dtype of the norm, and values within what torch loses by rounding norm and factor."""
    roundings = 4 * max(torch.finfo(dtype).eps for dtype in dtypes)
    for max_norm in (1.0, 30, 1e9):
        params = with_grads_of(dtypes)
        before = [p.grad.clone() for p in params]
        norm, expected, grads = clip_both(params, max_norm)
        assert norm > 60 and torch.allclose(norm, expected, rtol=roundings)
        for p, g in zip(params, grads, strict=True):
            assert torch.allclose(p.grad, g, rtol=roundings, atol=6e-8)
        assert_clipped_exactly(params, norm, max_norm, before)
        assert any(not torch.equal(p.grad, b) for p, b in zip(params, before, strict=True)) == (max_norm < 1e9)


@pytest.mark.parametrize("layout", ["as it is", "transposed", "every second"])
@pytest.mark.parametrize("dtype", HALVES)
def test_clip_halves_to_half_a_unit(dtype: Any, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By our engine, which tells autograd, in any layout, denormal numbers too."""
    monkeypatch.delattr(torch.nn.utils, "clip_grad_norm_")
    for max_norm in (1e-3, 0.37, 30, 1e9):
        params = with_grads_of([dtype], layout)
        before, versions = [p.grad.clone() for p in params], [p.grad._version for p in params]
        assert [p.grad.is_contiguous() for p in params].count(False) == {"as it is": 0, "transposed": 1, "every second": 3}[
            layout
        ]
        norm = gradstep.torch.clip_grad_norm_(params, max_norm)
        assert_clipped_exactly(params, norm, max_norm, before)
        rises = [p.grad._version > version for p, version in zip(params, versions, strict=True) if p.numel()]
        assert rises == [max_norm < 1e9] * 4


def test_clip_halves_whose_norm_is_beyond_their_dtype() -> None:
    """Torch's norm is infinite and its gradients zero; ours only returns as infinity, and is no error."""
    w = torch.nn.Parameter(torch.zeros(4, dtype=torch.float16))
    w.grad = torch.full((4,), 6e4, dtype=torch.float16)
    w.grad[1] *= -1
    norm, expected, (theirs,) = clip_both([w], 3.0)
    assert norm == expected == math.inf and (theirs == 0).all()
    assert w.grad.tolist() == [1.5, -1.5, 1.5, 1.5]
    w.grad *= 4e4
    assert gradstep.torch.clip_grad_norm_([w], 3.0, error_if_nonfinite=True) == math.inf
    assert w.grad.tolist() == [1.5, -1.5, 1.5, 1.5]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_clip_halves_that_are_not_finite(dtype: Any, value: float) -> None:
    params = with_grads_of([dtype])
    params[2].grad[7] = value
    before = [p.grad.clone() for p in params]
    with pytest.raises(RuntimeError, match=r"The total norm of order 2\.0 for gradients from `parameters` is non-finite"):
        gradstep.torch.clip_grad_norm_(params, 1.0, error_if_nonfinite=True)
    assert all(torch.allclose(p.grad, b, equal_nan=True, rtol=0, atol=0) for p, b in zip(params, before, strict=True))
    norm, expected, grads = clip_both(params, 1.0)
    assert torch.allclose(norm, expected, equal_nan=True)
    assert_clipped(params, grads, 0.0)


def test_clip_gradients_that_share_memory_in_part() -> None:
    memory = torch.ones(6, dtype=torch.bfloat16)
    params = [torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16)) for _ in range(2)]
    params[0].grad, params[1].grad = memory[:4], memory[2:]
    with pytest.raises(ValueError, match=r"clip_grad_norm_: gradients\[1\] shares memory with gradients\[0\]"):
        gradstep.torch.clip_grad_norm_(params, 1.0)
    assert (memory == 1).all()


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_clip_sparse_gradients_as_torch() -> None:
    outcomes = []
    for module in (torch.nn.utils, gradstep.torch):
        w = torch.nn.Parameter(torch.ones(8, 6))
        w.grad = torch.sparse_coo_tensor(torch.tensor([[1, 3]]), torch.full((2, 6), 9.0), (8, 6))
        w.grad = w.grad.coalesce()
        try:
            norm = module.clip_grad_norm_([w], 1.5, foreach=False)
            outcomes.append(torch.cat([norm.ravel(), w.grad.to_dense().ravel()]))
        except (RuntimeError, NotImplementedError) as error:
            outcomes.append((type(error), str(error).split("\n", maxsplit=1)[0]))
    assert type(outcomes[0]) is type(outcomes[1])
    assert torch.equal(*outcomes) if isinstance(outcomes[0], torch.Tensor) else outcomes[0] == outcomes[1]


def test_clip_tells_autograd() -> None:
    for max_norm, rises in ((1.0, True), (1e9, False)):
        params = with_grads()
        before = [p.grad._version for p in params]
        gradstep.torch.clip_grad_norm_(params, max_norm)
        after = [p.grad._version for p in params]
        assert [a > b for a, b, p in zip(after, before, params, strict=True) if p.numel()] == [rises] * 4
    w = torch.nn.Parameter(torch.ones(3))
    w.grad = torch.full((3,), 5.0, requires_grad=True)
    loss = (w.grad**2).sum()
    w.grad = w.grad.detach()
    gradstep.torch.clip_grad_norm_([w], 1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_clipping_and_the_option_agree() -> None:
    """Two sweeps or one: the same bits, but for the rounding of the clipped gradient."""
    for dtype, rtol in ((np.float32, 1e-5), (np.float64, 1e-13)):
        params, others = tensors(SMALL, dtype), tensors(SMALL, dtype)
        opt, other = gradstep.torch.SGD(params, lr=0.1, clip_norm=2.0), gradstep.torch.SGD(others, lr=0.1)
        for step in (1, 2):
            set_grads(params, step)
            set_grads(others, step)
            opt.step()
            gradstep.torch.clip_grad_norm_(others, 2.0)
            other.step()
        for p, q in zip(params, others, strict=True):
            assert torch.allclose(p, q, rtol=rtol, atol=rtol)


def test_gradients_that_come_twice_are_clipped_as_torch_does() -> None:
    shared, lists = torch.ones(4), []
    for function in (gradstep.torch.clip_grad_norm_, torch.nn.utils.clip_grad_norm_):
        params = [torch.nn.Parameter(torch.ones(4)) for _ in range(2)]
        for param in params:
            param.grad = shared.clone() if param is params[0] else params[0].grad
        function(params, 1.0)
        lists.append(params[0].grad)
    assert torch.equal(*lists)
