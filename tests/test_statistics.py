"""Statistics of a step against NumPy in float64, overall and for each parameter."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest

import gradstep
from gradstep import config
from gradstep.stats import Stats, StepStats

from .cases import Case, gradients, parameters
from .stage_cases import MANY, STAGES, case_of, make_optimizer, settings_of, step_arguments
from .stage_references import Stepper
from .test_skip import digest
from .test_values import assert_same_bits, cases

RUNS_ON_GPU = True

SHAPES = [(33, 3), (1030,), (2, 3, 5, 5), (0, 3), (), (1, 20_000), (130, 139)]
COUNTS = ("grad_nans", "grad_infs", "grad_zeros", "size")


def make_params(dtype: Any) -> list[Any]:
    return [np.array(parameters(shape, dtype, i)) for i, shape in enumerate(SHAPES)]


def make_grads(dtype: Any, step: int) -> list[Any]:
    return [np.array(gradients(shape, dtype, 100 * step + i)) for i, shape in enumerate(SHAPES)]


def norm(arrays: list[Any]) -> float:
    return math.sqrt(sum(float(np.square(np.asarray(a, np.float64)).sum()) for a in arrays))


def assert_stats(ours: Stats, expected: dict[str, Any], what: str) -> None:
    for name, value in expected.items():
        if name in (*COUNTS, "skipped"):
            assert getattr(ours, name) == value, f"{name} {what}"
            assert type(getattr(ours, name)) is type(value), f"{name} {what}"
        else:
            assert getattr(ours, name) == pytest.approx(value, rel=1e-6, nan_ok=True), f"{name} {what}"
            assert type(getattr(ours, name)) is float, f"{name} {what}"
    if expected["param_norm"]:
        assert ours.update_ratio == pytest.approx(expected["update_norm"] / expected["param_norm"], rel=1e-6, nan_ok=True), what


def counts(grads: list[Any]) -> dict[str, int]:
    return {
        "grad_nans": sum(int(np.isnan(g).sum()) for g in grads),
        "grad_infs": sum(int(np.isinf(g).sum()) for g in grads),
        "grad_zeros": sum(int((g == 0).sum()) for g in grads),
        "size": sum(g.size for g in grads),
    }


def largest(grads: list[Any]) -> float:
    return max((float(np.abs(g).max()) for g in grads if g.size), default=0.0)


NORM_OPTIONS = {"clip_norm": 2.0, "clip_norm_per_tensor": 1.0, "trust_ratio": True, "centralize": True}


def expected_of(tensors: list[Any], factor: float) -> dict[str, Any]:
    """The statistics of some tensors of the reference, by NumPy in float64."""
    raw = [tensor.raw for tensor in tensors]
    return {
        "grad_norm": norm(raw),
        "grad_norm_clipped": norm([tensor.clipped for tensor in tensors]),
        "update_norm": norm([tensor.u for tensor in tensors]),
        "param_norm": norm([tensor.before for tensor in tensors]),
        "grad_max": largest(raw),
        "clip_factor": factor,
        "skipped": False,
        **counts(raw),
    }


@pytest.mark.parametrize("name", [*STAGES, *MANY])
def test_statistics_of_every_stage(name: str, isa: str) -> None:
    options = {k: v for k, v in (STAGES.get(name) or MANY[name]).items() if k != "on_nonfinite"}
    of_constructor, scale, weights = step_arguments(options)
    overall = {k: v for k, v in of_constructor.items() if k in ("clip_norm", "zero_grad")}
    own = {k: v for k, v in of_constructor.items() if k not in overall}
    for dtype, rule in ((np.float32, "adamw"), (np.float64, "sgd_nesterov")):
        case, params = case_of(rule), make_params(dtype)
        opt = make_optimizer(case, params, of_constructor)
        reference = Stepper(case.reference, case.start, params, {**settings_of(case), **own}, **overall)
        for step in (1, 2):
            sources: list[tuple[float, list[Any]]] = [
                (w, make_grads(dtype, 10 * step + k)) for k, w in enumerate(weights or (1.0,))
            ]
            if step == 1:
                for _, grads in sources:
                    grads[1] = None
            reference.step(sources, scale)
            stats = opt.step(sources if weights else sources[0][1], grad_scale=scale, stats=True)
            assert isinstance(stats, StepStats)
            assert stats.step == step
            assert list(stats.parameters) == [tensor.index for tensor in reference.tensors]
            assert_stats(stats, expected_of(reference.tensors, reference.factor), f"at step {step}")
            for tensor in reference.tensors:
                expected = expected_of([tensor], tensor.factor)
                assert_stats(stats.parameters[tensor.index], expected, f"of parameter {tensor.index} at step {step}")


@cases
def test_statistics_change_nothing(case: Case) -> None:
    params, others = make_params(np.float32), make_params(np.float32)
    opt, other = (make_optimizer(case, p, NORM_OPTIONS) for p in (params, others))
    for step in (1, 2):
        assert opt.step(make_grads(np.float32, step), stats=True) is not None
        assert other.step(make_grads(np.float32, step)) is None
    for i, (p, q) in enumerate(zip(params, others, strict=True)):
        assert_same_bits(p, q, f"parameter {i}")
    assert digest(opt.state) == digest(other.state)


def test_the_same_numbers_for_every_instruction_set_and_number_of_threads() -> None:
    seen = set()
    for isa in config.isas():
        config.set_isa(isa)
        for threads in (1, 2, 3, 7):
            config.set_num_threads(threads)
            opt = make_optimizer(case_of("adamw"), make_params(np.float32), NORM_OPTIONS)
            opt.step(make_grads(np.float32, 1))
            stats = opt.step(make_grads(np.float32, 2), stats=True)
            seen.add(repr(dataclasses.astuple(stats)))
    assert len(seen) == 1


def test_counts_of_what_is_not_finite(isa: str) -> None:
    """Counted in the gradient as it came, also where it is then taken for 0; the largest is NaN only where there is a NaN."""
    for options in ({}, {"on_nonfinite": "zero"}, {"clip_value": 1.0}, {"on_nonfinite": "zero", "clip_norm": 1.0}):
        params, grads = make_params(np.float32), make_grads(np.float32, 1)
        grads[1][[3, 64, 1029]] = np.nan, np.inf, np.nan
        grads[6][129, [0, 70, 138]] = -np.inf, np.inf, -np.inf
        stats = gradstep.SGD(params, **options).step(grads, stats=True)
        assert (stats.grad_nans, stats.grad_infs) == (2, 4), options
        assert stats.size == sum(p.size for p in params)
        assert stats.grad_zeros == sum(int((g == 0).sum()) for g in grads)
        assert math.isnan(stats.grad_max)
        assert [of.grad_nans for of in stats.parameters.values()] == [0, 2, 0, 0, 0, 0, 0]
        assert [of.grad_infs for of in stats.parameters.values()] == [0, 1, 0, 0, 0, 0, 3]
        assert stats.parameters[6].grad_max == math.inf
        assert stats.parameters[0].grad_max == np.abs(grads[0]).max()
        assert not stats.skipped


@pytest.mark.parametrize("options", [{}, {"clip_norm": 1.0}, {"ema_decay": 0.9, "cautious": True}])
def test_skipped_steps(options: dict[str, Any], isa: str) -> None:
    params, grads = make_params(np.float32), make_grads(np.float32, 1)
    grads[1][3] = np.nan
    opt = gradstep.AdamW(params, on_nonfinite="skip", **options)
    stats = opt.step(grads, stats=True)
    assert stats.skipped
    assert stats.step == 1
    assert all(of.skipped for of in stats.parameters.values())
    for of in (stats, *stats.parameters.values()):
        assert (of.update_norm, of.grad_norm_clipped) == (0, 0)
    assert (stats.grad_nans, stats.parameters[1].grad_nans, stats.parameters[0].grad_nans) == (1, 1, 0)
    assert stats.parameters[0].grad_norm == pytest.approx(norm([grads[0]]), rel=1e-6)
    assert stats.param_norm == pytest.approx(norm(params), rel=1e-6)
    stats = opt.step(make_grads(np.float32, 1), stats=True)
    assert not stats.skipped
    assert stats.update_norm > 0


def test_extremes(isa: str) -> None:
    p = np.full(3000, 1e-30, np.float32)
    stats = gradstep.SGD(p, lr=1e-3).step(np.full(3000, 1e19, np.float32), stats=True)
    assert stats.grad_norm == pytest.approx(math.sqrt(3000) * 1e19, rel=1e-6)
    assert stats.update_norm == pytest.approx(math.sqrt(3000) * 1e16, rel=1e-6)
    assert stats.param_norm == pytest.approx(math.sqrt(3000) * 1e-30, rel=1e-6)


def test_keys_are_those_of_the_state() -> None:
    params = make_params(np.float32)
    opt = gradstep.AdamW([{"params": {"w": params[0], "b": params[1]}}, {"params": params[2:]}])
    grads = make_grads(np.float32, 1)
    grads[3] = None
    stats = opt.step([{"w": grads[0], "b": grads[1]}, grads[2:]], stats=True)
    assert list(stats.parameters) == list(opt.state)
    assert stats.size == sum(p.size for i, p in enumerate(params) if i != 3)


def test_nothing_to_see() -> None:
    stats = gradstep.AdamW(make_params(np.float32)).step([None] * len(SHAPES), stats=True)
    assert (stats.grad_norm, stats.update_norm, stats.param_norm, stats.size, stats.update_ratio) == (0, 0, 0, 0, 0)
    assert stats.parameters == {}


def test_statistics_are_values() -> None:
    stats = gradstep.AdamW(make_params(np.float32)).step(make_grads(np.float32, 1), stats=True)
    with pytest.raises(dataclasses.FrozenInstanceError):
        stats.grad_norm = 1.0
