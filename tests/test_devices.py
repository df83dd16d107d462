"""Arrays on devices in functions and NumPy optimizers: the same bits as on the host, and clear refusals."""

from __future__ import annotations

import copy
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import gradstep
from gradstep import _core, config, cuda
from gradstep.stats import StepStats

from .cases import Case, gradients, parameters
from .child import run_in_child
from .device_cases import DeviceArray, emulated_fixture, pretending
from .test_values import assert_same_bits, cases

__all__ = ["emulated_fixture"]

SHAPES = [(33, 3), (1030,), (2, 3, 5), ()]
pytestmark = pytest.mark.usefixtures("emulated")


def hosts(dtype: Any = np.float32) -> list[Any]:
    return [np.array(parameters(shape, dtype, i)) for i, shape in enumerate(SHAPES)]


def grads_of(step: int, dtype: Any = np.float32) -> list[Any]:
    return [np.array(gradients(shape, dtype, 100 * step + i)) for i, shape in enumerate(SHAPES)]


def on(arrays: list[Any], device: int = 0) -> list[Any]:
    return [DeviceArray(array, device) for array in arrays]


# ---- values ---------------------------------------------------------------------------------------------------------------


@cases
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_functions_as_on_the_host(case: Case, dtype: Any) -> None:
    ours, theirs = parameters((33, 40), dtype), parameters((33, 40), dtype)
    state, other = case.start((33, 40), dtype), case.start((33, 40), dtype)
    for name in case.numbers:
        state[name], other[name] = np.zeros(()), np.zeros(())
    for step in (1, 2, 3):
        g = gradients((33, 40), dtype, step)
        case.call(DeviceArray(ours), DeviceArray(g), {name: DeviceArray(value) for name, value in state.items()}, step)
        case.call(theirs, g, other, step)
    assert_same_bits(ours, theirs, "parameter")
    for name in state:
        assert_same_bits(state[name], other[name], name)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"clip_norm": 1.0, "on_nonfinite": "skip"},
    {"on_nonfinite": "raise"},
    {"ema_decay": 0.9, "swa": (1, 2), "lookahead": (2, 0.5), "zero_grad": True},
    {"noise": 0.01, "seed": 3, "l1": 0.1},
    {"state_dtype": "q8"},
]


@cases
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_optimizers_as_on_the_host(case: Case, options: dict[str, Any]) -> None:
    if options.get("state_dtype") and "centered" in case.name:
        return
    ours, theirs = hosts(), hosts()
    opt, other = (
        getattr(gradstep, case.optimizer)(params, **{**case.settings, **case.class_settings, **options})
        for params in (on(ours), theirs)
    )
    for step in (1, 2, 3, 4):
        seen = opt.step(on(grads_of(step)), stats=True)
        expected = other.step(grads_of(step), stats=True)
        assert seen == expected and seen.step == step
    assert opt.steps == other.steps == 4
    for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
        assert_same_bits(p, q, f"parameter {i}")
        assert opt.state[i].keys() == other.state[i].keys()
        for name, value in opt.state[i].items():
            assert isinstance(value, DeviceArray) and value.device.id == 0
            if isinstance(other.state[i][name], np.ndarray):
                assert_same_bits(value.host, other.state[i][name], f"{name} of {i}")
            else:
                assert value.host.dtype == np.float64 and value.host.shape == () and value.item() == other.state[i][name], name


def test_on_several_devices_and_the_host() -> None:
    ours, theirs = hosts(), hosts()
    mixed = [ours[0], DeviceArray(ours[1], 1), DeviceArray(ours[2], 0), DeviceArray(ours[3], 1)]
    opt, other = (gradstep.AdamW(params, lr=0.1, ema_decay=0.9) for params in (mixed, theirs))
    for step in (1, 2, 3):
        g = grads_of(step)
        seen = opt.step([g[0], DeviceArray(g[1], 1), DeviceArray(g[2], 0), DeviceArray(g[3], 1)], stats=step == 2)
        expected = other.step(grads_of(step), stats=step == 2)
        assert seen == expected
    for p, q in zip(ours, theirs, strict=True):
        assert_same_bits(p, q, "parameter")
    assert type(opt.state[0]["step"]) is int and opt.state[1]["step"].device.id == 1


def test_counts_of_the_host_beside_states_on_a_device() -> None:
    """The step waits where it may be left out, and counts for itself."""
    ours, theirs = hosts(), hosts()
    opt, other = (gradstep.NovoGrad(params, lr=0.1, ema_decay=0.9, on_nonfinite="skip") for params in (ours, theirs))
    for step in (1, 2, 3, 4):
        g = grads_of(step)
        if step == 2:
            g[1][7] = np.nan
        with pretending(0):
            assert opt.step(g) is None
        other.step(g)
        assert vars(opt).get("_undecided") is None
        assert opt.steps == other.steps == step - (step > 1)
    for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
        assert_same_bits(p, q, "parameter")
        for name in ("step", "ema_count", "grad_norm_sq"):
            assert opt.state[i][name] == other.state[i][name] and type(opt.state[i][name]) is type(other.state[i][name])


# ---- waiting --------------------------------------------------------------------------------------------------------------


def test_statistics_come_when_looked_at() -> None:
    opt = gradstep.AdamW(on(hosts()))
    stats = opt.step(on(grads_of(1)), stats=True)
    assert isinstance(stats, StepStats)
    with pytest.raises(AttributeError):
        object.__getattribute__(stats, "grad_norm")
    with pytest.raises(AttributeError, match="'StepStats' object has no attribute 'grad_nrm'"):
        stats.grad_nrm  # noqa: B018
    expected = gradstep.AdamW(hosts()).step(grads_of(1), stats=True)
    assert stats.grad_norm == expected.grad_norm and stats == expected and repr(stats) == repr(expected)
    again = opt.step(on(grads_of(2)), stats=True)
    assert copy.deepcopy(pickle.loads(pickle.dumps(again.step))) == 2


def test_steps_that_a_device_leaves_out_are_not_counted() -> None:
    params = hosts()
    opt = gradstep.AdamW(on(params), on_nonfinite="skip")
    numbers = []
    for step in range(1, 8):
        grads = grads_of(step)
        if step in (1, 3, 4, 7):
            grads[2].flat[3] = np.inf
        before = copy.deepcopy(params)
        numbers.append(opt.step(on(grads), stats=True))
        assert all(np.array_equal(p, q) for p, q in zip(params, before, strict=True)) == (step in (1, 3, 4, 7))
        if step == 1:
            assert not opt.state  # the step that makes states waits
    assert opt.state[0]["step"].item() == 3
    assert "_undecided" in vars(opt)
    assert [stats.step for stats in numbers] == [1, 1, 2, 2, 2, 3, 4]
    assert [stats.skipped for stats in numbers] == [True, False, True, True, False, False, True]
    assert opt.steps == 3 and "_undecided" not in vars(opt)


def test_a_function_that_skips_says_so() -> None:
    p, g = np.ones(4), np.array([1.0, np.nan, 0, 0])
    states = {name: DeviceArray(np.zeros(4)) for name in ("exp_avg", "exp_avg_sq")}
    for grad, carried_out in ((g, False), (np.ones(4), True)):
        assert gradstep.adamw_(DeviceArray(p), DeviceArray(grad), **states, step=1, on_nonfinite="skip") is carried_out
    with pytest.raises(FloatingPointError, match="adamw_: grad has an element that is not finite"):
        gradstep.adamw_(DeviceArray(p), DeviceArray(g), **states, step=2, on_nonfinite="raise")
    assert gradstep.adamw_(DeviceArray(p), DeviceArray(g), **states, step=2) is None


def test_an_error_of_a_gradient_comes_at_once() -> None:
    params = hosts()
    opt = gradstep.AdamW(on(params), on_nonfinite="raise")
    bad = grads_of(1)
    bad[1][5] = np.nan
    with pytest.raises(FloatingPointError, match=r"AdamW.step: grads\[1\] has an element that is not finite"):
        opt.step(on(bad))
    assert not opt.state and opt.steps == 0
    assert all(np.array_equal(p, q) for p, q in zip(params, hosts(), strict=True))


def test_schedules_are_asked_with_the_steps_that_were_carried_out() -> None:
    asked = []
    opt = gradstep.SGD(on([np.ones(3)]), lr=lambda step: asked.append(step) or 0.1, on_nonfinite="skip")
    asked.clear()
    for value in (1.0, np.nan, 2.0):
        opt.step(on([np.full(3, value)]))
    assert asked == [0, 1, 1]


# ---- saving ---------------------------------------------------------------------------------------------------------------

KEPT: dict[str, Any] = {"lr": 0.1, "ema_decay": 0.9, "on_nonfinite": "skip"}


def run(opt: Any, steps: Any, device: bool) -> None:
    for step in steps:
        opt.step(on(grads_of(step)) if device else grads_of(step))


@pytest.mark.parametrize("way", ["state_dict", "checkpoint", "pickle"])
@pytest.mark.parametrize("source", ["device", "host"])
@pytest.mark.parametrize("target", ["device", "host"])
def test_a_run_goes_on_anywhere(way: str, source: str, target: str, tmp_path: Path) -> None:
    def place(where: str, arrays: list[Any]) -> list[Any]:
        return on(arrays) if where == "device" else arrays

    if way == "pickle" and source != target:
        return
    straight, first = hosts(), hosts()
    run(gradstep.AdamW(straight, **KEPT), range(1, 6), False)
    opt = gradstep.AdamW(place(source, first), **KEPT)
    run(opt, (1, 2, 3), source == "device")
    second = copy.deepcopy(first)
    if way == "state_dict":
        other = gradstep.AdamW(place(target, second), **KEPT)
        other.load_state_dict(copy.deepcopy(opt.state_dict()))
    elif way == "checkpoint":
        opt.save(tmp_path / "opt")
        other = gradstep.AdamW.load(tmp_path / "opt", place(target, second))
    else:
        other = copy.deepcopy(opt)
        second = [getattr(p, "host", p) for p in other.param_groups[0]["params"]]
    assert other.steps == 3
    assert isinstance(other.state[0]["step"], DeviceArray) == (target == "device")
    assert isinstance(other.state[0]["ema"], DeviceArray) == (target == "device")
    run(other, (4, 5), target == "device")
    for p, q in zip(second, straight, strict=True):
        assert_same_bits(p, q, "parameter")


@pytest.mark.parametrize("form", ["float64", "q8"])
def test_a_checkpoint_changes_its_format_on_the_way(form: str, tmp_path: Path) -> None:
    values = parameters((70, 70), np.float32)
    opts = [gradstep.AdamW([place(values.copy())]) for place in (DeviceArray, np.asarray)]
    for opt, place in zip(opts, (DeviceArray, np.asarray), strict=True):
        opt.step([place(gradients((70, 70), np.float32, 1))])
        opt.save(tmp_path / "opt")
        (param,) = opt.param_groups[0]["params"]
        opt.loaded = gradstep.AdamW.load(tmp_path / "opt", [param], state_dtype=form)
    for name, value in opts[1].loaded.state[0].items():
        ours = opts[0].loaded.state[0][name]
        assert isinstance(ours, DeviceArray)
        assert ours.host.dtype == (np.float64 if name == "step" else value.dtype) and np.array_equal(ours.host, value), name


def test_averages_change_places() -> None:
    ours, theirs = hosts(), hosts()
    opt, other = (gradstep.SGD(params, lr=0.1, ema_decay=0.5) for params in (on(ours), theirs))
    run(opt, (1, 2), True)
    run(other, (1, 2), False)
    for which in (opt, other):
        which.swap_ema()
    for p, q in zip(ours, theirs, strict=True):
        assert_same_bits(p, q, "average")
    with opt.averaged(), other.averaged():
        for p, q in zip(ours, theirs, strict=True):
            assert_same_bits(p, q, "back")


def test_no_state_dir(tmp_path: Path) -> None:
    with pytest.raises(ValueError) as caught:
        gradstep.AdamW([np.ones(3), DeviceArray(np.ones(3), 1)], state_dir=tmp_path / "states")
    assert str(caught.value) == (
        "AdamW: params[1] is on cuda:1: state_dir keeps states in files, which are for parameters in CPU memory"
    )
    assert not (tmp_path / "states").exists()


# ---- refusals -------------------------------------------------------------------------------------------------------------

Z = np.zeros(3)


@pytest.mark.parametrize(
    ("param", "grad", "average", "error", "message"),
    [
        (Z + 1, DeviceArray(Z), Z, ValueError, "grad is on cuda:0, its parameter is in CPU memory"),
        (DeviceArray(Z + 1, 1), Z, DeviceArray(Z, 1), ValueError, "grad is in CPU memory, its parameter is on cuda:1"),
        (DeviceArray(Z + 1), DeviceArray(Z), DeviceArray(Z, 1), ValueError, "exp_avg is on cuda:1, its parameter is on cuda:0"),
        (
            DeviceArray(Z + 1),
            DeviceArray(np.zeros(4)),
            DeviceArray(Z),
            ValueError,
            "grad has shape (4,), its parameter has (3,)",
        ),
        (
            DeviceArray(Z + 1),
            DeviceArray(np.zeros(3, int)),
            DeviceArray(Z),
            TypeError,
            "grad has dtype int64, must be float64, float32, float16 or bfloat16",
        ),
        (DeviceArray(Z + 1, data=(8, True)), DeviceArray(Z), DeviceArray(Z), ValueError, "param is read-only"),
        (DeviceArray(Z, mask=Z), DeviceArray(Z), DeviceArray(Z), ValueError, "param has a mask"),
        (
            DeviceArray(Z, version=1),
            DeviceArray(Z),
            DeviceArray(Z),
            ValueError,
            "param has version 1 of __cuda_array_interface__, versions from 2 on can be read",
        ),
        (
            DeviceArray(Z, stream=0),
            DeviceArray(Z),
            DeviceArray(Z),
            ValueError,
            "param has the stream 0 in its __cuda_array_interface__, which is neither 1 nor 2",
        ),
        (
            DeviceArray(Z + 1, 2),
            DeviceArray(Z, 2),
            DeviceArray(Z + 0, 2),
            RuntimeError,
            "there is no cuda:2, there are 2 devices",
        ),
    ],
)
def test_refused(param: Any, grad: Any, average: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        gradstep.lion_(param, grad, exp_avg=average)
    assert str(caught.value) == f"lion_: {message}"


@pytest.mark.parametrize(
    "interface", [{"shape": None}, {"data": 3}, {"typestr": "<fx"}, {"strides": (8, 8)}, {"version": None}]
)
def test_an_interface_that_makes_no_sense(interface: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match="^lion_: param has a __cuda_array_interface__ that makes no sense: {'shape'"):
        gradstep.lion_(DeviceArray(Z, **interface), DeviceArray(Z), exp_avg=DeviceArray(Z))


def test_shared_memory_is_refused() -> None:
    memory = np.zeros(6)
    with pytest.raises(ValueError, match="lion_: exp_avg shares memory with param"):
        gradstep.lion_(DeviceArray(memory[:4]), DeviceArray(np.zeros(4)), exp_avg=DeviceArray(memory[2:]))


@pytest.mark.parametrize(
    ("options", "what"),
    [({"clip_norm": 1.0}, "clip_norm"), *[({"on_nonfinite": how}, f"on_nonfinite='{how}'") for how in ("skip", "raise")]],
)
def test_what_looks_at_all_gradients_takes_one_place(options: dict[str, Any], what: str) -> None:
    for places, text in (((0, 1), "on cuda:0 and on cuda:1"), ((None, 1), "in CPU memory and on cuda:1")):
        params = [np.ones(3) if place is None else DeviceArray(np.ones(3), place) for place in places]
        grads = [np.ones(3) if place is None else DeviceArray(np.ones(3), place) for place in places]
        opt = gradstep.AdamW(params, **options)
        with pytest.raises(ValueError) as caught:
            opt.step(grads)
        assert str(caught.value) == (
            f"AdamW.step: {what} looks at all gradients together, and parameters are {text}: take an optimizer for each"
        )
        assert not opt.state and opt.steps == 0 and np.array_equal(getattr(params[0], "host", params[0]), np.ones(3))
        opt.step([grads[0], None])  # what has no gradient takes no part


def test_denormals_are_flushed_on_devices() -> None:
    config.denormals = "keep"
    with pytest.raises(RuntimeError) as caught:
        gradstep.AdamW(DeviceArray(np.ones(3))).step(DeviceArray(np.ones(3)))
    assert str(caught.value) == (
        "AdamW.step: params[0] is on cuda:0, where denormals are always flushed: config.denormals must be 'flush'"
    )


def test_counts_have_to_be_in_one_place() -> None:
    p = np.ones(3)
    opt = gradstep.SGD(DeviceArray(p), swa=(0, 1))
    opt.step(DeviceArray(np.ones(3)))
    opt.state[0]["swa_count"] = 1
    with pytest.raises(ValueError) as caught:
        opt.step(DeviceArray(np.ones(3)))
    assert str(caught.value) == (
        "SGD.step: state[0]['swa_count'] is in CPU memory, state[0]['step'] is on cuda:0: both have to be there"
    )
    opt.state[0]["swa_count"] = DeviceArray(np.ones(()), 1)
    with pytest.raises(ValueError, match=r"state\[0\]\['swa_count'\] is on cuda:1, its parameter is on cuda:0"):
        opt.step(DeviceArray(np.ones(3)))
    opt.state[0]["swa_count"] = DeviceArray(np.ones((), np.int32))
    with pytest.raises(TypeError, match="must be an int, or a float32, float64 or int64 array"):
        opt.step(DeviceArray(np.ones(3)))


def test_a_rate_on_the_device() -> None:
    ours, theirs, rate = np.ones(5), np.ones(5), np.array(0.25)
    opt, other = gradstep.SGD(DeviceArray(ours), lr=DeviceArray(rate)), gradstep.SGD(theirs, lr=0.25)
    for value in (0.25, 0.5, 0.125):
        rate[...] = value
        other.param_groups[0]["lr"] = value
        opt.step(DeviceArray(np.full(5, 0.3)))
        other.step(np.full(5, 0.3))
    assert_same_bits(ours, theirs, "parameter")
    opt.param_groups[0]["lr"] = DeviceArray(rate, 1)
    with pytest.raises(ValueError) as caught:
        opt.step(DeviceArray(np.ones(5)))
    assert str(caught.value) == (
        "SGD.step: lr is on cuda:1, params[0] is on cuda:0: give lr as a number, or a group for each device"
    )
    other.param_groups[0]["lr"] = DeviceArray(rate, 1)
    with pytest.raises(ValueError, match=r"SGD.step: lr is on cuda:1, params\[0\] is in CPU memory"):
        other.step(np.ones(5))
    opt.param_groups[0]["lr"] = DeviceArray(np.ones(1, np.float16))
    with pytest.raises(TypeError, match="SGD.step: lr must be an int, or a float32, float64 or int64 array"):
        opt.step(DeviceArray(np.ones(5)))


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (lambda x: gradstep.global_norm([x]), "global_norm: arrays[0] is on cuda:1: global_norm takes"),
        (lambda x: gradstep.clip_grad_norm_([x], 1.0), "clip_grad_norm_: grads[0] is on cuda:1: clip_grad_norm_ takes"),
        (lambda x: gradstep.formats.convert_(x, np.ones(3)), "convert_: target is on cuda:1: convert_ takes"),
    ],
)
def test_other_functions_are_the_hosts(function: Any, name: str) -> None:
    with pytest.raises(ValueError) as caught:
        function(DeviceArray(np.ones(3), 1))
    assert str(caught.value) == f"{name} arrays in CPU memory"


def test_an_array_that_nothing_is_known_of() -> None:
    class Lonely:
        shape, ndim, dtype = (3,), 1, np.dtype(float)
        memory = np.ones(3)
        __cuda_array_interface__ = DeviceArray(memory).__cuda_array_interface__

    opt = gradstep.AdamW(Lonely())
    with pytest.raises(TypeError, match="Lonely can't be made: it has no __array_namespace__"):
        opt.step(DeviceArray(np.ones(3)))
    gradstep.sgd_(Lonely(), DeviceArray(np.ones(3)), lr=0.1)  # needs nothing made


# ---- streams --------------------------------------------------------------------------------------------------------------


class Stream:
    def __init__(self, **attributes: Any) -> None:
        vars(self).update(attributes)


def test_a_given_stream() -> None:
    array = DeviceArray(np.ones(3), stream=5)
    assert cuda._streams(0, array, 1) == (0, 0)
    for given in (7, np.int64(7), Stream(ptr=7), Stream(cuda_stream=7), Stream(__cuda_stream__=lambda: (0, 7))):
        with cuda.stream(given):
            assert cuda._streams(0, array, 1) == (7, 0)
            with cuda.stream(0):
                assert cuda._streams(1, array, 1) == (0, 0)
            with pytest.raises(ValueError, match=r"cuda.stream: a stream is one of a single device"):
                cuda._streams(0, array, 2)
            gradstep.AdamW(array).step(DeviceArray(np.ones(3)))
    assert cuda._streams(0, array, 2) == (0, 0)
    for bad in (None, "7", 1.0, True, Stream()):
        with (
            pytest.raises(TypeError, match="stream: stream must be an int, or an object with cuda_stream, ptr or"),
            cuda.stream(bad),
        ):
            pass
    with pytest.raises(ValueError, match="stream: stream must be an address, got -1"), cuda.stream(-1):
        pass


# ---- builds and machines --------------------------------------------------------------------------------------------------


def test_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert cuda.is_available() and cuda.device_count() == 2
    assert "emulated" in cuda.describe(1)
    config.show()
    assert "CUDA:" in capsys.readouterr().out


def check_nothing_is_loaded() -> None:
    assert "gradstep._cuda" not in sys.modules
    gradstep.AdamW(np.ones(3)).step(np.ones(3))
    assert "gradstep._cuda" not in sys.modules
    sys.modules["gradstep._cuda"] = None  # type: ignore[assignment]
    with pytest.raises(RuntimeError) as caught:
        gradstep.AdamW(DeviceArray(np.ones(3))).step(DeviceArray(np.ones(3)))
    assert str(caught.value) == (
        "AdamW.step: this build of gradstep has no CUDA: install it from source where nvcc is, "
        "with -Ccmake.define.GRADSTEP_CUDA=ON"
    )
    assert not cuda.is_available() and cuda.device_count() == 0
    assert cuda._summary() == "no" and config.describe()["CUDA"] == "no"
    with pytest.raises(RuntimeError, match="describe: this build of gradstep has no CUDA"):
        cuda.describe()


def test_nothing_of_cuda_is_loaded_before_it_is_needed() -> None:
    run_in_child(check_nothing_is_loaded)


def test_info_never_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    build = {"cuda": "12.8", "architectures": "90-real"}
    monkeypatch.setattr(cuda, "_load_extension", lambda: SimpleNamespace(build=build))
    assert cuda._summary().startswith("12.8, for 90-real; cuda:0 is emulated")
    monkeypatch.setattr(_core, "device_count", lambda: (_ for _ in ()).throw(RuntimeError("device_count: there is no driver")))
    assert cuda._summary() == "12.8, for 90-real; there is no driver"
    monkeypatch.setattr(cuda, "_load_extension", SimpleNamespace)
    assert "build" in cuda._summary()


def test_many_threads_may_wait() -> None:
    opt = gradstep.AdamW(on(hosts()))
    stats = [opt.step(on(grads_of(step)), stats=True) for step in range(1, 9)]
    with ThreadPoolExecutor(8) as pool:
        norms = [list(pool.map(lambda of_step: of_step.grad_norm, stats)) for _ in range(4)]
    assert all(found == norms[0] for found in norms) and [of_step.step for of_step in stats] == list(range(1, 9))


def test_a_driver_is_a_capsule_of_its_name() -> None:
    with pytest.raises((TypeError, ValueError)):
        _core.set_device_driver(3)
