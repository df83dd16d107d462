"""What a contender is: something that can make optimizer steps on the arrays of a problem."""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, NamedTuple

from ..cases import Case
from ..problem import Array, Problem
from ..rules import Rule


class UnsupportedError(Exception):
    """Raised by a contender that can't do what is asked; the message says why."""


def _nothing() -> None:
    pass


class Run(NamedTuple):
    """A contender on a problem, ready to step."""

    step: Callable[[], object]
    params: Callable[[], list[Array]]
    """Return the parameters as they are now."""
    refresh: Callable[[], None] = _nothing
    """Take over the problem's gradients, which have changed."""
    finish: Callable[[], None] = _nothing
    """Wait for steps that were only started."""


class Contender(ABC):
    """Somebody's optimizer step."""

    name: str
    about: str
    """What it is, in a line."""

    package: ClassVar[str] = ""
    """What has to be installed for it, by its name for pip and for import."""
    peer: ClassVar[str] = "gradstep"
    """The face of gradstep that takes its place in a program."""
    on_request: ClassVar[bool] = False
    """Whether it is measured only when it is named."""
    face: ClassVar[str] = ""
    """Which of gradstep's faces it is; empty: it is none."""

    def installed(self) -> bool:
        """Return whether its package can be found. It is not imported."""
        return not self.package or importlib.util.find_spec(self.package) is not None

    def slow_start(self, rule: Rule, case: Case) -> bool:
        """Return whether it compiles for so long that it is left out unless it is named or everything is asked for."""
        return False

    @abstractmethod
    def prepare(self, problem: Problem) -> Run:
        """Return a run on the problem's arrays.

        Raises:
            UnsupportedError: if it can't.
        """

    def set_threads(self, n: int) -> None:
        """Use `n` threads from now on.

        Raises:
            UnsupportedError: if it can't.
        """

    def threads_note(self, n: int) -> str:
        """Return how many threads it has if that is not the number asked for, else nothing."""
        return ""

    def enter(self) -> None:
        """Make ready for its turn; called before each block, untimed."""
