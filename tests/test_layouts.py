"""Any layout: right in place, whatever the strides, and nothing beside the operands touched."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradstep import config

from .cases import CASES, Case, gradients, parameters
from .test_values import assert_same_bits, cases

RUNS_ON_GPU = True

ADAMW = next(case for case in CASES if case.name == "adamw")
CANARY = 12345.678


class Placed:
    """An array of given values in a layout of its own, within a larger block of memory whose rest must stay as it is."""

    def __init__(self, values: Any, layout: str, axes: tuple[int, ...], steps: tuple[int, ...], offset: int) -> None:
        padded = [n * abs(step) for n, step in zip(values.shape, steps, strict=True)]
        size = int(np.prod(padded, dtype=int)) if values.ndim else 1
        self.block = np.full(size + offset + 3, CANARY, values.dtype)
        inner = self.block[offset : offset + size]
        view = (
            inner.reshape([padded[axis] for axis in axes]).transpose(np.argsort(axes))
            if layout == "permuted"
            else inner.reshape(padded)
        )
        self.array = view[tuple(slice(None, None, step) for step in steps)] if values.ndim else view.reshape(())
        self.array[...] = values
        self.outside = np.ones(self.block.shape, bool)
        first = self.array.__array_interface__["data"][0] - self.block.__array_interface__["data"][0]
        index = np.full(values.shape, first // values.itemsize)
        for axis, stride in enumerate(self.array.strides):
            index = index + (np.arange(values.shape[axis]) * (stride // values.itemsize)).reshape(
                [-1 if d == axis else 1 for d in range(values.ndim)]
            )
        self.outside[index.ravel().astype(int)] = False

    def check(self) -> None:
        assert (self.block[self.outside] == self.block.dtype.type(CANARY)).all(), "memory beside the array was written"


@st.composite
def placements(draw: st.DrawFn, ndim: int) -> tuple[str, tuple[int, ...], tuple[int, ...], int]:
    axes = tuple(draw(st.permutations(range(ndim))))
    steps = tuple(draw(st.sampled_from([1, 1, 2, 3, -1, -2])) for _ in range(ndim))
    return draw(st.sampled_from(["plain", "permuted"])), axes, steps, draw(st.integers(0, 17))


@st.composite
def problems(draw: st.DrawFn) -> tuple[Case, Any, tuple[int, ...], list[Any], str, int]:
    case = draw(st.sampled_from(CASES))
    shape = tuple(draw(st.lists(st.sampled_from([0, 1, 2, 3, 5, 7, 16, 33]), min_size=0, max_size=4)))
    places = [draw(placements(len(shape))) for _ in range(2 + len(case.states))]
    return (
        case,
        draw(st.sampled_from([np.float32, np.float64])),
        shape,
        places,
        draw(st.sampled_from(config.isas())),
        draw(st.sampled_from([1, 3])),
    )


@given(problems())
@settings(max_examples=400, deadline=None)
def test_every_operand_in_a_layout_of_its_own(problem: tuple[Case, Any, tuple[int, ...], list[Any], str, int]) -> None:
    case, dtype, shape, places, isa, threads = problem
    config.set_isa(isa)
    config.set_num_threads(threads)
    p, states = parameters(shape, dtype), case.start(shape, dtype)
    placed = [
        Placed(p, *places[0]),
        *(Placed(states[name], *place) for name, place in zip(case.states, places[2:], strict=True)),
    ]
    for step in (1, 2):
        g = gradients(shape, dtype, step)
        grad = Placed(g, *places[1])
        case.call(
            placed[0].array, grad.array, {name: place.array for name, place in zip(case.states, placed[1:], strict=True)}, step
        )
        assert_same_bits(grad.array, g, "gradient")
        p = case.reference(p, g, states, step, **case.settings)
    assert_same_bits(np.ascontiguousarray(placed[0].array), np.asarray(p, dtype), "parameter")
    for name, place in zip(case.states, placed[1:], strict=True):
        assert_same_bits(np.ascontiguousarray(place.array), np.asarray(states[name], dtype), name)
    for place in placed:
        place.check()


LAYOUTS = {
    "fortran": np.asfortranarray,
    "transposed": lambda a: a.T.copy().T,
    "reversed": lambda a: a[::-1].copy()[::-1],
    "channels_last": lambda a: np.moveaxis(np.moveaxis(a, 0, -1).copy(), -1, 0),
    "strided": lambda a: np.repeat(a, 2, axis=-1)[..., ::2],
    "offset": lambda a: np.concatenate([np.zeros(1, a.dtype), a.ravel()])[1:].reshape(a.shape),
}


@cases
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "only the parameter"])
def test_large_arrays_in_named_layouts(case: Case, layout: str, shared: bool) -> None:
    """Large enough for several chunks and threads."""
    config.set_num_threads(3)
    shape, place = (5, 129, 131), LAYOUTS[layout]
    p, states = parameters(shape, np.float32), case.start(shape, np.float32)
    ours = place(p.copy())
    our_states = {name: place(state.copy()) if shared else state.copy() for name, state in states.items()}
    for step in (1, 2):
        g = gradients(shape, np.float32, step)
        case.call(ours, place(g) if shared else g, our_states, step)
        p = case.reference(p, g, states, step, **case.settings)
    assert_same_bits(np.ascontiguousarray(ours), p, "parameter")
    for name in states:
        assert_same_bits(np.ascontiguousarray(our_states[name]), states[name], name)


@pytest.mark.parametrize("shape", [(), (7,), (3, 5), (33, 1031)])
def test_broadcast_gradients(shape: tuple[int, ...]) -> None:
    for kept in range(len(shape) + 1):
        g = gradients(tuple(1 if axis < len(shape) - kept else n for axis, n in enumerate(shape)), np.float32, 5)
        p, states = parameters(shape, np.float32), ADAMW.start(shape, np.float32)
        theirs = {name: state.copy() for name, state in states.items()}
        expected = ADAMW.reference(p, np.broadcast_to(g, shape), theirs, 1, **ADAMW.settings)
        ADAMW.call(p, np.broadcast_to(g, shape), states, 1)
        assert_same_bits(p, np.asarray(expected, np.float32), f"parameter, {kept} axes kept")


@pytest.mark.parametrize("offset", range(1, 16))
def test_arrays_off_any_vector_boundary(offset: int, isa: str) -> None:
    def place(a: Any) -> Any:
        block = np.empty(a.size + 32, a.dtype)
        start = (-block.__array_interface__["data"][0] // a.itemsize) % 16 + offset
        block[start : start + a.size] = a
        return block[start : start + a.size]

    p, states = parameters((1027,), np.float32), ADAMW.start((1027,), np.float32)
    ours, our_states = place(p), {name: place(state) for name, state in states.items()}
    g = gradients((1027,), np.float32, 1)
    ADAMW.call(ours, place(g), our_states, 1)
    assert_same_bits(ours, ADAMW.reference(p, g, states, 1, **ADAMW.settings), "parameter")


def test_interleaved_views_are_apart() -> None:
    """Columns of one block as parameter and states: their memory interleaves, no element is shared."""
    block = np.zeros((50, 3), np.float32)
    block[:, 0] = parameters((50,), np.float32)
    p, states, g = block[:, 0].copy(), ADAMW.start((50,), np.float32), gradients((50,), np.float32, 1)
    ADAMW.call(block[:, 0], g, {"exp_avg": block[:, 1], "exp_avg_sq": block[:, 2]}, 1)
    assert_same_bits(np.ascontiguousarray(block[:, 0]), ADAMW.reference(p, g, states, 1, **ADAMW.settings), "parameter")
    assert_same_bits(np.ascontiguousarray(block[:, 2]), states["exp_avg_sq"], "exp_avg_sq")


def test_scalars_and_empty_arrays_anywhere_in_a_list() -> None:
    shapes = [(0,), (), (3, 0, 2), (5,), (), (0, 0)]
    params = [parameters(shape, np.float64, i) for i, shape in enumerate(shapes)]
    grads = [gradients(shape, np.float64, 10 + i) for i, shape in enumerate(shapes)]
    states = [ADAMW.start(shape, np.float64) for shape in shapes]
    expected = [
        ADAMW.reference(p, g, {k: s.copy() for k, s in state.items()}, 1, **ADAMW.settings)
        for p, g, state in zip(params, grads, states, strict=True)
    ]
    params = [np.array(p) for p in params]
    ADAMW.call(params, grads, {name: [state[name] for state in states] for name in ADAMW.states}, 1)
    for p, q in zip(params, expected, strict=True):
        assert np.array_equal(p, q)


def test_lists_mix_dtypes_shapes_and_steps() -> None:
    shapes, dtypes, steps = [(70,), (3, 1111), (9,)], [np.float32, np.float64, np.float32], [1, 2, 40_000]
    params = [parameters(s, d, i) for i, (s, d) in enumerate(zip(shapes, dtypes, strict=True))]
    grads = [gradients(s, d, i) for i, (s, d) in enumerate(zip(shapes, dtypes, strict=True))]
    states = [ADAMW.start(s, d) for s, d in zip(shapes, dtypes, strict=True)]
    expected = [
        ADAMW.reference(p, g, {k: v.copy() for k, v in s.items()}, step, **ADAMW.settings)
        for p, g, s, step in zip(params, grads, states, steps, strict=True)
    ]
    ADAMW.call(params, grads, {name: [s[name] for s in states] for name in ADAMW.states}, steps)
    for p, q in zip(params, expected, strict=True):
        assert_same_bits(p, q, "parameter")


def test_complex_arrays_are_pairs_of_reals() -> None:
    rng = np.random.default_rng(0)
    p, g = (rng.standard_normal(37) + 1j * rng.standard_normal(37) for _ in range(2))
    states = {name: np.zeros(37, complex) for name in ADAMW.states}
    real = {name: np.zeros(74) for name in ADAMW.states}
    expected = ADAMW.reference(p.view(float), g.view(float), real, 1, **ADAMW.settings)
    ADAMW.call(p, g, states, 1)
    assert_same_bits(p.view(float), expected, "parameter")


@pytest.mark.parametrize("make", [bytearray, memoryview, "array", "mmap", "dlpack"])
def test_other_owners_of_memory(make: Any, tmp_path: Any) -> None:
    import array

    p, states, g = parameters((41,), np.float32), ADAMW.start((41,), np.float32), gradients((41,), np.float32, 1)
    theirs = {name: state.copy() for name, state in states.items()}
    expected = ADAMW.reference(p, g, theirs, 1, **ADAMW.settings)

    class Capsule:
        def __init__(self, a: Any) -> None:
            self.a, self.dtype = a, a.dtype

        def __dlpack__(self, **more: Any) -> Any:
            return self.a.__dlpack__(**more)

    def place(a: Any) -> Any:
        if make is bytearray:
            return memoryview(bytearray(a.tobytes())).cast("f")
        if make is memoryview:
            return memoryview(a)
        if make == "array":
            return array.array("f", a.tolist())
        if make == "mmap":
            file = np.memmap(tmp_path / f"{id(a)}.bin", np.float32, "w+", shape=a.shape)
            file[...] = a
            return file
        return Capsule(a)

    if make == "dlpack" and np.lib.NumpyVersion(np.__version__) < "2.1.0":
        pytest.skip("this NumPy does not tell through DLPack that memory may be written")
    ours = place(p)
    ADAMW.call(ours, place(g), {name: place(state) for name, state in states.items()}, 1)
    assert_same_bits(np.asarray(ours.a if make == "dlpack" else ours), expected, "parameter")
