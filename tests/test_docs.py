"""The documentation: every example in it runs, and what it says of the project is so."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import gradstep

ROOT = Path(__file__).parents[1]
MODULES = [
    name
    for _, name, _ in pkgutil.walk_packages(gradstep.__path__, "gradstep.")
    if not re.search(r"_core|__main__|\.bench", name)
]


@pytest.mark.parametrize("name", ["gradstep", *MODULES])
def test_docstring_examples(name: str) -> None:
    if name.startswith("gradstep.torch"):
        pytest.importorskip("torch", reason="torch is not installed")
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0


def code_blocks(path: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL)


@pytest.mark.parametrize("path", sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")]), ids=lambda path: path.name)
def test_examples_in_markdown(path: Path) -> None:
    for block in code_blocks(path):
        if "torch" in block:
            pytest.importorskip("torch", reason="torch is not installed")
        exec(compile(block, str(path), "exec"), {"__name__": "example"})


def test_links_within_the_project() -> None:
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text()):
            assert (path.parent / target).exists(), f"{path.name} links to {target}"


def test_readme_holds_the_setup_commands() -> None:
    readme = (ROOT / "README.md").read_text()
    assert "pip install . && python -m gradstep bench" in readme
    assert 'pip install ".[test]" && pytest' in readme
    assert 'pip install ".[test]" && pytest' in (ROOT / ".ci" / "run").read_text()


def test_version_is_the_changelogs_newest() -> None:
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None and newest.group(1) == gradstep.__version__
