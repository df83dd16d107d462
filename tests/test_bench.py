"""The benchmarks' command: what it measures, prints, writes and refuses."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys

import numpy as np
import pytest

import gradstep
from gradstep import config
from gradstep.bench import session
from gradstep.bench.chains import CHAINS
from gradstep.bench.contenders import LIMIT, contenders
from gradstep.bench.formats import FORMATS
from gradstep.bench.options import _contenders
from gradstep.bench.rules import RULES

from .bench_cases import run

TINY = ["bench", "--quick", "--size", "1000,3000", "--threads", "1", "--contender", "gradstep,numpy"]


def test_bench_writes_figures_and_a_picture(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    figures, picture = tmp_path / "figures.json", tmp_path / "picture.png"
    assert run(*TINY, "--json", figures, "--plot", picture) == 0
    shown = capsys.readouterr().out
    assert "adamw, float32, 1,000 elements, 1 thread, 28 bytes a parameter" in shown
    document = json.loads(figures.read_text())
    assert document.keys() == {
        "format", "date", "command", "machine", "versions", "config", "effort", "settings", "formats", "chains", "records",
        "distances", "notes", "failures", "left_out",
    }  # fmt: skip
    assert document["format"] == 3
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
            "contender", "rule", "chain", "dtype", "case", "kind", "tensors", "elements", "device", "threads", "note", "blocks",
            "calls", "median", "quartiles", "range", "wall", "spread", "bytes", "ns_per_parameter", "gb_per_s", "share_of_limit",
            "peer", "speed_up",
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
    monkeypatch.setattr(session, "check", lambda contender, *_: "too wrong" if contender.name == "numpy" else None)
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
