"""LAMB, LARS, NovoGrad, whose factors follow from norms of whole tensors: bits of the reference, the papers' and others' values."""

from __future__ import annotations

import copy
import itertools
import pickle
from typing import Any

import numpy as np
import pytest

import gradstep
from gradstep import config

from .cases import NORM_CASES, Case, gradients, parameters
from .child import run_in_child
from .stage_cases import MANY, SHAPES, STAGES, case_of, check, expect, make_grads, make_optimizer, make_params, settings_of
from .stage_references import Stepper
from .test_skip import digest
from .test_values import assert_same_bits

LARGE = [(130, 1030), (1, 20_000), (70_001,), (5470, 3)]  # several leaves, blocks and chunks
SIZES = [(size,) for size in (1, 31, 33, 1023, 1024, 1025, 16_384, 16_385)]
DTYPES = (np.float32, np.float64)
THE_THREE = [case for case in NORM_CASES if case.name in ("lamb", "lars", "novograd")]

norm_cases = pytest.mark.parametrize("case", NORM_CASES, ids=lambda case: case.name)
the_three = pytest.mark.parametrize("case", THE_THREE, ids=lambda case: case.name)


def same(ours: Any, theirs: Any, what: str) -> None:
    assert_same_bits(np.asarray(ours), theirs, what)


def lists_of(case: Case, shapes: list[Any], dtype: Any) -> dict[str, list[Any]]:
    """States of all arrays, as the functions take them; what a number begins as does not matter."""
    arrays = {name: [np.zeros(shape, dtype) for shape in shapes] for name in case.states}
    return arrays | {name: [np.full(1, 7.0) for _ in shapes] for name in case.numbers}


# ---- bits -----------------------------------------------------------------------------------------------------------------


@norm_cases
def test_same_bits_as_numpy(case: Case, isa: str) -> None:
    for dtype, shapes in itertools.product(DTYPES, (SHAPES, SIZES)):
        check(expect(case, dtype, {}, shapes, steps=3), case, dtype, {}, shapes, same=same)


@norm_cases
def test_same_bits_on_any_number_of_threads(case: Case) -> None:
    dtype = DTYPES[NORM_CASES.index(case) % 2]
    expected = expect(case, dtype, {}, LARGE, steps=2)
    for isa, threads in [(config.isas()[0], 2), *((config.isas()[-1], threads) for threads in (1, 2, 3, 7))]:
        config.set_isa(isa)
        config.set_num_threads(threads)
        check(expected, case, dtype, {}, LARGE, what=f"{isa}, {threads} threads", same=same)


@the_three
@pytest.mark.parametrize("name", [*STAGES, *MANY])
def test_stages_around_them(case: Case, name: str) -> None:
    options = STAGES.get(name) or MANY[name]
    for dtype in DTYPES:
        expected = expect(case, dtype, options, steps=3)
        for isa in config.isas():
            config.set_isa(isa)
            check(expected, case, dtype, options, what=f"{name}, {isa}", same=same)


@pytest.mark.parametrize("name", ["lamb that does not adapt", "lamb that adapts for its decay", "lamb with decay beside"])
@pytest.mark.parametrize("decay_mode", ["coupled", "decoupled", "independent"])
def test_forms_of_lamb_with_other_decays(name: str, decay_mode: str, isa: str) -> None:
    """Apex: `always_adapt=False` and a clipped norm; Keras: the decay beside."""
    options = {"clip_norm": 1.0, "decay_mode": decay_mode}
    check(expect(case_of(name), np.float32, options), case_of(name), np.float32, options, same=same)


@norm_cases
def test_functions_give_the_bits_of_the_classes(case: Case, isa: str) -> None:
    """Each array at a step of its own, NovoGrad's numbers in both forms of an array of one number."""
    shapes = [(33, 3), (1030,), (2, 3, 5, 5), (), (17, 40)]
    for dtype in DTYPES:
        params, lists = make_params(shapes, dtype), lists_of(case, shapes, dtype)
        for name in case.numbers:
            lists[name][2:] = [np.array(7.0) for _ in shapes[2:]]
        others = make_params(shapes, dtype)
        opt = make_optimizer(case, others, {})
        counts = [0] * len(shapes)
        for step in (1, 2, 3):
            grads = [np.array(gradients(shape, dtype, 50 * step + i)) for i, shape in enumerate(shapes)]
            here = [i for i in range(len(shapes)) if i + 1 != step]  # one array sits out, another each time
            counts = [count + (i in here) for i, count in enumerate(counts)]
            states = {name: [arrays[i] for i in here] for name, arrays in lists.items()}
            steps = [counts[i] for i in here]
            case.function([params[i] for i in here], [grads[i] for i in here], **states, step=steps, **settings_of(case))
            opt.step([g if i in here else None for i, g in enumerate(grads)])
        assert len(set(counts)) == 2
        for i, (p, q) in enumerate(zip(params, others, strict=True)):
            assert_same_bits(p, q, f"parameter {i}")
            for name in (*case.states, *case.numbers):
                same(np.ravel(lists[name][i]), np.ravel(opt.state[i][name]), f"{name} {i}")


@pytest.mark.parametrize("name", ["lars", "lars_nesterov", "novograd"])
def test_what_memory_held_before_the_first_step_does_not_matter(name: str, isa: str) -> None:
    case, results = case_of(name), []
    for value in (0.0, 7.0, np.inf, np.nan):
        p, states = parameters((40,), np.float32), {name: np.zeros(40, np.float32) for name in case.states}
        states |= {"momentum_buffer": np.full(40, value, np.float32)} if "lars" in name else {"grad_norm_sq": np.full(1, value)}
        case.function(p, gradients((40,), np.float32, 1), **states, step=1, **settings_of(case))
        results.append(digest([p, states]))
    assert len(set(results)) == 1


def test_one_array_or_a_list_of_one(isa: str) -> None:
    for case in NORM_CASES:
        results = []
        for form in (lambda a: a, lambda a: [a]):
            p, states = parameters((40,), np.float32), lists_of(case, [(40,)], np.float32)
            for step in (1, 2):
                given = {name: form(arrays[0]) for name, arrays in states.items()}
                case.function(form(p), form(gradients((40,), np.float32, step)), **given, step=step, **settings_of(case))
            results.append(digest([p, states]))
        assert results[0] == results[1], case.name


@norm_cases
def test_zero_parameters_and_zero_gradients(case: Case, isa: str) -> None:
    """Where a norm is 0 a ratio is 1; later steps follow from the states."""
    for dtype, zero_param, zero_grads in itertools.product(DTYPES, (True, False), ((), (1,), (1, 2), (2,))):
        p = np.zeros((7, 30), dtype) if zero_param else parameters((7, 30), dtype)
        reference = Stepper(case.reference, case.start, [p], settings_of(case))
        opt = make_optimizer(case, [p], {})
        for step in (1, 2, 3):
            g = np.zeros((7, 30), dtype) if step in zero_grads else gradients((7, 30), dtype, step)
            opt.step([g])
            reference.step([(1.0, [g])])
            assert np.isfinite(p).all()
            assert_same_bits(p, reference.params[0], f"step {step}, zero parameter {zero_param}, zero gradients {zero_grads}")


@the_three
def test_gradients_that_are_not_finite_pass_through(case: Case, isa: str) -> None:
    """By the formulas as they stand, at this step and later ones."""

    def same_or_nan(ours: Any, theirs: Any, what: str) -> None:
        ours, theirs = np.atleast_1d(ours), np.atleast_1d(theirs)
        assert np.array_equal(np.isnan(ours), np.isnan(theirs)), what
        assert_same_bits(np.nan_to_num(ours, nan=7.0), np.nan_to_num(theirs, nan=7.0), what)

    for dtype, value in itertools.product(DTYPES, (np.nan, np.inf)):
        p = parameters((7, 30), dtype)
        reference = Stepper(case.reference, case.start, [p], settings_of(case))
        opt = make_optimizer(case, [p], {})
        for step in (1, 2, 3):
            g = gradients((7, 30), dtype, step)
            g[1, 1] = value if step == 2 else 0.5
            opt.step([g])
            reference.step([(1.0, [g])])
            same_or_nan(p, reference.params[0], f"parameter at step {step}")
            for name in (*case.states, *case.numbers):
                same_or_nan(opt.state[0][name], reference.state[0][name], f"{name} at step {step}")


def test_norms_beyond_float32(isa: str) -> None:
    """Gradients of 1e25 have squares beyond float32; neither of the rules minds their size."""
    for case in (case_of("lars"), case_of("novograd")):
        options = {**settings_of(case), "weight_decay": 0.0, "eps": 0.0}
        ps = [parameters((50,), np.float32) for _ in range(2)]
        for p, scale in zip(ps, (1.0, 2.0**80), strict=True):
            opt = getattr(gradstep, case.optimizer)([p], **options)
            for step in (1, 2):
                opt.step([gradients((50,), np.float32, step) * np.float32(scale)])
        assert np.isfinite(ps[0]).all()
        assert not np.array_equal(ps[0], parameters((50,), np.float32))
        np.testing.assert_allclose(ps[1], ps[0], rtol=1e-6)


# ---- the papers, in torch, in float64 -------------------------------------------------------------------------------------


def lamb_of_the_paper(torch: Any, p: Any, g: Any, s: dict[str, Any], t: int, o: dict[str, Any]) -> Any:
    """arXiv:1904.00962, Algorithm 2."""
    (beta1, beta2), zero = o["betas"], torch.zeros_like(p)
    g = -g if o.get("maximize") else g
    s["m"] = beta1 * s.get("m", zero) + (1 - beta1 if o.get("grad_averaging", True) else 1) * g
    s["v"] = beta2 * s.get("v", zero) + (1 - beta2) * g**2
    m, v = s["m"], s["v"]
    if o.get("bias_correction", True):
        m, v = m / (1 - beta1**t), v / (1 - beta2**t)
    r, beside = m / (v.sqrt() + o["eps"]), torch.zeros_like(p)
    if o.get("decay_in_ratio", True):
        r = r + o["weight_decay"] * p
    else:
        beside = o["weight_decay"] * p
    low, high = o.get("trust_ratio", (0.0, float("inf")))
    norms = [torch.linalg.vector_norm(x).item() for x in (p, r)]
    adapts = all(norms) and (o["weight_decay"] != 0 or o.get("always_adapt", True))
    return p - o["lr"] * ((min(max(norms[0] / norms[1], low), high) if adapts else 1.0) * r + beside)


def lars_of_the_paper(torch: Any, p: Any, g: Any, s: dict[str, Any], t: int, o: dict[str, Any]) -> Any:
    """arXiv:1708.03888, Algorithm 1, with lr outside the buffer."""
    g = -g if o.get("maximize") else g
    decay, decoupled = o["weight_decay"], o.get("decay_mode") == "decoupled"
    p_norm, g_norm = (torch.linalg.vector_norm(x) for x in (p, g))
    rate = o["trust_coefficient"] * p_norm / (g_norm + (0 if decoupled else decay * p_norm) + o["eps"])
    g = rate * (g if decoupled else g + decay * p)
    b = s["b"] = g if t == 1 else o["momentum"] * s["b"] + (1 - o["dampening"]) * g
    u = g + o["momentum"] * b if o.get("nesterov") else b
    return p - o["lr"] * (u + decay * p if decoupled else u)


def novograd_of_the_paper(torch: Any, p: Any, g: Any, s: dict[str, Any], t: int, o: dict[str, Any]) -> Any:
    """arXiv:1905.11286, Algorithm 1."""
    beta1, beta2 = o["betas"]
    g = -g if o.get("maximize") else g
    square = (g**2).sum()
    s["v"] = square if t == 1 else beta2 * s["v"] + (1 - beta2) * square
    term = g / (s["v"].sqrt() + o["eps"]) + o["weight_decay"] * p
    s["m"] = beta1 * s.get("m", 0) + (1 - beta1 if o.get("grad_averaging") else 1) * term
    return p - o["lr"] * s["m"]


PAPERS = {"LAMB": lamb_of_the_paper, "LARS": lars_of_the_paper, "NovoGrad": novograd_of_the_paper}


@norm_cases
def test_as_the_papers_have_it(case: Case) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    shapes = [(33, 7), (1030,), (3, 4, 5, 5)]
    params, settings = make_params(shapes, np.float64), settings_of(case)
    opt = make_optimizer(case, params, {})
    theirs, states = [torch.from_numpy(p.copy()) for p in params], [{} for _ in shapes]
    for step in range(1, 21):
        grads = make_grads(shapes, np.float64, step, {})[0][1]
        opt.step(grads)
        for i, g in enumerate(grads):
            theirs[i] = PAPERS[case.optimizer](torch, theirs[i], torch.from_numpy(g), states[i], step, settings)
    for i, (p, start) in enumerate(zip(params, make_params(shapes, np.float64), strict=True)):
        assert np.abs(p - start).max() > 0.01
        np.testing.assert_allclose(p, theirs[i].numpy(), rtol=1e-12, atol=1e-13)


def test_without_momentum_the_papers_numbers() -> None:
    """Steps that can be done by hand: lengths of 5 and 10."""
    p, g = np.array([3.0, 4.0]), np.array([6.0, -8.0])
    gradstep.lars_(p, g, momentum_buffer=np.zeros(2), lr=0.5, momentum=0.0, weight_decay=0.5, trust_coefficient=0.1, eps=2.5)
    np.testing.assert_allclose(p, np.array([3.0, 4.0]) - 0.5 * (0.1 * 5 / 15) * np.array([7.5, -6.0]), rtol=1e-15)
    p, n = np.array([3.0, 4.0]), np.array([16.0])
    gradstep.novograd_(p, g, exp_avg=np.ones(2), grad_norm_sq=n, step=2, lr=0.5, betas=(0.5, 0.75), eps=0.5, weight_decay=2.0)
    assert n == 0.75 * 16 + 0.25 * 100
    m = 0.5 + np.array([6.0, -8.0]) / (np.sqrt(37) + 0.5) + 2 * np.array([3.0, 4.0])
    np.testing.assert_allclose(p, np.array([3.0, 4.0]) - 0.5 * m, rtol=1e-15)
    p = np.array([3.0, 4.0])
    gradstep.lamb_(p, g, exp_avg=np.zeros(2), exp_avg_sq=np.zeros(2), step=1, lr=0.5, eps=0.0, weight_decay=0.25)
    u = np.array([1.75, 0.0])
    np.testing.assert_allclose(p, np.array([3.0, 4.0]) - 0.5 * 5 / 1.75 * u, rtol=1e-15)


# ---- other implementations ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings", "of_theirs"),
    [
        (
            "Lamb",
            {"lr": 0.02, "betas": (0.85, 0.97), "eps": 1e-12, "weight_decay": 0.07, "bias_correction": False},
            {"weight_decouple": False, "adam_debias": True},
        ),
        (
            "Lamb",
            {"lr": 0.02, "eps": 1e-12, "weight_decay": 0.07, "bias_correction": False, "grad_averaging": False},
            {"weight_decouple": False, "adam_debias": True},
        ),
        ("LARS", {"lr": 0.3, "momentum": 0.85, "weight_decay": 0.07, "trust_coefficient": 0.1}, {}),
        ("LARS", {"lr": 0.3, "momentum": 0.85, "weight_decay": 0.07, "trust_coefficient": 0.1, "nesterov": True}, {}),
        ("NovoGrad", {"lr": 0.02, "betas": (0.85, 0.9), "eps": 0.01, "weight_decay": 0.07}, {}),
    ],
)
def test_as_pytorch_optimizer(name: str, settings: dict[str, Any], of_theirs: dict[str, Any]) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    theirs = pytest.importorskip("pytorch_optimizer", reason="pytorch_optimizer is not installed")
    if not hasattr(theirs, name):
        pytest.skip(f"this pytorch_optimizer has no {name}")
    shapes = [(8, 7), (3, 5)]  # shorter than 10: theirs limits the norm of a parameter in LAMB
    params = make_params(shapes, np.float64)
    others = [torch.nn.Parameter(torch.from_numpy(p.copy())) for p in params]
    opt = getattr(gradstep, "LAMB" if name == "Lamb" else name)(params, **settings)
    shared = {name: value for name, value in settings.items() if name != "bias_correction"}
    other = getattr(theirs, name)(others, **shared, **of_theirs)
    for step in range(1, 11):
        grads = make_grads(shapes, np.float64, step, {})[0][1]
        for q, g in zip(others, grads, strict=True):
            q.grad = torch.from_numpy(g.copy())
        opt.step(grads)
        other.step()
    for p, q, start in zip(params, others, make_params(shapes, np.float64), strict=True):
        assert np.abs(p - start).max() > 0.01
        np.testing.assert_allclose(p, q.detach().numpy(), rtol=1e-9)


def as_optax() -> None:
    """In a process of its own: JAX starts threads, and warns of forks ever after."""
    import jax
    import optax

    jax.config.update("jax_enable_x64", True)
    shapes = [(8, 7), (1030,)]
    pairs = [
        (
            gradstep.LAMB,
            {"lr": 0.02, "betas": (0.85, 0.97), "eps": 1e-5, "weight_decay": 0.07},
            optax.lamb(0.02, b1=0.85, b2=0.97, eps=1e-5, weight_decay=0.07),
        ),
        (
            gradstep.LARS,
            {"lr": 0.3, "momentum": 0.85, "weight_decay": 0.0, "trust_coefficient": 0.1, "eps": 0.3, "nesterov": True},
            optax.lars(0.3, weight_decay=0.0, trust_coefficient=0.1, eps=0.3, momentum=0.85, nesterov=True),
        ),
        (
            gradstep.NovoGrad,
            {"lr": 0.02, "betas": (0.85, 0.9), "eps": 0.01, "weight_decay": 0.07},
            optax.novograd(0.02, b1=0.85, b2=0.9, eps=0.01, weight_decay=0.07),
        ),
    ]
    for cls, settings, theirs in pairs:
        params = make_params(shapes, np.float64)
        others = [jax.numpy.asarray(p.copy()) for p in params]
        opt, state = cls(params, **settings), theirs.init(others)
        for step in range(1, 6):
            grads = make_grads(shapes, np.float64, step, {})[0][1]
            updates, state = theirs.update([jax.numpy.asarray(g) for g in grads], state, others)
            others = optax.apply_updates(others, updates)
            opt.step(grads)
        for p, q, start in zip(params, others, make_params(shapes, np.float64), strict=True):
            assert np.abs(p - start).max() > 0.01
            np.testing.assert_allclose(p, np.asarray(q), rtol=1e-12, atol=1e-13, err_msg=cls.__name__)


def test_as_optax() -> None:
    pytest.importorskip("optax", reason="optax is not installed")
    run_in_child(as_optax)


# ---- states ---------------------------------------------------------------------------------------------------------------


@norm_cases
@pytest.mark.parametrize("way", ["state_dict", "pickle", "deepcopy", "pickled state_dict"])
def test_states_go_round(case: Case, way: str) -> None:
    params, straight = make_params(SHAPES, np.float32), make_params(SHAPES, np.float32)
    opt, uncut = make_optimizer(case, params, {}), make_optimizer(case, straight, {})
    for step in (1, 2, 3, 4):
        if step == 3:
            if way == "pickle":
                opt = pickle.loads(pickle.dumps(opt))
            elif way == "deepcopy":
                opt = copy.deepcopy(opt)
            else:
                saved = opt.state_dict()
                saved = pickle.loads(pickle.dumps(saved)) if way == "pickled state_dict" else saved
                params = [p.copy() for p in params]
                opt = make_optimizer(case, params, {"clip_value": 1e-3})
                opt.load_state_dict({**saved, "param_groups": [{**g, "clip_value": None} for g in saved["param_groups"]]})
            params = opt.param_groups[0]["params"]
        opt.step(make_grads(SHAPES, np.float32, step, {})[0][1])
        uncut.step(make_grads(SHAPES, np.float32, step, {})[0][1])
    for i, (p, q) in enumerate(zip(params, straight, strict=True)):
        assert_same_bits(p, q, f"parameter {i}")
    assert opt.state.keys() == uncut.state.keys()
    for i, state in opt.state.items():
        assert digest(state) == digest(uncut.state[i])


def test_grad_norm_sq_is_a_number_of_the_state() -> None:
    p, g = np.array([3.0, 4.0], np.float32), np.array([0.6, 0.8], np.float32)
    opt = gradstep.NovoGrad([p], betas=(0.9, 0.75))
    opt.step([g])
    first = opt.state[0]["grad_norm_sq"]
    assert type(first) is float and first == pytest.approx(1.0, rel=1e-6)
    assert opt.state[0].keys() == {"step", "exp_avg", "grad_norm_sq"}
    opt.step([2 * g])
    assert opt.state[0]["grad_norm_sq"] == pytest.approx(0.75 + 0.25 * 4, rel=1e-6)


class Novograd:
    """Operands of `novograd_`: two parameters of 3."""

    def __init__(self) -> None:
        self.params, self.grads = ([make((3,), np.float32, i) for i in (0, 1)] for make in (parameters, gradients))
        self.exp_avg = [np.zeros(3, np.float32) for _ in range(2)]
        self.grad_norm_sq: Any = [np.full(1, 2.0) for _ in range(2)]

    def call(self, step: Any = 2, **more: Any) -> Any:
        return gradstep.novograd_(
            self.params, self.grads, exp_avg=self.exp_avg, grad_norm_sq=self.grad_norm_sq, step=step, **more
        )


def read_only(a: Any) -> Any:
    a.flags.writeable = False
    return a


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (2.0, TypeError, "novograd_: grad_norm_sq[1] must be an array of one number"),
        (2, TypeError, "novograd_: grad_norm_sq[1] must be an array of one number"),
        (np.zeros(2), ValueError, "novograd_: grad_norm_sq[1] has shape (2,), must hold one number"),
        (np.zeros(0), ValueError, "novograd_: grad_norm_sq[1] has shape (0,), must hold one number"),
        (np.zeros(1, np.int64), TypeError, "novograd_: grad_norm_sq[1] must be a float, or a float32 or float64 array"),
        (read_only(np.zeros(1)), ValueError, "novograd_: grad_norm_sq[1] is read-only"),
    ],
    ids=["float", "int", "two", "none", "int64", "read-only"],
)
def test_what_grad_norm_sq_can_not_be(value: Any, error: Any, message: str) -> None:
    operands = Novograd()
    operands.grad_norm_sq[1] = value
    before = digest(vars(operands))
    with pytest.raises(error) as caught:
        operands.call()
    assert str(caught.value) == message
    assert digest(vars(operands)) == before


@pytest.mark.parametrize("form", ["none", "one for two", "an array for a list", "missing"])
def test_grad_norm_sq_goes_by_the_parameters(form: str) -> None:
    operands = Novograd()
    if form == "missing":
        with pytest.raises(TypeError, match=r"^novograd_\(\) missing 1 required keyword-only argument: 'grad_norm_sq'$"):
            gradstep.novograd_(operands.params, operands.grads, exp_avg=operands.exp_avg, step=1)
        return
    operands.grad_norm_sq = {"none": None, "one for two": [np.zeros(1)], "an array for a list": np.zeros(2)}[form]
    message = {
        "none": "novograd_: grad_norm_sq must be a sequence, as params is, got NoneType",
        "one for two": "novograd_: grad_norm_sq has 1 numbers, params has 2",
        "an array for a list": "novograd_: grad_norm_sq must be a sequence, as params is, got numpy.ndarray",
    }[form]
    before = digest(vars(operands))
    with pytest.raises((TypeError, ValueError)) as caught:
        operands.call()
    assert str(caught.value) == message
    assert digest(vars(operands)) == before


def test_grad_norm_sq_may_be_float32(isa: str) -> None:
    single, double = Novograd(), Novograd()
    single.grad_norm_sq = [np.full((), 2.0, np.float32), np.full((1, 1), 2.0, np.float32)]
    for step in (2, 3):
        single.call(step)
        double.call(step)
    for i in range(2):
        assert single.grad_norm_sq[i].item() == pytest.approx(double.grad_norm_sq[i].item(), rel=1e-6)
        assert single.grad_norm_sq[i].item() != 2
        np.testing.assert_allclose(single.params[i], double.params[i], rtol=1e-6)


@pytest.mark.parametrize("how", ["skip", "raise"])
def test_a_skipped_step_leaves_grad_norm_sq(how: str, isa: str) -> None:
    for more in ({}, {"clip_norm": 0.1}):
        operands = Novograd()
        operands.grads[1][2] = np.inf
        before = digest(vars(operands))
        if how == "skip":
            assert operands.call(on_nonfinite=how, **more) is False
        else:
            with pytest.raises(FloatingPointError):
                operands.call(on_nonfinite=how, **more)
        assert digest(vars(operands)) == before
        operands.grads[1][2] = 0
        assert operands.call(on_nonfinite=how, **more) is True
        assert all(n != 2 for n in operands.grad_norm_sq)


@norm_cases
def test_optimizers_skip_in_full(case: Case, isa: str) -> None:
    params = make_params(SHAPES, np.float32)
    opt = make_optimizer(case, params, {"on_nonfinite": "skip"})
    for step in (3, 4, 5):
        before = digest([params, opt.state_dict()])
        grads = make_grads(SHAPES, np.float32, step, {})[0][1]
        grads[5].flat[-1] = np.nan
        opt.step(grads)
        assert digest([params, opt.state_dict()]) == before
        opt.step(make_grads(SHAPES, np.float32, step, {})[0][1])
        assert digest([params, opt.state_dict()]) != before


BAD_SETTINGS: list[tuple[str, dict[str, Any], str]] = [
    ("LAMB", {"lr": -1.0}, "lr must be >= 0, got -1.0"),
    ("LAMB", {"betas": (0.9, 1.0)}, "betas[1] must be in [0, 1), got 1.0"),
    ("LAMB", {"eps": -1.0}, "eps must be >= 0, got -1.0"),
    ("LAMB", {"weight_decay": -1.0}, "weight_decay must be >= 0, got -1.0"),
    ("LAMB", {"trust_ratio": (2, 1)}, "trust_ratio must be (low, high) with low <= high, got (2, 1)"),
    ("LARS", {"trust_coefficient": -1.0}, "trust_coefficient must be >= 0, got -1.0"),
    ("LARS", {"eps": float("nan")}, "eps must be >= 0, got nan"),
    ("LARS", {"momentum": 0.0, "nesterov": True}, "Nesterov momentum requires a momentum and zero dampening"),
    ("LARS", {"dampening": 0.1, "nesterov": True}, "Nesterov momentum requires a momentum and zero dampening"),
    ("NovoGrad", {"betas": (0.9, 1.0)}, "betas[1] must be in [0, 1), got 1.0"),
    ("NovoGrad", {"betas": (1.0, 0.9)}, "betas[0] must be in [0, 1), got 1.0"),
    ("NovoGrad", {"eps": -1.0}, "eps must be >= 0, got -1.0"),
]


@pytest.mark.parametrize(("name", "settings", "message"), BAD_SETTINGS)
def test_settings_out_of_range(name: str, settings: dict[str, Any], message: str) -> None:
    case = next(case for case in THE_THREE if case.optimizer == name)
    with pytest.raises(ValueError) as of_class:
        getattr(gradstep, name)([np.zeros(3)], **settings)
    lists, p = lists_of(case, [(3,)], np.float64), parameters((3,), np.float64)
    with pytest.raises(ValueError) as of_function:
        case.function([p], [np.ones(3)], **lists, step=1, **settings)
    assert message in str(of_class.value) and message in str(of_function.value)
    assert_same_bits(p, parameters((3,), np.float64), "parameter")


# ---- torch ----------------------------------------------------------------------------------------------------------------


def torch_params(torch: Any, dtype: Any) -> list[Any]:
    return [torch.nn.Parameter(torch.from_numpy(p)) for p in make_params(SHAPES, dtype)]


def torch_step(torch: Any, opt: Any, params: list[Any], dtype: Any, step: int) -> None:
    for p, g in zip(params, make_grads(SHAPES, dtype, step, {})[0][1], strict=True):
        p.grad = None if g is None else torch.from_numpy(g)
    opt.step()


@norm_cases
def test_torch_gives_the_bits_of_numpy(case: Case) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    import gradstep.torch

    for dtype in DTYPES:
        params = torch_params(torch, dtype)
        opt = getattr(gradstep.torch, case.optimizer)(params, **settings_of(case))
        for step, (theirs, states) in enumerate(expect(case, dtype, {}, steps=3), 1):
            torch_step(torch, opt, params, dtype, step)
            for i, q in enumerate(theirs):
                assert_same_bits(params[i].detach().numpy(), q, f"parameter {i} at step {step}")
            for i, state in states.items():
                for name in (*case.states, *case.numbers):
                    same(opt.state[params[i]][name], np.asarray(state[name]), f"{name} {i} at step {step}")


@the_three
@pytest.mark.parametrize("way", ["state_dict", "pickle"])
def test_torch_states_go_round(case: Case, way: str) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    import gradstep.torch

    for dtype in DTYPES:
        params, straight = torch_params(torch, dtype), torch_params(torch, dtype)
        make = getattr(gradstep.torch, case.optimizer)
        opt, uncut = make(params, **settings_of(case)), make(straight, **settings_of(case))
        for step in (1, 2, 3, 4):
            if step == 3 and way == "pickle":
                opt = pickle.loads(pickle.dumps(opt))
                params = opt.param_groups[0]["params"]
            elif step == 3:
                saved = copy.deepcopy(opt.state_dict())
                opt = make(params)
                opt.load_state_dict(saved)
            torch_step(torch, opt, params, dtype, step)
            torch_step(torch, uncut, straight, dtype, step)
        for i, (p, q) in enumerate(zip(params, straight, strict=True)):
            assert_same_bits(p.detach().numpy(), q.detach().numpy(), f"parameter {i}")
            for name in (*case.states, *case.numbers):
                same(opt.state[p][name], np.asarray(uncut.state[q][name]), f"{name} {i}")


def test_the_norm_that_a_function_keeps_lies_apart() -> None:
    p, g, m, n = (np.ones(3) for _ in range(4))
    first, second = n[:1], n[1:2]
    lists = {"exp_avg": [m[:1], m[1:2]], "step": 2}
    for norms, message in (([first, first], "shares memory with grad_norm_sq"), ([first, p[1:2]], "shares memory with params")):
        with pytest.raises(ValueError, match=message):
            gradstep.novograd_([p[:1], p[1:2]], [g[:1], g[1:2]], grad_norm_sq=norms, **lists)
    with pytest.raises(ValueError, match="shares memory with grad"):
        gradstep.novograd_(p, g, exp_avg=m, grad_norm_sq=g[:1], step=2)
    wrong = (
        (np.array([1.0], ">f8"), TypeError, "native byte order"),
        (np.frombuffer(bytearray(9), np.float64, 1, 1), ValueError, "misaligned"),
        (np.array([-1.0]), ValueError, ">= 0"),
    )
    for norm, error, message in wrong:
        with pytest.raises(error, match=f"grad_norm_sq.*{message}"):
            gradstep.novograd_(p, g, exp_avg=m, grad_norm_sq=norm, step=2)
    assert all((x == 1).all() for x in (p, g, m, n))
    gradstep.novograd_([p[:1], p[1:2]], [g[:1], g[1:2]], grad_norm_sq=[first, second], **lists)
    assert (p[:2] < 1).all()
