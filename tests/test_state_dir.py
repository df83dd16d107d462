"""States in memory-mapped files: the same bits as in memory, and after a restart."""

from __future__ import annotations

import copy
import mmap
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gradstep
from gradstep.state_files import folder as folders

from .cases import Case
from .saving_cases import (
    ADAMW,
    HAS_TORCH,
    NUMPY,
    OPTIONS,
    Numpy,
    assert_all_same,
    each_case,
    each_format,
    each_option,
    each_order,
    each_rule,
    faces,
    in_order,
)
from .stage_cases import case_of
from .state_dir_cases import check_goes_on, in_files, opened, some


@faces
@each_case
def test_every_rule(face: Numpy, case: Case, tmp_path: Path) -> None:
    for dtype in ("float32", "float64"):
        check_goes_on(face, tmp_path / "states", case, {}, dtype)


@faces
@each_option
@each_rule
def test_every_option(face: Numpy, rule: str, name: str, tmp_path: Path) -> None:
    check_goes_on(face, tmp_path / "states", case_of(rule), OPTIONS[name])


@faces
@each_format
@each_rule
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


@each_order
def test_layouts_of_parameters(order: str, tmp_path: Path) -> None:
    p, q = in_order(order), in_order(order)
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
