"""The extension for GPUs, on machines without one: what its code is made of, that it loads, and what it says."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import gradstep

from .child import run_in_child

ROOT = Path(__file__).parent.parent
CUDA = ROOT / "csrc" / "cuda"
KERNELS = sorted(path.name for path in CUDA.glob("*.cu"))

BUILT = importlib.util.find_spec("gradstep._cuda") is not None  # it is not loaded here
needs_cuda = pytest.mark.skipif(not BUILT, reason="built without CUDA")


def extension() -> Any:
    return importlib.import_module("gradstep._cuda")


# ---- code -----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, str]]:
    """The assembly code of each file of kernels, and what the assembler says about it."""
    nvcc = shutil.which("nvcc")
    if nvcc is None or not BUILT:
        pytest.skip("needs nvcc")
    flags = [*extension().build["flags"].split(), "-std=c++20", "-O3", "--expt-relaxed-constexpr"]
    running = {}
    for name in KERNELS:
        kept = tmp_path_factory.mktemp(name.removesuffix(".cu"))
        command = [nvcc, *flags, "-gencode", "arch=compute_90,code=sm_90", "-Xptxas", "-v", "--keep", "--keep-dir", str(kept)]
        running[name] = (
            kept,
            subprocess.Popen([*command, "-c", str(CUDA / name), "-o", str(kept / "code.o")], stderr=subprocess.PIPE, text=True),
        )
    found = {}
    for name, (kept, process) in running.items():
        said = process.communicate()[1]
        assert process.returncode == 0, said
        (ptx,) = kept.glob("*.ptx")
        found[name] = ptx.read_text(), said
    return found


@pytest.mark.parametrize("name", KERNELS)
def test_no_multiplication_is_contracted_with_an_addition(name: str, compiled: dict[str, tuple[str, str]]) -> None:
    """In the code that the assembler gets, and none is left to its choice: each has its rounding."""
    code = compiled[name][0]
    fused = set(re.findall(r"\bfma\.\S+", code))
    assert fused == ({"fma.rn.f64"} if name == "settle.cu" else set())  # asked for: what a product loses, in powers
    arithmetic = re.findall(r"\b(?:add|sub|mul|div|sqrt)\.\S*f(?:32|64)\b", code)
    assert all(".rn" in instruction for instruction in arithmetic), set(arithmetic)
    single = [instruction for instruction in arithmetic if instruction.endswith("f32")]
    assert all(".ftz" in instruction for instruction in single), set(single)
    roots = {"float": {"div.rn.ftz.f32", "sqrt.rn.ftz.f32"}, "double": {"div.rn.f64", "sqrt.rn.f64"}}
    of_type = [roots[kind] for kind in roots if kind in name]
    expected = of_type[0] if of_type else roots["float"] | roots["double"] if name == "direct.cu" else roots["double"]
    assert expected <= set(arithmetic)
    assert ".approx" not in code


@pytest.mark.parametrize("name", KERNELS)
def test_no_register_is_spilled(name: str, compiled: dict[str, tuple[str, str]]) -> None:
    said = compiled[name][1]
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
    assert len(spills) == said.count("Compiling entry function") > 0
    assert all(spill == ("0", "0") for spill in spills), said


def test_rules_work_in_registers(compiled: dict[str, tuple[str, str]]) -> None:
    """Four elements in an access of 16 bytes, and none of them in memory on the way."""
    code = compiled["direct.cu"][0]
    assert not re.findall(r"\b(?:ld|st)\.local\S*", code)
    assert {"ld.v4.f32", "st.v4.u32", "ld.v4.u16", "st.v4.u16"} <= set(re.findall(r"\b(?:ld|st)\.v4\.\S+", code))


def test_every_rule_has_its_kernels(compiled: dict[str, tuple[str, str]]) -> None:
    entries = re.findall(r"\.entry (\S+)\(", compiled["direct.cu"][0])
    updates = [entry for entry in entries if "update_kernel" in entry]
    assert len(updates) == 4 * len(gradstep._core.rules)  # two compute types, two ways to store


# ---- loading --------------------------------------------------------------------------------------------------------------------


def import_everything() -> None:
    import gradstep.torch  # noqa: F401

    assert [name for name in sys.modules if name == "gradstep._cuda"] == []


def test_importing_gradstep_loads_no_cuda() -> None:
    run_in_child(import_everything)


@needs_cuda
def test_the_extension_links_no_cuda_library() -> None:
    if shutil.which("ldd") is None:
        pytest.skip("needs ldd")
    linked = subprocess.run(["ldd", str(extension().__file__)], capture_output=True, text=True, check=True).stdout
    assert "cuda" not in linked.replace(str(extension().__file__), "")


@needs_cuda
def test_what_the_build_says_of_itself() -> None:
    assert re.fullmatch(r"\d+\.\d", extension().build["cuda"])
    assert extension().build["architectures"].split()[0].startswith("80")


@needs_cuda
def test_without_a_driver_there_is_one_clear_sentence() -> None:
    if gradstep.cuda.is_available():
        pytest.skip("there is a GPU")
    assert gradstep.cuda.device_count() == 0
    with pytest.raises(RuntimeError, match="^describe: there is no NVIDIA (driver|GPU) on this machine"):
        gradstep.cuda.describe(0)


def ask_after_a_fork() -> None:
    pid = os.fork()
    if pid == 0:
        gradstep.cuda.is_available()
        os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    gradstep.cuda.is_available()


@needs_cuda
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_process_may_fork_before_the_first_use() -> None:
    run_in_child(ask_after_a_fork)


def ask_on_both_sides_of_a_fork() -> None:
    gradstep.cuda.is_available()
    pid = os.fork()
    if pid == 0:
        try:
            gradstep.cuda.describe(0)
        except RuntimeError as error:
            os._exit(7 if "forked" in str(error) else 8)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7


@needs_cuda
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_process_that_forks_later_is_told() -> None:
    run_in_child(ask_on_both_sides_of_a_fork)
