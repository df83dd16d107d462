"""Options through the torch classes, torch's GradScaler, and `gradstep.torch.clip_grad_norm_`."""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from torch.optim.optimizer import register_optimizer_step_post_hook

import gradstep
import gradstep.torch
from gradstep.options import GROUP_OPTIONS
from gradstep.stats import StepStats

from .cases import CASES, NORM_CASES, Case
from .stage_cases import MANY, SHAPES, STAGES, make_grads, make_optimizer, make_params, settings_of, step_arguments
from .test_values import assert_same_bits

RULES = ("adamw", "sgd_momentum", "lion", "lamb")
OPTIONS: dict[str, dict[str, Any]] = {
    **STAGES,
    "noise": {"noise": 0.1, "noise_decay": 0.3, "seed": 5},
    "skip": {"on_nonfinite": "skip"},
    "raise": {"on_nonfinite": "raise"},
    **{name: MANY[name] for name in ("a usual step", "every gradient stage", "every stage by row", "everything")},
}
USUAL: dict[str, Any] = {"clip_norm": 3.0, "ema_decay": 0.9, "l1": 5.0, "swa": (0, 1), "zero_grad": True, "lookahead": (2, 0.4)}
SMALL = [(6, 40), (33,), (5, 7)]


def case_of(name: str) -> Case:
    return next(case for case in (*CASES, *NORM_CASES) if case.name == name)


ADAMW = case_of("adamw")


def tensors(shapes: Any = SHAPES, dtype: Any = np.float32) -> list[Any]:
    return [torch.nn.Parameter(torch.from_numpy(p)) for p in make_params(shapes, dtype)]


def make(case: Case, params: Any, options: dict[str, Any]) -> Any:
    return getattr(gradstep.torch, case.optimizer)(params, **{**settings_of(case), **case.class_settings, **options})


def sources(shapes: Any, step: int, options: dict[str, Any], dtype: Any = np.float32) -> Any:
    made = make_grads(shapes, dtype, step, options)
    return [(weight, [None if g is None else torch.from_numpy(g) for g in grads]) for weight, grads in made]


def set_grads(params: list[Any], step: int) -> None:
    dtype = np.float64 if params[0].dtype == torch.float64 else np.float32
    for p, g in zip(params, sources([tuple(p.shape) for p in params], step, {}, dtype)[0][1], strict=True):
        p.grad = g


def run(opt: Any, params: list[Any], steps: Any) -> None:
    for step in steps:
        set_grads(params, step)
        opt.step()


def assert_same(ours: Any, theirs: Any, what: str) -> None:
    """Of arrays the same bits, of numbers the same."""
    if not isinstance(ours, torch.Tensor):
        assert ours == theirs and type(ours) is type(theirs), what
        return
    assert_same_bits(ours.detach().numpy(), theirs.detach().numpy() if isinstance(theirs, torch.Tensor) else theirs, what)


def assert_all_same(params: list[Any], others: list[Any], opt: Any = None, other: Any = None) -> None:
    """The same bits in parameters and, given the optimizers, in all of their states."""
    for i, (p, q) in enumerate(zip(params, others, strict=True)):
        assert_same(p, q, f"parameter {i}")
        if opt is not None:
            state, theirs = opt.state[p], other.state[q]
            assert state.keys() == theirs.keys()
            for name in state:
                ours, others = (
                    value.double() if isinstance(value, torch.Tensor) else value for value in (state[name], theirs[name])
                )
                assert_same(ours, others, f"{name} of {i}")


def snapshot(opt: Any, params: list[Any]) -> Any:
    """All that a step may change, apart from gradients."""
    kept = [[p.detach().clone(), copy.deepcopy(dict(opt.state.get(p, {})))] for p in params]
    return kept, opt.steps, copy.deepcopy([{**g, "params": None} for g in opt.param_groups])


def assert_unchanged(opt: Any, params: list[Any], before: Any) -> None:
    kept, steps, groups = snapshot(opt, params)
    assert steps == before[1] and groups == before[2]
    for (p, state), (q, theirs) in zip(kept, before[0], strict=True):
        assert torch.equal(p, q)
        assert state.keys() == theirs.keys() and all(
            bool((state[name] == theirs[name]).all()) if isinstance(state[name], torch.Tensor) else state[name] == theirs[name]
            for name in state
        )
    assert len(opt.state) == sum(bool(state) for _, state in before[0])


# ---- values ---------------------------------------------------------------------------------------------------------------


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
        ([(1, [torch.ones(4)]), (1, [torch.ones(4, dtype=torch.float64)])], TypeError, None),
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


# ---- groups ---------------------------------------------------------------------------------------------------------------


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


# ---- saving ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("way", ["state_dict", "file", "pickle", "deepcopy"])
def test_options_go_round(rule: str, way: str) -> None:
    case, params, straight = case_of(rule), tensors(SMALL), tensors(SMALL)
    opt, uncut = make(case, params, USUAL), make(case, straight, USUAL)
    run(opt, params, (1, 2, 3))
    run(uncut, straight, (1, 2, 3, 4, 5, 6))
    assert opt.state[params[0]].keys() >= {"ema", "ema_count", "swa", "swa_count", "slow"}
    if way in ("pickle", "deepcopy"):
        opt = pickle.loads(pickle.dumps(opt)) if way == "pickle" else copy.deepcopy(opt)
        params = opt.param_groups[0]["params"]
        assert opt.clip_norm == 3.0 and opt.zeroes_grad is True and opt.steps == 3
    else:
        saved = opt.state_dict()
        if way == "file":
            file = io.BytesIO()
            torch.save(saved, file)
            file.seek(0)
            saved = torch.load(file, weights_only=True)
        saved = copy.deepcopy(saved)
        opt = getattr(gradstep.torch, case.optimizer)(params, lr=7.0, clip_norm=3.0, zero_grad=True, l2=4.0, ema_decay=0.1)
        opt.load_state_dict({**saved, "param_groups": [{**group, "l2": None} for group in saved["param_groups"]]})
    group = opt.param_groups[0]
    assert {name: group[name] for name in USUAL if name in GROUP_OPTIONS} == {
        name: value for name, value in USUAL.items() if name in GROUP_OPTIONS
    }
    run(opt, params, (4, 5, 6))
    assert_all_same(params, straight, opt, uncut)
    opt.add_param_group({"params": tensors([(3,)])})
    assert opt.param_groups[1]["ema_decay"] == (0.9 if way in ("pickle", "deepcopy") else 0.1)


@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_from_torch_and_back_in_mid_training(name: str) -> None:
    """Torch's optimizer has no options; ours keeps those that it was made with."""
    settings = {"lr": 0.01, "weight_decay": 0.07, **({"momentum": 0.9} if name == "SGD" else {})}
    theirs, ours = getattr(torch.optim, name), getattr(gradstep.torch, name)
    params, straight = tensors(SMALL, np.float64), tensors(SMALL, np.float64)
    uncut = theirs(straight, foreach=False, **settings)
    run(uncut, straight, range(1, 10))
    opt = theirs(params, foreach=False, **settings)
    run(opt, params, (1, 2, 3))
    crossed = ours(params, ema_decay=0.9, swa=(4, 1), **settings)
    crossed.load_state_dict(opt.state_dict())
    assert crossed.param_groups[0]["ema_decay"] == 0.9
    run(crossed, params, (4, 5, 6))
    assert crossed.ema[0] is not None
    if name == "AdamW":
        assert crossed.state[params[0]]["step"] == 6 and crossed.state[params[0]]["swa_count"] == 2
    back = theirs(params, foreach=False, **settings)
    back.load_state_dict(crossed.state_dict())
    run(back, params, (7, 8, 9))
    for p, q in zip(params, straight, strict=True):
        assert torch.allclose(p, q, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("options", [{"swa": (0, 1)}, {"lookahead": (9, 0.5)}, {"noise": 1e-30}], ids=lambda o: next(iter(o)))
def test_momentum_stays_where_an_option_comes_later(options: dict[str, Any]) -> None:
    """Options that count steps: torch's SGD does not, and its buffer is no less there."""
    for way in ("loaded", "edited"):
        params, straight = tensors(SMALL, np.float64), tensors(SMALL, np.float64)
        opt, uncut = (gradstep.torch.SGD(each, lr=0.01, momentum=0.9, dampening=0.5) for each in (params, straight))
        run(opt, params, (1, 2))
        if way == "loaded":
            saved = opt.state_dict()
            opt = gradstep.torch.SGD(params, **options)
            opt.load_state_dict(saved)
        else:
            opt.param_groups[0].update(options)
        run(opt, params, (3,))
        run(uncut, straight, (1, 2, 3))
        for i, (p, q) in enumerate(zip(params, straight, strict=True)):
            assert torch.allclose(p, q, rtol=1e-9), f"{i} {way}"


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


# ---- averages -------------------------------------------------------------------------------------------------------------


def test_averages_and_their_exchange() -> None:
    params = tensors(SMALL)
    opt = make(ADAMW, params, {"ema_decay": 0.5, "swa": (1, 1)})
    assert opt.ema == opt.swa == [None] * 3
    for swap in (opt.swap_ema, lambda: opt.averaged().__enter__(), lambda: opt.averaged("swa").__enter__()):
        with pytest.raises(RuntimeError, match="^AdamW: there are no averages yet"):
            swap()
    run(opt, params, (1,))
    assert opt.swa == [None] * 3 and all(torch.equal(a, p) for a, p in zip(opt.ema, params, strict=True))
    run(opt, params, (2, 3))
    points = [p.detach().clone() for p in params]
    ema, swa = ([a.clone() for a in averages] for averages in (opt.ema, opt.swa))
    assert not any(torch.equal(a, p) for a, p in zip([*ema, *swa], points * 2, strict=True))
    pointers = [p.data_ptr() for p in params]
    opt.swap_ema()
    assert all(torch.equal(p, a) for p, a in zip(params, ema, strict=True))
    assert all(torch.equal(a, p) for a, p in zip(opt.ema, points, strict=True))
    opt.swap_ema()
    for name, averages in ((None, ema), ("ema", ema), ("swa", swa)):
        with opt.averaged(name):
            assert all(torch.equal(p, a) for p, a in zip(params, averages, strict=True))
        assert all(torch.equal(p, q) for p, q in zip(params, points, strict=True))
    with pytest.raises(KeyError), opt.averaged("swa"):
        raise KeyError
    assert all(torch.equal(p, q) for p, q in zip(params, points, strict=True))
    assert [p.data_ptr() for p in params] == pointers


def test_the_average_is_that_of_torch() -> None:
    params = tensors(SMALL, np.float64)
    model = torch.nn.ParameterList(params)
    theirs = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.8))
    equal = torch.optim.swa_utils.AveragedModel(model)
    opt = make(ADAMW, params, {"ema_decay": 0.8, "swa": (0, 1)})
    for step in (1, 2, 3, 4):
        run(opt, params, (step,))
        theirs.update_parameters(model)
        equal.update_parameters(model)
    for averages, averaged in ((opt.ema, theirs), (opt.swa, equal)):
        for a, b in zip(averages, averaged.module, strict=True):
            assert torch.allclose(a, b, rtol=1e-12)
            assert not a.requires_grad


def test_the_keyword_and_the_method_zero_grad() -> None:
    params = tensors(SMALL)
    opt = make(ADAMW, params, {"zero_grad": True})
    run(opt, params, (1,))
    assert not any(p.grad.any() for p in params)
    set_grads(params, 2)
    opt.zero_grad(set_to_none=False)
    assert all(p.grad is not None and not p.grad.any() for p in params)
    opt.zero_grad()
    assert all(p.grad is None for p in params)
    plain = make(ADAMW, params, {})
    run(plain, params, (3,))
    assert all(p.grad.any() for p in params)
    assert opt.zeroes_grad is True and plain.zeroes_grad is False and callable(plain.zero_grad)


def test_version_counters_rise() -> None:
    p, unused = tensors([(6, 40), (33,)])
    opt = make(ADAMW, [p, unused], {"ema_decay": 0.9, "swa": (0, 1), "lookahead": (1, 0.5), "zero_grad": True})
    for step in (1, 2):
        p.grad = torch.ones(6, 40)
        states = {name: state for name, state in opt.state.get(p, {}).items() if isinstance(state, torch.Tensor)}
        watched = {"parameter": p, "gradient": p.grad, **(states if step == 2 else {})}
        before = {name: tensor._version for name, tensor in watched.items()}
        opt.step()
        for name, tensor in watched.items():
            assert tensor._version > before[name] or name == "step", name
    assert {"exp_avg", "exp_avg_sq", "ema", "swa", "slow"} <= watched.keys()
    assert unused._version == 0 and unused not in opt.state
    average = opt.ema[0]
    before = p._version, average._version
    opt.swap_ema()
    assert p._version > before[0] and average._version > before[1]


def test_autograd_notices_that_a_gradient_was_zeroed() -> None:
    p = torch.nn.Parameter(torch.ones(5))
    (p**3).sum().backward(create_graph=False)
    g = p.grad.requires_grad_()
    loss = (g**2).sum()
    p.grad = g.detach()
    gradstep.torch.SGD([p], lr=0.1, zero_grad=True).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ---- what stands around a step ----------------------------------------------------------------------------------------------


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda opt: torch.optim.lr_scheduler.LambdaLR(opt, lambda epoch: 0.9**epoch),
    "OneCycleLR": lambda opt: torch.optim.lr_scheduler.OneCycleLR(opt, 0.1, total_steps=20),  # edits betas and momentum
}


@pytest.mark.parametrize("schedule", SCHEDULERS)
@pytest.mark.parametrize("rule", RULES)
def test_schedulers(rule: str, schedule: str) -> None:
    case, params, arrays = case_of(rule), tensors(SMALL), make_params(SMALL, np.float32)
    options = {**USUAL, "group_lasso": 9.0, "decay_mode": "decoupled"}
    opt, other = make(case, params, options), make_optimizer(case, arrays, options)
    scheduler, rates = SCHEDULERS[schedule](opt), set()
    for step in range(1, 6):
        group = opt.param_groups[0]
        other.param_groups[0].update({name: group[name] for name in ("lr", "betas", "momentum") if name in group})
        rates.add(group["lr"])
        set_grads(params, step)
        seen = opt.step(stats=step == 3)
        assert (seen is not None) == (step == 3)
        other.step(make_grads(SMALL, np.float32, step, {})[0][1])
        scheduler.step()
    assert len(rates) == 5
    for i, (p, q) in enumerate(zip(params, arrays, strict=True)):
        assert_same(p, q, f"parameter {i}")


@pytest.mark.parametrize("around", ["hooks", "global hooks", "profiler", "compiler"])
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_what_watches_a_step_changes_nothing(around: str) -> None:
    params, others = tensors(SMALL), tensors(SMALL)
    opt, other = make(ADAMW, params, USUAL), make(ADAMW, others, USUAL)
    calls: list[Any] = []
    hooks = []
    if around == "hooks":
        hooks = [opt.register_step_pre_hook(lambda *args: calls.append(args[0]))]
        hooks.append(opt.register_step_post_hook(lambda *args: calls.append(args[0])))
    elif around == "global hooks":
        hooks = [register_optimizer_step_post_hook(lambda *args: calls.append(args[0]))]
    try:
        for step in (1, 2):
            set_grads(params, step)
            if around == "profiler":
                with torch.autograd.profiler.profile() as profile:
                    seen = opt.step(grad_scale=0.5, stats=True)
                assert any("Optimizer.step#AdamW.step" in event.name for event in profile.function_events)
            elif around == "compiler":
                opt_step = torch.compile(lambda: opt.step(grad_scale=0.5, stats=True), backend="eager")
                seen = opt_step()
            else:
                seen = opt.step(grad_scale=0.5, stats=True)
            assert seen.step == step and seen.grad_norm > 0
    finally:
        for hook in hooks:
            hook.remove()
    assert calls == {"hooks": [opt] * 4, "global hooks": [opt] * 2}.get(around, [])
    for step in (1, 2):
        set_grads(others, step)
        other.step(grad_scale=0.5)
    assert_all_same(params, others, opt, other)
    if around == "hooks":
        opt.register_step_pre_hook(lambda *args: calls.append(args[0]))
        extra = [(1.0, [torch.ones_like(p) for p in params])]
        assert opt.step(grads=extra) is None and len(calls) == 5
        other.step(grads=[(1.0, [torch.ones_like(p) for p in others])])
        assert_all_same(params, others)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize(
    "options",
    [
        *({name: value} for name, value in USUAL.items()),
        {"clip_value": 0.1},
        {"bounds": (0, None)},
        {"on_nonfinite": "skip"},
        {"on_nonfinite": "raise"},
        {"on_nonfinite": "zero"},
        {"decay_mode": "decoupled"},
    ],
    ids=str,
)
def test_sparse_gradients_go_without_options(options: dict[str, Any]) -> None:
    """SGD and Adagrad take sparse gradients, as torch's do; options would be lost on the way."""
    for name in ("SGD", "Adagrad"):
        table, dense = torch.nn.Embedding(10, 4, sparse=True), torch.nn.Linear(4, 1)
        params = [*table.parameters(), *dense.parameters()]
        opt = getattr(gradstep.torch, name)(params, lr=0.1, **options)
        dense(table(torch.tensor([1, 3, 3]))).sum().backward()
        before, grads = snapshot(opt, params), [p.grad.to_dense().clone() for p in params]
        with pytest.raises((TypeError, ValueError, RuntimeError), match="sparse"):
            opt.step()
        assert_unchanged(opt, params, before)
        assert all(torch.equal(p.grad.to_dense(), g) for p, g in zip(params, grads, strict=True))


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_sparse_gradients_and_what_step_takes() -> None:
    """Statistics and weighted gradients are refused; a scale is used."""
    table = torch.nn.Embedding(10, 4, sparse=True)
    opt = gradstep.torch.SGD(table.parameters(), lr=0.5)
    table(torch.tensor([1, 3, 3])).sum().backward()
    start = table.weight.detach().clone()
    for more in ({"stats": True}, {"grads": [(1.0, [table.weight.grad])]}):
        with pytest.raises((TypeError, ValueError), match="sparse"):
            opt.step(**more)
        assert torch.equal(table.weight, start)
    opt.step(grad_scale=0.25)
    expected = start.clone()
    expected[1] -= 0.125
    expected[3] -= 0.25
    assert torch.allclose(table.weight, expected)


# ---- GradScaler -----------------------------------------------------------------------------------------------------------


def amp(case: str, dtype: Any = np.float32) -> dict[str, Any]:
    name, settings = {
        "AdamW": ("AdamW", {"lr": 0.02, "weight_decay": 0.07}),
        "SGD": ("SGD", {"lr": 0.02, "momentum": 0.85, "weight_decay": 0.07}),
    }[case]
    params, others = tensors(SMALL, dtype), tensors(SMALL, dtype)
    return {
        "ours": (getattr(gradstep.torch, name)(params, **settings), params),
        "theirs": (getattr(torch.optim, name)(others, foreach=False, **settings), others),
    }


def backward(scaler: Any, params: list[Any], step: int, overflow: bool = False) -> None:
    """Gradients of a scaled loss; with `overflow`, one element is infinite."""
    dtype = np.float64 if params[0].dtype == torch.float64 else np.float32
    grads = sources([tuple(p.shape) for p in params], step, {}, dtype)[0][1]
    loss = sum((p * g / 100).sum() for p, g in zip(params, grads, strict=True))
    scaler.scale(loss + (params[1][5] * torch.inf if overflow else 0)).backward()


def close(params: list[Any], others: list[Any]) -> None:
    for p, q, start in zip(params, others, tensors(SMALL), strict=True):
        assert (p.double() - start.double()).abs().max() > 0.005
        assert torch.allclose(p, q, rtol=2e-6, atol=2e-6)


def counts(opt: Any) -> list[float]:
    return [float(state["step"]) for state in opt.state.values() if "step" in state]


BETWEEN: dict[str, Callable[[Any, Any, list[Any]], None]] = {
    "nothing": lambda scaler, opt, params: None,
    "unscale_": lambda scaler, opt, params: scaler.unscale_(opt),
    "unscale_ and clip": lambda scaler, opt, params: (
        scaler.unscale_(opt),
        torch.nn.utils.clip_grad_norm_(params, 0.5),
    ),
    "unscale_ and our clip": lambda scaler, opt, params: (
        scaler.unscale_(opt),
        gradstep.torch.clip_grad_norm_(params, 0.5),
    ),
}


@pytest.mark.parametrize("name", ["AdamW", "SGD"])
@pytest.mark.parametrize("between", BETWEEN)
@pytest.mark.parametrize("overflows", [(), (1,), (1, 2), (3,), (1, 4, 5)], ids=str)
@pytest.mark.parametrize("scale", [1024.0, 1000.0, 3.7])
def test_scaler_as_with_torchs_optimizer(name: str, between: str, overflows: tuple[int, ...], scale: float) -> None:
    scales: dict[str, list[float]] = {"ours": [], "theirs": []}
    pairs = amp(name)
    for which, (opt, params) in pairs.items():
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_factor=3.0, backoff_factor=0.25, growth_interval=2)
        keys = vars(opt).keys() - {"_plan"}
        for step in range(1, 7):
            opt.zero_grad()
            backward(scaler, params, step, step in overflows)
            before = [p.detach().clone() for p in params]
            BETWEEN[between](scaler, opt, params)
            assert scaler.step(opt) is None
            scaler.update()
            scales[which].append(scaler.get_scale())
            assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True)) == (step in overflows)
            if overflows[:step] == tuple(range(1, step + 1)):
                assert not opt.state and opt.state_dict()["state"] == {}
            assert vars(opt).keys() - {"_plan"} <= keys | {"steps"}
            assert which == "theirs" or opt.steps == step - sum(at <= step for at in overflows)
    assert scales["ours"] == scales["theirs"] and len(set(scales["ours"])) > 1
    close(pairs["ours"][1], pairs["theirs"][1])
    assert counts(pairs["ours"][0]) == counts(pairs["theirs"][0]) == [6.0 - len(overflows)] * (3 if name == "AdamW" else 0)


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_the_option_clips_what_was_unscaled(name: str, unscale: bool) -> None:
    """As torch's unscale_, clip_grad_norm_, step; in float64, with a scale of a power of two, to the last digits."""
    pairs = amp(name, np.float64)
    pairs["ours"][0].clip_norm = 0.5
    for which, (opt, params) in pairs.items():
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14)
        for step in range(1, 6):
            opt.zero_grad()
            backward(scaler, params, step, step == 3)
            if unscale or which == "theirs":
                scaler.unscale_(opt)
            if which == "theirs":
                norm = torch.nn.utils.clip_grad_norm_(params, 0.5)
                assert norm > 1
            scaler.step(opt)
            scaler.update()
    for p, q in zip(pairs["ours"][1], pairs["theirs"][1], strict=True):
        assert torch.allclose(p, q, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("how", ["propagate", "skip", "raise", "zero"])
def test_the_scaler_comes_before_on_nonfinite(how: str, unscale: bool) -> None:
    """What the scaler saw overflow is left out, whatever the option says."""
    params = tensors(SMALL)
    opt = make(ADAMW, params, {"on_nonfinite": how, "ema_decay": 0.9, "clip_norm": 3.0})
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=100)
    for step in (1, 2, 3, 4):
        opt.zero_grad()
        backward(scaler, params, step, overflow=step in (1, 3))
        if unscale:
            scaler.unscale_(opt)
        before = snapshot(opt, params)
        scaler.step(opt)
        scaler.update()
        if step in (1, 3):
            assert_unchanged(opt, params, before)
        else:
            assert opt.steps == step // 2 and opt.state[params[0]]["ema_count"] == step // 2
    assert scaler.get_scale() == 16


@pytest.mark.parametrize("unscale", [True, False])
def test_what_turns_bad_after_unscale_is_for_the_option(unscale: bool) -> None:
    """The loop goes on after an error, too, whether or not it calls unscale_ again."""
    results = []
    for how in ("skip", "raise"):
        params = tensors(SMALL)
        opt = make(ADAMW, params, {"on_nonfinite": how})
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        for step in (1, 2, 3):
            opt.zero_grad()
            backward(scaler, params, step)
            if unscale or step == 2:
                scaler.unscale_(opt)
            before = snapshot(opt, params)
            if step == 2:
                params[0].grad[1, 1] = torch.nan
            if step == 2 and how == "raise":
                with pytest.raises(FloatingPointError):
                    scaler.step(opt)
            else:
                scaler.step(opt)
            scaler.update()
            if step == 2:
                assert_unchanged(opt, params, before)
        assert opt.steps == 2
        results.append(params)
    assert_all_same(*results)


@pytest.mark.parametrize("unscale", [False, True])
def test_statistics_with_a_scaler(unscale: bool) -> None:
    params = tensors(SMALL)
    opt = make(ADAMW, params, {"clip_norm": 0.5})
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=100)
    for step in (1, 2, 3):
        opt.zero_grad()
        backward(scaler, params, step, overflow=step == 2)
        true = torch.cat([p.grad.ravel().double() for p in params]) / scaler.get_scale()
        if unscale:
            scaler.unscale_(opt)
        before = snapshot(opt, params)
        seen = scaler.step(opt, stats=True)
        scaler.update()
        assert seen.skipped == (step == 2) and seen.grad_infs == (step == 2)
        assert seen.step == min(step, 2)
        if step == 2:
            assert_unchanged(opt, params, before)
            assert seen.grad_norm == float("inf") and seen.update_norm == 0
        else:
            assert seen.grad_norm == pytest.approx(float(true.norm()), rel=1e-6)
            assert seen.clip_factor == pytest.approx(0.5 / float(true.norm()), rel=1e-5)
            assert seen.grad_norm_clipped == pytest.approx(0.5, rel=1e-5)


@pytest.mark.parametrize("stats", [False, True])
def test_found_inf_skips_also_where_gradients_were_mended(stats: bool) -> None:
    """As with torch's optimizers: what the scaler found counts."""
    params = tensors(SMALL)
    opt = make(ADAMW, params, {})
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    backward(scaler, params, 1, overflow=True)
    scaler.unscale_(opt)
    for p in params:
        p.grad.nan_to_num_(0.0, 0.0, 0.0)
    before = snapshot(opt, params)
    seen = scaler.step(opt, stats=stats)
    assert_unchanged(opt, params, before)
    assert seen is None or seen.skipped


@pytest.mark.parametrize("stats", [False, True])
@pytest.mark.parametrize("unscale", [False, True])
def test_zero_grad_with_a_scaler(unscale: bool, stats: bool) -> None:
    """Gradients are zeroed by steps that are left out, too: else they would stay infinite."""
    pairs = amp("AdamW")
    pairs["ours"][0].zeroes_grad = True
    for which, (opt, params) in pairs.items():
        scaler = torch.amp.GradScaler("cpu", init_scale=128.0)
        for step in (1, 2, 3, 4):
            if which == "theirs":
                opt.zero_grad()
            backward(scaler, params, step, overflow=step in (1, 3))
            if unscale:
                scaler.unscale_(opt)
            more = {"stats": True} if stats and which == "ours" else {}
            scaler.step(opt, **more)
            scaler.update()
            assert which == "theirs" or all(p.grad is not None and not p.grad.any() for p in params)
    close(pairs["ours"][1], pairs["theirs"][1])


def test_several_optimizers_on_one_scaler() -> None:
    """Each is left out for what is its own; the scale is common."""
    results = []
    for which in ("ours", "theirs"):
        made = [amp(name)[which] for name in ("AdamW", "SGD")]
        scaler, scales = torch.amp.GradScaler("cpu", init_scale=512.0, growth_interval=2), []
        for step in range(1, 7):
            for k, (opt, params) in enumerate(made):
                opt.zero_grad()
                backward(scaler, params, 10 * step + k, overflow=(step, k) in ((1, 0), (3, 1), (4, 0)))
            if step % 2:
                scaler.unscale_(made[1][0])
            for opt, _ in made:
                scaler.step(opt)
            scaler.update()
            scales.append(scaler.get_scale())
        results.append((made, scales))
    (ours, our_scales), (theirs, their_scales) = results
    assert our_scales == their_scales
    for (_, params), (_, others) in zip(ours, theirs, strict=True):
        close(params, others)
    assert [opt.steps for opt, _ in ours] == [4, 5] and counts(ours[0][0]) == counts(theirs[0][0]) == [4.0] * 3


def test_a_disabled_scaler_does_nothing() -> None:
    params, others = tensors(SMALL), tensors(SMALL)
    opt, other = make(ADAMW, params, USUAL), make(ADAMW, others, USUAL)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    for step in (1, 2):
        set_grads(params, step)
        scaler.unscale_(opt)
        scaler.step(opt)
        scaler.update()
    run(other, others, (1, 2))
    assert_all_same(params, others, opt, other)


def test_scaled_twice() -> None:
    """`grad_scale` of a step and the scaler's are two factors."""
    params, others = tensors(SMALL, np.float64), tensors(SMALL, np.float64)
    opt, other = (gradstep.torch.SGD(each, lr=0.1) for each in (params, others))
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    backward(scaler, params, 1)
    scaler.step(opt, grad_scale=0.5)
    for p, q in zip(params, others, strict=True):
        q.grad = p.grad / 128
    other.step()
    assert_all_same(params, others)


# ---- clip_grad_norm_ --------------------------------------------------------------------------------------------------------

CLIP_SHAPES = [(33, 7), (), (1030,), (0, 3), (2, 3, 5, 5)]


def with_grads(dtype: Any = torch.float32, scale: float = 1.0) -> list[Any]:
    params = tensors(CLIP_SHAPES)
    for p, g in zip(params, sources(CLIP_SHAPES, 3, {})[0][1], strict=True):
        p.data = p.data.to(dtype)
        p.grad = None if g is None else (g.double() * scale).to(dtype)
    return params


def clip_both(params: list[Any], *args: Any, **kwargs: Any) -> tuple[Any, Any, list[Any]]:
    """Norms by ours and torch's function, and torch's gradients; ours are left in `params`."""
    others = [torch.nn.Parameter(p.detach().clone()) for p in params]
    for p, q in zip(params, others, strict=True):
        q.grad = None if p.grad is None else p.grad.clone()
    norm = gradstep.torch.clip_grad_norm_(params, *args, **kwargs)
    expected = torch.nn.utils.clip_grad_norm_(others, *args, **kwargs)
    assert type(norm) is torch.Tensor and norm.shape == () and norm.dtype == expected.dtype and not norm.requires_grad
    for p, q in zip(params, others, strict=True):
        assert (p.grad is None) == (q.grad is None)
        assert p.grad is None or (p.grad.dtype == q.grad.dtype and p.grad.layout == q.grad.layout)
    return norm, expected, [q.grad for q in others]


def assert_clipped(params: list[Any], grads: list[Any], rtol: float) -> None:
    for p, g in zip(params, grads, strict=True):
        if g is not None:
            assert torch.allclose(p.grad.to_dense(), g.to_dense(), rtol=rtol, atol=0, equal_nan=True)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 3e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("max_norm", [1.0, 30, torch.tensor(2.5), 1e9, 0.0])
def test_clip_as_torch(dtype: Any, rtol: float, max_norm: Any) -> None:
    params = with_grads(dtype)
    params[2].grad = None
    before = [None if p.grad is None else p.grad.clone() for p in params]
    norm, expected, grads = clip_both(params, max_norm)
    assert norm > 100 and torch.allclose(norm, expected, rtol=rtol)
    assert_clipped(params, grads, rtol)
    changed = any(p.grad is not None and not torch.equal(p.grad, b) for p, b in zip(params, before, strict=True))
    assert changed == (float(max_norm) < 1e9)


def test_clip_keywords_and_order_are_torchs() -> None:
    params = with_grads()
    norm = gradstep.torch.clip_grad_norm_(parameters=params, max_norm=1.0, norm_type=2, error_if_nonfinite=True, foreach=False)
    assert norm > 100
    assert gradstep.torch.clip_grad_norm_(params, 1.0, 2.0, True, None) == pytest.approx(1.0, rel=1e-5)


def test_clip_a_generator_and_a_tensor() -> None:
    params = with_grads()
    listed = with_grads()
    norms = [gradstep.torch.clip_grad_norm_(p, 1.0) for p in ((q for q in params), listed)]
    assert torch.equal(*norms) and all(torch.equal(p.grad, q.grad) for p, q in zip(params, listed, strict=True))
    w = torch.nn.Parameter(torch.zeros(2))
    w.grad = torch.tensor([3.0, 4.0])
    assert gradstep.torch.clip_grad_norm_(w, 1.0) == 5
    assert torch.allclose(w.grad, torch.tensor([0.6, 0.8]))


@pytest.mark.parametrize("params", [[], "without"], ids=["no parameters", "no gradients"])
def test_clip_nothing(params: Any) -> None:
    params = tensors(SMALL) if params == "without" else params
    norm, expected, _ = clip_both(params, 1.0)
    assert torch.equal(norm, expected) and norm == 0


def test_clip_an_empty_generator_warns_as_torch_does() -> None:
    for module in (torch.nn.utils, gradstep.torch):
        with pytest.warns(UserWarning, match="empty generator"):
            module.clip_grad_norm_((p for p in []), 1.0)


@pytest.mark.parametrize("norm_type", [float("inf"), "inf", 1, 0, 3.5, "2"])
def test_clip_other_norms(norm_type: Any) -> None:
    params = with_grads(torch.float64)
    del params[3]  # torch's infinity norm of nothing is an error
    norm, expected, grads = clip_both(params, 1.5, norm_type)
    assert torch.allclose(norm, expected, rtol=1e-12)
    assert_clipped(params, grads, 1e-12)
    assert not torch.equal(params[0].grad, with_grads(torch.float64)[0].grad)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("norm_type", [2.0, 1.0])
def test_clip_what_is_not_finite(value: float, norm_type: float) -> None:
    params = with_grads()
    params[2].grad[7] = value
    texts = []
    for module in (torch.nn.utils, gradstep.torch):
        before = [p.grad.clone() for p in params]
        with pytest.raises(RuntimeError) as caught:
            module.clip_grad_norm_(params, 1.0, norm_type, error_if_nonfinite=True)
        texts.append(str(caught.value))
        assert all(torch.allclose(p.grad, b, equal_nan=True, rtol=0) for p, b in zip(params, before, strict=True))
    assert texts[0] == texts[1]
    norm, expected, grads = clip_both(params, 1.0, norm_type)
    assert torch.allclose(norm, expected, equal_nan=True)
    assert_clipped(params, grads, 0.0)


def test_clip_norms_beyond_float32() -> None:
    """Torch's norm of float32 gradients of 1e25 is infinite, and its gradients zero; ours is what it is."""
    params, plain = with_grads(scale=1e25), with_grads()
    norm = gradstep.torch.clip_grad_norm_(params, 1.0, error_if_nonfinite=True)
    assert norm == pytest.approx(1e25 * float(gradstep.torch.clip_grad_norm_(plain, 1.0)), rel=1e-6)
    for p, q in zip(params, plain, strict=True):
        assert torch.allclose(p.grad, q.grad, rtol=1e-5)


def test_clip_mixed_dtypes() -> None:
    params = with_grads()
    params[0].data, params[0].grad = params[0].data.double(), None
    params[0].grad = torch.ones(33, 7, dtype=torch.float64)
    norm, expected, grads = clip_both(params, 1.0)
    assert torch.allclose(norm, expected, rtol=1e-6)
    assert_clipped(params, grads, 3e-6)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("kind", ["half", "bfloat16", "transposed", "every second", "complex"])
def test_clip_other_gradients(kind: str) -> None:
    params = with_grads(torch.float64)
    w = torch.nn.Parameter(torch.ones(8, 6, dtype=torch.float64))
    values = torch.arange(48.0, dtype=torch.float64).reshape(8, 6) - 20
    if kind in ("half", "bfloat16"):
        dtype = getattr(torch, {"half": "float16", "bfloat16": "bfloat16"}[kind])
        w.data, w.grad = w.data.to(dtype), None
        w.grad = (values / 16).to(dtype)
        params = [w]
    elif kind == "complex":
        w = torch.nn.Parameter(torch.ones(8, 3, dtype=torch.complex128))
        w.grad = torch.view_as_complex(values.reshape(8, 3, 2)).clone()
        params = [w]
    else:
        w.grad = values.T.contiguous().T if kind == "transposed" else torch.cat([values, values], 1)[:, ::2]
        assert not w.grad.is_contiguous()
        params = [*params, w]
    norm, expected, grads = clip_both(params, 1.5)
    assert norm > 1.6 and torch.allclose(norm, expected, rtol=1e-12 if w.dtype.itemsize >= 8 else 0)
    assert_clipped(params, grads, 1e-12 if w.dtype.itemsize >= 8 else 0)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_clip_sparse_gradients_as_torch() -> None:
    outcomes = []
    for module in (torch.nn.utils, gradstep.torch):
        w = torch.nn.Parameter(torch.ones(8, 6))
        w.grad = torch.sparse_coo_tensor(torch.tensor([[1, 3]]), torch.full((2, 6), 9.0), (8, 6))
        w.grad = w.grad.coalesce()
        try:
            norm = module.clip_grad_norm_([w], 1.5, foreach=False)
            outcomes.append(torch.cat([norm.ravel(), w.grad.to_dense().ravel()]))
        except (RuntimeError, NotImplementedError) as error:
            outcomes.append((type(error), str(error).split("\n", maxsplit=1)[0]))
    assert type(outcomes[0]) is type(outcomes[1])
    assert torch.equal(*outcomes) if isinstance(outcomes[0], torch.Tensor) else outcomes[0] == outcomes[1]


def test_clip_tells_autograd() -> None:
    for max_norm, rises in ((1.0, True), (1e9, False)):
        params = with_grads()
        before = [p.grad._version for p in params]
        gradstep.torch.clip_grad_norm_(params, max_norm)
        after = [p.grad._version for p in params]
        assert [a > b for a, b, p in zip(after, before, params, strict=True) if p.numel()] == [rises] * 4
    w = torch.nn.Parameter(torch.ones(3))
    w.grad = torch.full((3,), 5.0, requires_grad=True)
    loss = (w.grad**2).sum()
    w.grad = w.grad.detach()
    gradstep.torch.clip_grad_norm_([w], 1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_clipping_and_the_option_agree() -> None:
    """Two sweeps or one: the same bits, but for the rounding of the clipped gradient."""
    for dtype, rtol in ((np.float32, 1e-5), (np.float64, 1e-13)):
        params, others = tensors(SMALL, dtype), tensors(SMALL, dtype)
        opt, other = gradstep.torch.SGD(params, lr=0.1, clip_norm=2.0), gradstep.torch.SGD(others, lr=0.1)
        for step in (1, 2):
            set_grads(params, step)
            set_grads(others, step)
            opt.step()
            gradstep.torch.clip_grad_norm_(others, 2.0)
            other.step()
        for p, q in zip(params, others, strict=True):
            assert torch.allclose(p, q, rtol=rtol, atol=rtol)


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


# ---- what a step that fails or is left out leaves behind --------------------------------------------------------------------


def sparse_step(opt: Any, table: Any, scaler: Any) -> None:
    scaler.scale(table(torch.tensor([1, 2])).sum()).backward()
    scaler.step(opt)
    scaler.update()


def test_sparse_gradients_with_a_scaler() -> None:
    tables = [torch.nn.Embedding.from_pretrained(torch.ones(5, 3), freeze=False, sparse=True) for _ in range(2)]
    for table, cls in zip(tables, (gradstep.torch.SGD, torch.optim.SGD), strict=True):
        opt, scaler = cls(table.parameters(), lr=0.5), torch.amp.GradScaler("cpu", init_scale=8.0)
        for _ in range(2):
            opt.zero_grad()
            sparse_step(opt, table, scaler)
    assert torch.equal(tables[0].weight, tables[1].weight)
    assert not torch.equal(tables[0].weight, torch.ones(5, 3))


def test_a_sparse_gradient_is_given_back_as_it_was() -> None:
    table = torch.nn.Embedding.from_pretrained(torch.ones(5, 3), freeze=False, sparse=True)
    table(torch.tensor([1])).sum().backward()
    grad = table.weight.grad
    opt = gradstep.torch.AdamW(table.parameters())
    with pytest.raises(RuntimeError, match="sparse"):
        opt.step(grad_scale=0.5)
    sgd = gradstep.torch.SGD(table.parameters(), lr=1.0)
    sgd.step(grad_scale=0.5)
    assert table.weight.grad is grad and torch.equal(grad.to_dense()[1], torch.ones(3))
    assert torch.equal(table.weight[1], torch.full((3,), 0.5)) and sgd.steps == 1


@pytest.mark.parametrize("wrong", ["clip_norm", "grads"])
def test_an_error_leaves_no_loss_scale_to_the_next_step(wrong: str) -> None:
    p = torch.nn.Parameter(torch.zeros(3))
    opt, scaler = gradstep.torch.SGD([p], lr=1.0), torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(p.sum()).backward()
    if wrong == "clip_norm":
        opt.clip_norm = -1.0
    with pytest.raises((TypeError, ValueError), match=wrong):
        scaler.step(opt, **({"grads": []} if wrong == "grads" else {}))
    opt.clip_norm = None
    p.grad = torch.ones(3)
    opt.step()
    assert (p == -1).all()


@pytest.mark.parametrize("how", ["skip", "raise"])
def test_a_step_that_is_left_out_raises_no_version(how: str) -> None:
    p = torch.nn.Parameter(torch.ones(3))
    opt = gradstep.torch.AdamW([p], on_nonfinite=how)
    loss = (p**2).sum()
    p.grad = torch.tensor([1.0, float("nan"), 1.0])
    with pytest.raises(FloatingPointError) if how == "raise" else contextlib.nullcontext():
        opt.step()
    assert p._version == 0
    p.grad = None
    loss.backward()
    assert torch.equal(p.grad, torch.full((3,), 2.0))


@pytest.mark.parametrize("name", ["clip_norm", "on_nonfinite", "zero_grad"])
def test_what_holds_for_all_groups_is_refused_in_one(name: str) -> None:
    p, q = torch.nn.Parameter(torch.ones(3)), np.ones(3, np.float32)
    p.grad = torch.ones(3)
    for opt, arguments in ((gradstep.torch.AdamW([p]), ()), (gradstep.AdamW([q]), ([np.ones(3, np.float32)],))):
        opt.param_groups[0][name] = 1.0
        with pytest.raises(TypeError, match=f"{name} holds for all groups"):
            opt.step(*arguments)
    assert (p == 1).all() and (q == 1).all()


def test_gradients_that_come_twice_are_clipped_as_torch_does() -> None:
    shared, lists = torch.ones(4), []
    for function in (gradstep.torch.clip_grad_norm_, torch.nn.utils.clip_grad_norm_):
        params = [torch.nn.Parameter(torch.ones(4)) for _ in range(2)]
        for param in params:
            param.grad = shared.clone() if param is params[0] else params[0].grad
        function(params, 1.0)
        lists.append(params[0].grad)
    assert torch.equal(*lists)
