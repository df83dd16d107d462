"""The benchmarks of storage formats: bytes, memory, the gate before timing, distance from float64, the command."""

from __future__ import annotations

import json
import math
import sys

import numpy as np
import pytest

from gradstep.bench import plan
from gradstep.bench.cases import one
from gradstep.bench.check import check
from gradstep.bench.contenders import LIMIT, UnsupportedError
from gradstep.bench.distance import STEPS, measure_distance
from gradstep.bench.format_tables import distance_table, time_table
from gradstep.bench.formats import FLOAT32, FORMATS
from gradstep.bench.limit import _cut, limit_bytes, loops
from gradstep.bench.options import _formats
from gradstep.bench.problem import Problem, moved_bytes
from gradstep.bench.rules import RULES

from .bench_cases import Idle, Wrong, faces, installed, measured, run

pytest.importorskip("ml_dtypes")

STORED = {name: form for name, form in FORMATS.items() if not form.plain}
ADAMW = RULES["adamw"]
SIZE = 1 << 16

formats = pytest.mark.parametrize("form", STORED.values(), ids=str)


@pytest.mark.parametrize(
    ("name", "each"),
    {
        "float32": 28, "float64": 56, "bf16": 22, "bf16-master": 30, "bf16-all": 14, "bf16-stochastic": 14, "bf16-kahan": 18,
        "bf16-split": 18, "bf16-states": 20, "q8": 16 + 1 / 16, "q4": 14 + 1 / 8, "bf16-q8": 10 + 1 / 16, "f16": 22,
    }.items(),
)  # fmt: skip
def test_bytes_that_a_format_moves(name, each):
    assert moved_bytes(ADAMW, ((SIZE,),), FORMATS[name]) == SIZE * each
    again = 2 * SIZE if name == "bf16-master" else 0  # seven pieces go with the gradients, and a loop takes five
    assert limit_bytes(ADAMW, ((SIZE,),), FORMATS[name]) == SIZE * each + again


def test_small_tensors_are_counted_as_they_are_stored():
    assert moved_bytes(ADAMW, ((64, 64), (16, 16)), FORMATS["q8"]) == 4096 * (16 + 1 / 16) + 256 * 28


@pytest.mark.parametrize(
    ("written", "read"), [([64, 64], 64), ([128, 640, 640], 128), ([4096, 1088, 1088], 4096), ([128] * 7, 128)]
)
def test_loops_go_over_every_byte_once(written, read):
    seen = [np.zeros(size, int) for size in written]
    for loop in _cut(written, read):
        assert 1 <= len(loop.outputs) <= 5
        assert 0 <= loop.begin < loop.begin + loop.size <= read
        for i, first in loop.outputs:
            seen[i][first : first + loop.size] += 1
    assert all((counts == 1).all() for counts in seen)


def test_loops_leave_out_padding():
    (loop,) = _cut([6400, 12800 - 64], 6400)[:1]
    assert loop.size == 6400 - 64
    assert len(_cut([6400, 12800 - 64], 6400)) == 1


@formats
def test_memory_of_a_format(form):
    made = Problem(ADAMW, ((5000,), (7, 3)), form)
    assert {array.dtype.name for array in (*made.params, *made.grads)} == {form.dtype}
    assert all(array.ctypes.data % 64 == 0 for state in made.state for array in state.values())
    assert sum(arena.size for arena in made.arenas) >= sum(a.nbytes for s in made.state for a in s.values())
    large, small = made.state
    assert large.keys() >= small.keys() >= {"exp_avg", "exp_avg_sq", *form.beside}
    assert ("exp_avg_scale" in large, "exp_avg_scale" in small) == (form.compressed, False)
    if "master" in large:
        assert np.array_equal(large["master"], made.params[0].astype(np.float32))
    before = [arena.copy() for arena in made.arenas]
    for loop in loops(made):
        loop()
    assert all(np.array_equal(arena, old) for arena, old in zip(made.arenas, before, strict=True))


@formats
@faces
def test_contenders_agree_with_the_formula(name, form):
    if name == "numpy":
        reason = "float32 and float64 only"
    elif name.startswith("torch"):
        reason = "" if form.uniform else "torch's states have the dtype of their parameter"
    else:
        reason = "the functions" if name == "gradstep" and (form.compressed or form.beside) else ""
    if reason:
        with pytest.raises(UnsupportedError, match=reason):
            check(installed(name), ADAMW, form)
    else:
        assert check(installed(name), ADAMW, form) is None


@formats
@pytest.mark.parametrize("rule", ["sgd", "amsgrad", "lion", "rmsprop-momentum", "lamb"])
def test_optimizers_agree_with_other_formulas(rule, form):
    assert check(installed("gradstep-object"), RULES[rule], form) is None


class WrongObject(Wrong):
    face = "gradstep-object"


@formats
def test_gate_catches_what_is_wrong_in_any_format(form):
    for wrong in (WrongObject(lr=0.7), WrongObject(betas=(0.0, 0.9)), WrongObject(eps=1.0), Idle(), Idle(math.nan)):
        assert "is off by" in check(wrong, ADAMW, form)


@pytest.mark.parametrize("settings", [{"lr": 0.52}, {"betas": (0.75, 0.9)}, {"weight_decay": 0.0}])
def test_gate_is_finer_where_the_format_is(settings):
    for name in ("bf16", "bf16-master", "f16"):
        assert "is off by" in check(WrongObject(**settings), ADAMW, FORMATS[name])


def test_distance_shows_what_rounding_costs():
    face = installed("gradstep-object")
    names = ("float32", "bf16-split", "bf16-kahan", "bf16-stochastic", "bf16-all")
    exact, split, kahan, stochastic, nearest = (measure_distance(face, ADAMW, FORMATS[name]).share for name in names)
    assert exact < 1e-4
    assert max(split, kahan) < 0.03
    assert 0.05 < stochastic < 0.4
    assert 0.6 < nearest < 1
    made = measure_distance(Idle(), ADAMW, FORMATS["bf16-all"])
    assert (made.contender, made.rule, made.dtype, made.steps) == ("idle", "adamw", "bf16-all", STEPS)
    assert made.share == 1


def test_tasks_of_formats():
    tasks = plan.make_tasks(plan.Choice(formats=[FORMATS["q8"], FORMATS["bf16"]], dtypes=[FLOAT32], rules=[RULES["lion"]]), 2)
    assert list(dict.fromkeys((task.rule.name, task.form.name) for task in tasks)) == [
        ("lion", "float32"), ("lion", "q8"), ("lion", "bf16"),
    ]  # fmt: skip
    assert {task.case.kind for task in tasks} == {"one", "many"}
    assert [form.name for form in _formats("all")] == ["float32", *STORED]
    assert _formats("f32,q4,float32") == [FLOAT32, FORMATS["q4"]]


def measured_in(form, rule, *names):
    return measured([plan.Task(RULES[rule], FORMATS[form], one(5000), (1,))], [installed(name) for name in names])


def test_format_is_measured_beside_float32(capsys):
    made = measured_in("bf16", "adamw", "gradstep", "gradstep-object", "numpy")
    assert [record.contender for record in made.records] == [
        LIMIT.name, "gradstep", "gradstep float32", "gradstep-object", "gradstep-object float32",
    ]  # fmt: skip
    limit, ours, throughout, *_ = made.records
    assert {record.dtype for record in made.records} == {"bf16"}
    assert (limit.bytes, ours.bytes, throughout.bytes) == (22 * 5000, 22 * 5000, 28 * 5000)
    assert ours.share_of_limit == pytest.approx(limit.median / ours.median)
    assert throughout.peer == "gradstep"
    assert throughout.speed_up["gradstep"] == pytest.approx(throughout.median / ours.median)
    assert {key[1:] for key in made.distances} == {("adamw", "float32"), ("adamw", "bf16")}
    (skip,) = made.skips
    assert (skip.contender, skip.dtype, skip.reason) == ("numpy", "bf16", "measured in float32 and float64 only")
    shown = time_table(made.records)
    assert shown.header == ("", "threads", "bytes", "gradstep", "gradstep-object")
    ((label, threads, moved, ratio, _),) = shown.rows
    assert (label, threads, moved) == ("adamw bf16, 5,000", "1", "79%")
    assert ratio == f"{ours.median / throughout.median:.0%}"
    assert [row[0] for row in distance_table(made.distances.values()).rows] == ["adamw float32", "adamw bf16"]
    assert "5,000 elements, 1 thread, 22 bytes a parameter" in capsys.readouterr().out


def test_torch_is_measured_where_all_is_of_one_dtype(capsys):
    made = measured_in("bf16-all", "adamw", "gradstep-torch", "torch-fused")
    names = [record.contender for record in made.records]
    assert names == [LIMIT.name, "gradstep-torch", "gradstep-torch float32", "torch-fused"]
    assert {key[0] for key in made.distances} == {"gradstep-torch", "torch-fused"}
    assert not made.skips
    assert not made.failures


def test_formats_that_a_rule_can_not_have_are_left_out(capsys):
    made = measured_in("q8", "rmsprop-centered", "gradstep-object")
    assert not made.records
    assert "centered RMSprop subtracts states" in made.skips[0].reason


def test_bfloat16_needs_ml_dtypes(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    made = measured_in("bf16", "adamw", "gradstep-object")
    assert "pip install ml_dtypes" in made.skips[0].reason
    assert run("bench", "--list") == 0


def test_wrong_contender_is_reported(capsys):
    made = measured([plan.Task(ADAMW, FORMATS["bf16-all"], one(5000), (1,))], [Idle()])
    assert made.failures[0].dtype == "bf16-all"
    assert "disagrees with the formula, not timed" in made.failures[0].reason


def test_command(tmp_path, capsys):
    figures = tmp_path / "figures.json"
    chosen = ["--format", "q8,bf16-stochastic", "--size", "5000", "--threads", "1", "--contender", "gradstep-object"]
    assert run("bench", "--quick", *chosen, "--json", figures) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "its time, in units of gradstep's in float32 throughout" in shown
    assert f"distance from float64 after {STEPS} steps" in shown
    document = json.loads(figures.read_text())
    assert document["formats"] == {
        "q8": {"dtype": "float32", "state_dtype": "q8"},
        "bf16-stochastic": {"dtype": "bfloat16", "state_dtype": "bfloat16", "precision": "stochastic"},
    }
    assert [(record["dtype"], record["contender"]) for record in document["records"]] == [
        (form, name)
        for form in ("q8", "bf16-stochastic")
        for name in (LIMIT.name, "gradstep-object", "gradstep-object float32")
    ]
    assert [(one["dtype"], one["steps"]) for one in document["distances"]] == [
        ("float32", STEPS), ("q8", STEPS), ("bf16-stochastic", STEPS),
    ]  # fmt: skip
    assert all(one["share"] == one["rms"] / one["way"] for one in document["distances"])
