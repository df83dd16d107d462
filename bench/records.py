"""What is reported of a contender in a case, and how it follows from the times measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from .contenders import LIMITS, Contender
from .formats import FLOAT32
from .measure import Blocks
from .plan import Task


@dataclass(frozen=True)
class Record:
    """One contender in one case. Times are seconds a step."""

    contender: str
    rule: str
    chain: str
    """What stands around the rule; empty: nothing."""
    dtype: str
    """The format: of what all arrays are, or a name of several dtypes and of what is rounded how."""
    case: str
    kind: str
    tensors: int
    elements: int
    device: str
    """What made the steps: cpu or cuda."""
    threads: int
    """Of the CPU; 1 on a GPU: the one that starts its steps."""
    note: str
    """How the contender departs from what was asked for: in threads, or in its formula."""
    blocks: int
    calls: int
    """In a block."""
    median: float
    quartiles: tuple[float, float]
    range: tuple[float, float]
    wall: float | None
    """The median by the host's clock, where the other times are a GPU's: longer if launching takes longer than running."""
    bytes: int
    """That a step has to move, at least; for the limit, those that it moves."""
    ns_per_parameter: float
    gb_per_s: float
    share_of_limit: float
    """Of the bandwidth of the loop without math; on a GPU, of a large copy."""
    peer: str
    """The face of gradstep that takes the contender's place in a program; empty for those faces and the limit."""
    speed_up: dict[str, float]
    """How many times faster each face of gradstep is."""

    @property
    def label(self) -> str:
        """Name of the rule, with that of the chain."""
        return f"{self.rule} {self.chain}".rstrip()

    @property
    def is_limit(self) -> bool:
        """Whether it is what the machine can do, and no step."""
        return self.contender in LIMITS

    @property
    def in_float32(self) -> bool:
        """Whether it is gradstep in float32 throughout, beside another format."""
        return self.contender.endswith(f" {FLOAT32.name}")

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles, in medians."""
        return (self.quartiles[1] - self.quartiles[0]) / 2 / self.median


def make_records(task: Task, threads: int, measured: Mapping[Contender, Blocks], device: str = "cpu") -> list[Record]:
    """Return a record for each contender. One of them is the limit."""
    medians = {contender: float(np.median(blocks.seconds)) for contender, blocks in measured.items()}
    elements, shapes = task.case.elements, task.case.shapes
    bytes_of = {contender: contender.moved_bytes(task.rule, shapes, task.form) for contender in measured}
    limit = next(bytes_of[contender] / medians[contender] for contender in measured if contender.is_limit)
    ours = [contender for contender in measured if contender.face]
    records = []
    for contender, blocks in measured.items():
        moved = bytes_of[contender]
        lowest, first, median, third, highest = map(float, np.percentile(blocks.seconds, [0, 25, 50, 75, 100]))
        records.append(
            Record(
                contender=contender.name,
                rule=task.rule.name,
                chain=task.rule.chain.name,
                dtype=task.form.name,
                case=task.case.name,
                kind=task.case.kind,
                tensors=len(task.case.shapes),
                elements=elements,
                device=device,
                threads=threads,
                note=contender.note(task.rule, threads),
                blocks=len(blocks.seconds),
                calls=blocks.calls,
                median=median,
                quartiles=(first, third),
                range=(lowest, highest),
                wall=float(np.median(blocks.wall)) if blocks.wall else None,
                bytes=moved,
                ns_per_parameter=1e9 * median / elements,
                gb_per_s=moved / median / 1e9,
                share_of_limit=moved / median / limit,
                peer=_peer(contender, ours),
                speed_up={face.name: median / medians[face] for face in ours if face is not contender},
            )
        )
    return records


def _peer(contender: Contender, ours: list[Contender]) -> str:
    if contender.face or contender.is_limit or not ours:
        return ""
    peers = [
        face.name for face in ours if contender.peer in (face.name, face.face)
    ]  # one for each instruction set, the widest last
    return (peers or [ours[0].name])[-1]
