"""Runs something in another thread while a step runs, and surely while it runs."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable

import pytest


def run_beside(step: Callable[[], object], other: Callable[[], object]) -> int:
    """Call `step` until the other thread could call `other` during it; return how often that was.

    The step must be one of milliseconds. No thread gives up the GIL of its own accord here. So if the other thread runs between
    the beginning and the end of `step`, the step has handed it over; and as it must take it back to end, it ends after `other`.
    """
    if not getattr(sys, "_is_gil_enabled", lambda: True)():
        pytest.skip("relies on the GIL to order two threads")
    interval = sys.getswitchinterval()
    sys.setswitchinterval(600)
    try:
        for attempt in range(1, 101):
            if _try(step, other):
                return attempt
    finally:
        sys.setswitchinterval(interval)
    raise AssertionError("no other thread ever ran during a step: it does not hand over the GIL")


def _try(step: Callable[[], object], other: Callable[[], object]) -> bool:
    go, running, ran, failures = threading.Event(), False, False, []

    def thread() -> None:
        nonlocal ran
        go.wait()
        if not running:
            return
        ran = True
        try:
            other()
        except BaseException as failure:
            failures.append(failure)

    helper = threading.Thread(target=thread)
    helper.start()
    go.set()
    awake = time.perf_counter() + 0.002
    while time.perf_counter() < awake:  # until the helper waits for nothing but the GIL
        pass
    running = True
    try:
        step()
    finally:
        running = False
        helper.join()
    if failures:
        raise failures[0]
    return ran
