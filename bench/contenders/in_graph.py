"""Steps in a CUDA graph: captured once, then replayed, which costs one launch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from ..formats import Format
from ..problem import Problem
from ..rules import Rule
from .base import Contender, Run, UnsupportedError

_MOST_ELEMENTS = 64_000_000  # launching larger ones costs nothing that could be seen

WARM_UPS = 3
"""Steps before the capture, as torch's documentation has it: they load kernels and make what is made once."""


def capture(step: Callable[[], object], before: Callable[[], None]) -> Callable[[], object]:
    """Take `WARM_UPS` steps, each after `before`. Return what replays one more, which is captured and not run."""
    import torch

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UPS):
            before()
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph: Any = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    replay: Callable[[], object] = graph.replay
    return replay


class InGraph(Contender):
    """A contender's step, captured and replayed."""

    package = "torch"
    whole = True
    stores = True
    warm_ups: ClassVar[int] = WARM_UPS
    on_host: ClassVar[frozenset[str]]
    """Options that need the host at each step."""

    def __init__(self, inner: Contender, name: str) -> None:
        self.name = name
        self.about = f"{inner.name}, capturable, captured in a CUDA graph and replayed"
        self._inner = inner

    def prepare(self, problem: Problem) -> Run:
        if sum(len(numbers.reshape(-1)) for numbers in problem.params) > _MOST_ELEMENTS:
            raise UnsupportedError(f"a graph saves launches: measured up to {_MOST_ELEMENTS:,} elements")
        if not problem.rule.optimizer:
            raise UnsupportedError("a norm is for the host")
        if on_host := sorted(problem.rule.chain.active.keys() & self.on_host):
            raise UnsupportedError(f"{', '.join(on_host)}: the host takes part in each step")
        inner = self._inner.prepare(problem)
        return Run(capture(inner.step, problem.refill_grads), inner.params)

    def formula(self, rule: Rule) -> Callable[..., Any]:
        return self._inner.formula(rule)

    def form(self, asked: Format) -> Format:
        return self._inner.form(asked)

    def enter(self) -> None:
        self._inner.enter()


class GradstepGraph(InGraph):
    """gradstep's torch classes in a graph."""

    face = "gradstep-graph"
    on_host = frozenset({"stats"})


class TorchGraph(InGraph):
    """torch.optim in a graph."""

    peer = GradstepGraph.face
    on_host = frozenset({"ema_decay", "swa"})  # the weights of the averages
