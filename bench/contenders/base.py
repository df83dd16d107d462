"""What a contender is: something that can make optimizer steps on the arrays of a problem."""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import numpy as np

from ..cases import Case
from ..formats import Format
from ..models import Shapes
from ..problem import Problem, moved_bytes
from ..rules import Rule


class UnsupportedError(Exception):
    """Raised by a contender that can't do what is asked; the message says why."""


def _nothing() -> None:
    pass


class Run(NamedTuple):
    """A contender on a problem, ready to step."""

    step: Callable[[], object]
    params: Callable[[], list[Any]]
    """Return the parameters as they are now: arrays or tensors."""
    refresh: Callable[[], None] = _nothing
    """Take over the problem's gradients, which have changed."""
    finish: Callable[[], None] = _nothing
    """Wait for steps that were only started."""
    before: Callable[[], None] | None = None
    """Untimed, before each step."""


def norm_run(norm: Callable[[], Any]) -> Run:
    """Return a run of `norm`, which returns the norm of all gradients; it takes the place of the parameters."""
    return Run(norm, lambda: [np.array([float(norm())])])


class Contender(ABC):
    """Somebody's optimizer step."""

    name: str
    about: str
    """What it is, in a line."""

    package: ClassVar[str] = ""
    """What has to be installed for it, by its name for pip and for import."""
    peer: str = "gradstep"
    """The face of gradstep that takes its place in a program."""
    on_request: bool = False
    """Whether it is measured only when it is named."""
    whole: ClassVar[bool] = False
    """Whether it takes what stands around a rule."""
    stores: ClassVar[bool] = False
    """Whether it takes other formats than float32 and float64 throughout."""
    warm_ups: ClassVar[int] = 0
    """How many steps `prepare` takes, each with the problem's gradients."""
    face: ClassVar[str] = ""
    """Which of gradstep's faces it is; empty: it is none."""
    is_limit: ClassVar[bool] = False
    """Whether it shows what the machine can do, and makes no step."""

    def installed(self) -> bool:
        """Return whether its package can be found. It is not imported."""
        return not self.package or importlib.util.find_spec(self.package) is not None

    def where(self) -> str:
        """Return where to get it."""
        return f"pip install {self.package}"

    def slow_start(self, rule: Rule, case: Case) -> bool:
        """Return whether it compiles for so long that it is left out unless it is named or everything is asked for."""
        return False

    def formula(self, rule: Rule) -> Callable[..., Any]:
        """Return what it is held to: the rule's formula, or its own."""
        return rule.formula

    def form(self, asked: Format) -> Format:
        """Return the format of its arrays: the one asked for, or its own."""
        return asked

    def moved_bytes(self, rule: Rule, shapes: Shapes, form: Format) -> int:
        """Return the bytes that one of its steps has to move, at least."""
        return moved_bytes(rule, shapes, self.form(form))

    def own_bytes(self, form: Format) -> float:
        """Return the bytes an element that it keeps for itself, beside the problem's arrays."""
        return 0.0

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

    def note(self, rule: Rule, threads: int) -> str:
        """Return how it departs from what was asked for: with how many threads, in what formula. Empty: it does not."""
        return ""

    def enter(self) -> None:
        """Make ready for its turn; called before each block, untimed."""
