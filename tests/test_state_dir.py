"""States in memory-mapped files: the same bits as in memory, and after a restart; folders that can't be gone on with are refused."""

from __future__ import annotations

import copy
import json
import mmap
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gradstep
from gradstep.state_files import folder as folders

from .cases import Case
from .child import ROOT, run_in_child
from .saving_cases import (
    ADAMW,
    ALL_CASES,
    FORMATS,
    HAS_TORCH,
    OPTIONS,
    RULES,
    Numpy,
    assert_all_same,
    case_options,
    faces,
    without_permission,
)
from .stage_cases import case_of, step_arguments

posix = pytest.mark.skipif(os.name == "nt", reason="needs POSIX")
NUMPY = Numpy()

KILLS = int(os.environ.get("GRADSTEP_KILLS", "20"))
"""How many times a process that steps and flushes is killed."""


def in_files(opt: Any, folder: Path) -> None:
    """Assert that every array of a state is all of a file in `folder`, and no file is left over."""
    found = set()
    for state in opt.state.values():
        for name, value in state.items():
            if name != "step" and hasattr(value, "shape") and 0 not in value.shape:
                placed = opt._placed_at(opt._work, value)
                assert placed is not None, name
                found.add(placed.file.name)
    assert {path.name for path in folder.glob("*.state")} == found


def check_goes_on(face: Numpy, folder: Path, case: Case, options: dict[str, Any], dtype: str = "float32") -> None:
    """Two steps, flush, two steps, close; open and take two more: all as in memory."""
    of_constructor, _, _ = step_arguments(case_options(case, options))
    params, others = face.params(dtype=dtype), face.params(dtype=dtype)
    expected = face.make(case, params, **of_constructor)
    opt = face.make(case, others, **of_constructor, state_dir=folder)
    for o, p in ((expected, params), (opt, others)):
        face.step(o, p, (1, 2), options)
    assert_all_same(face, expected, params, opt, others)
    opt.flush()
    in_files(opt, folder)
    for o, p in ((expected, params), (opt, others)):
        face.step(o, p, (3, 4), options)
    opt.close()
    resumed = face.make(case, others, **of_constructor, state_dir=folder)
    in_files(resumed, folder)
    assert_all_same(face, expected, params, resumed, others)
    for o, p in ((expected, params), (resumed, others)):
        face.step(o, p, (5, 6), options)
    assert_all_same(face, expected, params, resumed, others)
    in_files(resumed, folder)
    resumed.close()
    shutil.rmtree(folder)


@faces
@pytest.mark.parametrize("case", ALL_CASES, ids=lambda case: case.name)
def test_every_rule(face: Numpy, case: Case, tmp_path: Path) -> None:
    for dtype in ("float32", "float64"):
        check_goes_on(face, tmp_path / "states", case, {}, dtype)


@faces
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("rule", RULES)
def test_every_option(face: Numpy, rule: str, name: str, tmp_path: Path) -> None:
    check_goes_on(face, tmp_path / "states", case_of(rule), OPTIONS[name])


@faces
@pytest.mark.parametrize("kind", FORMATS, ids=lambda kind: "-".join([kind[0], *map(str, kind[1].values())]))
@pytest.mark.parametrize("rule", RULES)
def test_every_format(face: Numpy, rule: str, kind: tuple[str, dict[str, Any]], tmp_path: Path) -> None:
    for options in ({}, OPTIONS["a usual step"]):
        check_goes_on(face, tmp_path / "states", case_of(rule), {**options, **kind[1]}, kind[0])


@faces
def test_groups(face: Numpy, tmp_path: Path) -> None:
    params = face.params()

    def make() -> Any:
        groups = [{"params": params[:3], "ema_decay": 0.9}, {"params": params[3:], "lr": 0.5}]
        return face.make(ADAMW, groups, state_dir=tmp_path / "states")

    opt = make()
    face.step(opt, params, (1, 2), {})
    opt.close()
    resumed = make()
    assert_all_same(face, opt, params, resumed, params)
    assert [group["lr"] for group in resumed.param_groups] == [group["lr"] for group in opt.param_groups]


def test_a_group_that_is_added(tmp_path: Path) -> None:
    a, b = np.ones(3, np.float32), np.ones(4, np.float32)
    opt = gradstep.AdamW({"a": a}, state_dir=tmp_path)
    opt.step({"a": a / 2})
    opt.flush()
    opt.add_param_group({"params": {"b": b}})
    opt.step([{"a": a / 2}, {"b": b / 2}])
    opt.close()
    in_files(opt, tmp_path)
    with pytest.raises(ValueError, match="has states of 2 parameters, there are 1"):
        gradstep.AdamW({"a": a}, state_dir=tmp_path)
    resumed = gradstep.AdamW([{"params": {"a": a}}, {"params": {"b": b}}], state_dir=tmp_path)
    assert (resumed.steps, resumed.state["a"]["step"], resumed.state["b"]["step"]) == (2, 2, 1)


@pytest.mark.parametrize("order", ["F", "reversed axes", "columns"])
def test_layouts_of_parameters(order: str, tmp_path: Path) -> None:
    base = np.linspace(-1, 1, 2 * 34 * 70, dtype=np.float32)

    def make() -> Any:
        if order == "F":
            return np.asfortranarray(base.reshape(34, 140))
        if order == "columns":
            return base.copy().reshape(34, 140)[:, 3:50:2]
        return base.copy().reshape(2, 34, 70).transpose(2, 0, 1)

    p, q = make(), make()
    expected, opt = gradstep.AdamW([p]), gradstep.AdamW([q], state_dir=tmp_path)
    for o, x in ((expected, p), (opt, q)):
        o.step([x / 2])
    assert opt.state[0]["exp_avg"].strides == expected.state[0]["exp_avg"].strides
    opt.close()
    opt = gradstep.AdamW([q], state_dir=tmp_path)
    assert opt.state[0]["exp_avg"].strides == expected.state[0]["exp_avg"].strides
    for o, x in ((expected, p), (opt, q)):
        o.step([x / 2])
    assert_all_same(NUMPY, expected, [p], opt, [q])
    opt.close()
    other = np.ascontiguousarray(q)  # laid out otherwise now: elements are found where they are
    opt = gradstep.AdamW([other], state_dir=tmp_path)
    opt.step([other / 2])
    expected.step([p / 2])
    assert np.array_equal(other, p) and np.array_equal(opt.state[0]["exp_avg"], expected.state[0]["exp_avg"])


# ---- life of a folder -------------------------------------------------------------------------------------------------------


def some() -> dict[str, Any]:
    return {"a": np.linspace(0.5, 1.5, 30, dtype=np.float32), "b": np.ones((3, 4), np.float32)}


def opened(path: Path, steps: int = 0, **options: Any) -> Any:
    opt = gradstep.AdamW(some(), **options, state_dir=path)
    for _ in range(steps):
        opt.step(some())
    return opt


def manifest(path: Path) -> Any:
    return json.loads((path / "manifest.json").read_text())["contents"]


def test_what_lies_in_a_folder(tmp_path: Path) -> None:
    """What docs/checkpoints.md says."""
    path = tmp_path / "states"
    opt = opened(path)
    assert sorted(p.name for p in path.iterdir()) == ["lock", "manifest.json"] and manifest(path)["clean"]
    opt.step(some())
    assert not manifest(path)["clean"]
    files = sorted(p.name for p in path.iterdir())
    assert files == ["000000.state", "000001.state", "000002.state", "000003.state", "lock", "manifest.json"]
    opt.flush()
    contents = manifest(path)
    assert contents["clean"] and contents["steps"] == 1 and contents["optimizer"] == "AdamW"
    record = contents["params"][0]
    assert record["name"] == "a" and record["state"]["step"] == {"number": 1}
    of_file = record["state"]["exp_avg"]
    assert np.array_equal(np.fromfile(path / of_file["file"], np.float32), opt.state["a"]["exp_avg"])


def test_states_are_used_in_place(tmp_path: Path) -> None:
    opt = opened(tmp_path, 1)
    array = opt.state["a"]["exp_avg"]
    assert isinstance(array.base, mmap.mmap) and array.flags.writeable
    opt.step(some())
    assert opt.state["a"]["exp_avg"] is array
    opt.flush()
    assert opt.state["a"]["exp_avg"] is array


def test_steps_since_the_last_flush_are_lost_loudly(tmp_path: Path) -> None:
    opt = opened(tmp_path, 2)
    opt.flush()
    del opt
    opt = opened(tmp_path)
    assert opt.steps == opt.state["a"]["step"] == 2
    opt.step(some())
    del opt
    for _ in range(2):
        with pytest.raises(ValueError) as caught:
            opened(tmp_path)
        assert str(caught.value) == (
            f"AdamW: state_dir {tmp_path} was left in the middle: steps were taken since the last flush(), so its files belong "
            "to no step; delete it to start over, or to load a checkpoint into it"
        )


def test_opening_alone_changes_nothing(tmp_path: Path) -> None:
    opened(tmp_path, 2).close()
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    for _ in range(2):
        opt = opened(tmp_path)
        assert opt.steps == 2
        del opt
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_refused_step_changes_no_state(tmp_path: Path) -> None:
    opt = opened(tmp_path, 1)
    before = copy.deepcopy(opt.state)
    for grads in ({"a": np.ones(30, np.int32), "b": None}, {"a": np.ones(31, np.float32), "b": None}):
        with pytest.raises((TypeError, ValueError)):
            opt.step(grads)
    opt.close()
    resumed = opened(tmp_path)
    for key, state in before.items():
        for name, value in state.items():
            assert np.array_equal(resumed.state[key][name], value)


def test_files_of_a_refused_first_step_are_removed(tmp_path: Path) -> None:
    opt = opened(tmp_path)
    with pytest.raises(ValueError, match="shape"):
        opt.step({"a": some()["a"], "b": np.ones(5, np.float32)})
    assert not opt.state
    opt.step(some())
    opt.flush()
    in_files(opt, tmp_path)


def test_a_skipped_step(tmp_path: Path) -> None:
    opt = opened(tmp_path, 1, on_nonfinite="skip")
    opt.step({"a": np.full(30, np.nan, np.float32), "b": None})
    opt.close()
    assert opened(tmp_path).steps == 1


def test_one_optimizer_at_a_time(tmp_path: Path) -> None:
    opt = opened(tmp_path, 1)
    opt.flush()
    message = f"AdamW: state_dir {tmp_path} is in use by another optimizer, of this process or another; close() ends that"
    with pytest.raises(RuntimeError) as caught:
        opened(tmp_path)
    assert str(caught.value) == message
    code = f"import tests.test_state_dir as t; from pathlib import Path; t.opened(Path({str(tmp_path)!r}))"
    child = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert message in child.stderr
    opt.close()
    assert opened(tmp_path).steps == 1


def test_a_closed_folder_takes_no_steps(tmp_path: Path) -> None:
    opt = opened(tmp_path, 1, ema_decay=0.9)
    opt.close()
    p = copy.deepcopy(opt.param_groups[0]["params"])
    for call in (lambda: opt.step(some()), opt.flush, opt.close, opt.swap_ema):
        with pytest.raises(RuntimeError, match=f"AdamW: state_dir {tmp_path} is closed"):
            call()
    assert all(np.array_equal(x, y) for x, y in zip(p, opt.param_groups[0]["params"], strict=True))
    assert opened(tmp_path).steps == 1


def test_without_a_folder(tmp_path: Path) -> None:
    opt = gradstep.AdamW(some())
    for function in ("flush", "close"):
        with pytest.raises(RuntimeError) as caught:
            getattr(opt, function)()
        assert str(caught.value) == f"AdamW.{function}: there is no state_dir; save(path) writes a checkpoint"
    assert gradstep.AdamW(some(), state_dir=None).state == {}


def test_a_fork_of_the_process(tmp_path: Path) -> None:
    run_in_child(step_in_a_fork, str(tmp_path))


def step_in_a_fork(path: str) -> None:
    if not hasattr(os, "fork"):
        return
    opt = opened(Path(path), 1)
    child = os.fork()
    if child == 0:
        try:
            opt.step(some())
        except RuntimeError as error:
            os._exit(0 if f"belongs to process {os.getppid()}" in str(error) else 2)
        os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    opt.step(some())
    opt.close()


@pytest.mark.parametrize("how", ["pickle", "deepcopy", "state_dict"])
def test_copies_are_in_memory(how: str, tmp_path: Path) -> None:
    opt = opened(tmp_path, 2)
    if how == "state_dict":
        twin = gradstep.AdamW(some())
        twin.load_state_dict(opt.state_dict())
    else:
        twin = pickle.loads(pickle.dumps(opt)) if how == "pickle" else copy.deepcopy(opt)
    assert twin._work is None
    before = opt.state["a"]["exp_avg"].copy()
    twin.step(some())
    assert np.array_equal(opt.state["a"]["exp_avg"], before) and opt.steps == 2
    opt.close()
    assert opened(tmp_path).steps == 2


def test_states_that_are_replaced_are_put_into_files(tmp_path: Path) -> None:
    opt = opened(tmp_path, 1)
    other = gradstep.AdamW(some(), ema_decay=0.5)
    for _ in range(3):
        other.step(some())
    opt.load_state_dict(other.state_dict())
    opt.state["b"]["exp_avg"] = opt.state["b"]["exp_avg"].copy()[::-1].copy()[::-1]
    opt.close()
    in_files(opt, tmp_path)
    resumed = opened(tmp_path)
    assert resumed.steps == 3 and resumed.state["a"]["ema_count"] == 3
    for key, state in other.state.items():
        for name, value in state.items():
            assert np.array_equal(resumed.state[key][name], value), (key, name)


def test_averages_in_the_place_of_parameters(tmp_path: Path) -> None:
    """An exchange writes into the files: until the next flush they belong to no step."""
    opt = opened(tmp_path, 2, ema_decay=0.5)
    opt.flush()
    ema = opt.ema["a"].copy()
    with opt.averaged():
        assert np.array_equal(opt.param_groups[0]["params"][0], ema)
        assert not manifest(tmp_path)["clean"]
    assert np.array_equal(opt.ema["a"], ema)
    opt.close()
    assert np.array_equal(opened(tmp_path, ema_decay=0.5).ema["a"], ema)


def test_paths_of_any_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    opt = opened(Path("here") / "and" / "there", 1)
    monkeypatch.chdir("/")
    opt.step(some())
    opt.close()
    assert opened(tmp_path / "here" / "and" / "there").steps == 2


@pytest.mark.parametrize("face", [gradstep, "torch"], ids=["numpy", "torch"])
def test_no_group_has_a_folder_of_its_own(face: Any, tmp_path: Path) -> None:
    if face == "torch":
        torch = pytest.importorskip("torch", reason="torch is not installed")
        import gradstep.torch

        face, make = gradstep.torch, lambda: torch.nn.Parameter(torch.ones(3))
    else:
        make = lambda: np.ones(3, np.float32)
    message = "state_dir holds for all groups together: the constructor takes it"
    with pytest.raises(TypeError, match=message):
        face.AdamW([{"params": [make()], "state_dir": tmp_path}])
    opt = face.AdamW([make()])
    with pytest.raises(TypeError, match=message):
        opt.add_param_group({"params": [make()], "state_dir": tmp_path})
    assert not list(tmp_path.iterdir())


# ---- folders that can't be gone on with ----------------------------------------------------------------------------------------


def refuse(path: Path, error: type[Exception], message: str, make: Any = None) -> None:
    """Assert that opening is refused, and leaves everything as it was."""
    before = {p.name: p.read_bytes() for p in path.iterdir() if p.is_file()}
    with pytest.raises(error) as caught:
        (make or (lambda: opened(path)))()
    assert message.format(path) in str(caught.value), str(caught.value)
    assert {p.name: p.read_bytes() for p in path.iterdir() if p.is_file()} == before


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (lambda: {"a": some()["a"]}, "AdamW: state_dir {} has states of 2 parameters, there are 1"),
        (
            lambda: {"b": some()["b"], "a": some()["a"]},
            "AdamW: state_dir {} has states of a parameter 'a' in the place of 'b'",
        ),
        (lambda: list(some().values()), "AdamW: state_dir {} has states of a parameter 'a' in the place of 0"),
        (
            lambda: {**some(), "b": np.ones((4, 3), np.float32)},
            "AdamW: state_dir {} has states for shape (3, 4) of params['b'], which has (4, 3)",
        ),
        (
            lambda: {**some(), "b": np.ones((3, 4))},
            "AdamW: state_dir {} has states for dtype float32 of params['b'], which has float64",
        ),
    ],
)
def test_parameters_that_do_not_fit(params: Any, message: str, tmp_path: Path) -> None:
    opened(tmp_path, 1).close()
    refuse(tmp_path, ValueError, message, lambda: gradstep.AdamW(params(), state_dir=tmp_path))


def test_another_class(tmp_path: Path) -> None:
    opened(tmp_path, 1).close()
    message = "Adam: state_dir {} has states of AdamW for numpy, not of Adam for numpy"
    refuse(tmp_path, ValueError, message, lambda: gradstep.Adam(some(), state_dir=tmp_path))


def test_something_else_lies_there(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("not to be lost")
    refuse(tmp_path, ValueError, "AdamW: state_dir {} has 'thesis.txt' and no manifest.json: it must be empty, or hold states")
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError):
        opened(tmp_path / "file")


def edit(path: Path, change: Any) -> None:
    text = json.loads((path / "manifest.json").read_text())
    change(text)
    (path / "manifest.json").write_text(json.dumps(text))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(kind="cake"), "is not gradstep's: it has 'cake', not 'gradstep states'"),
        (lambda m: m.update(version=2), "has version 2 of the format, this gradstep reads version 1"),
        (lambda m: m.pop("crc32"), "is damaged, or not gradstep's: its manifest.json can't be read"),
        (lambda m: m["contents"].update(steps=5), "is damaged: the checksum of its manifest.json is "),
        (lambda m: m["contents"]["params"][0]["state"].update(step={"number": 3}), "is damaged: the checksum"),
        (lambda m: m["contents"].update(clean=True, extra=1), "is damaged: the checksum"),
    ],
)
def test_manifests_that_can_not_be(change: Any, message: str, tmp_path: Path) -> None:
    opened(tmp_path, 1).close()
    edit(tmp_path, change)
    refuse(tmp_path, ValueError, f"AdamW: state_dir {{}} {message}")


def test_every_byte_of_a_manifest_counts(tmp_path: Path) -> None:
    opened(tmp_path, 1).close()
    path = tmp_path / "manifest.json"
    data = path.read_bytes()
    for at in range(len(data)):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        refuse(tmp_path, ValueError, "AdamW: state_dir {} ")
    for length in (0, 1, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        refuse(tmp_path, ValueError, "can't be read")


def test_files_that_are_missing_or_of_another_length(tmp_path: Path) -> None:
    opened(tmp_path, 1).close()
    path = tmp_path / "000001.state"
    data = path.read_bytes()
    for content in (data[:-1], data + b"\0", b""):
        path.write_bytes(content)
        refuse(tmp_path, ValueError, f"AdamW: state_dir {{}} has 000001.state with {len(content)} bytes, it should have 120")
    path.unlink()
    refuse(tmp_path, ValueError, "AdamW: state_dir {} has no 000001.state, which its manifest names")


# ---- errors of the disk ---------------------------------------------------------------------------------------------------------


@posix
def test_a_full_disk(tmp_path: Path) -> None:
    run_in_child(fill_a_disk, str(tmp_path))


def fill_a_disk(name: str) -> None:
    """Files may have 40,000 bytes at most: states of 10,000 numbers fit, those of 20,000 do not."""
    import resource

    path = Path(name)
    small, large = np.ones(10_000, np.float32), np.ones(20_000, np.float32)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, resource.RLIM_INFINITY))
    opt = gradstep.AdamW([small, large], state_dir=path / "states")
    before = large.copy()
    with pytest.raises(OSError, match="File too large"):
        opt.step([small / 2, large / 2])
    assert not opt.state and opt.steps == 0 and np.array_equal(before, large) and np.array_equal(small, large[:10_000])
    opt.step([small / 2, None])
    opt.close()
    in_files(opt, path / "states")
    resumed = gradstep.AdamW([small, large], state_dir=path / "states")
    assert resumed.steps == 1 and resumed.state.keys() == {0}
    resumed.close()
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
    with pytest.raises(OSError, match="File too large"):
        gradstep.AdamW([small], state_dir=path / "others")
    assert not (path / "others").exists()


@posix
def test_a_folder_that_can_not_be_written() -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o555)
        with without_permission(), pytest.raises(PermissionError):
            opened(Path(name) / "states")
        with without_permission(), pytest.raises(PermissionError):
            opened(Path(name))
        assert not list(Path(name).iterdir())
        Path(name).chmod(0o755)


def test_room_is_taken_without_fallocate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "posix_fallocate", raising=False)
    monkeypatch.setattr(folders, "_BLOCK", 100)
    check_goes_on(NUMPY, tmp_path / "states", ADAMW, {"ema_decay": 0.9})


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="needs posix_fallocate")
def test_room_is_taken_when_a_state_is_made(tmp_path: Path) -> None:
    w = np.ones(1_000_000, np.float32)
    opt = gradstep.SGD([w], lr=0.1, momentum=0.9, state_dir=tmp_path)
    opt.step([w / 2])
    assert (tmp_path / "000000.state").stat().st_blocks * 512 >= w.nbytes


SIZE = 300_000


def step_forever(path: str) -> None:
    """Steps of a gradient of ones; every third is flushed. `sum` is the number of the step."""
    w, ones = np.zeros(SIZE, np.float32), np.ones(SIZE, np.float32)
    opt = gradstep.Adagrad([w], state_dir=path)
    while True:
        opt.step([ones])
        if opt.steps % 3 == 0:
            opt.flush()
            print("flushed", flush=True)


@posix
def test_processes_that_are_killed(tmp_path: Path) -> None:
    """At random moments: the folder is that of a step, or it is refused."""
    rng = random.Random(7)
    path = tmp_path / "states"
    code = f"from {__name__} import step_forever; step_forever({str(path)!r})"
    outcomes = []
    for _ in range(KILLS):
        with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE) as child:
            assert child.stdout is not None
            assert child.stdout.readline()
            time.sleep(rng.uniform(0, 0.02))
            child.send_signal(signal.SIGKILL)
        try:
            opt = gradstep.Adagrad([np.zeros(SIZE, np.float32)], state_dir=path)
        except ValueError as error:
            outcomes.append(str(error).split(" was left in the middle")[0])
            shutil.rmtree(path)
        else:
            assert opt.steps == opt.state[0]["step"] and opt.steps % 3 == 0 and (opt.state[0]["sum"] == opt.steps).all()
            outcomes.append("gone on")
            del opt
    refused = f"Adagrad: state_dir {path}"
    assert refused in outcomes and set(outcomes) <= {refused, "gone on"}


# ---- reading ahead ----------------------------------------------------------------------------------------------------------------


def test_reading_ahead_is_in_the_order_of_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened(tmp_path, 1).close()
    asked: list[list[str]] = []
    monkeypatch.setattr(
        "gradstep.state_files.holder.read_ahead", lambda files: asked.append([file.name for of in files for file in of])
    )
    opt = opened(tmp_path)
    assert asked == []
    for _ in range(3):
        opt.step(some())
    assert asked == [["000000.state", "000001.state", "000002.state", "000003.state"]]


def test_reading_ahead_reads_all_of_small_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Memory:
        def __init__(self, length: int) -> None:
            self.length, self.asked = length, []  # type: ignore[var-annotated]

        def __len__(self) -> int:
            return self.length

        def madvise(self, advice: int, begin: int, length: int) -> None:
            assert advice == mmap.MADV_WILLNEED and begin % mmap.PAGESIZE == 0
            self.asked += range(begin, begin + length, mmap.PAGESIZE)

    class Thread:
        def __init__(self, target: Any, args: Any, daemon: bool) -> None:
            assert daemon
            self.start = lambda: target(*args)

    if not hasattr(mmap.mmap, "madvise"):
        pytest.skip("no madvise here")
    monkeypatch.setattr(folders.threading, "Thread", Thread)
    lengths = [[4096, 5_000_000], [1], [], [600_000, 600_000, 120]]
    files = [[folders.MappedFile("", Memory(length)) for length in each] for each in lengths]  # type: ignore[arg-type]
    folders.read_ahead(files)
    for file in (file for each in files for file in each):
        assert file.memory.asked == list(range(0, len(file.memory), mmap.PAGESIZE))  # type: ignore[attr-defined]


# ---- checkpoints into folders ---------------------------------------------------------------------------------------------------


@faces
@pytest.mark.parametrize("state_dtype", ["as it is", "q8", "bfloat16"])
def test_a_checkpoint_into_a_folder(face: Numpy, state_dtype: str, tmp_path: Path) -> None:
    params = face.params()
    opt = face.make(ADAMW, params, ema_decay=0.9)
    face.step(opt, params, (1, 2), {})
    opt.save(tmp_path / "a")
    given = {} if state_dtype == "as it is" else {"state_dtype": state_dtype}
    others, copies = face.copy(params), face.copy(params)
    in_memory = face.cls(ADAMW).load(tmp_path / "a", others, **given)
    mapped = face.cls(ADAMW).load(tmp_path / "a", copies, **given, state_dir=tmp_path / "states")
    in_files(mapped, tmp_path / "states")
    for o, p in ((in_memory, others), (mapped, copies)):
        face.step(o, p, (3, 4), {})
    assert_all_same(face, in_memory, others, mapped, copies)
    mapped.close()
    resumed = face.make(ADAMW, copies, ema_decay=0.9, **given, state_dir=tmp_path / "states")
    assert_all_same(face, in_memory, others, resumed, copies)
    resumed.save(tmp_path / "b")
    in_memory.save(tmp_path / "c")
    assert (tmp_path / "b").read_bytes() == (tmp_path / "c").read_bytes()


def test_a_checkpoint_into_a_folder_at_once_is_flushed(tmp_path: Path) -> None:
    opt = gradstep.AdamW(some())
    opt.step(some())
    opt.save(tmp_path / "a")
    loaded = gradstep.AdamW.load(tmp_path / "a", some(), state_dir=tmp_path / "states")
    del loaded
    assert opened(tmp_path / "states").steps == 1


def test_a_checkpoint_does_not_go_where_states_are(tmp_path: Path) -> None:
    opt = opened(tmp_path / "states", 1)
    opt.save(tmp_path / "a")
    opt.close()

    def load(folder: str) -> Any:
        return gradstep.AdamW.load(tmp_path / "a", some(), state_dir=tmp_path / folder)

    message = "AdamW.load: state_dir {} holds states already: it must be empty, or not there yet"
    refuse(tmp_path / "states", ValueError, message, lambda: load("states"))
    data = (tmp_path / "a").read_bytes()
    (tmp_path / "a").write_bytes(data[:-1] + b"\0")
    with pytest.raises(ValueError, match="is damaged"):
        load("others")
    assert not (tmp_path / "others").exists()
    (tmp_path / "a").write_bytes(data)
    (tmp_path / "others").mkdir()
    assert load("others").steps == 1


@posix
def test_a_checkpoint_into_a_full_disk(tmp_path: Path) -> None:
    run_in_child(load_into_a_full_disk, str(tmp_path))


def load_into_a_full_disk(name: str) -> None:
    import resource

    w = np.ones(20_000, np.float32)
    opt = gradstep.AdamW([w])
    opt.step([w / 2])
    opt.save(Path(name) / "a")
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, resource.RLIM_INFINITY))
    with pytest.raises(OSError, match="File too large"):
        gradstep.AdamW.load(Path(name) / "a", [w], state_dir=Path(name) / "states")
    assert [p.name for p in Path(name).iterdir()] == ["a"]


# ---- torch ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not HAS_TORCH, reason="torch is not installed")
def test_states_that_torch_makes_itself(tmp_path: Path) -> None:
    """Adagrad's: there before the first step."""
    import torch

    import gradstep.torch

    p = torch.nn.Parameter(torch.ones(3))
    opt = gradstep.torch.Adagrad([p], initial_accumulator_value=0.5, state_dir=tmp_path)
    in_files(opt, tmp_path)
    p.grad = torch.ones(3)
    opt.step()
    assert (opt.state[p]["sum"] == 1.5).all()
    opt.close()
    resumed = gradstep.torch.Adagrad([p], initial_accumulator_value=7.0, state_dir=tmp_path)
    assert (resumed.state[p]["sum"] == 1.5).all() and resumed.state[p]["step"] == 1


@pytest.mark.skipif(not HAS_TORCH, reason="torch is not installed")
def test_state_dicts_and_copies_of_tensors(tmp_path: Path) -> None:
    import io

    import torch

    import gradstep.torch

    p = torch.nn.Parameter(torch.linspace(0, 1, 5000))
    p.grad = torch.ones(5000)
    opt = gradstep.torch.AdamW([p], state_dtype={"exp_avg": "q8", "exp_avg_sq": "bfloat16"}, state_dir=tmp_path)
    opt.step()
    twin = copy.deepcopy(opt)
    assert twin._work is None and pickle.loads(pickle.dumps(opt))._work is None
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    q = torch.nn.Parameter(p.detach().clone())
    other = gradstep.torch.AdamW([q], state_dtype={"exp_avg": "q8", "exp_avg_sq": "bfloat16"})
    other.load_state_dict(torch.load(file))
    q.grad = torch.ones(5000)
    for o in (opt, other):
        o.step()
    assert torch.equal(p, q)
    for name, value in opt.state[p].items():
        assert torch.equal(value, other.state[q][name]) and value.dtype == other.state[q][name].dtype
    opt.load_state_dict(other.state_dict())
    opt.close()
    in_files(opt, tmp_path)


@pytest.mark.skipif(not HAS_TORCH, reason="torch is not installed")
@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_sparse_gradients(tmp_path: Path) -> None:
    import torch

    import gradstep.torch

    table = torch.nn.Embedding(10, 4, sparse=True)
    opt = gradstep.torch.Adagrad(table.parameters(), lr=0.1, state_dir=tmp_path)
    table(torch.tensor([1, 3, 3])).sum().backward()
    opt.step()
    opt.close()
    assert (opt.state[table.weight]["sum"][3] == 4).all() and opt.steps == 1
    resumed = gradstep.torch.Adagrad(table.parameters(), lr=0.1, state_dir=tmp_path)
    assert torch.equal(resumed.state[table.weight]["sum"], opt.state[table.weight]["sum"])
