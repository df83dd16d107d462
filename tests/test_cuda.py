"""On a GPU: the bits of the CPU, streams, graphs, memory. Everything else of the engine is tested without one: test_cuda_engine."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import gradstep
import gradstep.torch

from .cases import CASES, NORM_CASES, Case
from .stage_cases import MANY, STAGES, case_of, settings_of, step_arguments

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(
        not (torch.cuda.is_available() and gradstep.cuda.is_available()), reason="needs a GPU, and torch with CUDA"
    ),
]

ALL = [*CASES, *NORM_CASES]
SIZES = [*range(68), 1023, 1024, 1025, 4097, 16_384, 16_385, 100_003]
DTYPES = {"float32": torch.float32, "float64": torch.float64, "float16": torch.float16, "bfloat16": torch.bfloat16}
each_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


def numbers(shape: Any, dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    return (x * 10.0 ** torch.randint(-2, 2, x.shape, generator=generator)).to(dtype)


def optimizer(case: Case, params: list[torch.Tensor], **options: Any) -> Any:
    settings = {**settings_of(case), **case.class_settings, **options}
    return getattr(gradstep.torch, case.optimizer)(params, **settings)


def same(ours: torch.Tensor, theirs: torch.Tensor, what: str) -> None:
    """The same bits; a NaN is a NaN."""
    ours, theirs = ours.detach().cpu(), theirs.detach().cpu()
    assert ours.dtype == theirs.dtype, what
    assert torch.equal(torch.nan_to_num(ours, nan=1e30), torch.nan_to_num(theirs, nan=1e30)), what
    assert torch.equal(ours.isnan(), theirs.isnan()), what


def compare(
    case: Case, shapes: list[Any], dtype: torch.dtype, *, steps: int = 3, place: Any = None, call: Any = None, **options: Any
) -> None:
    """Take the same steps on the GPU and on the CPU, and compare parameters and states."""
    sides = []
    for device in ("cuda", "cpu"):
        params = [torch.nn.Parameter(numbers(shape, dtype, i).to(device)) for i, shape in enumerate(shapes)]
        if place:
            params = [torch.nn.Parameter(place(p.detach())) for p in params]
        sides.append((params, optimizer(case, params, **options)))
    for step in range(steps):
        for params, opt in sides:
            for i, p in enumerate(params):
                p.grad = None if (step, i) == (1, 2) else numbers(p.shape, dtype, 100 * step + i + 50).to(p.device)
            opt.step(**(call or {}))
    (ours, on_gpu), (theirs, on_cpu) = sides
    for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
        where = f"parameter {i} of {tuple(p.shape)}"
        same(p, q, where)
        state, expected = on_gpu.state[p], on_cpu.state[q]
        assert state.keys() == expected.keys(), where
        for name, value in expected.items():
            same(torch.as_tensor(state[name]).double(), torch.as_tensor(value).double(), f"{name} of {where}")


# ---- values ---------------------------------------------------------------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize("case", ALL, ids=[case.name for case in ALL])
def test_every_rule_has_the_bits_of_the_cpu(case: Case, dtype: torch.dtype) -> None:
    compare(case, [(size,) for size in SIZES], dtype)


@each_dtype
@pytest.mark.parametrize("name", [*STAGES, *MANY])
@pytest.mark.parametrize("rule", ["adamw", "sgd_nesterov"])
def test_every_stage_has_the_bits_of_the_cpu(rule: str, name: str, dtype: torch.dtype) -> None:
    options, scale, weights = step_arguments({**STAGES, **MANY}[name])
    if weights:
        pytest.skip("several gradients: see below")
    shapes = [(33, 3), (1030,), (2, 3, 5, 5), (0, 3), (), (17, 40), (3, 20_000), (9000, 2)]
    compare(case_of(rule), shapes, dtype, call={"grad_scale": scale}, **options)


@pytest.mark.parametrize(
    "options", [{"state_dtype": "q8"}, {"state_dtype": "q4"}, {"state_dtype": "bfloat16"}, {"state_dtype": "float16"}]
)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@each_dtype
def test_formats_of_states(options: dict[str, Any], rounding: str, dtype: torch.dtype) -> None:
    compare(
        case_of("adamw"),
        [(size,) for size in (1, 255, 256, 257, 1023, 4097, 100_003)],
        dtype,
        state_rounding=rounding,
        **options,
    )


@pytest.mark.parametrize("precision", ["stochastic", "kahan", "master", "split"])
def test_precisions(precision: str) -> None:
    compare(case_of("adamw"), [(size,) for size in (1, 17, 4097, 100_003)], torch.bfloat16, precision=precision, seed=5)


@pytest.mark.parametrize(
    "place",
    [
        lambda x: x.t() if x.ndim == 2 else x,
        lambda x: torch.cat([x, x])[::2] if x.ndim else x,
        lambda x: torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape),
    ],
    ids=["transposed", "strided", "misaligned"],
)
@pytest.mark.parametrize("options", [{}, {"clip_norm": 0.1, "centralize": True}], ids=["plain", "rows"])
def test_layouts(place: Any, options: dict[str, Any]) -> None:
    compare(case_of("adamw"), [(64, 130), (31, 7), (5000,)], torch.float32, place=place, **options)


def test_more_elements_than_32_bits_count() -> None:
    n = 2**31 + 17
    if torch.cuda.mem_get_info()[0] < 3 * n * 2:
        pytest.skip("needs 13 GB of the GPU's memory")
    p = torch.nn.Parameter(torch.ones(n, dtype=torch.bfloat16, device="cuda"))
    p.grad = torch.full_like(p, 0.5)
    gradstep.torch.SGD([p], lr=1.0).step()
    assert bool((p.detach() == 0.5).all())


# ---- the order of things --------------------------------------------------------------------------------------------------------


def test_steps_do_not_wait_for_the_gpu() -> None:
    params = [torch.nn.Parameter(torch.ones(100, device="cuda")) for _ in range(5)]
    opt = gradstep.torch.AdamW(params, clip_norm=1.0, on_nonfinite="skip")
    for p in params:
        p.grad = torch.ones_like(p)
    opt.step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(200_000_000)  # a tenth of a second or so
        busy = torch.cuda.Event()
        for _ in range(10):
            seen = opt.step(stats=True)
        busy.record()
        assert not busy.query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert seen.grad_norm == pytest.approx(500**0.5)
    assert not seen.skipped


def test_gradients_that_are_freed_at_once_on_a_side_stream() -> None:
    stream = torch.cuda.Stream()
    p, q = (torch.nn.Parameter(torch.ones(30_000, device=device)) for device in ("cuda", "cpu"))
    ours, theirs = gradstep.torch.AdamW([p], clip_norm=1.0), gradstep.torch.AdamW([q], clip_norm=1.0)
    for step in range(1000):
        g = numbers((30_000,), torch.float32, step % 7)
        with torch.cuda.stream(stream):
            p.grad = g.to("cuda", non_blocking=False)
            ours.step()
            p.grad = None
            torch.empty(30_000, device="cuda").fill_(float("nan"))  # where the gradient stood
        q.grad = g
        theirs.step()
    stream.synchronize()
    same(p, q, "after 1,000 steps")


def test_a_step_that_is_skipped_changes_nothing() -> None:
    p = torch.nn.Parameter(torch.ones(1000, device="cuda"))
    opt = gradstep.torch.AdamW([p], on_nonfinite="skip")
    p.grad = torch.ones_like(p)
    opt.step()
    before = copy.deepcopy((p.detach(), opt.state[p]))
    p.grad[500] = float("nan")
    opt.step()
    same(p, before[0], "parameter")
    for name, value in before[1].items():
        same(opt.state[p][name], value, name)
    assert opt.steps == 1


@pytest.mark.parametrize("options", [{}, {"clip_norm": 0.5, "ema_decay": 0.9}], ids=["plain", "chain"])
def test_a_graph_that_is_replayed_is_the_eager_step(options: dict[str, Any]) -> None:
    sides = []
    for _ in range(2):
        params = [torch.nn.Parameter(numbers((size,), torch.float32, size).cuda()) for size in (5, 4097, 100_003)]
        for p in params:
            p.grad = torch.zeros_like(p)
        lr = torch.tensor(0.01, device="cuda")
        sides.append((params, lr, gradstep.torch.AdamW(params, lr=lr, capturable=True, **options)))
    (graphed, lr, opt), (eager, eager_lr, eager_opt) = sides

    def fill(params: list[torch.nn.Parameter], step: int) -> None:
        for p in params:
            assert p.grad is not None
            p.grad.copy_(numbers(p.shape, torch.float32, step + p.numel()))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # torch asks for a step before the capture
        fill(graphed, 0)
        opt.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        opt.step()
    fill(eager, 0)
    eager_opt.step()
    for step in range(1, 6):
        for params, rate in ((graphed, lr), (eager, eager_lr)):
            fill(params, step)
            rate.fill_(0.01 / step)
        graph.replay()
        eager_opt.step()
    for p, q in zip(graphed, eager, strict=True):
        same(p, q, f"parameter of {p.numel()}")
        same(opt.state[p]["step"], eager_opt.state[q]["step"], "step")


def test_grad_scaler_is_not_read_by_the_host() -> None:
    p, q = (torch.nn.Parameter(torch.ones(5000, device="cuda")) for _ in range(2))
    ours, theirs = gradstep.torch.AdamW([p], lr=0.1), gradstep.torch.AdamW([q], lr=0.1)
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0, growth_interval=1000)
    for step in range(6):
        g = numbers((5000,), torch.float32, step).cuda()
        p.grad = g * 1024
        if step == 3:
            p.grad[7] = float("inf")
        else:
            q.grad = g
            theirs.step()
        scaler.scale(torch.ones((), device="cuda"))
        torch.cuda.set_sync_debug_mode("error")
        scaler.step(ours)
        torch.cuda.set_sync_debug_mode("default")
        scaler.update(1024.0)
    same(p, q, "parameter")


def test_parameters_on_the_cpu_and_on_the_gpu() -> None:
    params = [torch.nn.Parameter(torch.ones(100, device=device)) for device in ("cuda", "cpu", "cuda")]
    opt = gradstep.torch.AdamW(params, lr=0.1)
    for p in params:
        p.grad = torch.full_like(p, 0.5)
    opt.step()
    for p in params[1:]:
        same(p, params[0], "parameter")
    assert {opt.state[p]["step"].device.type for p in params} == {"cuda", "cpu"}


def test_several_optimizers_and_devices() -> None:
    params = [
        torch.nn.Parameter(torch.ones(1000, device=f"cuda:{i}")) for i in range(torch.cuda.device_count()) for _ in range(2)
    ]
    optimizers = [gradstep.torch.AdamW([p], lr=0.1) for p in params] + [gradstep.torch.AdamW(params, lr=0.1)]
    before = torch.cuda.current_device()
    for _ in range(3):
        for p in params:
            p.grad = torch.full_like(p, 0.25)
        for opt in optimizers:
            opt.step()
    assert torch.cuda.current_device() == before
    for p in params[1:]:
        same(p, params[0], "parameter")


def test_cupy_arrays() -> None:
    cupy = pytest.importorskip("cupy")
    import numpy as np

    host = np.linspace(-1, 1, 4097, dtype=np.float32)
    w, v = cupy.asarray(host), host.copy()
    ours, theirs = gradstep.AdamW(w, lr=0.1), gradstep.AdamW(v, lr=0.1)
    for _ in range(3):
        ours.step(2 * w)
        theirs.step(2 * v)
    assert np.array_equal(cupy.asnumpy(w), v)


def test_arrays_on_different_devices_are_refused() -> None:
    p, g = torch.ones(3, device="cuda"), torch.ones(3)
    with pytest.raises(ValueError, match="is in CPU memory, its parameter is on cuda:0"):
        gradstep.sgd_(p, g, lr=0.1)
