"""The configuration: what can be chosen, how the environment chooses it, and what is refused."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gradstep import config


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=False, timeout=60
    )


def test_instruction_sets() -> None:
    assert config.isas()[0] == "baseline" and config.isa() in config.isas()
    for name in config.isas():
        config.set_isa(name)
        assert config.isa() == name
    with pytest.raises(ValueError, match=r"^set_isa: name must be one of baseline.*, got 'avx9'$"):
        config.set_isa("avx9")


def test_threads() -> None:
    config.set_num_threads(5)
    assert config.num_threads() == 5
    with pytest.raises(ValueError, match=r"^set_num_threads: n must be from 1 to 4096, got 0$"):
        config.set_num_threads(0)
    with pytest.raises(TypeError, match=r"^set_num_threads: n must be an int, got 2.5$"):
        config.set_num_threads(2.5)  # type: ignore[arg-type]
    assert config.num_threads() == 5


def test_denormals() -> None:
    assert config.denormals == "flush"
    config.denormals = "keep"
    assert config.denormals == "keep"
    with pytest.raises(ValueError, match=r'^denormals must be "flush" or "keep", got \'drop\'$'):
        config.denormals = "drop"
    assert config.denormals == "keep"


def test_environment() -> None:
    show = "from gradstep import config; print(config.isa(), config.num_threads())"
    assert run(show, GRADSTEP_ISA="baseline", GRADSTEP_NUM_THREADS="3").stdout == "baseline 3\n"
    wrong = run(show, GRADSTEP_ISA="avx9")
    assert wrong.returncode == 1 and "GRADSTEP_ISA must be one of baseline" in wrong.stderr and "got 'avx9'" in wrong.stderr
    for value in ("0", "many", "-1", "1.5", "99999"):
        wrong = run(show, GRADSTEP_NUM_THREADS=value)
        assert (
            wrong.returncode == 1 and f"GRADSTEP_NUM_THREADS must be an integer from 1 to 4096, got '{value}'" in wrong.stderr
        )


def test_threads_follow_openmp_but_not_beyond_the_processors() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "GRADSTEP_NUM_THREADS"}
    show = "from gradstep import config; print(config.num_threads())"
    for value, expected in (("1", "1"), ("1,4", "1"), ("9999", None), ("many", None)):
        result = subprocess.run(
            [sys.executable, "-c", show],
            env={**environment, "OMP_NUM_THREADS": value},
            capture_output=True,
            text=True,
            check=True,
        )
        assert result.stdout.strip() == (expected or str(config._default_threads()))


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no processor affinity")
def test_threads_follow_the_affinity() -> None:
    code = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); from gradstep import config; print(config.num_threads())"
    environment = {name: value for name, value in os.environ.items() if name != "GRADSTEP_NUM_THREADS"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout == "1\n"


@pytest.mark.parametrize(
    ("membership", "files", "cpus"),
    [
        ("0::/job/step\n", {"job/step/cpu.max": "max 100000", "job/cpu.max": "150000 100000"}, 1.5),
        ("0::/job\n", {"job/cpu.max": "50000 100000", "cpu.max": "400000 100000"}, 0.5),
        ("0::/\n", {}, math.inf),
        ("3:cpu,cpuacct:/box\n", {"cpu/box/cpu.cfs_quota_us": "300000", "cpu/box/cpu.cfs_period_us": "100000"}, 3.0),
        ("3:cpu:/box\n", {"cpu/box/cpu.cfs_quota_us": "-1", "cpu/box/cpu.cfs_period_us": "100000"}, math.inf),
        ("2:memory:/box\n", {"cpu/box/cpu.cfs_quota_us": "100", "cpu/box/cpu.cfs_period_us": "100"}, math.inf),
    ],
)
def test_control_groups(membership: str, files: dict[str, str], cpus: float, tmp_path: Path) -> None:
    (tmp_path / "cgroup").write_text(membership)
    for name, text in files.items():
        (tmp_path / "fs" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "fs" / name).write_text(text)
    assert config._cgroup_cpus(tmp_path / "fs", tmp_path / "cgroup") == cpus
    assert config._cgroup_cpus(tmp_path / "fs", tmp_path / "missing") == math.inf


def test_show(capsys: Any) -> None:
    config.show()
    shown = capsys.readouterr().out
    for word in ("gradstep:", "compiler:", "flags:", "instruction sets:", "threads:", "denormals:", "CUDA:"):
        assert word in shown
    assert f"{config.isa()} (in use)" in shown
