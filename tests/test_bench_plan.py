"""What the benchmarks measure: cases, the bytes and the memory of a problem, tasks."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

import gradstep
from gradstep import _core
from gradstep.bench import models, plan, problem
from gradstep.bench.cases import CASES, Case, named, one, parse_size
from gradstep.bench.chains import CHAINS
from gradstep.bench.formats import FORMATS
from gradstep.bench.rules import RULES

from .bench_cases import FLOAT32, FLOAT64, whole


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
    [
        ("full", 44),
        ("clip", 32),
        ("unscale-clip", 32),
        ("stats", 28),
        ("off", 28),
        ("norm", 4),
        ("lamb", 40),
        ("ema", 36),
        ("zero", 32),
    ],
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
    assert list(dict.fromkeys(labels)) == [
        "adamw full",
        "adamw clip",
        "adamw unscale-clip",
        "norm",
        "adamw stats",
        "adamw off",
        "lamb",
    ]
    assert {task.case.name for task in tasks} == {"8000 x 4000", "500 x 64x64"}
    assert {task.threads for task in tasks} == {(1, 2)}
    choice = plan.Choice(rules=[RULES["lion"], RULES["sgd"]], chains=["clip", "norm"], cases=[one(77)])
    assert [task.rule.label for task in plan.make_tasks(choice, 2)] == ["lion clip", "sgd clip", "norm"]


def test_case_names_what_it_holds():
    assert Case("x", "many", ((2, 3), (4,))).elements == 10
