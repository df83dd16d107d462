"""Where steps are made, the CPU or a GPU: its memory, its clock, its limit, and who takes part."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from . import contenders
from .contenders import Contender
from .measure import FULL, HOST_CLOCK, NORMAL, QUICK, Clock, Effort
from .memory import HOST, Memory
from .plan import Choice, Task, make_tasks
from .problem import memory_available, memory_needed


class Place(ABC):
    """What differs between devices."""

    device: ClassVar[str]
    threaded: ClassVar[bool]
    """Whether the number of threads means something."""
    quick: ClassVar[Effort]
    normal: ClassVar[Effort]
    full: ClassVar[Effort]
    memory: Memory
    clock: Clock
    limit: Contender
    """Measured in every case: what the machine can do."""

    def missing(self) -> str:
        """Return in a sentence why nothing can be measured here; empty: it can."""
        return ""

    @abstractmethod
    def contenders(self, isas: Sequence[str] = ()) -> dict[str, Contender]:
        """Return all contenders by name, gradstep's once for each of `isas` if there are any."""

    @abstractmethod
    def tasks(self, choice: Choice, threads: int) -> list[Task]:
        """Return the tasks for a choice, if so many threads can be had."""

    @abstractmethod
    def memory_needed(self, task: Task, taking_part: Sequence[Contender]) -> int:
        """Return the bytes that a task takes with all contenders."""

    @abstractmethod
    def memory_available(self) -> float:
        """Return the bytes of memory that are free."""

    def fitted(self, task: Task, taking_part: Sequence[Contender]) -> Task:
        """Return the task, or a smaller one that the memory has room for."""
        return task

    def describe(self) -> dict[str, Any]:
        """Return what the machine's description should tell of the device."""
        return {}


class Cpu(Place):
    """The processor of this machine, its memory, and the clock of the host."""

    device = "cpu"
    threaded = True
    quick, normal, full = QUICK, NORMAL, FULL
    memory = HOST
    clock = HOST_CLOCK
    limit = contenders.LIMIT

    def contenders(self, isas: Sequence[str] = ()) -> dict[str, Contender]:
        return contenders.contenders(isas)

    def tasks(self, choice: Choice, threads: int) -> list[Task]:
        return make_tasks(choice, threads)

    def memory_needed(self, task: Task, taking_part: Sequence[Contender]) -> int:
        return memory_needed(task.rule, task.case.elements, task.form)

    def memory_available(self) -> float:
        return memory_available()
