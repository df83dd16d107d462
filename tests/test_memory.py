"""Memory: nothing outside an operand is read or written, nothing grows, nothing is freed under a running step."""

from __future__ import annotations

import array
import ctypes
import mmap
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gradstep
from gradstep import _core, config, formats

from .beside import run_beside
from .cases import CASES, Case, gradients, parameters
from .child import run_in_child
from .test_values import assert_same_bits

PAGE = mmap.PAGESIZE
MIB = 1 << 20

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux's mprotect and /proc")

# ---- guard pages ------------------------------------------------------------------------------------------------------------

# Around the widths of vectors and of blocks of them, around a tile, and beyond a chunk.
SIZES = [0, 1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 31, 33, 63, 65, 129, 1023, 1025, 16385]
STRIDES = [1, -1, 3, -2]


class Guarded:
    """Memory between two pages that can't be touched."""

    def __init__(self, room: int) -> None:
        self.room = -(-room // PAGE) * PAGE
        self.memory = mmap.mmap(-1, self.room + 2 * PAGE)
        first = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        libc = ctypes.CDLL(None, use_errno=True)
        for guard in (first, first + PAGE + self.room):
            no_access = 0
            assert libc.mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(PAGE), no_access) == 0, ctypes.get_errno()

    def array(self, values: Any, stride: int, at_end: bool) -> Any:
        """A copy of `values`, `stride` items from one to the next, that ends (or begins) right beside a guard page."""
        span = ((values.size - 1) * abs(stride) + 1 if values.size else 0) * values.itemsize
        offset = PAGE + (self.room - span if at_end else 0)
        room = np.ndarray(span // values.itemsize, values.dtype, self.memory, offset)
        view = room[::stride]
        view[...] = values
        return view


def steps_between_guard_pages(isa: str) -> None:
    config.set_isa(isa)
    config.set_num_threads(2)
    places = [Guarded(3 * max(SIZES) * 8) for _ in range(5)]
    for case in CASES:
        for dtype in (np.float32, np.float64):
            for size in SIZES:
                p, g = parameters((size,), dtype), gradients((size,), dtype, size)
                q, expected = p.copy(), case.start((size,), dtype)
                for step in (1, 2):
                    case.call(q, g, expected, step)
                assert size < 9 or not np.array_equal(p, q)
                for stride in STRIDES:
                    for at_end in (True, False):
                        ours, grad, *states = (
                            place.array(values, stride, at_end)
                            for place, values in zip(places, [p, g, *case.start((size,), dtype).values()], strict=False)
                        )
                        for step in (1, 2):
                            case.call(ours, grad, dict(zip(case.states, states, strict=True)), step)
                        assert np.array_equal(ours, q), (case.name, dtype, size, stride, at_end)
                        assert np.array_equal(grad, g), (case.name, dtype, size, stride, at_end)
                        for name, state in zip(case.states, states, strict=True):
                            assert np.array_equal(state, expected[name]), (case.name, name, dtype, size, stride, at_end)


def conversions_between_guard_pages(isa: str) -> None:
    """Operands of every format: what is decoded and encoded is as long as what is computed with, and no longer."""
    config.set_isa(isa)
    config.set_num_threads(2)
    halves, narrow = [np.dtype(np.float16), formats.numpy_dtype("bfloat16")], parameters((max(SIZES),), np.float32)
    places = [Guarded(3 * max(SIZES) * 4) for _ in range(4)]
    for size in SIZES:
        for stride in STRIDES:
            for at_end in (True, False):
                for dtype in halves:
                    wide, half = (
                        place.array(narrow[:size].astype(a), stride, at_end)
                        for place, a in zip(places, (np.float32, dtype), strict=False)
                    )
                    formats.convert_(wide, half)
                    formats.convert_(half, wide)
                    assert np.array_equal(half, narrow[:size].astype(dtype)), (dtype, size, stride, at_end)
        for form, block in (("q8", 256), ("q4", 128)):
            if size < 2:
                continue
            for at_end in (True, False):
                bytes_of = (np.zeros(-(-size * int(form[1]) // 8), np.uint8), np.zeros(-(-size // block), np.float32))
                codes, scale, wide, back = (
                    place.array(values, 1, at_end)
                    for place, values in zip(places, (*bytes_of, narrow[:size], np.zeros(size, np.float32)), strict=True)
                )
                _core.convert((codes, scale), (wide,), False, "quantize")
                _core.convert((back,), (codes, scale), False, "dequantize")
                assert np.allclose(back, wide, rtol=0.26, atol=0.13 * abs(wide).max()), (form, size, at_end)


def touch_a_guard_page() -> None:
    values = Guarded(PAGE).array(np.zeros(4), 1, at_end=True)
    ctypes.memset(values.ctypes.data + values.nbytes, 0, 1)


@linux
@pytest.mark.parametrize("isa", config.isas())
def test_steps_stay_between_guard_pages(isa: str) -> None:
    run_in_child(steps_between_guard_pages, isa)


@linux
@pytest.mark.parametrize("isa", config.isas())
def test_conversions_stay_between_guard_pages(isa: str) -> None:
    pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed")
    run_in_child(conversions_between_guard_pages, isa)


@linux
def test_guard_pages_guard() -> None:
    with pytest.raises(AssertionError, match="touch_a_guard_page"):
        run_in_child(touch_a_guard_page)


# ---- neighbours -------------------------------------------------------------------------------------------------------------

VIEWS: dict[str, Callable[[Any], Any]] = {
    "every third": lambda base: base[1:-1:3],
    "reversed": lambda base: base[-2:3:-2],
    "columns": lambda base: base[: base.size // 40 * 40].reshape(-1, 40)[1:-1, 3:20],
    "transposed columns": lambda base: base[: base.size // 40 * 40].reshape(-1, 40)[:, 5:8].T,
    "box": lambda base: base[: base.size // 210 * 210].reshape(-1, 30, 7)[:, 2:-2, 1:6:2],
    "Fortran box": lambda base: base[: base.size // 210 * 210].reshape(7, 30, -1, order="F")[1:4, ::-3, 1:],
}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("view", VIEWS)
def test_neighbours_of_a_view_are_left_alone(case: Case, view: str) -> None:
    take = VIEWS[view]
    for room, dtype in ((1300, np.float32), (50_000, np.float64)):
        names = ("p", "g", *case.states)
        bases = {name: np.random.default_rng(i).random(room).astype(dtype) for i, name in enumerate(names)}
        inside = take(np.arange(room))
        before = {name: base.copy() for name, base in bases.items()}
        packed = {name: np.ascontiguousarray(take(base)) for name, base in bases.items()}

        case.call(take(bases["p"]), take(bases["g"]), {name: take(bases[name]) for name in case.states}, 2)
        case.call(packed["p"], packed["g"], {name: packed[name] for name in case.states}, 2)

        for name, base in bases.items():
            expected = before[name]
            if name != "g":
                assert not np.array_equal(packed[name], expected[inside])
                expected[inside] = packed[name]
            assert_same_bits(base, expected, f"{name}, {view} of {room}")


# ---- growth -----------------------------------------------------------------------------------------------------------------


def resident(field: str = "VmRSS") -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def assert_stops_growing(once: Callable[[], None], times: int) -> None:
    for _ in range(times):
        once()
    before = resident()
    for _ in range(times):
        once()
    grown = resident() - before
    assert grown < MIB, f"{grown / MIB:.1f} MiB in {times} rounds"


def numpy_steps() -> None:
    params = [parameters((n,), np.float32) for n in (3, 1000, 40_000)] + [np.ones((30, 50), np.float64).T]
    opt = gradstep.AdamW(params, lr=lambda step: 1e-3, amsgrad=True)
    assert_stops_growing(lambda: opt.step([np.ones_like(param) for param in params]), 3000)
    assert opt.state[1]["step"] == 6000


def function_steps() -> None:
    case = next(case for case in CASES if case.name == "rmsprop_momentum_centered")

    def once() -> None:
        for shape in ((5,), (40, 50)):
            case.call(parameters(shape, np.float32), gradients(shape, np.float32, 1), case.start(shape, np.float32), None)
        p, g = array.array("f", [1.0] * 5000), array.array("f", [1.0] * 5000)
        gradstep.sgd_([p], [memoryview(g)], lr=0.1)

    assert_stops_growing(once, 3000)


def refused_steps() -> None:
    p, m, v = np.ones(2000), np.zeros(2000), np.zeros(2000)
    opt = gradstep.Adam({"w": p})

    def once() -> None:
        for grad in (np.ones(3), np.ones(2000, np.int32), "no array", p):
            with pytest.raises((TypeError, ValueError)):
                opt.step({"w": grad})
            with pytest.raises((TypeError, ValueError)):
                gradstep.adam_([p], [grad], exp_avg=[m], exp_avg_sq=[v], step=1)
        with pytest.raises(ValueError):
            gradstep.adam_(p, np.ones(2000), exp_avg=m, exp_avg_sq=v, step=1, lr=-1.0)

    assert_stops_growing(once, 2000)
    assert (p == 1).all() and not opt.state


def torch_steps() -> None:
    import torch

    import gradstep.torch

    params = [torch.nn.Parameter(torch.ones(shape)) for shape in ((3,), (40, 1000))]
    opt = gradstep.torch.AdamW(params)

    def once() -> None:
        for param in params:
            param.grad = torch.ones_like(param)
        opt.step()

    assert_stops_growing(once, 3000)
    assert opt.state[params[0]]["step"] == 6000


@linux
@pytest.mark.parametrize("steps", [numpy_steps, function_steps, refused_steps], ids=lambda steps: steps.__name__)
def test_memory_does_not_grow(steps: Callable[[], None]) -> None:
    run_in_child(steps)


@linux
def test_memory_does_not_grow_with_torch() -> None:
    pytest.importorskip("torch")
    run_in_child(torch_steps)


def test_no_reference_is_kept_or_lost() -> None:
    for case in CASES:
        p, g, states = parameters((70,), np.float32), gradients((70,), np.float32, 1), case.start((70,), np.float32)
        owners = [p, g, *states.values()]
        before = [sys.getrefcount(owner) for owner in owners]
        for _ in range(10):
            case.call(p, g, states, 2)
            case.call([p], [g], {name: [state] for name, state in states.items()}, 2)
            with pytest.raises(ValueError):
                case.call(p, g[:-1], states, 2)
        assert [sys.getrefcount(owner) for owner in owners] == before, case.name


# ---- the peak ---------------------------------------------------------------------------------------------------------------


def step_of_large_tensors(name: str, strided: bool) -> None:
    size = 24 * MIB // 4
    case = next(case for case in CASES if case.name == name)

    def make(value: float, n: int) -> Any:
        base = np.full(2 * n if strided else n, value, np.float32)
        return base[::-2] if strided else base

    def step(n: int) -> Any:
        p, g = make(1.0, n), make(0.5, n)
        states = {state: make(0.5, n) for state in case.states}
        before = resident("VmHWM")
        case.call(p, g, states, 3)
        assert (p != 1).all()
        return resident("VmHWM") - before

    step(100_000)  # starts the threads
    # The comparison in `step` takes a byte an element.
    grown = step(size) - size
    assert grown < 4 * MIB, f"{grown / MIB:.1f} MiB, a tensor has {size * 4 / MIB:.0f}"


@linux
@pytest.mark.parametrize("name", ["adamw_amsgrad", "sgd_nesterov", "rmsprop_momentum_centered"])
@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
def test_a_step_needs_no_memory_the_size_of_a_tensor(name: str, strided: bool) -> None:
    run_in_child(step_of_large_tensors, name, strided)


# ---- buffers are held -------------------------------------------------------------------------------------------------------


LARGE = 1 << 21


def filled(typecode: str, value: float) -> array.array:
    return array.array(typecode, np.full(LARGE, value, typecode).tobytes())


def test_a_buffer_can_not_be_resized_during_a_step() -> None:
    p, g = filled("f", 1.0), filled("f", 0.5)

    def resize() -> None:
        for buffer in (p, g):
            with pytest.raises(BufferError):
                buffer.append(0.0)

    steps = run_beside(lambda: gradstep.sgd_(p, g, lr=0.5), resize)
    assert (np.frombuffer(p, np.float32) == 1 - 0.25 * steps).all()
    p.append(0.0)
    assert len(p) == LARGE + 1


def test_a_bytearray_can_not_be_resized_during_a_step() -> None:
    memory, g = bytearray(filled("d", 1.0)), np.full(LARGE, 0.5)

    def resize() -> None:
        with pytest.raises(BufferError):
            memory.extend(b"more")

    steps = run_beside(lambda: gradstep.sgd_(memoryview(memory).cast("d"), g, lr=0.5), resize)
    assert (np.frombuffer(memory) == 1 - 0.25 * steps).all()


def test_an_array_can_not_be_resized_during_a_step() -> None:
    arrays = [np.ones(LARGE), np.full(LARGE, 0.5)]

    def resize() -> None:
        for i in range(2):
            with pytest.raises(ValueError, match="resize"):
                arrays[i].resize(10)

    steps = run_beside(lambda: gradstep.sgd_(arrays[0], arrays[1], lr=0.5), resize)
    assert (arrays[0] == 1 - 0.25 * steps).all()
    arrays[0].resize(10)
    assert arrays[0].size == 10


class Hook:
    """An array that does something else first when it is read."""

    def __init__(self, values: Any, first: Callable[[], None]) -> None:
        self.values, self.first = values, first

    def __dlpack__(self, **options: Any) -> Any:
        self.first()
        return self.values.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return (1, 0)


def test_a_buffer_is_held_from_the_moment_it_is_read() -> None:
    p, g, tried = array.array("d", [1.0] * 10), np.full(10, 0.5), []

    def resize() -> None:
        with pytest.raises(BufferError):
            p.append(0.0)
        tried.append(True)

    gradstep.sgd_(p, Hook(g, resize), lr=0.5)
    assert tried and list(p) == [0.75] * 10
    p.append(0.0)


def test_operands_live_until_the_step_ends() -> None:
    """Whoever owns them may let go of them meanwhile."""
    params, grads, states = ([np.full(LARGE, value)] for value in (1.0, 0.5, 0.0))
    everything = (params, grads, states)
    dropped: list[weakref.ref[Any]] = []

    def drop() -> None:
        dropped.extend(weakref.ref(owner[0]) for owner in everything)
        for owner in everything:
            owner.clear()
        assert all(array() is not None for array in dropped)

    run_beside(lambda: gradstep.sgd_(params, grads, momentum_buffer=states, momentum=0.9, lr=0.5), drop)
    assert len(dropped) == 3 and all(array() is None for array in dropped)


def drop_operands_while_the_first_is_read() -> None:
    params, grads = [np.ones(10), np.ones(10)], [np.ones(10), np.ones(10)]
    last = [weakref.ref(params[1]), weakref.ref(grads[1])]

    def drop() -> None:
        params.clear()
        grads.clear()

    params[0] = Hook(params[0], drop)
    gradstep.sgd_(params, grads, lr=0.5)
    assert not params and all(array() is None for array in last)


def test_operands_are_held_before_the_first_is_read() -> None:
    """Reading an operand may call its owner, who may do anything."""
    run_in_child(drop_operands_while_the_first_is_read)


def test_reading_an_operand_may_step_others() -> None:
    p, q = np.full(20, 3.0), np.full(7, 2.0)
    grad = Hook(np.full(20, 2.0), lambda: gradstep.sgd_(q, np.ones(7), lr=0.25))
    gradstep.sgd_(p, grad, lr=0.5)
    assert (p == 2).all() and (q == 1.75).all()
