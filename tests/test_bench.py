"""The benchmarks: cases, the gate before timing, taking turns, the command and what it writes."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

import gradstep
from gradstep import _core, config
from gradstep.__main__ import main
from gradstep.bench import machine, measure, models, plan, problem, session, tables
from gradstep.bench.cases import CASES, Case, named, one, parse_size
from gradstep.bench.chains import CHAINS
from gradstep.bench.check import check
from gradstep.bench.contenders import LIMIT, Contender, Off, Run, UnsupportedError, contenders
from gradstep.bench.formats import FORMATS
from gradstep.bench.machine import busy_cores
from gradstep.bench.options import Order, _contenders
from gradstep.bench.report import PlainReporter
from gradstep.bench.rules import NORM, RULES, whole_steps

FLOAT32, FLOAT64 = plan.DTYPES.values()
TINY = ["bench", "--quick", "--size", "1000,3000", "--threads", "1", "--contender", "gradstep,numpy"]


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    monkeypatch.setattr(machine, "busy_cores", lambda: 0.0)


def run(*arguments):
    """Run the command; return its exit status, as a shell sees it."""
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as end:
        return end.code


def whole(name, rule="adamw"):
    """Return the whole step of that name."""
    (step,) = whole_steps(name, [RULES[rule]])
    return step


# ---- cases --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shapes", "tensors", "parameters"), [(models.resnet50(), 161, 25_557_032), (models.gpt2(), 148, 124_439_808)]
)
def test_models_have_the_right_number_of_parameters(shapes, tensors, parameters):
    assert len(shapes) == tensors
    assert sum(math.prod(shape) for shape in shapes) == parameters


def test_rules_are_those_of_the_engine():
    measured = {}
    for rule in RULES.values():
        optimizer = getattr(gradstep, rule.optimizer)(np.zeros(1), **rule.settings)
        measured[optimizer.kernel(optimizer.param_groups[0]).rule.name] = rule
    assert measured.keys() <= _core.rules.keys()
    for name, rule in measured.items():
        assert list(rule.states) == _core.rules[name].states


def test_bytes_that_a_rule_moves():
    assert problem.moved_bytes(RULES["adamw"], ((1000,),), FLOAT32) == 28_000
    assert problem.moved_bytes(RULES["sgd"], ((1000,),), FLOAT64) == 24_000
    assert problem.moved_bytes(RULES["lamb"], ((1000,),), FLOAT32) == 40_000


@pytest.mark.parametrize(
    ("name", "moved"),
    [("full", 44), ("clip", 32), ("stats", 28), ("off", 28), ("norm", 4), ("lamb", 40), ("ema", 36), ("zero", 32)],
)
def test_bytes_that_a_whole_step_moves(name, moved):
    assert problem.moved_bytes(whole(name), ((1000,),), FLOAT32) == 1000 * moved


def test_tensors_of_a_problem_are_aligned_and_apart():
    made = problem.Problem(RULES["amsgrad"], ((3,), (5, 7), ()), FLOAT32)
    tensors = [*made.params, *made.grads, *(tensor for stream in made.states.values() for tensor in stream)]
    assert [tensor.shape for tensor in made.params] == [(3,), (5, 7), ()]
    assert all(tensor.ctypes.data % 64 == 0 for tensor in tensors)
    spans = sorted((tensor.ctypes.data, tensor.ctypes.data + tensor.nbytes) for tensor in tensors)
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(spans))
    assert all(tensor.any() for tensor in (*made.params, *made.grads))
    assert not any(tensor.any() for stream in made.states.values() for tensor in stream)


def test_problem_of_a_chain_has_averages_and_scaled_gradients():
    made = problem.Problem(whole("full", "sgd-momentum"), ((300,), (5, 7)), FLOAT32)
    assert list(made.states) == ["momentum_buffer", "ema"]
    assert 600 < np.abs(made.grads[0]).mean() < 1100
    before = [grad.copy() for grad in made.grads]
    for grad in made.grads:
        grad.fill(0)
    made.refill_grads()
    assert all(np.array_equal(grad, old) for grad, old in zip(made.grads, before, strict=True))
    alone = made.alone()
    assert alone.rule == RULES["sgd-momentum"]
    assert list(alone.states) == ["momentum_buffer"]
    assert alone.params is made.params
    made = problem.Problem(whole("lookahead", "sgd"), ((300,),), FLOAT64)
    assert np.array_equal(made.states["slow"][0], made.params[0])


@pytest.mark.parametrize(
    ("text", "size"), [("1000", 1000), ("1e5", 100_000), ("3.2e7", 32_000_000), ("100k", 100_000), ("1.5M", 1_500_000)]
)
def test_sizes_as_people_write_them(text, size):
    assert parse_size(text) == size


def test_cases_by_kind_and_name():
    assert named("resnet50")[0].elements == 25_557_032
    assert {case.kind for case in named("many")} == {"many"}
    assert named("500x64x64")[0].shapes == ((64, 64),) * 500


# ---- what is measured when ------------------------------------------------------------------------------------------------------


def test_tasks_by_default_are_adamw_and_one_case_of_each_other_rule():
    tasks = plan.make_tasks(plan.Choice(), 4)
    adamw = [task for task in tasks if task.rule.label == "adamw"]
    assert {task.form.name for task in tasks} == {"float32"}
    assert all(task.threads == (1, 4) for task in adamw)
    assert {task.case.kind for task in adamw} == {"one", "many"}
    full, *others = (task for task in tasks if task not in adamw)
    assert [task.rule.label for task in others] == [name for name in RULES if name != "adamw"]
    assert (full.rule.label, full.case.name, full.threads) == ("adamw full", "500 x 64x64", (4,))


def test_tasks_of_everything():
    tasks = plan.make_tasks(plan.Choice(full=True), 6)
    assert all(task.threads == (1, 2, 4, 6) for task in tasks)
    assert {task.case for task in tasks if task.rule.label == "adamw"} == set(CASES)
    labels = [*RULES, *(f"adamw {name}" for name in CHAINS), "norm"]
    stored = {("adamw", name) for name in FORMATS}
    assert {(task.rule.label, task.form.name) for task in tasks} == stored.union(itertools.product(labels, plan.DTYPES))
    assert len({(task.rule.label, task.form.name, task.case) for task in tasks}) == len(tasks)


def test_tasks_of_chosen_axes():
    choice = plan.Choice(rules=[RULES["lion"]], dtypes=[FLOAT64], cases=[one(77)], threads=[3])
    (task,) = plan.make_tasks(choice, 2)
    assert (task.rule.name, task.form, task.case.shapes, task.threads) == ("lion", FLOAT64, ((77,),), (3,))
    assert {task.rule.name for task in plan.make_tasks(plan.Choice(cases=[one(77)]), 2)} == {"adamw"}


def test_tasks_of_chains():
    tasks = plan.make_tasks(plan.Choice(chains=["all"]), 2)
    labels = [task.rule.label for task in tasks]
    assert list(dict.fromkeys(labels)) == ["adamw full", "adamw clip", "norm", "adamw stats", "adamw off", "lamb"]
    assert {task.case.name for task in tasks} == {"8000 x 4000", "500 x 64x64"}
    assert {task.threads for task in tasks} == {(1, 2)}
    choice = plan.Choice(rules=[RULES["lion"], RULES["sgd"]], chains=["clip", "norm"], cases=[one(77)])
    assert [task.rule.label for task in plan.make_tasks(choice, 2)] == ["lion clip", "sgd clip", "norm"]


# ---- the gate -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", plan.DTYPES.values(), ids=str)
@pytest.mark.parametrize("rule", RULES.values(), ids=lambda rule: rule.name)
@pytest.mark.parametrize(
    "name", ["gradstep", "gradstep-object", "gradstep-torch", "numpy", "torch-loop", "torch-foreach", "torch-fused"]
)
def test_contenders_agree_with_the_formula(name, rule, dtype):
    contender = contenders()[name]
    if not contender.installed():
        pytest.skip(f"{contender.package} is not installed")
    if name.startswith("torch-") and (rule.optimizer == "Lion" or (name, rule.optimizer) == ("torch-fused", "RMSprop")):
        with pytest.raises(UnsupportedError, match=f"torch has no .*{rule.optimizer}"):
            check(contender, rule, dtype)
    else:
        assert check(contender, rule, dtype) is None


@pytest.mark.parametrize("name", ["numba", "optax"])
@pytest.mark.parametrize("rule", ["adamw", "sgd-nesterov"])
def test_compiled_contenders_agree_with_the_formula(name, rule):
    contender = contenders()[name]
    if not contender.installed():
        pytest.skip(f"{contender.package} is not installed")
    assert check(contender, RULES[rule], FLOAT32) is None


_TORCH = {"full", "clip", "off", "norm", "lamb", "scale", "clip-value", "clip-tensor", "bounds", "ema", "swa", "zero"}


@pytest.mark.parametrize("dtype", plan.DTYPES.values(), ids=str)
@pytest.mark.parametrize("step", [*CHAINS, "norm"])
@pytest.mark.parametrize(
    "name", ["gradstep", "gradstep-object", "gradstep-torch", "numpy", "torch-loop", "torch-foreach", "torch-fused"]
)
def test_contenders_agree_with_the_whole_step(name, step, dtype):
    contender = contenders()[name]
    if not contender.installed():
        pytest.skip(f"{contender.package} is not installed")
    alone = {"gradstep": set(CHAINS), "gradstep-object": {"norm"}, "numpy": {"stats"}, "torch-fused": {"norm"}}.get(name, set())
    if step in alone or (name.startswith("torch-") and step not in _TORCH):
        with pytest.raises(UnsupportedError):
            check(contender, whole(step), dtype)
    else:
        assert check(contender, whole(step), dtype) is None


def test_compiled_torch_refuses_what_it_is_not_written_for():
    contender = contenders()["torch-compile"]
    if not contender.installed():
        pytest.skip("torch is not installed")
    with pytest.raises(UnsupportedError, match="adamw and lamb only"):
        check(contender, RULES["sgd"], FLOAT32)
    with pytest.raises(UnsupportedError, match="torch has no agc"):
        check(contender, whole("agc"), FLOAT32)
    with pytest.raises(UnsupportedError, match="up to 8 tensors"):
        contender.prepare(problem.Problem(whole("full"), ((2,),) * 9, FLOAT32))


def test_contenders_agree_with_their_own_lamb():
    contender = contenders()["pytorch-optimizer"]
    if not contender.installed():
        pytest.skip("pytorch_optimizer is not installed")
    assert check(contender, RULES["lamb"], FLOAT32) is None
    with pytest.raises(UnsupportedError, match="lamb only"):
        check(contender, RULES["adam"], FLOAT32)


class Other(Contender):
    """gradstep's optimizer with other options than the chain's."""

    name = about = "other"
    whole = True

    def __init__(self, **options):
        self.options = options

    def prepare(self, problem):
        chain = problem.rule.chain
        given = {**chain.options, **chain.call, **self.options}
        step = {name: value for name, value in given.items() if name in ("grad_scale", "stats")}
        options = {name: value for name, value in given.items() if name not in step}
        other = dataclasses.replace(chain, options=options, call=step)
        problem.rule = dataclasses.replace(problem.rule, chain=other)
        return contenders()["gradstep-object"].prepare(problem)


@pytest.mark.parametrize(
    ("step", "options"),
    [
        ("full", {"grad_scale": 1 / 1000, "clip_norm": None}),
        ("full", {"clip_norm": 1.01}),
        ("full", {"ema_decay": 0.71}),
        ("full", {"zero_grad": False}),
        ("clip", {"clip_norm": None}),
        ("agc", {"agc": 0.011}),
        ("clip-value", {"clip_value": 0.51}),
        ("clip-tensor", {"clip_norm_per_tensor": 1.01}),
        ("centralize", {"centralize": False}),
        ("noise", {"noise": 0.01}),
        ("cautious", {"cautious": False}),
        ("trust-ratio", {"trust_ratio": (0.0, 0.5)}),
        ("elastic-net", {"l1": 0.11}),
        ("elastic-net", {"l2": 0.2}),
        ("bounds", {"bounds": (-1.0, None)}),
        ("group-lasso", {"group_lasso": 0.11}),
        ("max-norm", {"max_norm": 1.01}),
        ("lookahead", {"lookahead": (3, 0.5)}),
        ("lookahead", {"lookahead": (2, 0.6)}),
        ("swa", {"swa": (1, 1)}),
        ("zero", {"zero_grad": False}),
    ],
)
def test_gate_catches_another_option(step, options):
    assert check(Other(), whole(step), FLOAT64) is None
    assert check(Other(**options), whole(step), FLOAT64) is not None


def test_gate_catches_wrong_statistics_and_a_wrong_norm():
    class Silent(Contender):
        name = about = "silent"
        whole = True

        def prepare(self, problem):
            run = contenders()["gradstep-object"].prepare(problem)
            return run._replace(step=lambda: dataclasses.replace(run.step(), grad_norm=3.0))

    class Guess(Contender):
        name = about = "guess"

        def prepare(self, problem):
            return Run(lambda: None, lambda: [np.array([3.0])])

    assert "grad_norm is 3, not" in check(Silent(), whole("stats"), FLOAT32)
    assert "is off by" in check(Guess(), NORM, FLOAT32)


class Wrong(Contender):
    """gradstep's function with settings that are not the rule's."""

    name = about = "wrong"

    def __init__(self, **settings):
        self.settings = settings

    def prepare(self, problem):
        rule = dataclasses.replace(problem.rule, settings={**problem.rule.settings, **self.settings})
        problem.rule = rule
        return contenders()["gradstep"].prepare(problem)


@pytest.mark.parametrize(
    ("rule", "settings"),
    [
        ("adamw", {"lr": 0.051}),
        ("adamw", {"betas": (0.81, 0.9)}),
        ("adamw", {"betas": (0.8, 0.91)}),
        ("adamw", {"eps": 0.011}),
        ("adamw", {"weight_decay": 0.0}),
        ("sgd-momentum", {"momentum": 0.71}),
        ("sgd-nesterov", {"nesterov": False}),
        ("rmsprop-centered", {"alpha": 0.81}),
        ("lion", {"betas": (0.8, 0.91)}),
    ],
)
@pytest.mark.parametrize("dtype", plan.DTYPES.values(), ids=str)
def test_gate_catches_a_wrong_setting(rule, settings, dtype):
    assert check(Wrong(), RULES[rule], dtype) is None
    assert "is off by" in check(Wrong(**settings), RULES[rule], dtype)


class Idle(Contender):
    """Does nothing, or leaves NaN."""

    name = about = "idle"

    def __init__(self, value=None):
        self.value = value

    def prepare(self, problem):
        def step():
            if self.value is not None:
                problem.params[1][...] = self.value

        return Run(step, lambda: problem.params)


@pytest.mark.parametrize("value", [None, math.nan])
def test_gate_catches_a_contender_that_does_nothing_or_harm(value):
    assert "is off by" in check(Idle(value), RULES["sgd"], FLOAT32)


def measured_with(*added, longest=math.inf):
    tasks = [plan.Task(RULES["adamw"], FLOAT32, one(1000), (1, 2))]
    order = Order(tasks, [contenders()["gradstep"], *added], patient=True, effort=measure.Effort(0.001, 2, 2), longest=longest)
    made = session.Session(order, PlainReporter())
    made.measure()
    return made


def whole_with(step, *names):
    tasks = [plan.Task(whole(step), FLOAT32, one(1000), (1,))]
    picked = [contenders()[name] for name in names]
    made = session.Session(
        Order(tasks, picked, patient=True, effort=measure.Effort(0.001, 2, 2), longest=math.inf), PlainReporter()
    )
    made.measure()
    return made


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

    monkeypatch.setattr(session, "check", lambda contender, rule, form: None)
    order = Order(
        [plan.Task(whole("zero"), FLOAT32, one(1000), (1,))], [Watching()], True, measure.Effort(0.001, 2, 2), math.inf
    )
    session.Session(order, PlainReporter()).measure()
    assert len(seen) > 2
    assert all(seen)


def test_time_before_calls_does_not_count():
    run = Run(lambda: None, list, before=lambda: time.sleep(0.002))
    start = time.perf_counter()
    assert measure.time_block(run, 10) < 0.005
    assert time.perf_counter() - start > 0.02


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
    monkeypatch.setattr(session, "memory_available", lambda: 1000.0)
    made = measured_with()
    assert not made.records
    assert "GB of memory" in made.skips[0].reason


def test_tasks_after_the_end_are_left_out(capsys):
    made = measured_with(longest=-1.0)
    assert not made.records
    assert "seconds were over" in made.skips[0].reason


# ---- taking turns ---------------------------------------------------------------------------------------------------------------


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


# ---- the command ----------------------------------------------------------------------------------------------------------------


def test_bench_writes_figures_and_a_picture(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    figures, picture = tmp_path / "figures.json", tmp_path / "picture.png"
    assert run(*TINY, "--json", figures, "--plot", picture) == 0
    shown = capsys.readouterr().out
    assert "adamw, float32, 1,000 elements, 1 thread, 28 bytes a parameter" in shown
    document = json.loads(figures.read_text())
    assert document.keys() == {
        "format", "date", "command", "machine", "versions", "config", "effort", "settings", "formats", "chains", "records",
        "distances", "failures", "left_out",
    }  # fmt: skip
    assert document["format"] == 2
    assert document["command"].startswith("python -m gradstep bench --quick")
    assert document["machine"].keys() == {"processor", "architecture", "system", "cores", "caches", "memory", "busy_cores"}
    assert document["versions"]["gradstep"] == gradstep.__version__
    assert document["versions"]["numpy"] == np.__version__
    assert document["config"]["isa"] == config.isa()
    assert document["settings"]["adamw"]["weight_decay"] == 0.01
    assert document["formats"] == {"float32": {"dtype": "float32"}}
    assert document["distances"] == document["failures"] == []
    assert [(record["contender"], record["elements"]) for record in document["records"]] == [
        (name, size) for size in (1000, 3000) for name in (LIMIT.name, "gradstep", "numpy")
    ]
    for record in document["records"]:
        assert record.keys() == {
            "contender", "rule", "chain", "dtype", "case", "kind", "tensors", "elements", "threads", "note", "blocks", "calls",
            "median", "quartiles", "range", "spread", "bytes", "ns_per_parameter", "gb_per_s", "share_of_limit", "peer", "speed_up",
        }  # fmt: skip
        assert (
            0 < record["range"][0] <= record["quartiles"][0] <= record["median"] <= record["quartiles"][1] <= record["range"][1]
        )
        assert record["gb_per_s"] == pytest.approx(28 * record["elements"] / record["median"] / 1e9)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 20_000


def test_bench_without_rich_prints_plain_text(monkeypatch, capsys):
    for name in ("rich", "rich.console", "rich.progress", "rich.table"):
        monkeypatch.setitem(sys.modules, name, None)
    assert run(*TINY) == 0
    shown = capsys.readouterr().out
    assert shown.isascii() or set(shown) - set(map(chr, range(128))) == {"±"}
    lines = shown.splitlines()
    title = lines.index("adamw, float32, 3,000 elements, 1 thread, 28 bytes a parameter")
    assert " ".join(lines[title + 1].split()) == "time a step spread ns/param GB/s of limit gradstep's gain"
    assert [line.split()[0] for line in lines[title + 2 : title + 5]] == ["no", "gradstep", "numpy"]


def test_bench_measures_with_numpy_alone(monkeypatch, capsys):
    for name in ("rich", "rich.console", "matplotlib", "torch", "numba", "optax", "jax", "deepspeed"):
        monkeypatch.setitem(sys.modules, name, None)
    assert run("bench", "--quick", "--size", "1000", "--threads", "1") == 0
    shown = capsys.readouterr().out
    assert "gradstep-object" in shown
    assert "torch" not in shown


def test_bench_measures_what_is_chosen(tmp_path, capsys):
    figures = tmp_path / "figures.json"
    chosen = [
        "--rule",
        "lion,sgd",
        "--dtype",
        "f64,float64,f32",
        "--size",
        "1k,100,1000",
        "--threads",
        "2,1",
        "--contender",
        "numpy",
    ]
    assert run("bench", "--quick", *chosen, "--json", figures) == 0
    records = json.loads(figures.read_text())["records"]
    measured = [tuple(record[key] for key in ("rule", "dtype", "elements", "threads", "contender")) for record in records]
    assert measured == list(
        itertools.product(("lion", "sgd"), ("float64", "float32"), (1000, 100), (1, 2), (LIMIT.name, "gradstep", "numpy"))
    )


def test_bench_measures_whole_steps(tmp_path, capsys):
    figures = tmp_path / "figures.json"
    chosen = ["--chain", "clip,norm,stats", "--size", "1000", "--threads", "1", "--contender", "gradstep-object,gradstep,numpy"]
    assert run("bench", "--quick", *chosen, "--json", figures) == 0
    shown = capsys.readouterr().out
    assert "adamw clip, float32, 1,000 elements, 1 thread, 32 bytes a parameter" in shown
    document = json.loads(figures.read_text())
    assert document["chains"] == {
        "clip": {"constructor": {"clip_norm": 1.0}, "step": {}},
        "stats": {"constructor": {}, "step": {"stats": True}},
    }
    assert document["settings"].keys() == {"adamw", "norm"}
    faces = ["gradstep-object", "gradstep-object off"]
    assert [(record["rule"], record["chain"], record["contender"]) for record in document["records"]] == [
        *(("adamw", "clip", name) for name in (LIMIT.name, *faces, "numpy")),
        *(("norm", "", name) for name in (LIMIT.name, "gradstep", "numpy")),
        *(("adamw", "stats", name) for name in (LIMIT.name, *faces)),
    ]


def test_bench_on_each_instruction_set(capsys):
    assert run("bench", "--quick", "--size", "1000", "--threads", "1", "--contender", "gradstep,numpy", "--isa", "all") == 0
    shown = capsys.readouterr().out
    assert all(f"gradstep@{isa}" in shown for isa in config.isas())


def test_bench_adds_the_face_that_a_contender_is_compared_with():
    known = contenders()
    assert [c.name for c in _contenders("numpy", known)] == ["gradstep", "numpy"]
    assert [c.name for c in _contenders("gradstep-object", known)] == ["gradstep-object"]
    assert not any(c.on_request for c in _contenders(None, known))


def test_bench_shows_what_was_measured_when_it_is_interrupted(monkeypatch, capsys):
    original, times = session.make_records, iter([0])

    def interrupted(*arguments):
        if next(times, None) is None:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(session, "make_records", interrupted)
    assert run(*TINY) == 130
    shown = capsys.readouterr().out
    assert "1,000" in shown
    assert "3,000" not in shown


def test_bench_fails_if_a_contender_is_wrong(monkeypatch, capsys):
    monkeypatch.setattr(session, "check", lambda contender, rule, form: "too wrong" if contender.name == "numpy" else None)
    assert run(*TINY) == 1
    assert "FAILED: numpy, adamw float32: disagrees with the formula, not timed: too wrong" in capsys.readouterr().out


def test_list(capsys):
    assert run("bench", "--list") == 0
    shown = capsys.readouterr().out
    assert all(
        f"  {name} " in shown
        for name in (*RULES, *CHAINS, *FORMATS, *contenders(), "norm", "resnet50", "8000x4000", "500x64x64")
    )
    assert "25,557,032" in shown


def test_info(capsys):
    assert run("info") == 0
    shown = capsys.readouterr().out
    assert gradstep.__version__ in shown
    assert all(f"{name}:" in shown for name in ("compiler", "flags", "instruction sets", "threads", "CUDA"))


BAD = [
    ([], "the following arguments are required: COMMAND"),
    (["bench", "--rule", "adamx"], "--rule: there is no 'adamx'; did you mean adam?"),
    (["bench", "--rule", "x"], "--rule: there is no 'x'; there are adamw, adam,"),
    (["bench", "--chain", "fulll"], "--chain: there is no 'fulll'; did you mean full?"),
    (["bench", "--chain", "full", "--plot", "x.png"], "--plot draws the steps of rules alone: leave --chain out"),
    (["bench", "--dtype", "bf16"], "--dtype: there is no 'bf16'"),
    (["bench", "--format", "bf61"], "--format: there is no 'bf61'; did you mean bf16?"),
    (["bench", "--format", "q8", "--chain", "full"], "--format is for the steps of rules alone: leave --chain out"),
    (["bench", "--format", "q8", "--plot", "x.png"], "--plot draws float32 and float64 throughout: leave --format out"),
    (
        ["bench", "--size", "0"],
        "--size: a size must be a whole number from 1 to 1e10, such as 100000, 1e5, 100k or 32M, got '0'",
    ),
    (["bench", "--size", "1e3,many"], "got 'many'"),
    (["bench", "--case", "vgg"], "--case: there is no case 'vgg'; there are one, matrix, many, model, 8000x4000, 500x64x64"),
    (["bench", "--threads", "0"], "--threads: a number of threads is from 1 to 4096, got '0'"),
    (["bench", "--threads", "1,,2"], "--threads must be a list separated by commas, got '1,,2'"),
    (["bench", "--contender", "nump"], "--contender: there is no 'nump'; did you mean numpy?"),
    (["bench", "--isa", "avx9"], "--isa: there is no 'avx9'; there are baseline"),
    (["bench", "--quick", "--full"], "--quick and --full exclude each other"),
    (["bench", "--json", "no/such/folder/x.json"], "there is no folder no/such/folder"),
    (["bench", "--plot", "x.gif"], "--plot: the name must end in .png, .svg, .pdf, got x.gif"),
    (["bench", "--plot", "x.png", "--size", "1000"], "--plot needs cases of one tensor in two sizes at least"),
    (["bench", "--speed"], "unrecognized arguments: --speed"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_bad_options_are_refused(arguments, message, capsys):
    assert run(*arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("contender", ["numba", "torch-fused", "gradstep-torch", "optax", "deepspeed"])
def test_contender_that_is_not_installed(contender, monkeypatch, capsys):
    package = contenders()[contender].package
    monkeypatch.setitem(sys.modules, package, None)
    assert run("bench", "--contender", contender) == 2
    assert f"is not installed: pip install {package}" in capsys.readouterr().err


def test_picture_without_matplotlib(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert run("bench", "--plot", "x.png") == 2
    assert "--plot needs matplotlib: pip install matplotlib" in capsys.readouterr().err


def test_module_runs():
    done = subprocess.run([sys.executable, "-m", "gradstep", *TINY], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert "no math" in done.stdout


# ---- the machine ----------------------------------------------------------------------------------------------------------------


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


def test_case_names_what_it_holds():
    assert Case("x", "many", ((2, 3), (4,))).elements == 10
