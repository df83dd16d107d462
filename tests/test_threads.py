"""Threads: steps beside each other, forks, the GIL, and a floating-point state that is the caller's own."""

from __future__ import annotations

import ctypes
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import gradstep
from gradstep import config

from .beside import run_beside
from .cases import CASES, Case, gradients, parameters
from .child import run_in_child
from .test_values import assert_same_bits

ADAMW = next(case for case in CASES if case.name == "adamw")
LARGE = 300_007  # several chunks
fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def steps(case: Case, size: int, seed: int = 1, count: int = 2, dtype: Any = np.float32) -> dict[str, Any]:
    """Parameter and states after some steps."""
    p, states = parameters((size,), dtype, seed), case.start((size,), dtype)
    for step in range(1, count + 1):
        case.call(p, gradients((size,), dtype, seed + step), states, step)
    return {"p": p, **states}


def assert_same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    for name, array in theirs.items():
        assert_same_bits(ours[name], array, name)


# ---- numbers of threads -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_any_number_of_threads_gives_the_same_bits(case: Case) -> None:
    results = []
    for threads in (1, 2, 3, 7, 40):
        config.set_num_threads(threads)
        results.append(steps(case, LARGE))
    for result in results[1:]:
        assert_same(result, results[0])
    assert not np.array_equal(results[0]["p"], parameters((LARGE,), np.float32, 1))


def test_many_small_tensors_are_shared_out() -> None:
    """Lists of tensors whose pieces make up chunks, cut at every kind of place."""
    sizes = [1, 0, 16_384, 5000, 70_000, 3, 16_383, 16_385, 900, 0, 40_000, *[257] * 300]
    names = ("p", *ADAMW.states)

    def run(together: bool) -> list[dict[str, Any]]:
        tensors = [{"p": parameters((n,), np.float32, i), **ADAMW.start((n,), np.float32)} for i, n in enumerate(sizes)]
        grads = [gradients((n,), np.float32, i) for i, n in enumerate(sizes)]
        if together:
            params, *states = ([tensor[name] for tensor in tensors] for name in names)
            ADAMW.call(params, grads, dict(zip(ADAMW.states, states, strict=True)), 2)
        else:
            for tensor, grad in zip(tensors, grads, strict=True):
                ADAMW.call(tensor["p"], grad, {name: tensor[name] for name in ADAMW.states}, 2)
        return tensors

    config.set_num_threads(1)
    expected = run(together=False)
    for threads in (1, 2, 3, 7):
        config.set_num_threads(threads)
        for ours, theirs in zip(run(together=True), expected, strict=True):
            assert_same(ours, theirs)


def test_the_number_of_threads_may_change_between_steps() -> None:
    expected = steps(ADAMW, LARGE, count=12)
    p, states = parameters((LARGE,), np.float32, 1), ADAMW.start((LARGE,), np.float32)
    for step, threads in enumerate((1, 2, 7, 3, 1, 40, 2, 2, 1, 5, 3, 2), start=1):
        config.set_num_threads(threads)
        ADAMW.call(p, gradients((LARGE,), np.float32, 1 + step), states, step)
    assert_same({"p": p, **states}, expected)


# ---- several at once --------------------------------------------------------------------------------------------------------


def run_threads(functions: list[Callable[[], None]]) -> None:
    """Run each function in a thread of its own, all from the same moment on."""
    barrier, failures = threading.Barrier(len(functions)), []

    def run(function: Callable[[], None]) -> None:
        try:
            barrier.wait()
            function()
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=run, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_different_optimizers_step_at_once(threads: int) -> None:
    config.set_num_threads(threads)
    chosen = CASES[:: len(CASES) // 5]
    expected = [steps(case, LARGE, seed, count=8) for seed, case in enumerate(chosen)]
    results: dict[int, dict[str, Any]] = {}

    def train(seed: int) -> Callable[[], None]:
        return lambda: results.update({seed: steps(chosen[seed], LARGE, seed, count=8)})

    run_threads([train(seed) for seed in range(len(chosen))])
    for seed, theirs in enumerate(expected):
        assert_same(results[seed], theirs)


def test_one_optimizer_steps_in_one_thread_at_a_time() -> None:
    size = 1 << 21
    p, g = np.ones(size, np.float32), np.full(size, 0.5, np.float32)
    opt = gradstep.SGD(p, lr=0.25)
    refused = []

    def step_too() -> None:
        with pytest.raises(RuntimeError, match=r"^SGD\.step: is already running in another thread$"):
            opt.step(g)
        refused.append(True)

    count = run_beside(lambda: opt.step(g), step_too)
    assert refused
    assert (p == 1 - 0.125 * count).all()
    assert opt.steps == count
    opt.step(g)
    assert (p == 1 - 0.125 * (count + 1)).all()


def test_one_optimizer_in_many_threads_steps_whole_or_not_at_all() -> None:
    p, g = np.zeros(LARGE, np.float32), np.full(LARGE, -1.0, np.float32)
    opt = gradstep.SGD(p, lr=1.0)
    done: list[int] = []

    def train() -> None:
        for _ in range(50):
            try:
                opt.step(g)
                done.append(1)
            except RuntimeError as error:
                assert "already running" in str(error)  # noqa: PT017

    run_threads([train] * 4)
    assert len(done) >= 50
    assert (p == len(done)).all()


def test_the_functions_may_run_at_once_on_their_own_arrays() -> None:
    expected = steps(ADAMW, 50_000, count=20)
    results: list[dict[str, Any]] = []
    run_threads([lambda: results.append(steps(ADAMW, 50_000, count=20))] * 6)
    assert len(results) == 6
    for result in results:
        assert_same(result, expected)


def test_a_large_step_lets_other_threads_run() -> None:
    size = 1 << 21
    opt, g, ran = gradstep.AdamW(np.ones(size, np.float32)), np.ones(size, np.float32), []
    run_beside(lambda: opt.step(g), lambda: ran.append(sum(range(1000))))
    assert ran == [499_500]


def test_settings_may_change_while_others_step() -> None:
    expected = steps(ADAMW, LARGE, count=10)
    results: list[dict[str, Any]] = []
    stop = threading.Event()

    def train() -> None:
        results.append(steps(ADAMW, LARGE, count=10))
        stop.set()

    def change() -> None:
        while not stop.is_set():
            for threads, name in zip((1, 3, 2), config.isas() * 3, strict=False):
                config.set_num_threads(threads)
                config.set_isa(name)

    run_threads([train, change])
    assert_same(results[0], expected)


# ---- forks ------------------------------------------------------------------------------------------------------------------


def in_fork(function: Callable[[], None], seconds: float = 60) -> None:
    """Call `function` in a forked child; it has to end well, and in time."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            function()
            status = 0
        finally:
            os._exit(status)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            assert status == 0, f"the forked child ended with status {status}"
            return
        time.sleep(0.002)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    raise AssertionError(f"the forked child did not end in {seconds} s")


def fork_after_use() -> None:
    config.set_num_threads(3)
    expected = steps(ADAMW, LARGE)

    def check() -> None:
        for _ in range(5):
            assert_same(steps(ADAMW, LARGE), expected)

    def check_and_fork() -> None:
        check()
        in_fork(check)

    for _ in range(3):
        in_fork(check_and_fork)
        check()


def fork_before_use() -> None:
    config.set_num_threads(2)
    results: list[dict[str, Any]] = []
    in_fork(lambda: results.append(steps(ADAMW, LARGE)))
    steps(ADAMW, LARGE)


def fork_while_others_step() -> None:
    config.set_num_threads(2)
    expected, stop, rounds = steps(ADAMW, LARGE), threading.Event(), []

    def train() -> None:
        while not stop.is_set():
            assert_same(steps(ADAMW, LARGE), expected)
            rounds.append(1)

    threads = [threading.Thread(target=train) for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(20):
        in_fork(lambda: assert_same(steps(ADAMW, LARGE), expected))
    stop.set()
    for thread in threads:
        thread.join()
    assert len(rounds) >= 2


def fork_an_optimizer_in_use() -> None:
    """The child goes on with the optimizer that the parent has stepped."""
    p, g = np.ones(LARGE, np.float32), np.full(LARGE, 0.5, np.float32)
    opt = gradstep.SGD(p, lr=0.25)
    opt.step(g)

    def go_on() -> None:
        opt.step(g)
        assert (p == 0.75).all()

    in_fork(go_on)
    assert (p == 0.875).all()


def fork_beside_torch() -> None:
    """In the child torch's own parallel operations hang, but steps don't."""
    import torch

    import gradstep.torch

    torch.set_num_threads(2)
    config.set_num_threads(2)
    start, g = parameters((LARGE,), np.float32), gradients((LARGE,), np.float32, 1)
    param = torch.nn.Parameter(torch.from_numpy(start.copy()))
    param.grad = torch.from_numpy(g)
    opt = gradstep.torch.AdamW([param], **ADAMW.settings)
    memory = param.detach().numpy()
    expected = {"p": start, **ADAMW.start((LARGE,), np.float32)}

    def step() -> None:
        opt.step()
        count = int(opt.state[param]["step"])
        ADAMW.call(expected["p"], g, {name: expected[name] for name in ADAMW.states}, count)
        assert_same_bits(memory, expected["p"], f"step {count}")

    def three_steps() -> None:
        for _ in range(3):
            step()

    step()
    x = torch.rand(500, 500)
    for _ in range(5):
        x = (x @ x).sin()  # on all of torch's threads
        in_fork(three_steps, seconds=20)
        step()
    assert opt.state[param]["step"] == 6


@fork
@pytest.mark.parametrize(
    "scenario",
    [fork_after_use, fork_before_use, fork_while_others_step, fork_an_optimizer_in_use],
    ids=lambda scenario: scenario.__name__,
)
def test_fork(scenario: Callable[[], None]) -> None:
    run_in_child(scenario)


@fork
def test_fork_with_torch() -> None:
    pytest.importorskip("torch")
    run_in_child(fork_beside_torch)


def end_while_a_step_runs() -> None:
    import __main__

    class Slow:
        def __del__(self, sleep: Callable[[float], None] = time.sleep) -> None:
            sleep(0.1)

    def train() -> None:
        opt, g = gradstep.AdamW(np.ones(1 << 21)), np.ones(1 << 21)
        while True:
            opt.step(g)
            steps_done.append(1)

    steps_done: list[int] = []
    __main__.slow = Slow()  # goes when Python has begun to end, and so lets the step end before Python does
    threading.Thread(target=train, daemon=True).start()
    while not steps_done:
        time.sleep(0.001)


def test_python_may_end_while_a_step_runs() -> None:
    run_in_child(end_while_a_step_runs)


def steps_beside_torch() -> None:
    """Our steps in one thread, torch's operations on all of its threads in another."""
    import torch

    import gradstep.torch  # noqa: F401  (from now on steps run on torch's threads)

    config.set_num_threads(2)
    expected = steps(ADAMW, LARGE, count=30)
    results: list[dict[str, Any]] = []
    x = torch.rand(300, 300)

    def compute() -> None:
        for _ in range(30):
            assert torch.equal((x @ x).sin(), (x @ x).sin())

    run_threads([compute, lambda: results.append(steps(ADAMW, LARGE, count=30)), compute])
    assert_same(results[0], expected)


def test_steps_beside_torch() -> None:
    pytest.importorskip("torch")
    run_in_child(steps_beside_torch)


# ---- the caller's floating-point state --------------------------------------------------------------------------------------

DENORMAL = np.array([2.0**-140, -(2.0**-130)], np.float32)


def test_zero_gradients_never_make_a_step_slow() -> None:
    """Unflushed, the moments decay into denormals, and a step takes up to 24 times as long."""
    config.set_num_threads(1)
    size, settings = 50_000, {"betas": (0.9, 0.95), "weight_decay": 0.0}
    g, zero = np.full(size, 1e-3, np.float32), np.zeros(size, np.float32)
    fresh, decayed = ({"p": np.ones(size, np.float32), **ADAMW.start((size,), np.float32)} for _ in range(2))
    times: dict[int, list[float]] = {id(fresh): [], id(decayed): []}

    def step(tensors: dict[str, Any], grad: Any, number: int) -> None:
        begin = time.perf_counter()
        ADAMW.call(tensors["p"], grad, {name: tensors[name] for name in ADAMW.states}, number, **settings)
        times[id(tensors)].append(time.perf_counter() - begin)

    step(decayed, g, 1)
    for number in range(2, 2502):
        step(decayed, zero, number)
    for number in range(2502, 2803):  # in turns, so that both meet the same machine
        step(decayed, zero, number)
        step(fresh, g, number)
    assert statistics.median(times[id(decayed)][-301:]) < 3 * statistics.median(times[id(fresh)])
    for name in ADAMW.states:
        assert not decayed[name].any()
        assert fresh[name].all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("threads", [1, 2])
def test_denormals_are_kept_or_flushed(dtype: Any, threads: int, isa: str) -> None:
    config.set_num_threads(threads)
    tiny = np.finfo(dtype).tiny  # the smallest number that is not denormal
    half, most = tiny * dtype(0.5), tiny * dtype(1.5)
    for size in (5, LARGE):
        for mode, expected in (("keep", half), ("flush", 0)):
            config.denormals = mode
            g, b = np.full(size, tiny), np.full(size, tiny)
            p, strided = np.full(size, most), np.full(2 * size, most)[::2]
            gradstep.sgd_([p, strided], [g, g], lr=1.0)
            for made_here in (p, strided):
                assert (made_here == expected).all(), mode
            gradstep.sgd_(np.ones(size, dtype), np.zeros(size, dtype), momentum_buffer=b, momentum=0.5, lr=1.0)
            assert (b == expected).all(), mode
            gradstep.sgd_(p := np.zeros(size, dtype), np.full(size, half), lr=2.0)
            assert (p == (-tiny if mode == "keep" else 0)).all(), mode


def test_denormals_are_the_callers_own() -> None:
    """NumPy computes with denormals before, after and beside a step that flushes them."""
    size = 1 << 21
    opt, g = gradstep.AdamW(np.ones(size, np.float32)), np.ones(size, np.float32)

    def compute() -> None:
        assert np.array_equal(DENORMAL * np.float32(0.5) * np.float32(2), DENORMAL)
        assert DENORMAL.all()

    compute()
    for n in (10, LARGE):
        steps(ADAMW, n)
        compute()
    with pytest.raises(ValueError):
        opt.step(g[1:])
    compute()
    run_beside(lambda: opt.step(g), compute)
    compute()


TO_NEAREST, UPWARD = 0, 0x800  # FE_TONEAREST and FE_UPWARD of x86


@pytest.fixture
def round_up() -> Iterator[Callable[[], None]]:
    libm = ctypes.CDLL("libm.so.6")
    yield lambda: libm.fesetround(UPWARD)
    libm.fesetround(TO_NEAREST)


@pytest.mark.skipif(not sys.platform.startswith("linux") or os.uname().machine != "x86_64", reason="knows x86's rounding modes")
@pytest.mark.parametrize("size", [37, LARGE])
def test_rounding_is_to_nearest_inside_and_the_callers_outside(size: int, round_up: Callable[[], None]) -> None:
    one, three = np.ones(1), np.full(1, 3.0)
    to_nearest = (one / three)[0]
    for case in CASES:
        expected = steps(case, size, count=1)
        p, g, states = parameters((size,), np.float32, 1), gradients((size,), np.float32, 2), case.start((size,), np.float32)
        round_up()
        upward = (one / three)[0]
        case.call(p, g, states, 1)
        after = (one / three)[0]
        ctypes.CDLL("libm.so.6").fesetround(TO_NEAREST)
        assert upward > to_nearest
        assert after == upward
        assert_same({"p": p, **states}, expected)


def flushing_caller() -> None:
    """A caller that flushes denormals goes on flushing them, and gets the same bits."""
    import torch

    expected = steps(ADAMW, LARGE)
    assert torch.set_flush_denormal(True)
    half = np.float32(0.5)
    assert not (DENORMAL * half).any()
    assert_same(steps(ADAMW, LARGE), expected)
    assert not (DENORMAL * half).any()
    config.denormals = "keep"
    p = np.full(LARGE, np.finfo(np.float32).tiny)
    gradstep.sgd_(p, p.copy(), lr=0.5)
    assert not (DENORMAL * half).any()
    torch.set_flush_denormal(False)
    assert (p == np.finfo(np.float32).tiny * half).all()


def test_a_caller_that_flushes_denormals_with_torch() -> None:
    pytest.importorskip("torch")
    run_in_child(flushing_caller)
