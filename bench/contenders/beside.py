"""Faces of gradstep with another step than the one that is measured, to compare it with."""

from __future__ import annotations

from ..formats import FLOAT32, Format
from ..problem import Problem
from .base import Contender, Run


class Beside(Contender):
    """A face of gradstep that takes another step than the one asked for, to be compared with that."""

    what: str
    """Behind the name of the face."""

    def __init__(self, face: Contender) -> None:
        self.name = f"{face.name} {self.what}"
        self.about = f"{face.name}, {self.what}"
        self.peer = face.name
        self._face = face

    def set_threads(self, n: int) -> None:
        self._face.set_threads(n)

    def enter(self) -> None:
        self._face.enter()


class Off(Beside):
    """The rule alone: what the stages cost."""

    what = "off"

    def prepare(self, problem: Problem) -> Run:
        return self._face.prepare(problem.alone())


class Throughout(Beside):
    """float32 throughout: what another format saves."""

    what = FLOAT32.name

    def form(self, asked: Format) -> Format:
        return FLOAT32

    def prepare(self, problem: Problem) -> Run:
        return self._face.prepare(problem.in_float32)
