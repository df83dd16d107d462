"""The engine of GPUs, as the host emulates it: what it launches, what it sends, and blocks of many threads.

That its results have the bits of the CPU's is a matter of the tests of values: see RUNS_ON_GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from ml_dtypes import bfloat16 as BFLOAT16

import gradstep
from gradstep import _core

from .cases import ADAM, CASES, NORM_CASES, Case, gradients, parameters

BLOCK = 16_384  # elements of a block of threads


@pytest.fixture(autouse=True)
def _emulated() -> Iterator[None]:
    _core.emulate_gpu(True)
    _core.set_pretend_device(0)
    _core.take_emulated()
    yield
    _core.set_emulated_failure(False)
    _core.set_emulated_threads(1)
    _core.set_pretend_device(-1)
    _core.emulate_gpu(False)


def many(n: int, shape: tuple[int, ...], dtype: Any = np.float32) -> tuple[list[Any], list[Any]]:
    return [parameters(shape, dtype, i) for i in range(n)], [gradients(shape, dtype, i) for i in range(n)]


def launches() -> list[tuple[str, int]]:
    return [(program, tasks) for program, tasks, _ in _core.take_emulated()[0]]


# ---- launches and tables --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 500, 3000])
def test_any_number_of_tensors_are_two_launches(n: int) -> None:
    params, grads = many(n, (8, 3))
    gradstep.AdamW(params).step(grads)
    assert launches() == [("prepare", n), ("update", n)]


@pytest.mark.parametrize("size", [1, BLOCK - 1, BLOCK, BLOCK + 1, 10 * BLOCK + 7])
def test_a_block_of_threads_for_every_16_384_elements(size: int) -> None:
    gradstep.SGD(np.zeros(size, np.float32)).step(np.ones(size, np.float32))
    assert launches() == [("prepare", 1), ("update", -(-size // BLOCK))]


def test_empty_tensors_are_not_launched() -> None:
    params = [np.zeros((0, 4), np.float32), np.zeros(3, np.float32)]
    gradstep.AdamW(params).step([np.ones_like(p) for p in params])
    assert launches() == [("prepare", 2), ("update", 1)]


def test_a_launch_for_each_way_to_store_and_for_what_needs_tiles() -> None:
    kinds: list[Any] = [np.float32, np.float64, BFLOAT16, np.float16]
    params = [parameters((100,), dtype, 1) for dtype in kinds]
    gradstep.AdamW(params).step([gradients((100,), dtype, 1) for dtype in kinds])
    assert launches() == [("prepare", 4), ("update", 1), ("update", 2), ("update", 1)]  # halves together

    strided = parameters((40, 50), np.float32, 1)[:, ::2]
    gradstep.AdamW(strided).step(gradients((40, 25), np.float32, 1))
    assert launches() == [("prepare", 1), ("tiles", 1)]


def test_the_launches_of_a_whole_chain() -> None:
    params, grads = many(3, (20_000,))
    opt = gradstep.AdamW(params, clip_norm=1.0, on_nonfinite="skip")
    opt.step(grads, grad_scale=0.5)
    sums = [("prepare", 3), ("sums", 6), ("groups", 30), ("settle", 1)]
    assert launches() == [*sums, ("prepare", 3), ("update", 6)]
    opt.step(grads, stats=True)
    counted = [("prepare", 3), ("tiles", 6), ("groups", 30), ("settle", 1)]
    assert launches() == [*counted, ("prepare", 3), ("tiles", 6), ("groups", 30), ("report", 1)]


def test_cautious_steps_and_trust_ratios_look_at_the_update_first() -> None:
    params, grads = many(2, (300,))
    gradstep.AdamW(params, cautious=True, trust_ratio=True).step(grads)
    looks = [("prepare", 2), ("tiles", 2), ("groups", 20), ("follow", 1)]
    assert launches() == [*looks, *looks, ("prepare", 2), ("tiles", 2)]


def test_tables_are_sent_once_and_then_what_has_changed() -> None:
    params, grads = many(200, (64,))
    opt = gradstep.SGD(params, momentum=0.9)
    opt.step(grads)
    first = _core.take_emulated()[1]
    assert first > 200 * 300
    opt.step(grads)
    second = _core.take_emulated()[1]
    assert second < first / 3  # the numbers of the steps, which are Python's here
    opt.step([*grads[:-1], grads[-1].copy()])
    assert second < _core.take_emulated()[1] < second + 1000  # one tensor
    opt.param_groups[0]["lr"] = 0.5
    opt.step([*grads[:-1], grads[-1].copy()])
    assert _core.take_emulated()[1] < second + 2000


def test_an_optimizer_that_shrinks_and_grows() -> None:
    """Tables of another length, in memory that held longer ones."""
    expected, params = many(30, (50,))[0], many(30, (50,))[0]
    grads = many(30, (50,))[1]
    ours, theirs = gradstep.AdamW(params), gradstep.AdamW(expected)
    for which in (range(30), range(3), range(20, 30), range(30)):
        some = [g if i in which else None for i, g in enumerate(grads)]
        ours.step(some)
        _core.set_pretend_device(-1)
        theirs.step(some)
        _core.set_pretend_device(0)
    assert all(np.array_equal(a, b) for a, b in zip(params, expected, strict=True))


def test_a_launch_that_fails_names_its_rule_and_leaves_nothing() -> None:
    p = np.ones(50, np.float32)
    opt = gradstep.Lion(p)
    _core.set_emulated_failure(True)
    with pytest.raises(RuntimeError, match="^Lion.step: the launch of the rule lion failed: out of resources$"):
        opt.step(np.ones(50, np.float32))
    _core.set_emulated_failure(False)
    assert np.array_equal(p, np.ones(50, np.float32))
    assert not opt.state
    assert opt.steps == 0
    opt.step(np.ones(50, np.float32))
    assert opt.steps == 1


# ---- the bits of the CPU --------------------------------------------------------------------------------------------------------

RULES = [*CASES, *NORM_CASES]
FORMATS: list[dict[str, Any]] = [
    {},
    {"state_dtype": "bfloat16", "state_rounding": "stochastic"},
    {"state_dtype": "q8"},
    {"state_dtype": "q4", "state_rounding": "stochastic"},
    *({"precision": precision} for precision in ("stochastic", "kahan", "master", "split")),
]


def on_both(rule: str, dtype: Any, size: int, settings: dict[str, Any]) -> list[list[bytes]]:
    """Parameters and states after three steps: of the emulated GPU, and of the CPU."""
    both = []
    for device in (0, -1):
        _core.set_pretend_device(device)
        p = parameters((size,), dtype, 1)
        opt = getattr(gradstep, rule)(p, **settings)
        for step in range(3):
            opt.step(gradients((size,), dtype, step))
        states = [value for state in opt.state.values() for value in state.values()]
        both.append([p.tobytes(), *(np.asarray(state).tobytes() for state in states)])
        assert both[-1][0] != parameters((size,), dtype, 1).tobytes()
    _core.set_pretend_device(0)
    return both


@pytest.mark.parametrize("size", [1, 17, 4099, 1_000_003])
@pytest.mark.parametrize("case", RULES, ids=[case.name for case in RULES])
def test_every_rule_at_every_size(case: Case, size: int) -> None:
    settings = {**case.settings, **case.class_settings}
    ours, theirs = on_both(case.optimizer, np.float32, size, settings)
    assert ours == theirs


@pytest.mark.parametrize("size", [1, 17, 4099, 1_000_003])
@pytest.mark.parametrize("options", FORMATS, ids=[" ".join(options.values()) or "plain" for options in FORMATS])
@pytest.mark.parametrize("dtype", [np.float32, BFLOAT16], ids=["float32", "bfloat16"])
def test_every_format_at_every_size(dtype: Any, options: dict[str, Any], size: int) -> None:
    ours, theirs = on_both("AdamW", dtype, size, {**ADAM, "lr": 0.05, "maximize": True, **options})
    assert ours == theirs


# ---- blocks of many threads -----------------------------------------------------------------------------------------------------

SHAPES = [(5,), (3, 700), (2, 1500), (40, 9), (2100,), (17_000,)]
OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("AdamW", {}),
    "norms": ("AdamW", {"clip_norm": 0.1, "on_nonfinite": "skip"}),
    "stages": ("AdamW", {"clip_value": 0.5, "noise": 0.1, "seed": 3, "l1": 1e-3, "bounds": (-1, 1), "ema_decay": 0.9, "lookahead": (2, 0.5)}),
    "rows": ("AdamW", {"agc": 0.01, "centralize": True, "group_lasso": 0.01, "max_norm": 1.0}),
    "looks ahead": ("Lion", {"cautious": True, "trust_ratio": True, "weight_decay": 0.1}),
    "lars": ("LARS", {"clip_norm_per_tensor": 1.0}),
    "novograd": ("NovoGrad", {"weight_decay": 0.01}),
    "q8": ("AdamW", {"state_dtype": "q8"}),
    "q4": ("AdamW", {"state_dtype": "q4", "state_rounding": "stochastic"}),
    "kahan": ("AdamW", {"precision": "kahan", "state_dtype": "bfloat16"}),
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64, BFLOAT16], ids=["float32", "float64", "bfloat16"])
def test_threads_wait_for_each_other(name: str, dtype: Any) -> None:
    """The same bits from 64 threads a block as from one."""
    rule, options = OPTIONS[name]
    shapes = [shape for shape in SHAPES if name != "rows" or len(shape) > 1]
    results = []
    for threads in (1, 64):
        _core.set_emulated_threads(threads)
        params = [parameters(shape, dtype, i) for i, shape in enumerate(shapes)]
        opt = getattr(gradstep, rule)(params, lr=0.05, **options)
        seen = []
        for step in range(3):
            stats = opt.step([gradients(shape, dtype, 7 * step + i) for i, shape in enumerate(shapes)], stats=step == 2)
            seen.append(repr(stats))
        states = [v for state in opt.state.values() for v in state.values() if isinstance(v, np.ndarray)]
        results.append(([p.tobytes() for p in params], [s.tobytes() for s in states], seen))
    assert results[0] == results[1]
