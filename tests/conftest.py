"""Fixtures that all tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from gradstep import config


@pytest.fixture(autouse=True)
def _config_as_it_was() -> Iterator[None]:
    isa, threads, denormals = config.isa(), config.num_threads(), config.denormals
    yield
    config.set_isa(isa)
    config.set_num_threads(threads)
    config.denormals = denormals


@pytest.fixture(params=config.isas())
def isa(request: pytest.FixtureRequest) -> str:
    """Each instruction set of this machine in turn, in use."""
    config.set_isa(request.param)
    return str(request.param)
