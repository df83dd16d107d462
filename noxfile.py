"""Sessions for development: `nox -l` lists them."""

from __future__ import annotations

import nox

nox.options.default_venv_backend = "venv"
nox.options.sessions = ["tests", "lint", "types"]


@nox.session
def tests(session: nox.Session) -> None:
    """Run the tests; arguments go to pytest."""
    session.install(".[test]")
    session.run("pytest", *session.posargs)


@nox.session
def minimums(session: nox.Session) -> None:
    """Run the tests that need no torch on the oldest NumPy that is supported."""
    session.install(".", "numpy==1.26.*", "pytest", "hypothesis")
    session.run("pytest", "tests/test_values.py", "tests/test_layouts.py", "tests/test_numpy.py", "tests/test_refused.py")


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and formatting."""
    session.install(*nox.project.dependency_groups(nox.project.load_toml("pyproject.toml"), "lint"))
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    files = session.run("git", "ls-files", "*.cpp", "*.h", external=True, silent=True)
    session.run("clang-format", "--dry-run", "--Werror", *files.split())


@nox.session
def types(session: nox.Session) -> None:
    """Check types, and that the stub of the extension tells what is in it."""
    session.install(".[test]", *nox.project.dependency_groups(nox.project.load_toml("pyproject.toml"), "lint"))
    session.run("mypy")
    session.run("python", "-m", "mypy.stubtest", "gradstep._core")


@nox.session
def bench(session: nox.Session) -> None:
    """Run the benchmarks against what is installed here; arguments go to them."""
    session.install(".[bench,torch]", "numba")
    session.run("python", "-m", "gradstep", "bench", *session.posargs)


@nox.session
def sanitize(session: nox.Session) -> None:
    """Run the tests under sanitizers: `nox -s sanitize -- asan` or `tsan`."""
    session.install("pybind11", "numpy", "pytest", "hypothesis", "cmake", "ninja")
    session.run("tools/sanitize.sh", *(session.posargs or ["asan"]), external=True)
