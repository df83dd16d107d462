"""A session of the benchmarks: what is compared, reported and left out."""

from __future__ import annotations

import math

import pytest

from gradstep import config
from gradstep.bench import places, plan, problem, session
from gradstep.bench.cases import one
from gradstep.bench.contenders import LIMIT, Contender, Off, Run, contenders
from gradstep.bench.rules import RULES

from .bench_cases import FLOAT32, Wrong, measured, whole


def measured_with(*added, longest=math.inf):
    tasks = [plan.Task(RULES["adamw"], FLOAT32, one(1000), (1, 2))]
    return measured(tasks, [contenders()["gradstep"], *added], longest)


def whole_with(step, *names):
    return measured([plan.Task(whole(step), FLOAT32, one(1000), (1,))], [contenders()[name] for name in names])


def test_whole_step_is_measured_against_the_rule_alone(capsys):
    made = whole_with("full", "gradstep-object", "numpy", "gradstep")
    assert [record.contender for record in made.records] == [LIMIT.name, "gradstep-object", "gradstep-object off", "numpy"]
    limit, face, off, other = made.records
    assert {record.label for record in made.records} == {"adamw full"}
    assert (limit.bytes, face.bytes, off.bytes) == (28_000, 44_000, 44_000)
    assert face.share_of_limit == pytest.approx(44 / 28 * limit.median / face.median)
    assert (off.peer, other.peer) == ("gradstep-object", "gradstep-object")
    assert off.speed_up == {"gradstep-object": pytest.approx(off.median / face.median)}
    (skip,) = made.skips
    assert (skip.contender, skip.rule, skip.reason) == ("gradstep", "adamw full", "makes the rule's step alone")
    assert not made.failures


def test_rule_alone_keeps_chain_out():
    made = problem.Problem(whole("full"), ((300,),), FLOAT32)
    run = Off(contenders()["gradstep-object"]).prepare(made)
    run.step()
    assert made.states["exp_avg"][0].any()
    assert not made.states["ema"][0].any()
    assert made.grads[0].any()


def test_gradients_are_new_before_each_call(monkeypatch, capsys):
    seen = []

    class Watching(Contender):
        name = about = "watching"
        whole = True

        def prepare(self, problem):
            def step():
                seen.append(problem.grads[0].any())
                problem.grads[0].fill(0)

            return Run(step, lambda: problem.params)

    monkeypatch.setattr(session, "check", lambda *_: None)
    measured([plan.Task(whole("zero"), FLOAT32, one(1000), (1,))], [Watching()])
    assert len(seen) > 2
    assert all(seen)


def test_wrong_contender_is_reported_and_not_timed(capsys):
    made = measured_with(Wrong(lr=0.5))
    assert {record.contender for record in made.records} == {"gradstep", LIMIT.name}
    (failure,) = made.failures
    assert (failure.contender, failure.rule) == ("wrong", "adamw")
    assert "disagrees with the formula, not timed: params[0] is off by" in failure.reason


@pytest.mark.parametrize("where", ["prepare", "set_threads", "step"])
def test_broken_contender_is_reported(where, capsys):
    def broken(*_):
        raise RuntimeError("no luck\ntoday")

    class Broken(Contender):
        name = about = "broken"

        def prepare(self, problem):
            return Run(broken, lambda: problem.params)

    if where != "step":
        setattr(Broken, where, broken)
    made = measured_with(Broken())
    (failure,) = made.failures
    assert failure.reason == "failed: no luck"
    assert {record.contender for record in made.records} == {"gradstep", LIMIT.name}


def test_session_leaves_the_configuration_as_it_was(capsys):
    before = config.isa(), config.num_threads()
    config.set_num_threads(3)
    try:
        made = measured_with(*list(contenders(config.isas()[:1]).values())[:3])
        assert "gradstep@baseline" in {record.contender for record in made.records}
        assert (config.isa(), config.num_threads()) == (before[0], 3)
    finally:
        config.set_num_threads(before[1])


def test_case_too_large_for_the_memory_is_left_out(monkeypatch, capsys):
    monkeypatch.setattr(places, "memory_available", lambda: 1000.0)
    made = measured_with()
    assert not made.records
    assert "GB of memory" in made.skips[0].reason


def test_tasks_after_the_end_are_left_out(capsys):
    made = measured_with(longest=-1.0)
    assert not made.records
    assert "seconds were over" in made.skips[0].reason
