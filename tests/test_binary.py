"""The machine code: every loop of every instruction set is packed, nothing leaks between the objects, nothing fuses or needs AVX early.

The objects are compiled here, by the commands that CMake gives for the project: the module that is installed is stripped of the
names of its loops.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from gradstep import _core

ROOT = Path(__file__).parents[1]

# The registers that hold a whole vector of each instruction set.
VECTOR = {"baseline": "%xmm", "v3": "%ymm", "v4": "%zmm"}

PACKED = re.compile(r"v?(add|sub|mul|div|sqrt|min|max|cmp\w*)p[sd]$")
SCALAR = re.compile(r"v?(add|sub|mul|div|sqrt)s[sd]$")
# What the loops that belong to no rule are called. (Sums, noise and exchanges are other loops than those over elements in blocks.)
ELEMENTWISE = (
    "update|direction|gradient_stage|param_stage|touch|multiply_factors|couple|cautious|decay_update|trust|apply"
    "|average|lookahead|scale"
)
BY_ROW = "scale_row|centralize|scale_param_row"
SUMS = "sum_grad|sum_param|sum_rule_grad|sum_update|count_grad|sum_row|sum_row_squares|sum_param_row"

WORDS = re.compile(r"v?(psll|psrl|psra|padd|psub)[dq]$")
BITWISE = re.compile(r"v?p?xor(ps|pd|d|q)?$|vpternlog[dq]$")

x86_64 = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="reads x86-64 assembly")


@dataclass
class Instruction:
    address: int
    name: str
    operands: str


@dataclass
class Object:
    """The kernels, compiled for one instruction set."""

    path: Path
    by_gcc: bool
    log: str

    def functions(self) -> dict[str, list[Instruction]]:
        """The code of each function, by its signature."""
        found: dict[str, list[Instruction]] = {}
        for line in run(tool("objdump"), "-d", "-C", "--no-show-raw-insn", self.path).splitlines():
            if head := re.match(r"[0-9a-f]+ <(.*)>:$", line):
                code = found[head[1]] = []
            elif parts := re.match(r"\s*([0-9a-f]+):\t(\S+)\s*(.*)", line):
                code.append(Instruction(int(parts[1], 16), parts[2], parts[3]))
        return found

    def instructions(self) -> Iterator[Instruction]:
        for code in self.functions().values():
            yield from code


def tool(name: str) -> str:
    places = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    found = shutil.which(name, path=places)
    if found is None:
        pytest.skip(f"needs {name}")
    return found


def run(*command: object, cwd: Path | None = None) -> str:
    # Whatever flags the environment adds to every build are none of the project's.
    environment = {name: value for name, value in os.environ.items() if name not in ("CXXFLAGS", "CPPFLAGS", "LD_PRELOAD")}
    parts = [str(part) for part in command]
    process = subprocess.run(parts, cwd=cwd, env=environment, text=True, capture_output=True, check=False)
    assert process.returncode == 0, f"{shlex.join(process.args)}\n{process.stdout}{process.stderr}"
    return process.stdout + process.stderr


# Stands in for pybind11, whose headers no kernel includes.
PYBIND11 = "function(pybind11_add_module name)\n  add_library(${name} MODULE ${ARGN})\nendfunction()\n"


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """How CMake compiles each source of the project."""
    if not (ROOT / "CMakeLists.txt").exists():
        pytest.skip("needs the sources of the project")
    folder = tmp_path_factory.mktemp("build")
    (folder / "pybind11Config.cmake").write_text(PYBIND11)
    (folder / "pybind11ConfigVersion.cmake").write_text("set(PACKAGE_VERSION_COMPATIBLE TRUE)\n")
    generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if (ninja := shutil.which("ninja")) else []
    version = [f"-DSKBUILD_PROJECT_VERSION{suffix}={_core.__version__}" for suffix in ("", "_FULL")]
    options = ["-DCMAKE_EXPORT_COMPILE_COMMANDS=ON", "-DCMAKE_BUILD_TYPE=Release", f"-Dpybind11_DIR={folder}", *version]
    options.append("-DGRADSTEP_CUDA=OFF")  # see test_cuda_build
    run(tool("cmake"), "-S", ROOT, "-B", folder, *generator, *options)
    return json.loads((folder / "compile_commands.json").read_text())


def compile_kernels(entry: dict[str, str], folder: Path, *more: str) -> tuple[str, Object]:
    command = shlex.split(entry["command"])
    isa = next(part.removeprefix("-DGRADSTEP_ISA=") for part in command if part.startswith("-DGRADSTEP_ISA="))
    path = folder / f"{isa}.o"
    command[command.index("-o") + 1] = str(path)
    by_gcc = "Free Software Foundation" in run(command[0], "--version")
    report = ["-fopt-info-vec-optimized"] if by_gcc else []
    return isa, Object(path, by_gcc, run(*command, *report, *more, cwd=Path(entry["directory"])))


def kernel_commands(commands: list[dict[str, str]]) -> list[dict[str, str]]:
    return [entry for entry in commands if "-DGRADSTEP_ISA=" in entry["command"]]


@pytest.fixture(scope="module")
def objects(commands: list[dict[str, str]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Object]:
    folder = tmp_path_factory.mktemp("objects")
    with ThreadPoolExecutor(2) as pool:
        return dict(pool.map(lambda entry: compile_kernels(entry, folder), kernel_commands(commands)))


@pytest.fixture(scope="module")
def unoptimized(commands: list[dict[str, str]], tmp_path_factory: pytest.TempPathFactory) -> Object:
    """The baseline as the checks have to refuse it: its loops scalar, its inline functions left to the linker."""
    entry = next(entry for entry in kernel_commands(commands) if "-DGRADSTEP_ISA=baseline" in entry["command"])
    return compile_kernels(entry, tmp_path_factory.mktemp("unoptimized"), "-O0")[1]


# ---- packed code ------------------------------------------------------------------------------------------------------------


def loops(code: list[Instruction]) -> list[list[Instruction]]:
    """The outermost loops of a function: the instructions that can be reached again from each other."""
    position = {one.address: i for i, one in enumerate(code)}
    jumps: dict[int, int] = {}
    for i, one in enumerate(code):
        target = re.match(r"([0-9a-f]+)\b", one.operands) if one.name.startswith("j") else None
        if target and int(target[1], 16) in position:
            jumps[i] = position[int(target[1], 16)]

    # Blocks: runs of instructions that nothing jumps into or out of, by where they begin.
    starts = sorted({0, *jumps.values(), *(i + 1 for i in jumps if i + 1 < len(code))})
    blocks = dict(zip(starts, [*starts[1:], len(code)], strict=True))
    following = {}
    for start, end in blocks.items():
        goes_on = end < len(code) and not code[end - 1].name.startswith(("jmp", "ret"))
        following[start] = [*([jumps[end - 1]] if end - 1 in jumps else []), *([end] if goes_on else [])]

    reached: dict[int, set[int]] = {}
    for start in blocks:
        reached[start], front = set(), [start]
        while front:
            fresh = [block for block in following[front.pop()] if block not in reached[start]]
            reached[start].update(fresh)
            front += fresh
    cycles = {frozenset(k for k in reached[start] if start in reached[k]) for start in blocks if start in reached[start]}
    return [[one for start in sorted(cycle) for one in code[start : blocks[start]]] for cycle in cycles]


def innermost(code: list[Instruction]) -> list[list[Instruction]]:
    """The loops of a function that have no other in them, where each is one run of instructions that ends with the jump back."""
    position = {one.address: i for i, one in enumerate(code)}
    runs = set()
    for i, one in enumerate(code):
        target = re.match(r"([0-9a-f]+)\b", one.operands) if one.name.startswith("j") else None
        if target and (start := position.get(int(target[1], 16), i + 1)) <= i:
            runs.add((start, i))
    return [code[a : b + 1] for a, b in runs if not any((c, d) != (a, b) and a <= c and d <= b for c, d in runs)]


def kernels(functions: dict[str, list[Instruction]]) -> dict[str, list[Instruction]]:
    """The functions that hold the loops over elements: of rules, stages, and of the access pattern in benchmarks."""
    kernel = re.compile(rf"::({ELEMENTWISE})<.*\(std::byte")
    return {name: code for name, code in functions.items() if kernel.search(name)}


def not_packed(built: Object, vector: str) -> list[str]:
    """The functions whose loops over blocks are of scalar arithmetic, of narrower vectors, or of calls.

    Compilers may keep scalar loops for the few elements before and after the blocks. The loop over the blocks is the one that
    prefetches, or where nothing does, the one of vectors.
    """
    wrong = []
    for name, code in kernels(built.functions()).items():
        packed, scalar = (BITWISE, re.compile(r"xor[lq]$")) if "::touch<" in name else (PACKED, SCALAR)

        def whole(body: list[Instruction], packed: re.Pattern[str] = packed) -> bool:
            return any(packed.match(one.name) and vector in one.operands for one in body)

        bodies = loops(code)
        found = [body for body in bodies if any(one.name.startswith("prefetch") for one in body)] or list(filter(whole, bodies))
        other = [any(scalar.match(one.name) or one.name.startswith("call") for one in body) for body in found]
        if not found or not all(map(whole, found)) or any(other):
            wrong.append(name)
    return wrong


@x86_64
def test_every_rule_and_stage_is_there(objects: dict[str, Object]) -> None:
    decays = 3  # with none
    for isa, built in objects.items():
        names = list(kernels(built.functions()))
        for dtype in ("float", "double"):
            of_update = re.compile(rf"::update<(.*?, {dtype}, .*?), (?:true|false), (.*)>\(")
            updates = {m.groups() for name in names if (m := of_update.search(name))}
            storages = 6 if dtype == "float" else 1  # which operands it takes as bfloat16
            assert len(updates) == len(_core.rules) * decays * storages, f"{isa}, {dtype}: {sorted(updates)}"
            for dry in ("true", "false"):
                direction = re.compile(rf"::direction<(.*, {dtype}, .*), {dry}, (?:true|false)>\(")
                found = {m[1] for name in names if (m := direction.search(name))}
                assert len(found) == len(_core.rules) * 2, f"{isa}, {dtype}: {sorted(found)}"
            for kind in ("gradient_stage", "param_stage"):
                assert len({name for name in names if re.search(rf"::{kind}<.*, {dtype}>", name)}) == 2
        found = {m[1] for name in names if (m := re.search(rf"::({ELEMENTWISE})<", name))}
        assert found == set(ELEMENTWISE.split("|"))


@x86_64
def test_sums_are_packed(objects: dict[str, Object]) -> None:
    for isa, built in objects.items():
        sums = {name: code for name, code in built.functions().items() if re.search(rf"::({SUMS})<[^(]*\(std::byte", name)}
        assert len(sums) == 2 * len(SUMS.split("|")), isa
        for name, code in sums.items():
            adds = [[one for one in body if re.match(r"v?addpd$|vfmadd\d+pd$", one.name)] for body in innermost(code)]
            assert any(len(found) >= 4 and all(VECTOR[isa] in one.operands for one in found) for found in adds), (
                f"{isa}: {name}"
            )


@x86_64
def test_every_loop_is_packed(objects: dict[str, Object]) -> None:
    assert objects.keys() == VECTOR.keys()
    for isa, built in objects.items():
        assert not_packed(built, VECTOR[isa]) == [], isa


@x86_64
def test_loops_over_rows_are_packed(objects: dict[str, Object], unoptimized: Object) -> None:
    """They have scalar loops beside, for rows that are shorter than a vector."""

    def by_row(built: Object) -> list[list[Instruction]]:
        return [code for name, code in built.functions().items() if re.search(rf"::({BY_ROW})<[^(]*\(std::byte", name)]

    def packed(code: list[Instruction], vector: str) -> bool:
        bodies = [[one for one in body if PACKED.match(one.name)] for body in innermost(code)]
        return any(found and all(vector in one.operands for one in found) for found in bodies)

    for isa, built in objects.items():
        assert len(by_row(built)) == 2 * len(BY_ROW.split("|")), isa
        assert all(packed(code, VECTOR[isa]) for code in by_row(built)), isa
    assert not any(packed(code, "%xmm") for code in by_row(unoptimized))


@x86_64
def test_loops_over_formats_are_packed(objects: dict[str, Object], unoptimized: Object) -> None:
    """Decoding and encoding: loops of integers, mostly, with scalar ones beside for strided operands and short ends."""

    def codecs(built: Object) -> dict[str, list[Instruction]]:
        of_codec = re.compile(r"::(load|store)(_blocks)?<gradstep::(?!Int16|Float32|Float64).*\(")
        return {name: code for name, code in built.functions().items() if of_codec.search(name)}

    def packed(code: list[Instruction], vector: str) -> bool:
        bodies = [[one for one in body if WORDS.match(one.name)] for body in innermost(code)]
        return any(len(found) >= 2 and all(vector in one.operands for one in found) for found in bodies)

    for isa, built in objects.items():
        assert len(codecs(built)) == 2 * 2 * (3 + 4), isa  # of halves and blocks, for two compute types
        assert [name for name, code in codecs(built).items() if not packed(code, VECTOR[isa])] == [], isa
    assert not any(packed(code, "%xmm") for code in codecs(unoptimized).values())


@x86_64
def test_no_loop_falls_back_where_it_suspects_overlap(objects: dict[str, Object]) -> None:
    """Operands never overlap. A loop that was not told so comes twice, packed and scalar, behind a test of the addresses."""
    for isa, built in objects.items():
        if not built.by_gcc:
            pytest.skip("reads the report of GCC's vectorizer")
        assert "loop vectorized" in built.log, isa
        assert [line for line in built.log.splitlines() if "versioned" in line and "kernels.cpp" in line] == [], isa


@x86_64
def test_a_scalar_loop_would_be_noticed(unoptimized: Object) -> None:
    assert sorted(not_packed(unoptimized, "%xmm")) == sorted(kernels(unoptimized.functions()))


# ---- symbols ----------------------------------------------------------------------------------------------------------------


def external(built: Object) -> list[tuple[str, str]]:
    """(kind, name) of the symbols that an object defines and a linker may see."""
    symbols = [line.split() for line in run(tool("nm"), "--defined-only", built.path).splitlines()]
    return [(kind, name) for *_, kind, name in symbols if kind.isupper() or kind in "uvw"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads ELF symbols")
def test_only_the_accessor_can_be_linked_to(objects: dict[str, Object], unoptimized: Object) -> None:
    """A weak symbol in two objects becomes one in the module: the linker takes the AVX-512 copy for all (numpy #25274)."""
    for isa, built in objects.items():
        name = f"kernels_{isa}"
        assert external(built) == [("T", f"_ZN8gradstep3cpu{len(name)}{name}Ev")]
    assert any(kind in "WVu" for kind, _ in external(unoptimized))


# ---- instructions -----------------------------------------------------------------------------------------------------------


def needs_avx(one: Instruction) -> bool:
    return one.name.startswith("v") or re.search(r"%[yz]mm|%k[0-7]\b", one.operands) is not None


@x86_64
def test_the_baseline_needs_no_avx(objects: dict[str, Object]) -> None:
    assert [one for one in objects["baseline"].instructions() if needs_avx(one)] == []
    assert any(needs_avx(one) for one in objects["v3"].instructions())


@x86_64
def test_nothing_is_fused(objects: dict[str, Object]) -> None:
    """A fused multiply-add rounds once where NumPy rounds twice. In sums of squares of floats the product is exact, and fused it is
    the same."""
    for isa, built in objects.items():
        fused = {name for name, code in built.functions().items() if any(re.match(r"vfn?m(add|sub)", one.name) for one in code)}
        assert [name for name in fused if not re.search(rf"::({SUMS})<float>", name)] == [], isa
        assert isa == "baseline" or fused


def test_no_other_source_is_compiled_for_a_wider_processor(commands: list[dict[str, str]]) -> None:
    """All but the kernels runs on any processor, also while the module is loaded."""
    others = [entry for entry in commands if entry not in kernel_commands(commands)]
    assert len(others) > 5
    for entry in others:
        flags = [part for part in shlex.split(entry["command"]) if re.match(r"-m(?!pic$)|/arch:", part)]
        assert flags == [], entry["file"]


def test_no_flag_depends_on_the_machine_that_builds(commands: list[dict[str, str]]) -> None:
    native = re.compile(r"-m(arch|tune|cpu)=native|-xHost|/favor:|-ffast-math|-Ofast")
    for entry in commands:
        assert not native.search(entry["command"]), entry["command"]
        assert "-ffp-contract=off" in entry["command"] or "/fp:precise" in entry["command"], entry["command"]
    for name in ("CMakeLists.txt", "CMakePresets.json", "pyproject.toml"):
        assert not native.search((ROOT / name).read_text()), name
