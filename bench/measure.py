"""Timing: blocks of calls, the contenders in turns, each beginning in quiet; by the host's clock, or another."""

from __future__ import annotations

import gc
import itertools
import math
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from .contenders import Contender, Run

_LONG = 0.05  # seconds; calls that take longer find no caches to warm
_TASKS = Path("/proc/self/task")


@dataclass(frozen=True)
class Effort:
    """How long to measure."""

    seconds: float
    """For each contender, about."""
    fewest: int
    """Blocks of a contender, even if they take longer: up to ten times `seconds`."""
    most: int
    longest: float = math.inf
    """Seconds after which nothing new is begun, unless the user chose what to measure."""
    block: float = 0.002
    """Seconds that a block lasts at least."""
    warm_up: float = 0.0
    """Seconds of untimed calls before the first block: until the device runs at its full clock."""

    def blocks(self, seconds: float) -> int:
        """Return how many blocks to take, if one lasts for `seconds`."""
        fewest = min(self.fewest, max(1, int(10 * self.seconds / seconds)))
        return min(self.most, max(fewest, int(self.seconds / seconds)))


QUICK = Effort(0.02, 3, 7, longest=12)
NORMAL = Effort(0.12, 5, 25, longest=80)
FULL = Effort(0.5, 7, 51)


def _others_run() -> bool:
    me = threading.get_native_id()
    for task in _TASKS.iterdir():
        if int(task.name) != me:
            try:
                stat = (task / "stat").read_text()
            except OSError:
                continue  # it has ended
            if stat[stat.rindex(")") + 2] == "R":
                return True
    return False


def wait_for_quiet(longest: float = 0.1) -> None:
    """Wait until no other thread of this process runs; for 20 ms where the system does not tell."""
    if not _TASKS.is_dir():
        time.sleep(0.02)
        return
    deadline = time.perf_counter() + longest
    while _others_run() and time.perf_counter() < deadline:
        time.sleep(0.0005)


def time_block(run: Run, calls: int) -> float:
    """Return the seconds that `calls` steps take, without what comes before each."""
    step, before = run.step, run.before
    if before is not None:
        seconds = 0.0
        for _ in itertools.repeat(None, calls):
            before()
            start = time.perf_counter()
            step()
            run.finish()
            seconds += time.perf_counter() - start
        return seconds
    start = time.perf_counter()
    for _ in itertools.repeat(None, calls):
        step()
    run.finish()
    return time.perf_counter() - start


class Times(NamedTuple):
    """Of a block of steps."""

    seconds: float
    """That the steps take, without what comes before each."""
    wall: float | None = None
    """That pass on the host until all is done, if another clock is asked for the steps themselves."""


class Clock(ABC):
    """Times blocks of steps."""

    @abstractmethod
    def settle(self) -> None:
        """Wait until nothing that was started before disturbs a block."""

    @abstractmethod
    def block(self, run: Run, calls: int) -> Times:
        """Return what `calls` steps take."""


class HostClock(Clock):
    """The clock of the host, for steps that are done when their call returns, or when `finish` does."""

    def settle(self) -> None:
        wait_for_quiet()

    def block(self, run: Run, calls: int) -> Times:
        return Times(time_block(run, calls))


HOST_CLOCK = HostClock()


def _calls_for(run: Run, block: float, clock: Clock) -> tuple[int, float]:
    """Return how many calls last for `block` seconds, and how long they do."""
    long = 5 * _LONG
    # The first call may have compiled something.
    if clock.block(run, 1).seconds > long and (second := clock.block(run, 1).seconds) > long:
        return 1, second
    calls = 1
    while (seconds := clock.block(run, calls).seconds) < block:
        calls = max(2 * calls, math.ceil(1.1 * calls * block / max(seconds, 1e-9)))
    return calls, seconds


@dataclass
class Blocks:
    """What was measured of one contender."""

    calls: int
    """In a block."""
    seconds: list[float]
    """A call, for each block."""
    wall: list[float] = field(default_factory=list)
    """The same by the host's clock, if `seconds` are another's."""


def alternate(runs: Mapping[Contender, Run], effort: Effort, clock: Clock = HOST_CLOCK) -> dict[Contender, Blocks]:
    """Time the runs in turns. Those whose calls take long get fewer blocks, spread evenly over the rounds."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        blocks, wanted = {}, {}
        passed = 0.0
        for contender, run in runs.items():
            contender.enter()
            clock.settle()
            while passed < effort.warm_up:
                times = clock.block(run, 10)
                passed += max(times.seconds, times.wall or 0.0, 1e-6)
            calls, seconds = _calls_for(run, effort.block, clock)
            blocks[contender] = Blocks(calls, [])
            wanted[contender] = effort.blocks(seconds)
        rounds = max(wanted.values(), default=0)
        for i in range(rounds):
            for contender, run in runs.items():
                if (i + 1) * wanted[contender] // rounds == i * wanted[contender] // rounds:
                    continue
                _take_turn(contender, run, blocks[contender], clock)
        return blocks
    finally:
        if enabled:
            gc.enable()


def _take_turn(contender: Contender, run: Run, blocks: Blocks, clock: Clock) -> None:
    contender.enter()
    clock.settle()
    if blocks.calls > 1 or not blocks.seconds or blocks.seconds[-1] < _LONG:
        clock.block(run, max(1, blocks.calls // 10))
    seconds, wall = clock.block(run, blocks.calls)
    blocks.seconds.append(seconds / blocks.calls)
    if wall is not None:
        blocks.wall.append(wall / blocks.calls)
