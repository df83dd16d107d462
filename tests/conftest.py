"""Fixtures that all tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from gradstep import _core, config


@pytest.fixture(autouse=True)
def _config_as_it_was() -> Iterator[None]:
    isa, threads, denormals = config.isa(), config.num_threads(), config.denormals
    yield
    config.set_isa(isa)
    config.set_num_threads(threads)
    config.denormals = denormals


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run tests on each instruction set; those of modules that say so on the engine of GPUs, too, as the host emulates it."""
    given = any("isa" in mark.args[0] for mark in metafunc.definition.iter_markers("parametrize"))
    if "isa" in metafunc.fixturenames and not given:
        on_gpu = getattr(metafunc.module, "RUNS_ON_GPU", False) and not metafunc.definition.get_closest_marker("on_the_host")
        metafunc.parametrize("isa", [*config.isas(), *(["gpu"] if on_gpu else [])], indirect=True)


@pytest.fixture
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set of this machine in turn, in use."""
    if request.param != "gpu":
        config.set_isa(request.param)
        yield str(request.param)
        return
    _core.emulate_gpu(True)
    _core.set_pretend_device(0)
    yield "gpu"
    _core.set_pretend_device(-1)
    _core.emulate_gpu(False)
