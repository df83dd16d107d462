"""Seeds a bug into the kernels and expects the tests to fail: `python tools/mutants.py [arguments of pytest]`.

Each mutant is built from a copy of the sources. Ends with a status other than 0 if one survives, or if the tests fail without any.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from shutil import copytree, ignore_patterns

from build import ROOT, build

TESTS = ["tests/test_values.py", "tests/test_norms.py", "tests/test_stages.py"]


@dataclass(frozen=True)
class Mutant:
    """A piece of source text, and what to put in its place."""

    name: str
    file: str
    original: str
    changed: str

    def apply(self, source: Path) -> None:
        """Change the sources in `source`."""
        path = source / self.file
        text = path.read_text()
        if text.count(self.original) != 1:
            sys.exit(f"{self.name}: {self.file} has {self.original!r} {text.count(self.original)} times, must have it once")
        path.write_text(text.replace(self.original, self.changed))


MUTANTS = [
    Mutant(
        "a skipped tail",
        "csrc/cpu/loops.h",
        "for (std::int64_t j = i; j < size; ++j) element(j);",
        "for (std::int64_t j = i; j < size / 4 * 4; ++j) element(j);",
    ),
    Mutant("a wrong beta", "csrc/rules/adam.h", "rest2(T(1 - rule.beta2))", "rest2(T(1 - rule.beta1))"),
    Mutant(
        "a sum in another order",
        "csrc/core/norms.h",
        "eight[0] + eight[4], eight[1] + eight[5]",
        "eight[0] + eight[5], eight[1] + eight[4]",
    ),
    Mutant("a clip factor without its epsilon", "csrc/core/factors.h", "limit / (norm + 1e-6)", "limit / norm"),
]


def passes(source: Path, tests: list[str]) -> bool:
    """Build `source` and run the tests of the project on it."""
    site = build("default", source, source / "build")
    environment = {**os.environ, "PYTHONPATH": str(site)}
    python = [sys.executable, "-c", "import gradstep._core; print(gradstep._core.__file__)"]
    imported = subprocess.run(python, env=environment, text=True, capture_output=True, check=True).stdout.strip()
    if not Path(imported).is_relative_to(site):
        sys.exit(f"the tests would run on {imported}, not on {site}")
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    status = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, check=False).returncode
    if status not in (0, 1):  # 1: a test failed
        sys.exit(f"{' '.join(command)} ended with status {status}")
    return status == 0


def main(tests: list[str]) -> int:
    """Try every mutant; return the status to exit with."""
    survivors = 0
    with tempfile.TemporaryDirectory() as folder:

        def copy(name: str) -> Path:
            return Path(copytree(ROOT, Path(folder) / name, ignore=ignore_patterns(".*", "build", "__pycache__")))

        if not passes(copy("unchanged"), tests):
            print("the tests fail without a mutant")
            return 1
        for i, mutant in enumerate(MUTANTS):
            source = copy(str(i))
            mutant.apply(source)
            survived = passes(source, tests)
            survivors += survived
            print(f"{mutant.name}: {'survived' if survived else 'caught'}", flush=True)
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or TESTS))
