"""bench/gpu.sh: its plan, and what becomes of parts that fail, with programs in the place of Python and the sanitizer."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "bench" / "gpu.sh"
PARTS = ["build", "device", "tests", "memcheck", "racecheck", "benchmark"]

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux") or shutil.which("bash") is None, reason="the script is for Linux"
)


def call(*arguments, **environment):
    variables = {**os.environ, **environment}
    return subprocess.run([SCRIPT, *arguments], capture_output=True, text=True, env=variables, check=False, timeout=60)


def test_plan(tmp_path):
    done = call("--plan", tmp_path / "figures", PYTHON="some-python")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert [line.split(":")[0] for line in lines if line.startswith("#")] == [f"# {name}" for name in PARTS]
    assert sum(int(line.split()[-2]) for line in lines if line.startswith("#") and "benchmark" not in line) < 540
    build, *_ = (line for line in lines if "pip install" in line)
    assert {"GRADSTEP_CUDA=ON", "CUDAARCHS=native", "--no-build-isolation", "--no-deps", "--no-index"} <= set(build.split())
    (tests,) = (line for line in lines if "-m cuda" in line)
    assert {"tests/test_cuda.py", "tests/test_cuda_gate.py"} <= set(tests.split())
    assert all(f"compute-sanitizer --tool {tool} " in done.stdout for tool in ("memcheck", "racecheck"))
    assert "some-python -m gradstep bench --device cuda --seconds 240 --json" in lines[-1]
    assert list(tmp_path.iterdir()) == []


def test_options_that_there_are_not():
    done = call("--speed")
    assert done.returncode == 2
    assert "usage: bench/gpu.sh [--plan] [FOLDER]" in done.stderr


PROGRAM = """#!/usr/bin/env bash
call="$(basename "$0") $PYTHONPATH $*"
echo "${call//[[:space:]]/ }" >>"$CALLS"
while read -r text; do
  [[ $text && $call == *"$text"* ]] && exit 3
done <<<"$FAILING"
[[ $call == *get_device_name* ]] && echo x-1
exit 0
"""


def run_with(tmp_path, *failing):
    """Run the script with programs that note how they are called, and fail if the call has one of `failing` in it."""
    for name in ("python", "compute-sanitizer"):
        program = tmp_path / name
        program.write_text(PROGRAM)
        program.chmod(0o755)
    calls, path = tmp_path / "calls", f"{tmp_path}:{os.environ['PATH']}"
    done = call(tmp_path / "figures", PYTHON=str(tmp_path / "python"), PATH=path, CALLS=str(calls), FAILING="\n".join(failing))
    summary = {line.split()[0]: line for line in done.stdout.split("== summary")[1].splitlines()[1:]}
    assert list(summary) == PARTS
    return done, summary, calls.read_text()


def test_all_parts_run(tmp_path):
    done, summary, calls = run_with(tmp_path)
    assert done.returncode == 0, done.stdout
    assert all(line.endswith("ok") for line in summary.values())
    assert f"--json {tmp_path}/figures/x-1.json" in calls
    assert (tmp_path / "figures").is_dir()
    assert len({line.split()[1] for line in calls.splitlines()}) == 1
    assert not Path(calls.split()[1]).exists()  # what was built is taken away


def test_parts_run_after_one_has_failed(tmp_path):
    done, summary, _ = run_with(tmp_path, "racecheck", "-m pytest")
    assert done.returncode == 1
    failed = [name for name, line in summary.items() if "FAILED: exit status 3" in line]
    assert failed == ["tests", "memcheck", "racecheck"]
    assert summary["benchmark"].endswith("ok")


@pytest.mark.parametrize(
    ("failing", "reason"), [("pip install", "there is no build"), ("gradstep.cuda, sys", "there is no device")]
)
def test_nothing_runs_without_a_build_or_a_device(failing, reason, tmp_path):
    done, summary, calls = run_with(tmp_path, failing)
    assert done.returncode == 1
    assert summary["benchmark"].endswith(f"not run: {reason}")
    assert "pytest" not in calls
    assert "bench" not in calls
