"""A session of measuring: task after task, each contender checked before it is timed."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from gradstep import config

from .check import check
from .contenders import LIMIT, Contender, Run, Unsupported
from .measure import Effort, alternate
from .plan import Task
from .problem import Problem, memory_available, memory_needed
from .records import Record, make_records
from .report import Reporter


@dataclass(frozen=True)
class Skip:
    """Something that was not measured."""

    contender: str
    """Empty: all of them."""
    rule: str
    dtype: str
    case: str
    """Empty: all of them."""
    reason: str


@dataclass
class Session:
    """What to measure with, and what came out."""

    contenders: Sequence[Contender]
    named: bool
    """Whether the contenders were named, or everything was asked for: then slow compilers are waited for."""
    effort: Effort
    reporter: Reporter
    records: list[Record] = field(default_factory=list)
    skips: list[Skip] = field(default_factory=list)
    failures: list[Skip] = field(default_factory=list)
    """Contenders that disagree with the formula, or broke down."""
    _verdicts: dict[tuple[str, str, str], bool] = field(default_factory=dict)

    def measure(self, tasks: Sequence[Task]) -> None:
        """Measure all tasks, and show each when it is done. Configuration and threads are left as they were found."""
        with _configuration_kept():
            total = sum(len(task.threads) for task in tasks)
            done = 0
            for task in tasks:
                for records in self._measure_task(task, done, total):
                    done += 1
                    self.records += records
                    self.reporter.show(records)
            self.reporter.progress("", total, total)

    def _measure_task(self, task: Task, done: int, total: int) -> Iterator[list[Record]]:
        label = f"{task.rule.name} {task.dtype.name}, {task.case.name}"
        self.reporter.progress(label, done, total)
        needed, available = memory_needed(task.rule, task.case.elements, task.dtype), memory_available()
        if needed > 0.9 * available:
            reason = f"needs {needed / 1e9:.1f} GB of memory, {available / 1e9:.1f} are free"
            self._skip(self.skips, "", task, reason, case=task.case.name)
            for _ in task.threads:
                yield []
            return
        for contender in self.contenders:
            self._set_threads(contender, task, task.threads[-1])
        problem = Problem(task.rule, task.case.shapes, task.dtype)
        runs = self._prepare(problem, task)
        for i, threads in enumerate(task.threads):
            self.reporter.progress(f"{label}, {threads} thread{'s' * (threads > 1)}", done + i, total)
            ready = {contender: run for contender, run in runs.items() if self._set_threads(contender, task, threads)}
            yield make_records(task, threads, alternate(ready, self.effort))

    def _prepare(self, problem: Problem, task: Task) -> dict[Contender, Run]:
        runs = {LIMIT: LIMIT.prepare(problem)}
        for contender in self.contenders:
            if not self.named and contender.slow_start(task.rule, task.case):
                reason = "compiles for long: name it with --contender, or take --full"
                self._skip(self.skips, contender.name, task, reason, case=task.case.name)
            elif self._right(contender, task):
                try:
                    runs[contender] = contender.prepare(problem)
                except Exception as error:  # whatever somebody else's code may raise
                    self._skip(self.failures, contender.name, task, f"failed: {_first_line(error)}", case=task.case.name)
        return runs

    def _right(self, contender: Contender, task: Task) -> bool:
        key = (contender.name, task.rule.name, task.dtype.name)
        if key not in self._verdicts:
            self._verdicts[key] = False
            try:
                wrong = check(contender, task.rule, task.dtype)
            except Unsupported as reason:
                self._skip(self.skips, contender.name, task, str(reason))
            except Exception as error:  # whatever somebody else's code may raise
                self._skip(self.failures, contender.name, task, f"failed: {_first_line(error)}")
            else:
                self._verdicts[key] = wrong is None
                if wrong is not None:
                    self._skip(self.failures, contender.name, task, f"disagrees with the formula, not timed: {wrong}")
        return self._verdicts[key]

    def _set_threads(self, contender: Contender, task: Task, n: int) -> bool:
        try:
            contender.set_threads(n)
        except Unsupported as reason:
            self._skip(self.skips, contender.name, task, str(reason))
            return False
        return True

    def _skip(self, where: list[Skip], contender: str, task: Task, reason: str, case: str = "") -> None:
        skip = Skip(contender, task.rule.name, task.dtype.name, case, reason)
        if skip not in where:
            where.append(skip)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__


@contextmanager
def _configuration_kept() -> Iterator[None]:
    isa, threads = config.isa(), config.num_threads()
    torch_threads = sys.modules["torch"].get_num_threads() if "torch" in sys.modules else None
    try:
        yield
    finally:
        config.set_isa(isa)
        config.set_num_threads(threads)
        if torch_threads is not None:
            sys.modules["torch"].set_num_threads(torch_threads)
        if "gradstep.torch" in sys.modules:
            sys.modules["gradstep.torch"].share_torch_threads()
