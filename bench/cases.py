"""The cases: which tensors a step updates."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from .models import Shapes, gpt2, resnet50

SIZES = (1_000, 10_000, 100_000, 1_000_000, 4_000_000, 16_000_000, 32_000_000, 48_000_000, 64_000_000)

KINDS = {"one": "one tensor", "matrix": "one matrix", "many": "many small tensors", "model": "the shapes of a model"}


@dataclass(frozen=True)
class Case:
    """A list of tensors, of a kind from `KINDS`."""

    name: str
    kind: str
    shapes: Shapes

    @property
    def elements(self) -> int:
        """How many numbers there are in all tensors."""
        return sum(math.prod(shape) for shape in self.shapes)


def one(size: int) -> Case:
    """Return the case of one tensor of `size` elements."""
    return Case(f"{size:,}", "one", ((size,),))


ONE = [one(size) for size in SIZES]
MATRIX = Case("8000 x 4000", "matrix", ((8000, 4000),))
MANY = [Case("500 x 64x64", "many", ((64, 64),) * 500), Case("2000 x 256", "many", ((256,),) * 2000)]
MODELS = [Case("resnet50", "model", resnet50()), Case("gpt2", "model", gpt2())]
CASES = [*ONE, MATRIX, *MANY, *MODELS]


def named(name: str) -> list[Case]:
    """Return the cases of a kind, or the one of that name (spaces may be left out).

    Raises:
        ValueError: if there is none.
    """
    key = name.replace(" ", "")
    found = [case for case in CASES if key in (case.kind, case.name.replace(" ", ""))]
    if not found:
        names = [*KINDS, *(case.name.replace(" ", "") for case in (MATRIX, *MANY, *MODELS))]
        raise ValueError(f"there is no case {name!r}; there are {', '.join(names)} (and --size for one tensor)")
    return found


def parse_size(text: str) -> int:
    """Return the number of elements that `text` names, such as 100000, 1e5, 100k or 32M.

    Raises:
        ValueError: if it names none from 1 to 10^10.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?(?:e\d+)?)([kM]?)", text.replace("_", ""))
    size = float(match[1]) * {"": 1, "k": 1e3, "M": 1e6}[match[2]] if match else 0.0
    if not (1 <= size <= 1e10 and size.is_integer()):
        raise ValueError(f"a size must be a whole number from 1 to 1e10, such as 100000, 1e5, 100k or 32M, got {text!r}")
    return int(size)
