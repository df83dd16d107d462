"""Files of checkpoints: whole or not at all, every byte checked, readable by others."""

from __future__ import annotations

import errno
import itertools
import os
import random
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gradstep
from gradstep import files
from gradstep.checkpoint import tensor_file
from gradstep.checkpoint.checksum import Checksum
from gradstep.checkpoint.tensor_file import Tensor, TensorFile, write

from .child import ROOT, run_in_child
from .saving_cases import posix, without_permission

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux")

KILLS = int(os.environ.get("GRADSTEP_KILLS", "20"))
"""How many times a process that saves is killed."""


def make(size: int = 5, value: float = 0.5) -> Any:
    opt = gradstep.AdamW({"w": np.ones(size, np.float32)}, lr=0.1)
    opt.step({"w": np.full(size, value, np.float32)})
    return opt


def load(path: Path, size: int = 5) -> Any:
    return gradstep.AdamW.load(path, {"w": np.ones(size, np.float32)})


# ---- damage -----------------------------------------------------------------------------------------------------------------


def refusal(path: Path) -> str:
    with pytest.raises(ValueError) as caught:
        load(path)
    message = str(caught.value)
    assert type(caught.value) is ValueError and message.startswith(f"AdamW.load: {path} ")
    return message.removeprefix(f"AdamW.load: {path} ")


def test_every_bit_of_every_byte_counts(tmp_path: Path) -> None:
    """Length of the header, header, checksums, padding, data."""
    path = tmp_path / "a"
    make().save(path)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    assert len(data) == 8 + length + 40  # two states of five float32
    with path.open("r+b", buffering=0) as file:
        for at in range(len(data)):
            for change in [*(1 << bit for bit in range(8)), 0xFF, 0]:
                file.seek(at)
                file.write(bytes([data[at] ^ change]))
                if change:
                    message = refusal(path)
                    assert at < 8 + length or message.startswith("is damaged: the checksum of its data is ")
    assert path.read_bytes() == data
    assert load(path).steps == 1


def test_every_length_but_the_right_one(tmp_path: Path) -> None:
    path = tmp_path / "a"
    make().save(path)
    data = path.read_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        assert refusal(path).startswith("is cut short")
    for more in (b"\0", data):
        path.write_bytes(data + more)
        assert refusal(path).startswith("is cut short or too long")


def test_parts_that_change_places(tmp_path: Path) -> None:
    path = tmp_path / "a"
    make(4000).save(path)
    data = path.read_bytes()
    begin = len(data) - 32_000
    path.write_bytes(data[:begin] + data[begin + 16_000 :] + data[begin : begin + 16_000])
    with pytest.raises(ValueError, match="is damaged: the checksum of its data"):
        load(path, 4000)


@pytest.mark.parametrize("content", [b"", b"\0" * 8, b"\2" + b"\0" * 7 + b"{}", b"PK\3\4" + b"\0" * 60, b"\xff" * 100])
def test_files_that_are_something_else(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(content)
    assert "cut short" in (message := refusal(tmp_path / "a")) or "no checkpoint of gradstep" in message


def test_files_of_others_in_the_same_layout(tmp_path: Path) -> None:
    library = pytest.importorskip("safetensors.numpy", reason="safetensors is not installed")
    for metadata in (None, {"format": "np"}):
        library.save_file({"w": np.ones(3)}, tmp_path / "a", metadata)
        assert refusal(tmp_path / "a") == "is damaged, or no checkpoint of gradstep: its header can't be read"


def test_another_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_file, "VERSION", "2")
    make().save(tmp_path / "a")
    monkeypatch.undo()
    assert refusal(tmp_path / "a") == "has version '2' of the format, this gradstep reads version '1'"
    monkeypatch.setattr(tensor_file, "_KIND", "cake")
    make().save(tmp_path / "a")
    monkeypatch.undo()
    assert refusal(tmp_path / "a") == "is no checkpoint of gradstep: its kind is 'cake', not 'gradstep optimizer'"


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "a")
    with pytest.raises((IsADirectoryError, PermissionError)):
        load(tmp_path)


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    make(4000).save(tmp_path / "a")
    with TensorFile(tmp_path / "a", "here") as file:
        os.truncate(tmp_path / "a", 20_000)
        with pytest.raises(ValueError, match="here: .* is cut short: it became shorter while it was read"):
            file.check()


# ---- layout -----------------------------------------------------------------------------------------------------------------


def some_tensors(rng: Any) -> dict[str, Any]:
    """Of many sizes: alone in a block, many in one, over several, none."""
    sizes = [0, 1, 3, 1000, *([17] * 700), 300_001, 5_000_000, 2]
    dtypes = itertools.cycle([np.float32, np.uint8, np.float64, np.int16, np.float16])
    return {
        f"{i}": (rng.integers(0, 100, size)).astype(dtype) for i, (size, dtype) in enumerate(zip(sizes, dtypes, strict=False))
    }


def test_any_arrays(tmp_path: Path) -> None:
    arrays = some_tensors(np.random.default_rng(0))
    tensors = [Tensor(name, a.dtype.name, a.shape, lambda a=a: a.view(np.uint8)) for name, a in arrays.items()]
    write(tmp_path / "a", {"some": ["thing"]}, tensors)
    with TensorFile(tmp_path / "a", "here") as file:
        assert file.contents == {"some": ["thing"]} and file.tensors.keys() == arrays.keys()
        file.check()
        rooms = {name: np.empty(a.size, a.dtype) for name, a in arrays.items()}
        file.read(lambda name: rooms[name].view(np.uint8))
        file.check()
    for name, a in arrays.items():
        assert np.array_equal(rooms[name], a), name
    library = pytest.importorskip("safetensors.numpy", reason="safetensors is not installed")
    for name, a in library.load_file(tmp_path / "a").items():
        assert np.array_equal(arrays[name], a) and arrays[name].dtype == a.dtype


def test_each_array_begins_where_its_dtype_may(tmp_path: Path) -> None:
    test_any_arrays(tmp_path)
    data = (tmp_path / "a").read_bytes()
    with TensorFile(tmp_path / "a", "here") as file:
        begin = 8 + int.from_bytes(data[:8], "little")
        for entry in file.tensors.values():
            assert (begin + entry.begin) % tensor_file.itemsize(entry.dtype) == 0


@pytest.mark.parametrize("backlog", [0, 1 << 20, 1 << 30])
def test_checksums(backlog: int) -> None:
    import zlib

    rng = np.random.default_rng(0)
    blocks = [rng.integers(0, 256, size).astype(np.uint8).data for size in (1, 0, 5 << 20, 100, 9 << 20, 3 << 20, 3 << 20, 1)]
    with Checksum(backlog) as checksum:
        for block in blocks:
            checksum.add(block)
        assert checksum.value() == zlib.crc32(b"".join(blocks)) == checksum.value()


def test_the_library_reads_states(tmp_path: Path) -> None:
    library = pytest.importorskip("safetensors.numpy", reason="safetensors is not installed")
    pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed")
    opt = gradstep.AdamW({"w": np.ones((70, 70), np.float32)}, state_dtype={"exp_avg": "q8", "exp_avg_sq": "bfloat16"})
    opt.step({"w": np.linspace(0, 1, 4900, dtype=np.float32).reshape(70, 70)})
    opt.save(tmp_path / "a.safetensors")
    found = library.load_file(tmp_path / "a.safetensors") if library.__name__ else {}
    assert found.keys() == {f"state.0.{name}" for name in ("exp_avg", "exp_avg_scale", "exp_avg_sq")}
    for name, array in found.items():
        ours = opt.state["w"][name.removeprefix("state.0.")]
        assert array.dtype == ours.dtype and np.array_equal(array, ours), name


# ---- whole or not at all ------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["without a name", "with a name"])
def _temporary(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both kinds of temporary files."""
    if request.param == "with a name":
        monkeypatch.delattr(os, "O_TMPFILE", raising=False)


temporary = pytest.mark.usefixtures("_temporary")


@temporary
def test_a_save_takes_the_place_of_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a"
    for value in (0.5, 0.25):
        opt = make(value=value)
        opt.save(path)
        assert np.array_equal(load(path).state["w"]["exp_avg"], opt.state["w"]["exp_avg"])
    with path.open("rb") as old:
        before = old.read()
        make(value=2.0).save(path)
        old.seek(0)
        assert old.read() == before  # whoever reads the old file has all of it
    assert os.listdir(tmp_path) == ["a"]  # noqa: PTH208


@posix
@temporary
def test_permissions_stay(tmp_path: Path) -> None:
    path = tmp_path / "a"
    mask = os.umask(0o027)
    try:
        make().save(path)
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
        path.chmod(0o600)
        make().save(path)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    finally:
        os.umask(mask)


@posix
@temporary
def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    make().save(tmp_path / "there" / "a")
    (tmp_path / "link").symlink_to(tmp_path / "there" / "a")
    make(value=0.25).save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert np.array_equal(load(tmp_path / "there" / "a").state["w"]["exp_avg"], make(value=0.25).state["w"]["exp_avg"])
    assert os.listdir(tmp_path / "there") == ["a"]  # noqa: PTH208


def test_paths_of_any_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for path in ("a", Path("b"), str(tmp_path / "c"), "x" * 255):
        make().save(path)
        assert load(Path(path)).steps == 1
    with pytest.raises(OSError, match="File name too long") as caught:
        make().save("x" * 256)
    assert caught.value.errno == errno.ENAMETOOLONG


@temporary
def test_what_no_file_can_take_the_place_of(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError, match="no regular file, so nothing can take its place"):
        make().save(tmp_path)
    with pytest.raises(FileNotFoundError) as caught:
        make().save(tmp_path / "not" / "there")
    assert caught.value.filename == str(tmp_path / "not" / "there")
    if os.name != "nt":
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(OSError, match="no regular file"):
            make().save(tmp_path / "pipe")
        assert os.listdir(tmp_path) == ["pipe"]  # noqa: PTH208


@posix
@temporary
def test_a_folder_that_can_not_be_written(tmp_path_factory: pytest.TempPathFactory) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make().save(folder / "a")
        before = (folder / "a").read_bytes()
        folder.chmod(0o555)
        (folder / "a").chmod(0o444)
        with without_permission(), pytest.raises(PermissionError) as caught:
            make(value=0.25).save(folder / "a")
        assert caught.value.filename == str((folder / "a").resolve())
        assert (folder / "a").read_bytes() == before and os.listdir(folder) == ["a"]  # noqa: PTH208
        folder.chmod(0o755)


class Stop(BaseException):
    """Of no kind that anybody expects."""


@temporary
@pytest.mark.parametrize("function", ["fsync", "replace", "writev"])
@pytest.mark.parametrize("make_error", [lambda: OSError(errno.ENOSPC, "No space left on device"), Stop], ids=["full", "stop"])
def test_an_error_leaves_the_old_file(function: str, make_error: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make().save(tmp_path / "a")
    before = (tmp_path / "a").read_bytes()

    def fail(*args: Any, **more: Any) -> None:
        raise make_error()

    if not hasattr(os, function):
        pytest.skip(f"no {function} here")
    monkeypatch.setattr(files.Path if function == "replace" else os, function, fail)
    with pytest.raises((OSError, Stop)) as caught:
        make(value=0.25).save(tmp_path / "a")
    monkeypatch.undo()
    assert not isinstance(caught.value, OSError) or caught.value.filename == str(tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == before
    assert os.listdir(tmp_path) == ["a"]  # noqa: PTH208


def save_into_a_full_disk(path: str, named: bool) -> None:
    """Files may have 100,000 bytes at most, wherever the limit falls."""
    import resource

    if named and hasattr(os, "O_TMPFILE"):
        del os.O_TMPFILE
    make().save(path)
    before = Path(path).read_bytes()
    for limit in (0, 10, 1000, 5000, 100_000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        for size in (100_000, 4_000_000):
            with pytest.raises(OSError, match="File too large") as caught:
                make(size).save(path)
            assert caught.value.filename == path
            assert Path(path).read_bytes() == before
            assert os.listdir(Path(path).parent) == [Path(path).name]  # noqa: PTH208


@posix
@pytest.mark.parametrize("named", [False, True])
def test_a_full_disk(named: bool, tmp_path: Path) -> None:
    run_in_child(save_into_a_full_disk, str(tmp_path / "a"), named)


@pytest.mark.skipif(os.name == "nt" or not hasattr(os, "writev"), reason="needs writev")
def test_writes_that_end_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = [np.arange(size, dtype=np.uint8) for size in (100, 0, 57, 200)]
    tensors = [Tensor(str(i), "uint8", a.shape, lambda a=a: a) for i, a in enumerate(arrays)]
    write(tmp_path / "a", {}, tensors)
    whole = os.writev
    for end in (0, 1, 99, 100, 101, 157, 158, 356):
        monkeypatch.setattr(os, "writev", lambda fd, block, end=end: whole(fd, [b"".join(block)[:end]]))
        write(tmp_path / "b", {}, tensors)
        assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


SIZE = 600_000


def save_forever(path: str) -> None:
    """Steps of a gradient of ones, each saved: `sum` is the number of the step."""
    w = np.zeros(SIZE, np.float32)
    opt = gradstep.Adagrad([w])
    ones = np.ones(SIZE, np.float32)
    while True:
        opt.step([ones])
        opt.save(path)
        print("saved", flush=True)


@posix
def test_processes_that_are_killed(tmp_path: Path) -> None:
    """At random moments of saving: the file is whole, of some step."""
    rng = random.Random(7)
    code = f"from {__name__} import save_forever; save_forever({str(tmp_path / 'a')!r})"
    steps = []
    for _ in range(KILLS):
        with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE) as child:
            assert child.stdout is not None
            for _ in range(rng.randint(1, 3)):
                assert child.stdout.readline()
            time.sleep(rng.uniform(0, 0.03))
            child.send_signal(signal.SIGKILL)
        opt = gradstep.Adagrad.load(tmp_path / "a", [np.zeros(SIZE, np.float32)])
        assert (opt.state[0]["sum"] == opt.steps).all() and opt.state[0]["step"] == opt.steps
        steps.append(opt.steps)
    assert min(steps) >= 1
    for left in tmp_path.glob(".gradstep-*.tmp"):  # killed in the moment of the exchange, if at all: as whole as any
        assert (gradstep.Adagrad.load(left, [np.zeros(SIZE, np.float32)]).state[0]["sum"] > 0).all()
        os.utime(left, (0, 0))
    opt.save(tmp_path / "a")
    assert os.listdir(tmp_path) == ["a"]  # noqa: PTH208


def test_what_is_left_behind_is_removed_when_nobody_works_on_it(tmp_path: Path) -> None:
    with files.replacing(tmp_path / "a") as file:
        file.write(b"1")
    ours, of_others = files._temporary(tmp_path / "a"), files._temporary(tmp_path / "b")
    for path, age in ((ours, 3000), (of_others, 4000)):
        path.write_bytes(b"2")
        os.utime(path, (time.time() - age,) * 2)
    make().save(tmp_path / "a")
    assert ours.exists() and of_others.exists()
    os.utime(ours, (time.time() - 4000,) * 2)
    make().save(tmp_path / "a")
    assert not ours.exists() and of_others.exists()


@linux
def test_bytes_are_on_the_disk_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of what a crash of the machine could tear apart."""
    seen: list[str] = []
    for owner, name in ((os, "fsync"), (os, "link"), (files.Path, "replace")):
        original = getattr(owner, name)

        def note(*args: Any, _name: str = name, _original: Any = original, **more: Any) -> Any:
            folder = _name == "fsync" and stat.S_ISDIR(os.fstat(args[0]).st_mode)
            seen.append("fsync of the folder" if folder else _name)
            return _original(*args, **more)

        monkeypatch.setattr(owner, name, note)
    make().save(tmp_path / "a")
    assert seen == ["fsync", "link", "replace", "fsync of the folder"]
