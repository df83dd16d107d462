"""Options through the torch classes: the NumPy classes' values, and those of groups."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

import gradstep
import gradstep.torch
from gradstep.stats import StepStats

from .stage_cases import MANY, SHAPES, STAGES, case_of, make_grads, make_optimizer, make_params, step_arguments
from .torch_cases import (
    ADAMW,
    RULES,
    SMALL,
    assert_all_same,
    assert_same,
    assert_unchanged,
    make,
    run,
    set_grads,
    snapshot,
    sources,
    tensors,
)

OPTIONS: dict[str, dict[str, Any]] = {
    **STAGES,
    "noise": {"noise": 0.1, "noise_decay": 0.3, "seed": 5},
    "skip": {"on_nonfinite": "skip"},
    "raise": {"on_nonfinite": "raise"},
    **{name: MANY[name] for name in ("a usual step", "every gradient stage", "every stage by row", "everything")},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("rule", RULES)
def test_same_bits_as_the_numpy_optimizer(rule: str, name: str) -> None:
    case, options = case_of(rule), OPTIONS[name]
    of_constructor, scale, weights = step_arguments(options)
    for dtype in (np.float32, np.float64):
        params, arrays = tensors(SHAPES, dtype), make_params(SHAPES, dtype)
        opt, other = make(case, params, of_constructor), make_optimizer(case, arrays, of_constructor)
        for step in (1, 2, 3):
            given, theirs = sources(SHAPES, step, options, dtype), make_grads(SHAPES, dtype, step, options)
            if weights:
                opt.step(grads=given, grad_scale=scale)
                other.step(theirs, grad_scale=scale)
            else:
                for p, g in zip(params, given[0][1], strict=True):
                    p.grad = g
                opt.step(grad_scale=scale)
                other.step(theirs[0][1], grad_scale=scale)
            assert opt.steps == other.steps == step
            for i, (p, q) in enumerate(zip(params, arrays, strict=True)):
                assert_same(p, q, f"parameter {i} at step {step}")
                state, numpys = opt.state.get(p, {}), other.state.get(i, {})
                assert state.keys() - {"step"} == numpys.keys() - {"step"}
                for key in state.keys() - {"step"}:
                    assert_same(state[key], numpys[key], f"{key} of {i} at step {step}")
            for g, h in zip((g for _, gs in given for g in gs), (h for _, hs in theirs for h in hs), strict=True):
                assert (g is None) == (h is None)
                assert g is None or np.array_equal(g.numpy(), h, equal_nan=True)
                assert g is None or not options.get("zero_grad") or not g.any()
            for ours, numpys in ((opt.ema, other.ema), (opt.swa, other.swa)):
                assert [average is None for average in ours] == [average is None for average in numpys]
                for average, expected in zip(ours, numpys, strict=True):
                    if average is not None:
                        assert_same(average, expected, f"average at step {step}")


@pytest.mark.parametrize("rule", RULES)
def test_statistics_are_those_of_numpy(rule: str) -> None:
    case, options = case_of(rule), {"clip_norm": 3.0, "ema_decay": 0.9, "on_nonfinite": "skip"}
    params, arrays = tensors(SHAPES), make_params(SHAPES, np.float32)
    opt, other = make(case, params, options), make_optimizer(case, arrays, options)
    for step in (1, 2, 3):
        set_grads(params, step)
        theirs = make_grads(SHAPES, np.float32, step, {})[0][1]
        if step == 2:
            params[2].grad[1, 2] = torch.inf
            theirs[2][1, 2] = np.inf
        seen, expected = opt.step(grad_scale=0.5, stats=True), other.step(theirs, grad_scale=0.5, stats=True)
        assert isinstance(seen, StepStats)
        assert seen == expected
        assert seen.step == min(step, 2) and seen.skipped == (step == 2) and seen.grad_norm > 0
        assert sorted(seen.parameters) == [i for i, p in enumerate(params) if p.grad is not None]


def test_statistics_with_a_closure_and_without() -> None:
    w = torch.nn.Parameter(torch.tensor([3.0]))
    opt = gradstep.torch.SGD([w], lr=0.1, clip_norm=3.0)

    def closure() -> Any:
        opt.zero_grad()
        loss = (w**2).sum()
        loss.backward()
        return loss

    with torch.no_grad():
        loss, seen = opt.step(closure, stats=True)
    assert loss.item() == 9 and seen.grad_norm == 6
    assert seen.clip_factor == pytest.approx(0.5) and seen.update_norm == pytest.approx(0.3)
    w.grad = torch.ones(1)
    assert opt.step(stats=True).grad_norm == 1
    assert opt.step(closure).item() == pytest.approx(w.grad.item() ** 2 / 4)
    assert opt.step() is None


def test_weighted_gradients_leave_the_parameters_own_alone() -> None:
    p, q = (torch.nn.Parameter(torch.ones(4, dtype=torch.float64)) for _ in range(2))
    p.grad = torch.full((4,), torch.nan, dtype=torch.float64)
    first, second = torch.arange(4.0, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    opt = gradstep.torch.SGD([p, q], lr=0.5)
    opt.step(grads=[(0.25, [first, None]), (-2, [second, None])], grad_scale=2.0)
    assert torch.equal(p.detach(), 1 - 0.5 * (0.5 * first - 4 * second))
    assert torch.equal(q.detach(), torch.ones(4)) and q.grad is None and p.grad.isnan().all()
    opt.step(grads=iter([(1.0, (g for g in [None, second]))]))
    assert torch.equal(q.detach(), 1 - 0.5 * second)


@pytest.mark.parametrize(
    ("grads", "error", "message"),
    [
        ([], ValueError, "SGD.step: grads has no gradients"),
        (3, TypeError, "SGD.step: grads must be pairs (weight, gradients), got 3"),
        ([torch.ones(4)], TypeError, "SGD.step: grads must be pairs (weight, gradients), got [tensor([1., 1., 1., 1.])]"),
        ([("1", [torch.ones(4)])], TypeError, "SGD.step: the weight of grads[0] must be a number, got '1'"),
        (
            [(1, [torch.ones(4)]), (float("nan"), [torch.ones(4)])],
            ValueError,
            "SGD.step: the weight of grads[1] must be finite, got nan",
        ),
        ([(1, [torch.ones(4)] * 2)], ValueError, None),
        ([(1, [torch.ones(5)])], ValueError, None),
        ([(1, [torch.ones(4)]), (1, [None])], ValueError, None),
        ([(1, [torch.ones(4)]), (1, [torch.ones(4, dtype=torch.int32)])], TypeError, None),
        ([(1, [torch.ones(4)]), (1, [torch.ones(4).to_sparse()])], (TypeError, ValueError), None),
    ],
)
def test_weighted_gradients_that_can_not_be(grads: Any, error: Any, message: str | None) -> None:
    p = torch.nn.Parameter(torch.ones(4))
    opt = gradstep.torch.SGD([p], lr=0.5, momentum=0.9)
    with pytest.raises(error) as caught:
        opt.step(grads=grads)
    assert str(caught.value) == message if message else str(caught.value).startswith("SGD.step: ")
    assert torch.equal(p.detach(), torch.ones(4)) and not opt.state and opt.steps == 0


def test_lamb_with_a_clipped_norm_through_all_faces() -> None:
    """As Apex has it."""
    shapes = [(6, 40), (33,)]
    params, arrays, operands = tensors(shapes), make_params(shapes, np.float32), make_params(shapes, np.float32)
    settings: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.07, "clip_norm": 1.0, "always_adapt": False}
    opt, other = gradstep.torch.LAMB(params, **settings), gradstep.LAMB(arrays, **settings)
    averages = [[np.zeros_like(p) for p in operands] for _ in range(2)]
    for step in (1, 2, 3):
        run(opt, params, (step,))
        grads = make_grads(shapes, np.float32, step, {})[0][1]
        other.step(grads)
        gradstep.lamb_(operands, grads, exp_avg=averages[0], exp_avg_sq=averages[1], step=step, **settings)
    for i, p in enumerate(params):
        assert_same(p, arrays[i], f"class, {i}")
        assert_same(p, operands[i], f"function, {i}")


def test_groups_have_options_of_their_own() -> None:
    own: list[dict[str, Any]] = [
        {"centralize": True, "ema_decay": 0.9, "l1": 20.0, "clip_norm_per_tensor": 3.0},
        {"weight_decay": 0.0, "clip_value": 0.5, "swa": (0, 1), "agc": 2.0},
        {"lookahead": (2, 0.5), "bounds": (0, None), "decay_mode": "coupled", "trust_ratio": True, "lr": 0.02},
    ]
    common = {"l2": 5.0, "max_norm": 2.0, "clip_norm": 2.0, "zero_grad": True}
    for rule in RULES:
        case, params, arrays = case_of(rule), tensors(SMALL), make_params(SMALL, np.float32)
        opt = make(case, [{"params": [p], **o} for p, o in zip(params, own, strict=True)], common)
        other = make_optimizer(case, [{"params": [p], **o} for p, o in zip(arrays, own, strict=True)], common)
        for step in (1, 2, 3):
            run(opt, params, (step,))
            other.step(make_grads(SMALL, np.float32, step, {})[0][1])
            for i, (p, q) in enumerate(zip(params, arrays, strict=True)):
                assert_same(p, q, f"parameter {i} of {rule} at step {step}")
                assert opt.state[p].keys() - {"step"} == other.state[i].keys() - {"step"}
        assert [a is None for a in opt.ema] == [False, True, True] and [a is None for a in opt.swa] == [True, False, True]


def test_a_group_that_is_added_has_the_options() -> None:
    params, others = tensors(SMALL), tensors(SMALL)
    opt = make(ADAMW, params[:2], {"clip_value": 0.5, "ema_decay": 0.9, "clip_norm": 3.0})
    opt.add_param_group({"params": params[2:], "ema_decay": 0.5, "l1": 9.0})
    assert opt.param_groups[1]["clip_value"] == 0.5 and opt.param_groups[1]["ema_decay"] == 0.5
    assert "l1" not in opt.param_groups[0]
    groups = [{"params": others[:2], "clip_value": 0.5, "ema_decay": 0.9}]
    groups.append({"params": others[2:], "clip_value": 0.5, "ema_decay": 0.5, "l1": 9.0})
    other = make(ADAMW, groups, {"clip_norm": 3.0})
    run(opt, params, (1, 2))
    run(other, others, (1, 2))
    assert_all_same(params, others, opt, other)


@pytest.mark.parametrize(("name", "value"), [("clip_norm", 1.0), ("on_nonfinite", "skip"), ("zero_grad", True)])
def test_what_holds_for_all_is_refused_in_a_group(name: str, value: Any) -> None:
    params = tensors(SMALL)
    opt = make(ADAMW, params[:2], {})
    message = f"^AdamW: {name} holds for all groups together: the constructor takes it$"
    with pytest.raises(TypeError, match=message):
        opt.add_param_group({"params": params[2:], name: value})
    assert len(opt.param_groups) == 1
    with pytest.raises(TypeError, match=message):
        make(ADAMW, [{"params": params, name: value}], {})
    run(opt, params, (1,))


@pytest.mark.parametrize("name", ["clip_norm", "on_nonfinite", "zero_grad"])
def test_what_holds_for_all_groups_is_refused_in_one(name: str) -> None:
    p, q = torch.nn.Parameter(torch.ones(3)), np.ones(3, np.float32)
    p.grad = torch.ones(3)
    for opt, arguments in ((gradstep.torch.AdamW([p]), ()), (gradstep.AdamW([q]), ([np.ones(3, np.float32)],))):
        opt.param_groups[0][name] = 1.0
        with pytest.raises(TypeError, match=f"{name} holds for all groups"):
            opt.step(*arguments)
    assert (p == 1).all() and (q == 1).all()


@pytest.mark.parametrize("name", ["AdamW", "SGD", "Lion", "LAMB"])
def test_unknown_keywords(name: str) -> None:
    for keyword in ("clip_nrom", "decay_in_ration", "options"):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{keyword}'"):
            getattr(gradstep.torch, name)(tensors(SMALL), **{keyword: 1.0})


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"clip_norm": -1.0}, ValueError, "AdamW: clip_norm must be >= 0 and finite, got -1.0"),
        ({"clip_norm": "1"}, TypeError, "AdamW: clip_norm must be a number, got '1'"),
        ({"zero_grad": 1}, TypeError, "AdamW: zero_grad must be True or False, got 1"),
        (
            {"on_nonfinite": "skp"},
            ValueError,
            "AdamW: on_nonfinite must be 'propagate', 'skip', 'raise' or 'zero', got 'skp'",
        ),
        ({"ema_decay": 1.0}, ValueError, "AdamW: ema_decay must be in [0, 1), got 1.0"),
        ({"ema_correction": "bias"}, ValueError, "AdamW: ema_correction needs ema_decay"),
        ({"l1": -1.0}, ValueError, "AdamW: l1 must be >= 0, got -1.0"),
        ({"bounds": (1, 0)}, ValueError, "AdamW: bounds must be (low, high) with low <= high, got (1, 0)"),
        (
            {"decay_mode": "none"},
            ValueError,
            "AdamW: decay_mode must be None, 'coupled', 'decoupled' or 'independent', got 'none'",
        ),
    ],
)
def test_options_out_of_range(options: dict[str, Any], error: Any, message: str) -> None:
    params = tensors(SMALL)
    with pytest.raises(error) as caught:
        gradstep.torch.AdamW(params, **options)
    assert str(caught.value) == message
    opt = gradstep.torch.AdamW(params)
    (name, value), *_ = options.items()
    attribute = {"zero_grad": "zeroes_grad"}.get(name, name)
    if attribute in ("clip_norm", "on_nonfinite", "zeroes_grad"):
        setattr(opt, attribute, value)
    else:
        with pytest.raises(error):
            opt.add_param_group({"params": tensors([(3,)]), **options})
        assert len(opt.param_groups) == 1
        opt.param_groups[0].update(options)
    set_grads(params, 1)
    before = snapshot(opt, params)
    with pytest.raises(error, match=name):
        opt.step()
    assert_unchanged(opt, params, before)


def test_options_edited_between_steps() -> None:
    params, arrays = tensors(SMALL), make_params(SMALL, np.float32)
    opt, other = make(ADAMW, params, {}), make_optimizer(ADAMW, arrays, {})
    edits: list[tuple[Any, ...]] = [
        (1.5, "zero", False, {"clip_value": 0.5, "ema_decay": 0.9}),
        (None, "skip", True, {"clip_value": None, "lookahead": (2, 0.5), "l1": 20.0}),
        (0.5, "propagate", False, {"l1": None, "decay_mode": "independent", "trust_ratio": True}),
    ]
    for step, (clip_norm, on_nonfinite, zero_grad, edit) in enumerate(edits, 1):
        opt.clip_norm = other.clip_norm = clip_norm
        opt.on_nonfinite = other.on_nonfinite = on_nonfinite
        opt.zeroes_grad = other.zero_grad = zero_grad
        opt.param_groups[0].update(edit)
        other.param_groups[0].update(edit)
        run(opt, params, (step,))
        other.step(make_grads(SMALL, np.float32, step, {})[0][1])
        for i, (p, q) in enumerate(zip(params, arrays, strict=True)):
            assert_same(p, q, f"parameter {i} at step {step}")
            assert params[i].grad.any() != zero_grad


def test_named_parameters() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    opt = gradstep.torch.AdamW(model.named_parameters(), ema_decay=0.9, clip_norm=1.0)
    model(torch.ones(2, 3)).sum().backward()
    seen = opt.step(stats=True)
    assert list(seen.parameters) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert opt.param_groups[0]["param_names"] == list(seen.parameters)
    assert all(torch.equal(a, p) for a, p in zip(opt.ema, model.parameters(), strict=True))
    opt.on_nonfinite = "raise"
    model[1].weight.grad[0, 0] = torch.nan
    before = snapshot(opt, list(model.parameters()))
    with pytest.raises(FloatingPointError, match=r"^AdamW.step: params\[2\].grad has an element that is not finite$"):
        opt.step()
    assert_unchanged(opt, list(model.parameters()), before)
