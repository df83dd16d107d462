"""Timing in the benchmarks: taking turns, the figures that follow, and what is told of the machine."""

from __future__ import annotations

import os
import sys
import threading
import time

import numpy as np
import pytest

from gradstep.bench import machine, measure, plan, tables
from gradstep.bench.cases import one
from gradstep.bench.contenders import LIMIT, Contender, Run, contenders
from gradstep.bench.machine import busy_cores
from gradstep.bench.rules import RULES

from .bench_cases import FLOAT32


def test_time_before_calls_does_not_count():
    run = Run(lambda: None, list, before=lambda: time.sleep(0.002))
    start = time.perf_counter()
    assert measure.time_block(run, 10) < 0.005
    assert time.perf_counter() - start > 0.02


class Scripted(Contender):
    """Takes a given time a call and writes down when it is called."""

    about = ""

    def __init__(self, name, seconds, log):
        self.name, self.seconds, self.log = name, seconds, log

    def prepare(self, problem=None):
        def step():
            self.log.append(self.name)
            end = time.perf_counter() + self.seconds
            while time.perf_counter() < end:
                pass

        return Run(step, list)

    def enter(self):
        self.log.append(f"enter {self.name}")


def test_blocks_alternate_and_slow_contenders_get_fewer():
    log = []
    a, b, slow = Scripted("a", 1e-4, log), Scripted("b", 5e-4, log), Scripted("slow", 0.02, log)
    blocks = measure.alternate({c: c.prepare() for c in (a, b, slow)}, measure.Effort(0.04, fewest=2, most=6))
    assert len(blocks[a].seconds) == len(blocks[b].seconds) == 6
    assert 2 <= len(blocks[slow].seconds) < 6
    assert all(c.seconds <= t for c in (a, b, slow) for t in blocks[c].seconds)
    assert np.median(blocks[a].seconds) < 2 * a.seconds
    assert blocks[a].calls >= 10
    assert blocks[slow].calls == 1
    turns = [entry.split()[1] for entry in log if entry.startswith("enter")][3:]
    assert turns[:2] == ["a", "b"]
    assert [turn for turn in turns if turn != "slow"] == ["a", "b"] * 6


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the system does not tell what threads do")
def test_a_block_begins_in_quiet():
    stop = threading.Event()
    data = np.ones(1 << 16)

    def spin():
        while not stop.is_set():
            np.sqrt(data, out=data)  # without the GIL for most of the time

    thread = threading.Thread(target=spin)
    thread.start()
    try:
        start = time.perf_counter()
        measure.wait_for_quiet(longest=0.05)
        assert time.perf_counter() - start > 0.03
    finally:
        stop.set()
        thread.join()


def test_blocks_for_the_time_that_one_takes():
    effort = measure.Effort(0.1, fewest=4, most=20)
    assert [effort.blocks(seconds) for seconds in (0.002, 0.01, 0.1, 0.25, 0.4, 3.0)] == [20, 10, 4, 4, 2, 1]


def test_figures_follow_from_the_times():
    ours, other = contenders()["gradstep"], contenders()["numpy"]
    task = plan.Task(RULES["adamw"], FLOAT32, one(1000), (2,))
    blocks = {
        LIMIT: measure.Blocks(10, [1e-6, 2e-6, 3e-6]),
        ours: measure.Blocks(10, [4e-6]),
        other: measure.Blocks(1, [8e-6, 10e-6, 12e-6, 14e-6, 16e-6]),
    }
    from gradstep.bench.records import make_records

    limit, mine, theirs = make_records(task, 2, blocks)
    assert limit.share_of_limit == 1
    assert mine.share_of_limit == pytest.approx(0.5)
    assert mine.gb_per_s == pytest.approx(7)
    assert mine.ns_per_parameter == pytest.approx(4)
    assert mine.speed_up == {}
    assert mine.note == ""
    assert theirs.median == pytest.approx(12e-6)
    assert theirs.quartiles == pytest.approx((10e-6, 14e-6))
    assert theirs.range == pytest.approx((8e-6, 16e-6))
    assert theirs.spread == pytest.approx(1 / 6)
    assert theirs.speed_up == {"gradstep": pytest.approx(3)}
    assert theirs.note == "one thread"
    shown = tables.case_table([limit, mine, theirs])
    assert shown.rows[2] == ("numpy*", "12 us", "±17%", "12", "2.3", "17%", "3.00x")


def test_machine_is_read_from_the_system(tmp_path):
    for i, (level, kind, size) in enumerate([(1, "Data", "48K"), (1, "Instruction", "32K"), (2, "Unified", "2M")]):
        index = tmp_path / f"index{i}"
        index.mkdir()
        for name, value in (("level", level), ("type", kind), ("size", size)):
            (index / name).write_text(f"{value}\n")
    assert machine.caches(tmp_path) == {"L1": 48 << 10, "L2": 2 << 20}
    assert machine.caches(tmp_path / "none") == {}
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: Some CPU @ 3 GHz\n")
    assert machine.processor(tmp_path / "cpuinfo") == "Some CPU @ 3 GHz"
    assert machine.processor(tmp_path / "none")
    (tmp_path / "stat").write_text("cpu 10 0 10 80 0 0 0 0 0 0\n")
    assert busy_cores(0, tmp_path / "stat") is None  # no time has passed
    assert busy_cores(0, tmp_path / "none") is None
    assert busy_cores(0.02) is None or 0 <= busy_cores(0.02) <= os.cpu_count()


def test_times_are_shown_with_three_digits():
    assert [tables.time_text(t) for t in (1.5, 0.0123, 9.999e-4, 1.2345e-6, 5e-8)] == [
        "1.5 s",
        "12.3 ms",
        "1e+03 us",
        "1.23 us",
        "50 ns",
    ]
