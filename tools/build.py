"""Builds the module by a preset of CMake, in a folder of its own, and lays a package around it: `python tools/build.py asan`.

Prints the folder that holds the package. With that folder on PYTHONPATH, Python imports this build, whatever is installed.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11

ROOT = Path(__file__).parents[1]

# An editable installation answers imports before PYTHONPATH is looked at. Python runs this file at its start.
SITECUSTOMIZE = """\
import sys

sys.meta_path[:] = [finder for finder in sys.meta_path if "gradstep" not in getattr(finder, "known_source_files", ())]
"""


def build(preset: str, source: Path = ROOT, folder: Path | None = None) -> Path:
    """Build the sources in `source` and return the folder that holds the package."""
    folder = folder or source / "build" / preset
    places = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    environment = {**os.environ, "PATH": places}
    if shutil.which("ninja", path=places):
        environment.setdefault("CMAKE_GENERATOR", "Ninja")
    version = re.search(r'^version = "(.*)"$', (source / "pyproject.toml").read_text(), re.MULTILINE)
    options = [
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DPython_EXECUTABLE={sys.executable}",
        *(f"-DSKBUILD_PROJECT_VERSION{suffix}={version[1]}" for suffix in ("", "_FULL") if version),
    ]

    def cmake(*arguments: object) -> None:
        command = ["cmake", *map(str, arguments)]
        process = subprocess.run(command, cwd=source, env=environment, text=True, capture_output=True, check=False)
        if process.returncode != 0:
            sys.exit(f"{' '.join(command)}\n{process.stdout}{process.stderr}")

    cmake("--preset", preset, "-B", folder, *options)
    cmake("--build", folder, "--parallel")
    site = folder / "site"
    shutil.rmtree(site, ignore_errors=True)
    cmake("--install", folder, "--prefix", site)
    shutil.copytree(source / "python" / "gradstep", site / "gradstep", dirs_exist_ok=True)
    shutil.copytree(source / "bench", site / "gradstep" / "bench")
    (site / "sitecustomize.py").write_text(SITECUSTOMIZE)
    return site


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    print(build(sys.argv[1]))
