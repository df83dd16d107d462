"""Timing: blocks of calls, the contenders in turns, each beginning in quiet."""

from __future__ import annotations

import gc
import itertools
import math
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

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


def _calls_for(run: Run, block: float) -> tuple[int, float]:
    """Return how many calls last for `block` seconds, and how long they do."""
    long = 5 * _LONG
    # The first call may have compiled something.
    if time_block(run, 1) > long and (second := time_block(run, 1)) > long:
        return 1, second
    calls = 1
    while (seconds := time_block(run, calls)) < block:
        calls = max(2 * calls, math.ceil(1.1 * calls * block / max(seconds, 1e-9)))
    return calls, seconds


@dataclass
class Blocks:
    """What was measured of one contender."""

    calls: int
    """In a block."""
    seconds: list[float]
    """A call, for each block."""


def alternate(runs: Mapping[Contender, Run], effort: Effort) -> dict[Contender, Blocks]:
    """Time the runs in turns. Those whose calls take long get fewer blocks, spread evenly over the rounds."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        blocks, wanted = {}, {}
        for contender, run in runs.items():
            contender.enter()
            wait_for_quiet()
            calls, seconds = _calls_for(run, effort.block)
            blocks[contender] = Blocks(calls, [])
            wanted[contender] = effort.blocks(seconds)
        rounds = max(wanted.values(), default=0)
        for i in range(rounds):
            for contender, run in runs.items():
                if (i + 1) * wanted[contender] // rounds == i * wanted[contender] // rounds:
                    continue
                _take_turn(contender, run, blocks[contender])
        return blocks
    finally:
        if enabled:
            gc.enable()


def _take_turn(contender: Contender, run: Run, blocks: Blocks) -> None:
    contender.enter()
    wait_for_quiet()
    if blocks.calls > 1 or not blocks.seconds or blocks.seconds[-1] < _LONG:
        time_block(run, max(1, blocks.calls // 10))
    blocks.seconds.append(time_block(run, blocks.calls) / blocks.calls)
