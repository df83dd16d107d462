"""A session of measuring: task after task, each contender checked before it is timed."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from gradstep import config
from gradstep.formats import check_state_dtype, numpy_dtype

from .check import check
from .contenders import Contender, Off, Run, Throughout, UnsupportedError
from .distance import Distance, measure_distance
from .formats import FLOAT32
from .measure import alternate
from .memory import HOST
from .options import Order
from .plan import Task
from .problem import Problem
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
    """What to measure, and what came out."""

    order: Order
    reporter: Reporter
    records: list[Record] = field(default_factory=list)
    skips: list[Skip] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What was measured otherwise than it was asked for."""
    failures: list[Skip] = field(default_factory=list)
    """Contenders that disagree with the formula, or broke down."""
    distances: dict[tuple[str, str, str], Distance] = field(default_factory=dict)
    """From float64, by contender, rule and format: of those measured in other formats than float32 and float64 throughout."""
    _verdicts: dict[tuple[str, str, str], bool] = field(default_factory=dict)

    def measure(self) -> None:
        """Measure all tasks, and show each when it is done. Configuration and threads are left as they were found."""
        tasks, longest = self.order.tasks, self.order.longest
        total = sum(len(task.threads) for task in tasks)
        end = time.monotonic() + longest
        done = 0
        with _configuration_kept():
            for task in tasks:
                if time.monotonic() > end:
                    reason = f"the {longest:g} seconds were over: choose it by options, or take --full"
                    self._skip(self.skips, "", task, reason, case=task.case.name)
                    continue
                for records in self._measure_task(self._fitted(task), done, total):
                    done += 1
                    self.records += records
                    self.reporter.show(records)

    def _fitted(self, task: Task) -> Task:
        gc.collect()  # the last problem, should somebody's objects go round in circles
        fitted = self.order.place.fitted(task, self.order.contenders)
        if fitted != task:
            label = f"{task.rule.label} {task.form.name}, {task.case.name} elements"
            note = f"{label}: reduced to {fitted.case.name}, for which the free memory has room"
            self.notes.append(note)
            self.reporter.line(note)
        return fitted

    def _measure_task(self, task: Task, done: int, total: int) -> Iterator[list[Record]]:
        label = f"{task.rule.label} {task.form.name}, {task.case.name}"
        self.reporter.progress(label, done, total)
        if reason := _obstacle(task, self.order):
            self._skip(self.skips, "", task, reason, case=task.case.name)
            yield from ([] for _ in task.threads)
            return
        gc.freeze()  # all that is loaded by now, so that the next time takes no time
        place = self.order.place
        problem = Problem(task.rule, task.case.shapes, task.form, place.memory)
        runs = self._prepare(task, problem)
        for i, threads in enumerate(task.threads):
            shown = f"{label}, {threads} thread{'s' * (threads > 1)}" if place.threaded else label
            self.reporter.progress(shown, done + i, total)
            ready = {contender: run for contender, run in runs.items() if self._has_threads(contender, task, threads)}
            if task.rule.chain.writes_grads:
                ready = {contender: run._replace(before=problem.refill_grads) for contender, run in ready.items()}
            yield make_records(task, threads, alternate(ready, self.order.effort, place.clock), place.device)

    def _prepare(self, task: Task, problem: Problem) -> dict[Contender, Run]:
        limit = self.order.place.limit
        runs: dict[Contender, Run] = {limit: limit.prepare(problem)}
        for contender in self.order.contenders:
            if not self.order.patient and contender.slow_start(task.rule, task.case):
                reason = "compiles for long: name it with --contender, or take --full"
                self._skip(self.skips, contender.name, task, reason, case=task.case.name)
            elif self._has_threads(contender, task, task.threads[0]) and self._right(contender, task):
                try:
                    runs[contender] = contender.prepare(problem)
                except Exception as error:  # whatever somebody else's code may raise
                    self._fail(contender, task, error, case=task.case.name)
                    continue
                if task.rule.chain and contender.face and self._right(contender, replace(task, rule=task.rule.alone())):
                    off = Off(contender)
                    runs[off] = off.prepare(problem)
                throughout = replace(task, form=FLOAT32)
                if not task.form.plain and self._right(contender, throughout):
                    self._measure_distance(contender, throughout)
                    if contender.face:
                        other = Throughout(contender)
                        runs[other] = other.prepare(problem)
                if not task.form.plain:
                    self._measure_distance(contender, task)
        return runs

    def _measure_distance(self, contender: Contender, task: Task) -> None:
        key = (contender.name, task.rule.name, task.form.name)
        if key not in self.distances:
            try:
                self.distances[key] = measure_distance(contender, task.rule, task.form, self.order.place.memory)
            except Exception as error:  # whatever somebody else's code may raise
                self._fail(contender, task, error)

    def _right(self, contender: Contender, task: Task) -> bool:
        key = (contender.name, task.rule.label, task.form.name)
        if key not in self._verdicts:
            self._verdicts[key] = False
            try:
                wrong = check(contender, task.rule, task.form, self.order.place.memory)
            except UnsupportedError as reason:
                self._skip(self.skips, contender.name, task, str(reason))
            except Exception as error:  # whatever somebody else's code may raise
                self._fail(contender, task, error)
            else:
                self._verdicts[key] = wrong is None
                if wrong is not None:
                    self._skip(self.failures, contender.name, task, f"disagrees with the formula, not timed: {wrong}")
        return self._verdicts[key]

    def _has_threads(self, contender: Contender, task: Task, n: int) -> bool:
        if not self.order.place.threaded:
            return True
        try:
            contender.set_threads(n)
        except UnsupportedError as reason:
            self._skip(self.skips, contender.name, task, str(reason))
            return False
        except Exception as error:  # whatever somebody else's code may raise
            self._fail(contender, task, error)
            return False
        return True

    def _fail(self, contender: Contender, task: Task, error: Exception, case: str = "") -> None:
        text = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        self._skip(self.failures, contender.name, task, f"failed: {text}", case)

    def _skip(self, where: list[Skip], contender: str, task: Task, reason: str, case: str = "") -> None:
        skip = Skip(contender, task.rule.label, task.form.name, case, reason)
        if skip not in where:
            where.append(skip)


def _obstacle(task: Task, order: Order) -> str:
    """Return why nobody can be measured in a case; empty if nothing stands against it."""
    place = order.place
    try:
        check_state_dtype(task.form.state_dtype or None, task.rule.states)
        if place.memory is HOST:
            numpy_dtype(task.form.dtype)
    except (ImportError, ValueError) as error:
        return str(error)
    needed, available = place.memory_needed(task, order.contenders), place.memory_available()
    return f"needs {needed / 1e9:.1f} GB of memory, {available / 1e9:.1f} are free" if needed > 0.9 * available else ""


@contextmanager
def _configuration_kept() -> Iterator[None]:
    isa, threads = config.isa(), config.num_threads()
    torch = sys.modules.get("torch")
    torch_threads = torch.get_num_threads() if torch else 0
    try:
        yield
    finally:
        gc.unfreeze()
        config.set_isa(isa)
        config.set_num_threads(threads)
        if torch and torch_threads:
            torch.set_num_threads(torch_threads)
        if faces := sys.modules.get("gradstep.torch"):
            faces.share_torch_threads()
