"""A GPU: CUDA's clock, what its memory has room for, and what is told of it."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from gradstep import cuda

from . import contenders
from .cases import one
from .contenders import Contender, DeviceCopy, Run
from .formats import FLOAT32, Format
from .measure import Clock, Effort, Times
from .memory import TorchMemory
from .places import Place
from .plan import Choice, Task, make_cuda_tasks
from .rules import Rule

QUICK = Effort(0.05, 3, 7, longest=60, block=0.005, warm_up=0.2)
NORMAL = Effort(0.3, 5, 25, longest=300, block=0.02, warm_up=0.5)
FULL = Effort(1.0, 7, 51, block=0.05, warm_up=1.0)

_SPARE = 0.9  # of the free memory; the rest is for what allocators round up
_SCRATCH = 3  # arrays of the size of the parameters that torch's operations make on their way
_DIGITS = 2  # of a size that was reduced
_SMI = (
    "driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.draw", "power.limit", "temperature.gpu",
)  # fmt: skip


class CudaClock(Clock):
    """CUDA's events around a block of steps, on the stream that they are launched on."""

    def __init__(self, cuda: Any = None) -> None:
        self._given = cuda

    @property
    def _cuda(self) -> Any:
        return self._given or importlib.import_module("torch").cuda

    def settle(self) -> None:
        self._cuda.synchronize()

    def block(self, run: Run, calls: int) -> Times:
        events = [self._cuda.Event(enable_timing=True) for _ in range(2)]
        if run.before is None:
            return self._time(run, calls, events)
        seconds = wall = 0.0
        for _ in itertools.repeat(None, calls):
            run.before()
            one_call = self._time(run, 1, events)
            seconds += one_call.seconds
            wall += one_call.wall or 0.0
        return Times(seconds, wall)

    def _time(self, run: Run, calls: int, events: Sequence[Any]) -> Times:
        first, last = events
        step = run.step
        self._cuda.synchronize()
        start = time.perf_counter()
        first.record()
        for _ in itertools.repeat(None, calls):
            step()
        run.finish()
        last.record()
        last.synchronize()
        wall = time.perf_counter() - start
        return Times(first.elapsed_time(last) / 1000, wall)


def missing() -> str:
    """Return in a sentence why nothing can be measured on a GPU; empty: it can."""
    if importlib.util.find_spec("torch") is None:
        return "the benchmarks on a GPU need torch, which is not installed"
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no CUDA device, or no driver for one"
    try:
        cuda.describe(torch.cuda.current_device())
    except RuntimeError as reason:
        return str(reason)
    return ""


def bytes_needed(rule: Rule, elements: int, form: Format, taking_part: Sequence[Contender]) -> int:
    """Return the bytes that one tensor takes with all contenders.

    These are the shared arrays, those of float32 throughout beside another format, what contenders keep for themselves, and what
    torch's operations make on their way.
    """
    shapes = ((elements,),)
    shared = 2 * form.stream_bytes(shapes) + sum(form.stream_bytes(shapes, name) for name in (*rule.arrays, *form.beside))
    beside = 0 if form.plain else FLOAT32.computing.itemsize * (2 + len(rule.arrays))
    own = sum(contender.own_bytes(form) for contender in taking_part)
    return shared + round(elements * (beside + own + _SCRATCH * form.computing.itemsize))


def largest(needed: Callable[[int], int], elements: int, available: float) -> int:
    """Return up to `elements`, as many as need no more than `available` bytes; of fewer, the first digits."""
    if needed(elements) <= available:
        return elements
    fitting = int(elements * available / needed(elements)) if available > 0 else 0
    unit: int = 10 ** max(0, len(str(fitting)) - _DIGITS)
    return fitting // unit * unit


def ask_smi(run: Callable[..., Any] = subprocess.run, device: str = "0") -> dict[str, str]:
    """Return what nvidia-smi tells of a device: driver, clocks in MHz, power in W, temperature; {} if it tells nothing."""
    command = ["nvidia-smi", f"--id={device}", f"--query-gpu={','.join(_SMI)}", "--format=csv,noheader,nounits"]
    try:
        done = run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    values = [value.strip() for value in str(done.stdout).strip().split(",")]
    return dict(zip(_SMI, values, strict=True)) if len(values) == len(_SMI) else {}


class Cuda(Place):
    """torch's current CUDA device."""

    device = "cuda"
    threaded = False
    quick, normal, full = QUICK, NORMAL, FULL

    def __init__(self, device: str = "cuda", copied: int = 2 << 30) -> None:
        self.memory = TorchMemory(device)
        self.clock = CudaClock()
        self.limit = self._copy = DeviceCopy(copied)

    def missing(self) -> str:
        return missing()

    def contenders(self, isas: Sequence[str] = ()) -> dict[str, Contender]:
        return contenders.cuda_contenders()

    def tasks(self, choice: Choice, threads: int) -> list[Task]:
        return make_cuda_tasks(choice)

    def memory_needed(self, task: Task, taking_part: Sequence[Contender]) -> int:
        return bytes_needed(task.rule, task.case.elements, task.form, taking_part)

    def memory_available(self) -> float:
        import torch

        torch.cuda.empty_cache()  # what the last task has left there
        return float(torch.cuda.mem_get_info()[0]) - self._copy.wanted

    def fitted(self, task: Task, taking_part: Sequence[Contender]) -> Task:
        if task.case.kind != "one":
            return task

        def needed(elements: int) -> int:
            return bytes_needed(task.rule, elements, task.form, taking_part)

        size = largest(needed, task.case.elements, _SPARE * self.memory_available())
        return task if size in (0, task.case.elements) else replace(task, case=one(size))

    def describe(self) -> dict[str, Any]:
        """Return name, sizes and versions of the device, and its clocks as they are now: right after the work."""
        import torch

        properties: Any = torch.cuda.get_device_properties(torch.cuda.current_device())
        told = {
            name: getattr(properties, name, None) for name in ("name", "total_memory", "multi_processor_count", "L2_cache_size")
        }
        uuid = getattr(properties, "uuid", None)  # nvidia-smi does not look at CUDA_VISIBLE_DEVICES
        return {
            "gpu": {
                **told,
                "compute_capability": f"{properties.major}.{properties.minor}",
                "cuda_runtime": torch.version.cuda,
                "nvidia_smi": ask_smi(device=f"GPU-{uuid}" if uuid else "0"),
                "gradstep": cuda.describe(torch.cuda.current_device()),
            }
        }
