"""The benchmarks on a GPU, without one: tasks, memory, clock, gate, records and refusals, on tensors of the CPU and a clock by hand."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import time
import types

import pytest

from gradstep.bench import options, plan
from gradstep.bench.cases import MANY, Case, one
from gradstep.bench.chains import CHAINS
from gradstep.bench.check import check
from gradstep.bench.contenders import DeviceCopy, Run, UnsupportedError, cuda_contenders, in_graph
from gradstep.bench.contenders.apex_adam import ApexAdam
from gradstep.bench.contenders.gradstep_faces import TorchClass
from gradstep.bench.contenders.in_graph import WARM_UPS, GradstepGraph, TorchGraph
from gradstep.bench.contenders.torch_optim import TorchOptim
from gradstep.bench.cuda import Cuda, CudaClock, ask_smi, bytes_needed, largest, missing
from gradstep.bench.formats import FORMATS
from gradstep.bench.memory import TorchMemory, as_numpy
from gradstep.bench.problem import Problem
from gradstep.bench.rules import RULES

from .bench_cases import FLOAT32, FLOAT64, Wrong, run, whole

torch = pytest.importorskip("torch")

ADAMW = RULES["adamw"]
MEMORY = TorchMemory("cpu")


class FakeCuda:
    """In the place of torch.cuda: a clock that its user turns."""

    def __init__(self):
        self.now = 0.0
        self.events = 0

    def synchronize(self):
        pass

    def Event(self, enable_timing):
        return FakeEvent(self)


class FakeEvent:
    def __init__(self, cuda):
        self.cuda = cuda

    def record(self):
        self.at = self.cuda.now
        self.cuda.events += 1

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return 1000 * (end.at - self.at)


class HostsTime(FakeCuda):
    """The host's clock, under the name of the device's."""

    now = property(lambda self: time.perf_counter(), lambda self, value: None)


class HostGpu(Cuda):
    """A GPU of tensors in CPU memory, with room for `free` bytes."""

    free = 1e9

    def __init__(self):
        super().__init__("cpu", copied=1 << 16)
        self.clock = CudaClock(HostsTime())

    def missing(self):
        return ""

    def memory_available(self):
        return self.free

    def describe(self):
        return {"gpu": {"name": "none"}}


@pytest.fixture
def gpu(monkeypatch):
    """The device `cuda` of the command is tensors in CPU memory."""
    monkeypatch.setitem(options._PLACES, "cuda", HostGpu)


# ---- tasks ----------------------------------------------------------------------------------------------------------------


def test_tasks_by_default():
    tasks = plan.make_cuda_tasks(plan.Choice())
    assert {task.threads for task in tasks} == {(1,)}
    assert [(task.rule.label, task.form.name, task.case.name) for task in tasks] == [
        ("adamw", "float32", "1,000,000,000"),
        ("adamw", "float32", "500 x 64x64"),
        ("adamw unscale-clip", "float32", "1,000,000,000"),
        ("adamw unscale-clip", "float32", "500 x 64x64"),
        ("adamw", "bf16", "1,000,000,000"),
        ("adamw", "bf16-all", "1,000,000,000"),
        ("adamw", "q8", "1,000,000,000"),
        ("adamw", "float32", "32,000,000"),
        ("adamw", "float32", "2000 x 256"),
    ]


def test_tasks_of_choices():
    def names(**choice):
        return [(task.rule.label, task.form.name, task.case.name) for task in plan.make_cuda_tasks(plan.Choice(**choice))]

    assert names(rules=[RULES["lion"]], cases=[one(77)], dtypes=[FLOAT64]) == [("lion", "float64", "77")]
    assert names(cases=[one(77)]) == [("adamw", "float32", "77")]
    assert names(formats=[FORMATS["q4"]]) == [("adamw", "q4", "1,000,000,000")]
    assert names(chains=["clip"]) == [("adamw clip", "float32", name) for name in ("1,000,000,000", "500 x 64x64")]
    assert {name for _, _, name in names(quick=True)} == {"4,000,000", "500 x 64x64", "2000 x 256"}
    everything = names(full=True)
    assert len(set(everything)) == len(everything)
    assert {label for label, _, _ in everything} >= {*RULES, *(f"adamw {name}" for name in CHAINS), "norm"}
    assert {form for _, form, _ in everything} == {form.name for form in FORMATS.values() if form != FLOAT64}


# ---- memory ---------------------------------------------------------------------------------------------------------------


def test_bytes_that_a_task_needs():
    assert bytes_needed(ADAMW, 1000, FLOAT32, []) == 1000 * (16 + 12)
    assert bytes_needed(ADAMW, 1 << 20, FORMATS["bf16"], []) == (1 << 20) * (4 + 8 + 16 + 12)
    assert bytes_needed(whole("full"), 1000, FLOAT32, []) == 1000 * (20 + 12)
    own = cuda_contenders()
    assert bytes_needed(ADAMW, 1000, FLOAT32, [own["bitsandbytes"], own["bitsandbytes-8bit"]]) == 1000 * (16 + 12 + 8)
    extra = bytes_needed(ADAMW, 1 << 20, FORMATS["q8"], [own["torchao-8bit"]]) - bytes_needed(ADAMW, 1 << 20, FORMATS["q8"], [])
    assert extra == (1 << 20) * (2 + 2 * 4 / 256)


@pytest.mark.parametrize(
    ("available", "size"),
    [(28e9, 10**9), (27.9e9, 990_000_000), (3e9, 100_000_000), (1e4, 350), (100.0, 3), (0.0, 0), (-1.0, 0)],
)
def test_largest_tensor_that_there_is_room_for(available, size):
    assert largest(lambda elements: 28 * elements, 10**9, available) == size


def test_one_tensor_is_reduced_and_others_are_not():
    place = HostGpu()
    place.free = 30e6
    task = plan.Task(ADAMW, FLOAT32, one(10**9), (1,))
    assert place.fitted(task, []).case == one(960_000)
    assert place.fitted(plan.Task(ADAMW, FLOAT32, one(1000), (1,)), []).case == one(1000)
    many = plan.Task(ADAMW, FLOAT32, MANY[0], (1,))
    assert place.fitted(many, []) is many
    place.free = 0.0
    assert place.fitted(task, []) is task  # and the session says how much it would take


def test_copy_takes_its_memory_once():
    copy = DeviceCopy(1 << 10)
    assert copy.wanted == 2 << 10
    made = Problem(ADAMW, ((5,),), FLOAT32, MEMORY)
    step = copy.prepare(made).step
    assert copy.wanted == 0
    assert copy.prepare(made).step() is step()
    assert torch.equal(*copy._buffers)
    assert copy.moved_bytes(ADAMW, ((5,),), FLOAT32) == 2 << 10


@pytest.mark.parametrize("form", FORMATS.values(), ids=str)
def test_arrays_of_a_problem_are_tensors(form):
    made = Problem(ADAMW, ((5000,), (7, 3), ()), form, MEMORY)
    tensors = [*made.params, *made.grads, *(tensor for state in made.state for tensor in state.values())]
    assert all(isinstance(tensor, torch.Tensor) for tensor in tensors)
    assert {str(tensor.dtype) for tensor in made.params} == {f"torch.{form.dtype}"}
    assert all((tensor.data_ptr() - made.params[0].data_ptr()) % 512 == 0 for tensor in made.params)
    assert all(as_numpy(tensor).any() for tensor in (*made.params, *made.grads))
    if form.dtype != "bfloat16":
        assert (as_numpy(made.params[0]) == Problem(ADAMW, ((5000,), (7, 3), ()), form).params[0]).all()
    before = made.grads[0].clone()
    made.fill_grads(1)
    assert not torch.equal(made.grads[0], before)
    made.set_grad(1, as_numpy(made.grads[1]).astype("float64") * 0 + 0.5)
    assert (made.grads[1] == 0.5).all()


# ---- the clock ------------------------------------------------------------------------------------------------------------


def test_events_stand_around_a_block():
    cuda = FakeCuda()

    def step():
        cuda.now += 0.002

    times = CudaClock(cuda).block(Run(step, list), 10)
    assert times.seconds == pytest.approx(0.02)
    assert times.wall > 0
    assert cuda.events == 2


def test_time_before_calls_does_not_count():
    cuda = FakeCuda()

    def spend(seconds):
        cuda.now += seconds

    made = Run(functools.partial(spend, 0.002), list, before=functools.partial(spend, 5.0))
    assert CudaClock(cuda).block(made, 10).seconds == pytest.approx(0.02)
    assert cuda.now > 50


# ---- contenders -----------------------------------------------------------------------------------------------------------

torch_contenders = pytest.mark.parametrize("name", ["gradstep-torch", "torch-loop", "torch-foreach", "torch-fused"])


@torch_contenders
@pytest.mark.parametrize("rule", ["adamw", "amsgrad", "sgd-momentum", "lamb"])
def test_contenders_agree_with_the_formula(name, rule):
    assert check(cuda_contenders()[name], RULES[rule], FLOAT32, MEMORY) is None


@torch_contenders
@pytest.mark.parametrize("step", ["full", "unscale-clip", "norm"])
def test_contenders_agree_with_the_whole_step(name, step):
    if (name, step) == ("torch-fused", "norm"):
        pytest.skip("torch has no fused norm")
    assert check(cuda_contenders()[name], whole(step), FLOAT32, MEMORY) is None


@pytest.mark.parametrize("form", [form for form in FORMATS.values() if not form.plain], ids=str)
def test_gradstep_agrees_in_each_format(form):
    assert check(TorchClass(), ADAMW, form, MEMORY) is None


def test_gate_catches_what_is_wrong():
    class WrongClass(Wrong):
        face = "gradstep-torch"

    assert "is off by" in check(WrongClass(lr=0.051), ADAMW, FLOAT32, MEMORY)
    assert "is off by" in check(WrongClass(lr=0.6), ADAMW, FORMATS["bf16"], MEMORY)


def played(steps):
    """Return what takes the place of a capture: it takes `steps` before, and the step is its own replay."""

    def capture(step, before):
        for _ in range(steps):
            before()
            step()
        return step

    return capture


@pytest.mark.parametrize("step", ["", "unscale-clip"])
def test_steps_before_a_capture_count(step, monkeypatch):
    graph = GradstepGraph(TorchClass(), "gradstep-graph")
    rule = whole(step) if step else ADAMW
    monkeypatch.setattr(in_graph, "capture", played(WARM_UPS))
    assert check(graph, rule, FLOAT32, MEMORY) is None
    monkeypatch.setattr(in_graph, "capture", played(WARM_UPS - 1))
    assert "is off by" in check(graph, rule, FLOAT32, MEMORY)


def test_graphs_are_not_for_everything(monkeypatch):
    monkeypatch.setattr(in_graph, "capture", played(WARM_UPS))
    ours, torchs = cuda_contenders()["gradstep-graph"], cuda_contenders()["torch-fused-graph"]
    assert isinstance(torchs, TorchGraph)
    assert (ours.face, torchs.peer) == ("gradstep-graph", "gradstep-graph")
    with pytest.raises(UnsupportedError, match="up to 64,000,000 elements"):
        ours.prepare(types.SimpleNamespace(params=[torch.empty(64_000_001, device="meta")]))
    for contender, step in ((ours, "stats"), (torchs, "ema"), (ours, "norm")):
        with pytest.raises(UnsupportedError, match="the host"):
            check(contender, whole(step), FLOAT32, MEMORY)


def test_what_is_captured_keeps_its_numbers_on_the_device():
    made = Problem(ADAMW, ((5,),), FLOAT32, MEMORY)
    seen = {}

    class Watching(torch.optim.AdamW):
        def __init__(self, params, capturable=False, **settings):
            seen["capturable"] = capturable
            super().__init__(params, capturable=capturable, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim, "AdamW", Watching)
        TorchOptim("fused", "", capturable=True).prepare(made)
        assert seen["capturable"]
        TorchOptim("fused", "").prepare(made)
        assert not seen["capturable"]
    TorchOptim("fused", "", capturable=True).prepare(Problem(RULES["sgd"], ((5,),), FLOAT32, MEMORY))  # it has no such keyword


def installed_as(monkeypatch, package, module, **classes):
    """Put classes in the place of a package's module."""
    monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
    monkeypatch.setitem(sys.modules, module, types.SimpleNamespace(**classes))


class DecaysLast(torch.optim.AdamW):
    """Decays the parameter after the update, as some versions of bitsandbytes do."""

    def step(self):
        for group in self.param_groups:
            decay, group["weight_decay"] = group["weight_decay"], 0.0
            super().step()
            group["weight_decay"] = decay
            for param in group["params"]:
                param.detach().mul_(1 - group["lr"] * decay)


@pytest.mark.parametrize("last", [True, False])
def test_bitsandbytes_is_held_to_its_own_order(last, monkeypatch):
    contender, optimizer = cuda_contenders()["bitsandbytes"], DecaysLast if last else torch.optim.AdamW
    installed_as(monkeypatch, "bitsandbytes", "bitsandbytes.optim", AdamW=optimizer)
    assert check(contender, ADAMW, FLOAT32, MEMORY) is None
    assert bool(contender.note(ADAMW, 1)) == last
    wrong = functools.partial(optimizer, betas=(0.8, 0.91))
    installed_as(
        monkeypatch, "bitsandbytes", "bitsandbytes.optim", AdamW=lambda params, **given: wrong(params, **given | wrong.keywords)
    )
    assert "is off by" in check(contender, ADAMW, FLOAT32, MEMORY)
    for rule, form, reason in ((RULES["adam"], FLOAT32, "adamw only"), (ADAMW, FORMATS["q8"], "states of float32")):
        with pytest.raises(UnsupportedError, match=reason):
            check(contender, rule, form, MEMORY)


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("bitsandbytes-8bit", "q8"),
        ("bitsandbytes-8bit", "bf16-q8"),
        ("torchao-8bit", "q8"),
        ("torchao-4bit", "q4"),
        ("torchao-fp8", "q8"),
    ],
)
def test_contenders_with_states_of_few_bits(name, form, monkeypatch):
    contender = cuda_contenders()[name]
    kind = {"8bit": "AdamW8bit", "4bit": "AdamW4bit", "fp8": "AdamWFp8"}[name.split("-")[1]]
    installed_as(monkeypatch, contender.package, f"{contender.package}.optim", **{kind: torch.optim.AdamW})
    assert check(contender, ADAMW, FORMATS[form], MEMORY) is None
    with pytest.raises(UnsupportedError, match="states of q"):
        check(contender, ADAMW, FLOAT32, MEMORY)


def test_apex(monkeypatch, tmp_path):
    class FusedAdam(torch.optim.AdamW):
        def __init__(self, params, adam_w_mode, **settings):
            assert adam_w_mode
            super().__init__(params, **settings)

    installed_as(monkeypatch, "apex", "apex.optimizers", FusedAdam=FusedAdam)
    assert check(ApexAdam(), ADAMW, FLOAT32, MEMORY) is None
    assert check(ApexAdam(), whole("unscale-clip"), FLOAT32, MEMORY) is None
    for rule, form, reason in ((RULES["lion"], FLOAT32, "no lion"), (ADAMW, FLOAT64, "float64"), (ADAMW, FORMATS["q8"], "q8")):
        with pytest.raises(UnsupportedError, match=reason):
            check(ApexAdam(), rule, form, MEMORY)
    monkeypatch.delitem(sys.modules, "apex")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").touch()  # another package of that name
    assert not ApexAdam().installed()
    (tmp_path / "apex" / "optimizers").mkdir()
    assert ApexAdam().installed()


# ---- the command ----------------------------------------------------------------------------------------------------------


def test_command_writes_records(gpu, tmp_path, capsys):
    figures = tmp_path / "figures.json"
    chosen = ["--size", "1000", "--case", "500x64x64", "--contender", "torch-fused", "--json", figures]
    assert run("bench", "--device", "cuda", "--quick", *chosen) == 0
    shown = capsys.readouterr().out
    assert "adamw, float32, 1,000 elements, GPU, 28 bytes a parameter" in shown
    assert "by the host" in shown
    assert "thread" not in shown.split("Share of the limit")[0]
    document = json.loads(figures.read_text())
    assert document["machine"]["gpu"] == {"name": "none"}
    assert document["command"].startswith("python -m gradstep bench --device cuda")
    names = [(record["case"], record["contender"]) for record in document["records"]]
    assert names == [(case, name) for case in ("500 x 64x64", "1,000") for name in ("copy", "gradstep-torch", "torch-fused")]
    assert {record["device"] for record in document["records"]} == {"cuda"}
    copy, ours, other = document["records"][3:]
    assert (copy["bytes"], ours["bytes"], other["bytes"]) == (2 << 16, 28_000, 28_000)
    assert ours["share_of_limit"] == pytest.approx(28_000 / ours["median"] / (copy["bytes"] / copy["median"]))
    assert all(record["wall"] > 0 for record in document["records"])
    assert other["peer"] == "gradstep-torch"
    assert other["speed_up"] == {"gradstep-torch": pytest.approx(other["median"] / ours["median"])}
    assert document["notes"] == document["failures"] == []


def test_command_says_what_was_reduced(gpu, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(HostGpu, "free", 30e3)
    figures = tmp_path / "figures.json"
    chosen = ["--size", "1e9", "--case", "2000x256", "--contender", "gradstep-torch", "--json", figures]
    assert run("bench", "--device", "cuda", "--quick", *chosen) == 0
    said = "adamw float32, 1,000,000,000 elements: reduced to 960, for which the free memory has room"
    assert said in " ".join(capsys.readouterr().out.split())
    document = json.loads(figures.read_text())
    assert document["notes"] == [said]
    assert {record["elements"] for record in document["records"]} == {960}
    (skip,) = document["left_out"]
    assert skip["case"] == "2000 x 256"
    assert "GB of memory" in skip["reason"]


def test_command_measures_whole_steps_and_formats(gpu, capsys):
    assert (
        run("bench", "--device", "cuda", "--quick", "--chain", "unscale-clip", "--size", "5000", "--contender", "torch-fused")
        == 0
    )
    shown = capsys.readouterr().out
    assert "adamw unscale-clip, float32, 5,000 elements, GPU, 32 bytes a parameter" in shown
    assert "gradstep-torch off" in shown
    assert (
        run("bench", "--device", "cuda", "--quick", "--format", "bf16", "--size", "5000", "--contender", "gradstep-torch") == 0
    )
    shown = capsys.readouterr().out
    assert "adamw, bf16, 5,000 elements, GPU, 22 bytes a parameter" in shown
    assert "distance from float64" in shown


def test_command_ends_in_time(gpu, capsys):
    assert (
        run("bench", "--device", "cuda", "--quick", "--seconds", "1e-9", "--size", "1000", "--contender", "gradstep-torch") == 0
    )
    assert "seconds were over" in capsys.readouterr().out


def test_graphs_that_can_not_be_captured_are_reported(gpu, capsys):
    assert run("bench", "--device", "cuda", "--quick", "--size", "1000", "--contender", "torch-fused-graph") == 1
    assert "FAILED: torch-fused-graph, adamw float32: failed:" in capsys.readouterr().out


def test_list(capsys):
    assert run("bench", "--device", "cuda", "--list") == 0
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in ("copy", *cuda_contenders()))
    assert "no math" not in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--threads", "2"], "--threads is for the CPU: leave it out, or --device cuda"),
        (["--isa", "all"], "--isa is for the CPU"),
        (["--plot", "x.png"], "--plot is for the CPU"),
        (["--contender", "numpy"], "--contender: there is no 'numpy'"),
        (["--seconds", "0"], "--seconds must be above 0, got 0"),
    ],
)
def test_bad_options_are_refused(arguments, message, gpu, capsys):
    assert run("bench", "--device", "cuda", *arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("name", "where"), [("apex", "see github.com/NVIDIA/apex"), ("torchao-8bit", "pip install torchao")])
def test_contender_that_is_not_installed(name, where, gpu, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, cuda_contenders()[name].package, None)
    assert run("bench", "--device", "cuda", "--contender", name) == 2
    assert f"contender {name} is not installed: {where}" in capsys.readouterr().err


def test_where_there_is_no_gpu(monkeypatch, capsys):
    def refused(reason):
        assert missing() == reason
        assert run("bench", "--device", "cuda") == 2
        return capsys.readouterr().err.strip().endswith(f"--device cuda: {reason}")

    monkeypatch.setattr(torch.version, "cuda", None)
    assert refused(f"torch {torch.__version__} is built without CUDA")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert refused(f"torch {torch.__version__} finds no CUDA device, or no driver for one")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)

    def describe(device):
        raise RuntimeError("the driver is too old")

    monkeypatch.setattr("gradstep.cuda.describe", describe)
    assert refused("the driver is too old")
    monkeypatch.setattr("gradstep.cuda.describe", lambda device: "a GPU")
    assert missing() == ""
    monkeypatch.setitem(sys.modules, "torch", None)
    assert refused("the benchmarks on a GPU need torch, which is not installed")


def test_what_is_told_of_the_device(monkeypatch):
    def smi(command, **_):
        assert command[1] == "--id=GPU-7"
        return types.SimpleNamespace(stdout="580.1, 1980, 3201, 1980, 3201, 92.50, 700.00, 41\n")

    told = ask_smi(smi, "GPU-7")
    assert (told["driver_version"], told["clocks.sm"], told["temperature.gpu"]) == ("580.1", "1980", "41")
    for error in (
        FileNotFoundError(),
        subprocess.CalledProcessError(9, "nvidia-smi"),
        subprocess.TimeoutExpired("nvidia-smi", 10),
    ):

        def broken(*_, error=error, **__):
            raise error

        assert ask_smi(broken) == {}
    assert ask_smi(lambda *_, **__: types.SimpleNamespace(stdout="No devices were found\n")) == {}
    properties = types.SimpleNamespace(name="X", total_memory=5, multi_processor_count=3, L2_cache_size=2, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr("gradstep.cuda.describe", lambda device: "in a line")
    gpu = Cuda().describe()["gpu"]
    assert gpu.keys() == {
        "name", "total_memory", "multi_processor_count", "L2_cache_size", "compute_capability", "cuda_runtime", "nvidia_smi", "gradstep",
    }  # fmt: skip
    assert (gpu["compute_capability"], gpu["gradstep"]) == ("9.0", "in a line")


def test_case_of_many_tensors_shows_the_time_of_the_host():
    from gradstep.bench.measure import Blocks
    from gradstep.bench.records import make_records
    from gradstep.bench.tables import case_table, summary_table

    copy, ours = DeviceCopy(1000), TorchClass()
    task = plan.Task(ADAMW, FLOAT32, Case("2 x 5", "many", ((5,), (5,))), (1,))
    blocks = {copy: Blocks(1, [1e-6], [2e-6]), ours: Blocks(1, [4e-6, 4e-6], [5e-6, 7e-6])}
    records = make_records(task, 1, blocks, "cuda")
    assert [record.wall for record in records] == [pytest.approx(2e-6), pytest.approx(6e-6)]
    assert records[1].share_of_limit == pytest.approx(280 / 4e-6 / (2000 / 1e-6))
    shown = case_table(records)
    assert shown.header[:3] == ("", "time a step", "by the host")
    assert shown.rows[1][:3] == ("gradstep-torch", "4 us", "6 us")
    assert summary_table(records).rows[0][:2] == ("adamw float32, 2 x 5", "GPU")
