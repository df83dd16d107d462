"""Offloaded optimizers: the bits of those that are not, whatever the rule, the options, the layout and the way it is cut."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

import gradstep
import gradstep.torch
from gradstep import _core
from gradstep.torch.offload import Offloaded, look

from .cases import CASES, NORM_CASES, Case
from .stage_cases import STAGES, case_of, gradient, step_arguments
from .torch_cases import ADAMW, make

SHAPES = [(33, 3), (4100,), (2, 3, 5, 5), (0, 3), (), (17, 400)]
SMALL = {"chunk_bytes": 9000, "buffers": 2}
"""Cuts the largest two of these in pieces, and packs the others."""

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}


def parameters(shapes: Any = SHAPES, dtype: str = "float32") -> list[Any]:
    rng = np.random.default_rng(7)
    return [torch.nn.Parameter(torch.from_numpy(rng.standard_normal(shape)).to(DTYPES[dtype])) for shape in shapes]


def copies(params: list[Any]) -> list[Any]:
    made = []
    for p in params:
        q = torch.empty_strided(p.shape, p.stride(), dtype=p.dtype)
        made.append(torch.nn.Parameter(q.copy_(p.detach())))
    return made


def set_grads(params: list[Any], step: int, *, nonfinite: bool = False, nones: bool = True) -> None:
    for i, p in enumerate(params):
        g = np.array(gradient(tuple(p.shape), np.float64, 100 * step + i))
        if nonfinite and g.size > 20:
            g.flat[step], g.flat[11], g.flat[13] = np.nan, np.inf, -np.inf
        p.grad = torch.from_numpy(g).to(p.dtype)
    if nones and len(params) > 4:
        if step == 2:
            params[1].grad = None
        if step == 1:
            params[4].grad = None


def same(ours: Any, theirs: Any) -> bool:
    if not isinstance(ours, torch.Tensor) or not isinstance(theirs, torch.Tensor):
        return type(ours) is type(theirs) and ours == theirs
    if ours.dtype != theirs.dtype or ours.shape != theirs.shape:
        return False
    return torch.equal(ours, theirs) or bool(((ours == theirs) | (ours.isnan() & theirs.isnan())).all())


def assert_same(params: list[Any], others: list[Any], opt: Any, other: Any) -> None:
    for i, (p, q) in enumerate(zip(params, others, strict=True)):
        assert same(p.detach(), q.detach()), f"parameter {i}"
        assert (p in opt.state) == (q in other.state), i
        ours, theirs = opt.state.get(p, {}), other.state.get(q, {})
        assert list(ours) == list(theirs), i
        for name in ours:
            assert same(ours[name], theirs[name]), f"{name} of {i}"
        assert (p.grad is None) == (q.grad is None) and (p.grad is None or same(p.grad, q.grad)), f"gradient {i}"


def both(
    case: Case, options: dict[str, Any], dtype: str = "float32", shapes: Any = SHAPES, **how: Any
) -> tuple[Any, list[Any], Any, list[Any]]:
    """An offloaded optimizer with its parameters, and one that is not."""
    params = parameters(shapes, dtype)
    others = copies(params)
    if dtype in ("bfloat16", "float16"):
        options = {"precision": "master", **options}
    return gradstep.torch.offload(make(case, params, options), **{**SMALL, **how}), params, make(case, others, options), others


def check(case: Case, options: dict[str, Any], dtype: str = "float32", steps: int = 5, **how: Any) -> None:
    of_constructor, scale, _ = step_arguments(options)
    opt, params, other, others = both(case, of_constructor, dtype, **how)
    for step in range(1, steps + 1):
        for each in (params, others):
            set_grads(each, step, nonfinite=options.get("on_nonfinite") == "zero")
        opt.step(grad_scale=scale)
        other.step(grad_scale=scale)
        assert_same(params, others, opt, other)
    assert opt.steps == other.steps == steps


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", [*CASES, *NORM_CASES], ids=lambda case: case.name)
def test_every_rule(case: Case, dtype: str) -> None:
    check(case, {}, dtype)


@pytest.mark.parametrize("dtype", ["float64", "float16"])
@pytest.mark.parametrize("name", ["adamw", "sgd_momentum", "novograd"])
def test_other_dtypes(name: str, dtype: str) -> None:
    check(case_of(name), {}, dtype)


OPTIONS = [name for name in STAGES if name != "sources"]


@pytest.mark.parametrize("stage", OPTIONS)
def test_every_option(stage: str) -> None:
    """Alone, it has the same bits, scaled by `clip_norm` as well: then a gradient is multiplied once."""
    check(ADAMW, STAGES[stage])


MANY: dict[str, dict[str, Any]] = {
    "usual": {"clip_norm": 3.0, "ema_decay": 0.9, "l1": 5.0, "swa": (0, 1), "zero_grad": True, "lookahead": (2, 0.4)},
    "by element": {"on_nonfinite": "zero", "clip_value": 0.7, "l1": 3.0, "bounds": (-1, 1), "swa": (1, 2), "ema_decay": 0.5},
    "by row": {"agc": 2.0, "centralize": True, "group_lasso": 9.0, "max_norm": 1.5},
    "clipped, zeroed": {"clip_norm": 3.0, "on_nonfinite": "zero"},
    "clipped, with noise": {"clip_norm": 3.0, "noise": 0.1, "seed": 5},
    "clipped, skipping": {"clip_norm": 1e-3, "on_nonfinite": "skip"},
    "by tensor": {"clip_norm_per_tensor": 4.0, "cautious": True, "trust_ratio": True},
    "maximize, clipped": {"clip_norm": 3.0, "maximize": True},
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("which", MANY)
def test_several_options(which: str, dtype: str) -> None:
    check(ADAMW, MANY[which], dtype)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("state_dtype", ["q8", "q4", "bfloat16", "float64", {"exp_avg": "q4"}], ids=str)
@pytest.mark.parametrize("precision", ["nearest", "stochastic", "kahan", "master", "split"])
def test_formats(precision: str, state_dtype: Any, rounding: str) -> None:
    check(ADAMW, {"precision": precision, "state_dtype": state_dtype, "state_rounding": rounding}, "bfloat16", steps=3)


@pytest.mark.parametrize("buffers", [1, 2, 3, 9])
@pytest.mark.parametrize("chunk_bytes", [1, 4096, 10_000, 1 << 30])
def test_however_it_is_cut(chunk_bytes: int, buffers: int) -> None:
    check(ADAMW, {"clip_norm": 3.0, "swa": (0, 1)}, chunk_bytes=chunk_bytes, buffers=buffers)
    check(ADAMW, {"state_dtype": "q4"}, "bfloat16", chunk_bytes=chunk_bytes, buffers=buffers)


@pytest.mark.parametrize("state_dtype", [None, "q8"])
@pytest.mark.parametrize("name", ["adamw", "lamb", "rmsprop_centered"])
def test_layouts(name: str, state_dtype: Any) -> None:
    """Parameters with other strides, with gaps, and gradients that are laid out otherwise."""
    if name == "rmsprop_centered" and state_dtype:
        pytest.skip("refused")

    def made() -> list[Any]:
        torch.manual_seed(5)
        flipped = torch.randn(70, 90).t()
        channels_last = torch.randn(8, 16, 6, 6).contiguous(memory_format=torch.channels_last)
        gaps = torch.randn(60, 200)[:, ::2]
        return [torch.nn.Parameter(each) for each in (flipped, channels_last, gaps, torch.randn(5000))]

    params, others = made(), made()
    options = {"state_dtype": state_dtype, "clip_norm": 2.0} if state_dtype else {"clip_norm": 2.0}
    opt = gradstep.torch.offload(make(case_of(name), params, options), **SMALL)
    other = make(case_of(name), others, options)
    for step in range(3):
        for i, (p, q) in enumerate(zip(params, others, strict=True)):
            g = torch.randn(p.shape) if (step + i) % 2 else torch.randn(p.shape[::-1]).permute(*reversed(range(p.ndim)))
            p.grad, q.grad = g, g.clone(memory_format=torch.preserve_format)
        opt.step()
        other.step()
        assert_same(params, others, opt, other)
        assert [p.stride() for p in params] == [q.stride() for q in others]


def test_complex_parameters() -> None:
    def made() -> list[Any]:
        torch.manual_seed(2)
        return [torch.nn.Parameter(torch.randn(n, dtype=torch.complex64)) for n in (5, 3000)]

    params, others = made(), made()
    opt, other = (
        gradstep.torch.offload(make(ADAMW, params, {"clip_norm": 1.0}), **SMALL),
        make(ADAMW, others, {"clip_norm": 1.0}),
    )
    for _ in range(3):
        for p, q in zip(params, others, strict=True):
            g = torch.randn_like(p.detach())
            p.grad, q.grad = g.conj(), g.conj().resolve_conj()
        opt.step()
        other.step()
        assert_same(params, others, opt, other)


def test_groups_of_mixed_dtypes() -> None:
    def made() -> tuple[list[Any], list[dict[str, Any]]]:
        params = [*parameters(dtype="bfloat16")[:3], *parameters(dtype="float32")[4:], *parameters([(3000,)], "float64")]
        groups: list[dict[str, Any]] = [
            {"params": params[:2], "precision": "split"},
            {"params": params[2:5], "lr": 0.3, "max_norm": 1.0, "precision": "master"},
            {"params": params[5:], "weight_decay": 0.0},
        ]
        return params, groups

    (params, groups), (others, other_groups) = made(), made()
    opt = gradstep.torch.offload(gradstep.torch.AdamW(groups, clip_norm=0.5), **SMALL)
    other = gradstep.torch.AdamW(other_groups, clip_norm=0.5)
    for step in (1, 2, 3):
        set_grads(params, step)
        set_grads(others, step)
        opt.step()
        other.step()
        assert_same(params, others, opt, other)


def test_halves_get_masters_unless_told_otherwise() -> None:
    params = [*parameters([(5,)], "bfloat16"), *parameters([(5,)])]
    opt = gradstep.torch.offload(gradstep.torch.AdamW([{"params": params[:1]}, {"params": params[1:]}]))
    assert [group.get("precision") for group in opt.param_groups] == ["master", None]
    set_grads(params, 1)
    opt.step()
    assert opt.state[params[0]]["master"].dtype == torch.float32 and "master" not in opt.state[params[1]]
    params = parameters([(5,)], "bfloat16")
    opt = gradstep.torch.offload(gradstep.torch.AdamW(params, precision="nearest"))
    set_grads(params, 1)
    opt.step()
    assert opt.param_groups[0]["precision"] == "nearest" and "master" not in opt.state[params[0]]


def test_frozen_and_empty() -> None:
    params = parameters([(40,), (0,), (5000,)])
    params[0].requires_grad_(False)
    before = [p.detach().clone() for p in params]
    opt = gradstep.torch.offload(gradstep.torch.AdamW(params), **SMALL)
    opt.step()
    assert opt.steps == 1 and not opt.state
    params[1].grad, params[2].grad = torch.zeros(0), torch.ones(5000)
    opt.step()
    assert torch.equal(params[0], before[0]) and not torch.equal(params[2], before[2])
    assert set(opt.state) == set(params[1:]) and opt.state[params[1]]["step"] == 1


def test_tied_weights() -> None:
    """A parameter that a model uses twice is one parameter."""
    torch.manual_seed(0)
    losses = []
    for off in (True, False):
        torch.manual_seed(1)
        table, last = torch.nn.Embedding(50, 8), torch.nn.Linear(8, 50, bias=False)
        last.weight = table.weight
        model = torch.nn.Sequential(table, last)
        opt: Any = gradstep.torch.AdamW(model.parameters(), lr=0.1)
        opt = gradstep.torch.offload(opt, chunk_bytes=1) if off else opt
        for _ in range(4):
            opt.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(torch.arange(50)), torch.arange(50).flip(0))
            loss.backward()
            opt.step()
        losses.append(loss.item())
    assert losses[0] == losses[1]


# ---- what is written by hand ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_parameters_written_by_hand(dtype: str) -> None:
    """A step goes on from what was written, as it does without offloading; a master is kept where that is what it rounds to."""
    opt, params, other, others = both(ADAMW, {"lookahead": (2, 0.5)}, dtype)
    for step in range(1, 5):
        for each in (params, others):
            set_grads(each, step)
            with torch.no_grad():
                if step == 2:
                    each[0].mul_(2)
                if step == 3:
                    each[5].data = each[5].data.clone() * 3
                if step == 4:
                    each[1][7] = 0.25
        opt.step()
        other.step()
        assert_same(params, others, opt, other)


def test_a_model_that_loads_a_state_dict() -> None:
    torch.manual_seed(3)
    model = torch.nn.Linear(20, 30)
    kept = copy.deepcopy(model.state_dict())
    opt = gradstep.torch.offload(gradstep.torch.SGD(model.parameters(), lr=0.5))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    opt.step()
    model.load_state_dict(kept)
    opt.step()
    assert torch.equal(model.weight, kept["weight"] - 0.5)


def test_what_torch_keeps_no_count_of() -> None:
    params = parameters([(5,)])
    opt = gradstep.torch.offload(gradstep.torch.SGD(params, lr=0.5))
    params[0].data.fill_(3.0)
    opt.pull()
    params[0].grad = torch.ones(5)
    opt.step()
    assert (params[0] == 2.5).all()


def test_autograd_notices_the_step() -> None:
    p = torch.nn.Parameter(torch.ones(4))
    opt = gradstep.torch.offload(gradstep.torch.SGD([p], lr=0.1))
    loss = (p**2).sum()
    p.grad = torch.ones(4)
    opt.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ---- as torch's optimizers ------------------------------------------------------------------------------------------------


def test_it_is_an_optimizer() -> None:
    params = parameters([(5,), (6,)])
    given = gradstep.torch.AdamW(params, lr=0.25)
    opt = gradstep.torch.offload(given)
    assert isinstance(opt, torch.optim.Optimizer) and isinstance(opt, Offloaded)
    assert opt.param_groups[0] is given.param_groups[0]
    assert all(p is q for p, q in zip(opt.param_groups[0]["params"], params, strict=True))
    assert repr(opt).startswith("Offloaded AdamW (\nParameter Group 0\n    amsgrad: False\n") and "lr: 0.25" in repr(opt)
    set_grads(params, 1)
    opt.zero_grad()
    assert all(p.grad is None for p in params)


@pytest.mark.parametrize("before", [True, False])
def test_schedulers(before: bool) -> None:
    """Made with the optimizer that was given, too: the groups are the same."""
    params = parameters()
    others = copies(params)
    given, other = gradstep.torch.AdamW(params, lr=0.1), gradstep.torch.AdamW(others, lr=0.1)
    schedulers = [torch.optim.lr_scheduler.LambdaLR(other, lambda t: 0.5**t)]
    if before:
        schedulers.append(torch.optim.lr_scheduler.LambdaLR(given, lambda t: 0.5**t))
    opt = gradstep.torch.offload(given, **SMALL)
    if not before:
        schedulers.append(torch.optim.lr_scheduler.LambdaLR(opt, lambda t: 0.5**t))
    for step in range(1, 4):
        set_grads(params, step)
        set_grads(others, step)
        opt.step()
        other.step()
        if before and step == 1:
            with pytest.warns(UserWarning, match="lr_scheduler.step"):  # of the one that is not stepped
                schedulers[1].step()
            schedulers[0].step()
        else:
            for scheduler in schedulers:
                scheduler.step()
        assert opt.param_groups[0]["lr"] == 0.1 * 0.5**step
        assert_same(params, others, opt, other)


def test_settings_are_live() -> None:
    opt, params, other, others = both(ADAMW, {})
    for step in range(1, 5):
        for o, each in ((opt, params), (other, others)):
            set_grads(each, step)
            o.param_groups[0]["betas"] = (0.5 + step / 10, 0.9)
            if step == 3:
                o.param_groups[0]["max_norm"] = 1.0
                o.clip_norm = 0.5
            o.step()
        assert_same(params, others, opt, other)


def test_closures_and_hooks() -> None:
    params = parameters([(5,)])
    given = gradstep.torch.SGD(params, lr=0.5)
    seen: list[Any] = []
    given.register_step_pre_hook(lambda o, args, kwargs: seen.append(("before, registered early", o)))
    opt = gradstep.torch.offload(given)
    opt.register_step_post_hook(lambda o, args, kwargs: seen.append(("after", o)))

    def closure() -> Any:
        opt.zero_grad()
        loss = (params[0] ** 2).sum()
        loss.backward()
        seen.append("closure")
        return loss

    before = params[0].detach().clone()
    loss = opt.step(closure)
    assert loss.item() == pytest.approx(float((before**2).sum())) and torch.allclose(params[0], torch.zeros(5))
    assert seen == [("before, registered early", opt), "closure", ("after", opt)]
    loss, stats = opt.step(closure, stats=True)
    assert loss.item() == 0 and stats.grad_norm == 0 and stats.step == 2


def test_add_param_group() -> None:
    params = parameters([(5000,), (33, 7), (12,)])
    others = copies(params)
    opt = gradstep.torch.offload(gradstep.torch.AdamW(params[:1], lr=0.1, ema_decay=0.5), **SMALL)
    other = gradstep.torch.AdamW(others[:1], lr=0.1, ema_decay=0.5)
    for step in (1, 2, 3):
        if step == 2:
            opt.add_param_group({"params": params[1:], "lr": 0.01, "max_norm": 1.0})
            other.add_param_group({"params": others[1:], "lr": 0.01, "max_norm": 1.0})
        set_grads(params, step)
        set_grads(others, step)
        opt.step()
        other.step()
        assert_same(params, others, opt, other)
    half = parameters([(5,)], "bfloat16")
    opt.add_param_group({"params": half})
    assert opt.param_groups[2]["precision"] == "master"


def test_what_was_stepped_before_goes_on() -> None:
    opt, params = make(ADAMW, parameters(), {"ema_decay": 0.9}), None
    params = opt.param_groups[0]["params"]
    others = copies(params)
    other = make(ADAMW, others, {"ema_decay": 0.9})
    for step in range(1, 5):
        set_grads(params, step)
        set_grads(others, step)
        opt.step()
        other.step()
        if step == 2:
            opt = gradstep.torch.offload(opt, **SMALL)
        assert_same(params, others, opt, other)
    assert opt.steps == 4


# ---- clipping, skipping, scaling ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_are_those_of_the_engine(dtype: str) -> None:
    torch.manual_seed(4)
    sizes = (0, 1, 31, 33, 1000, 1024, 1025, 16383, 16384, 16385, 100_003, 4_194_304, 4_194_305, 9_000_017)
    grads = {i: (3 * torch.randn(n)).to(DTYPES[dtype]) for i, n in enumerate(sizes)}
    found = look(grads, wide=set(grads) if dtype == "float64" else set())
    assert [each.squares for each in found.values()] == [_core.sum_of_squares([g], "test", "grads") for g in grads.values()]


def test_norms_of_scaled_gradients() -> None:
    """Each element is rounded to float32 first, as the engine scales it; those that are then not finite count as such."""
    torch.manual_seed(4)
    g = torch.randn(50_000)
    (found,) = look({3: g}, wide=set(), scale=0.3).values()
    assert found.squares == _core.sum_of_squares([g * np.float32(0.3)], "test", "grads") and found.is_finite
    (wide,) = look({3: g}, wide={3}, scale=0.3).values()
    assert wide.squares == _core.sum_of_squares([g.double() * 0.3], "test", "grads") != found.squares
    g[7] = 3e38
    assert look({0: g}, wide=set())[0].is_finite and not look({0: g}, wide=set(), scale=2.0)[0].is_finite
    assert look({0: g}, wide=set(), scale=2.0, drops=True)[0].squares < 1e6
    wide_one = torch.full((5,), 1e200, dtype=torch.float64)  # its square is not finite
    assert look({0: wide_one}, wide={0})[0].is_finite


@pytest.mark.parametrize("name", ["lars", "novograd", "adamw"])
def test_clipping_beside_other_factors(name: str) -> None:
    """Where the gradient is multiplied twice without offloading, and once with: to the last digits."""
    options = {"clip_norm": 0.5, "centralize": True} if name == "adamw" else {"clip_norm": 0.5}
    opt, params, other, others = both(case_of(name), options, "float64")
    for step in range(1, 4):
        set_grads(params, step)
        set_grads(others, step)
        opt.step(grad_scale=0.3)
        other.step(grad_scale=0.3)
    for p, q in zip(params, others, strict=True):
        assert torch.allclose(p, q, rtol=1e-12, atol=1e-13)
    assert not torch.equal(params[0], parameters(dtype="float64")[0])


@pytest.mark.parametrize("where", [0, 5])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("how", ["propagate", "zero", "skip", "raise"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_gradients_that_are_not_finite(how: str, value: float, where: int, dtype: str) -> None:
    opt, params, other, others = both(ADAMW, {"on_nonfinite": how, "clip_norm": 1.0, "zero_grad": True}, dtype)
    for step in range(1, 4):
        for o, each in ((opt, params), (other, others)):
            set_grads(each, step)
            if step == 2:
                each[where].grad.view(-1)[3] = value
            if how == "raise" and step == 2:
                with pytest.raises(
                    FloatingPointError, match=rf"^AdamW.step: params\[{where}\].grad has an element that is not"
                ):
                    o.step()
            else:
                o.step()
        assert_same(params, others, opt, other)
        assert opt.steps == other.steps == step - (step >= 2 and how in ("skip", "raise"))


def test_a_step_left_out_first_makes_no_states() -> None:
    opt, params, _, _ = both(ADAMW, {"on_nonfinite": "skip"})
    set_grads(params, 1)
    params[5].grad[3, 3] = torch.nan
    before = [p.detach().clone() for p in params]
    opt.step()
    assert not opt.state and opt.steps == 0 and all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
    set_grads(params, 2)
    opt.step()
    assert len(opt.state) == len(params) - 1 and opt.steps == 1


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("clip_norm", [None, 0.5])
def test_scaler(clip_norm: float | None, unscale: bool) -> None:
    """The bits of the optimizer that is not offloaded, also clipped: the scale is a power of two."""
    pairs = both(ADAMW, {"clip_norm": clip_norm})
    scales = []
    for opt, params in (pairs[:2], pairs[2:]):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
        for step in range(1, 7):
            opt.zero_grad()
            loss = sum(
                (p * torch.from_numpy(np.array(gradient(tuple(p.shape), np.float32, 100 * step + i)))).sum()
                for i, p in enumerate(params)
            )
            scaler.scale(loss * (float("inf") if step in (1, 4) else 1)).backward()
            if unscale:
                scaler.unscale_(opt)
            before = params[0].detach().clone()
            assert scaler.step(opt) is None
            assert torch.equal(before, params[0]) == (step in (1, 4))
            scaler.update()
        assert not {"grad_scale", "found_inf"} & vars(opt).keys()
        scales.append(scaler.get_scale())
    assert scales[0] == scales[1] and pairs[0].steps == pairs[2].steps == 4
    assert_same(pairs[1], pairs[3], pairs[0], pairs[2])


@pytest.mark.parametrize("stats", [False, True])
def test_what_a_scaler_leaves(stats: bool) -> None:
    """`grad_scale` and `found_inf` as attributes, as a GradScaler on a device leaves them."""
    opt, params, other, others = both(ADAMW, {"zero_grad": True})
    for step, found in ((1, 1.0), (2, 0.0), (3, 0.0)):
        for o, each in ((opt, params), (other, others)):
            set_grads(each, step)
            o.grad_scale, o.found_inf = torch.tensor(8.0), torch.tensor(found)
            seen = o.step(stats=stats)
            assert seen.skipped == bool(found) if stats else seen is None
            del o.grad_scale, o.found_inf
        assert_same(params, others, opt, other)
    assert opt.steps == other.steps == 2


def test_an_error_leaves_no_loss_scale_to_the_next_step() -> None:
    opt, params, _, _ = both(ADAMW, {})
    set_grads(params, 1)
    opt.grad_scale, opt.found_inf = torch.tensor(8.0), torch.tensor(0.0)
    opt.clip_norm = -1.0
    with pytest.raises(ValueError, match=r"^AdamW: clip_norm must be >= 0 and finite, got -1.0$"):
        opt.step()
    assert not {"grad_scale", "found_inf"} & vars(opt).keys()


@pytest.mark.parametrize(
    "options",
    [{}, {"clip_norm": 0.5}, {"clip_norm_per_tensor": 1.0}, {"on_nonfinite": "zero", "clip_norm": 2.0}, {"centralize": True}],
    ids=str,
)
def test_statistics(options: dict[str, Any]) -> None:
    """Of tensors that are not cut the same, of others to the last digits."""
    opt, params, other, others = both(ADAMW, options)
    for step in range(1, 4):
        nonfinite = options.get("on_nonfinite") == "zero"
        set_grads(params, step, nonfinite=nonfinite)
        set_grads(others, step, nonfinite=nonfinite)
        ours, theirs = opt.step(stats=True), other.step(stats=True)
        assert (ours.step, ours.size, ours.skipped) == (theirs.step, theirs.size, theirs.skipped)
        assert list(ours.parameters) == list(theirs.parameters)
        for a, b in ((ours, theirs), *((ours.parameters[i], theirs.parameters[i]) for i in ours.parameters)):
            for name in ("grad_max", "grad_nans", "grad_infs", "grad_zeros", "size", "skipped"):
                assert getattr(a, name) == pytest.approx(getattr(b, name), rel=0, abs=0, nan_ok=True), name
            for name in ("grad_norm", "grad_norm_clipped", "update_norm", "param_norm", "clip_factor"):
                assert getattr(a, name) == pytest.approx(getattr(b, name), rel=1e-6, nan_ok=True), name
        assert_same(params, others, opt, other)
    assert all(ours.parameters[i] == theirs.parameters[i] for i in (0, 2, 3, 4)) or "centralize" in options or nonfinite


def test_statistics_of_a_step_left_out() -> None:
    opt, params, other, others = both(ADAMW, {"on_nonfinite": "skip", "clip_norm": 1.0})
    set_grads(params, 3)
    set_grads(others, 3)
    for each in (params, others):
        each[2].grad[0, 0, 0, 0] = torch.inf
    ours, theirs = opt.step(stats=True), other.step(stats=True)
    assert ours.skipped and (ours.step, ours.grad_norm, ours.grad_infs) == (1, float("inf"), 1)
    assert ours == theirs or dict(ours.parameters) == dict(theirs.parameters)
    assert ours.update_norm == theirs.update_norm == 0 and ours.param_norm == theirs.param_norm


# ---- averages -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("options", [{"ema_decay": 0.5}, {"swa": (0, 1)}], ids=str)
def test_averages(options: dict[str, Any], dtype: str) -> None:
    opt, params, other, others = both(ADAMW, options, dtype)
    with pytest.raises(RuntimeError, match="there are no averages yet"), opt.averaged():
        pass
    for step in range(1, 6):
        set_grads(params, step)
        set_grads(others, step)
        opt.step()
        other.step()
        with opt.averaged(), other.averaged():
            assert torch.is_grad_enabled()
            assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))
        assert_same(params, others, opt, other)
    assert all(same(a, b) for a, b in zip(opt.ema, other.ema, strict=True))
    assert all(same(a, b) for a, b in zip(opt.swa, other.swa, strict=True))
    with pytest.raises(ZeroDivisionError), opt.averaged():
        raise ZeroDivisionError
    assert_same(params, others, opt, other)


def test_swap_ema() -> None:
    opt, params, other, others = both(ADAMW, {"ema_decay": 0.5})
    for step in range(1, 5):
        set_grads(params, step)
        set_grads(others, step)
        opt.step()
        other.step()
        opt.swap_ema()
        other.swap_ema()
        assert_same(params, others, opt, other)


# ---- states ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"precision": "split", "state_dtype": "q8"}, {"ema_decay": 0.5, "swa": (0, 1)}], ids=str
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("way", ["to plain", "from plain", "to offloaded"])
def test_state_dicts(way: str, dtype: str, options: dict[str, Any]) -> None:
    opt, params, other, others = both(ADAMW, options, dtype)
    for step in (1, 2):
        set_grads(params, step)
        set_grads(others, step)
        opt.step()
        other.step()
    source, target = (other, opt) if way == "from plain" else (opt, other)
    theirs = others if way == "from plain" else params
    fresh = copies(theirs)
    made: Any = make(ADAMW, fresh, {} if way == "to plain" else options)
    if way != "to plain":
        made = gradstep.torch.offload(made, chunk_bytes=4096)
    made.load_state_dict(copy.deepcopy(source.state_dict()))
    keep = target if way != "to offloaded" else other
    keep_params = params if keep is opt else others
    for step in (3, 4):
        for o, each in ((made, fresh), (keep, keep_params)):
            set_grads(each, step)
            o.step()
    assert_same(fresh, keep_params, made, keep)
    assert all(
        value.device.type == "cpu" for state in made.state.values() for value in state.values() if hasattr(value, "device")
    )


def test_hooks_of_state_dicts() -> None:
    opt, params, _, _ = both(ADAMW, {})
    set_grads(params, 2)
    opt.step()
    seen: list[Any] = []
    opt.register_state_dict_post_hook(lambda o, d: seen.append(("saved", o)))
    opt.register_load_state_dict_pre_hook(lambda o, d: seen.append(("before", o)))
    opt.register_load_state_dict_post_hook(lambda o: seen.append(("after", o)))
    opt.load_state_dict(opt.state_dict())
    assert seen == [("saved", opt), ("before", opt), ("after", opt)]


def test_checkpoints(tmp_path: Any) -> None:
    opt, params, other, others = both(ADAMW, {"clip_norm": 0.5, "ema_decay": 0.9}, "bfloat16")
    for step in (1, 2):
        set_grads(params, step)
        set_grads(others, step)
        opt.step()
        other.step()
    opt.save(tmp_path / "ours")
    other.save(tmp_path / "theirs")
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    fresh = copies(params)
    made = gradstep.torch.offload(gradstep.torch.AdamW.load(tmp_path / "ours", fresh), **SMALL)
    assert made.steps == 2 and made.clip_norm == 0.5
    for o, each in ((made, fresh), (other, others)):
        set_grads(each, 3)
        o.step()
    assert_same(fresh, others, made, other)
