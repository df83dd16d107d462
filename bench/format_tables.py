"""What is shown of storage formats: time against float32 throughout, and distance from float64."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from .distance import STEPS, Distance
from .formats import FLOAT32, FORMATS
from .records import Record
from .tables import Table


def time_table(records: Iterable[Record]) -> Table:
    """Return bytes and time of each case in another format, in units of those of gradstep in float32 throughout."""
    cases: dict[tuple[str, str], dict[str, Record]] = {}
    for record in records:
        if not FORMATS[record.dtype].plain and not record.is_limit:
            key = (f"{record.label} {record.dtype}, {record.case}", str(record.threads) if record.device == "cpu" else "GPU")
            cases.setdefault(key, {})[record.contender] = record
    names = list(
        dict.fromkeys(record.contender for case in cases.values() for record in case.values() if not record.in_float32)
    )
    rows = []
    for key, case in cases.items():
        times = [_time(case[name], case) if name in case else "" for name in names]
        rows.append((*key, _bytes(case.values()), *times))
    title = "Bytes that a step moves, and its time, in units of gradstep's in float32 throughout"
    return Table(title, ("", "threads", "bytes", *names), rows)


def _time(record: Record, case: dict[str, Record]) -> str:
    reference = case.get(f"{record.peer or record.contender} {FLOAT32.name}")
    return f"{record.median / reference.median:.0%}" if reference else ""


def _bytes(case: Collection[Record]) -> str:
    own, reference = ({record.bytes for record in case if record.in_float32 == which} for which in (False, True))
    return f"{own.pop() / reference.pop():.0%}" if own and reference else ""


def distance_table(distances: Iterable[Distance]) -> Table:
    """Return how far everyone is from float64 after many steps, in units of the way."""
    rules: dict[str, dict[str, Distance]] = {}
    for distance in distances:
        rules.setdefault(f"{distance.rule} {distance.dtype}", {})[distance.contender] = distance
    names = list(dict.fromkeys(name for row in rules.values() for name in row))
    rows = [
        (label, *(f"{100 * row[name].share:.3g}%" if name in row else "" for name in names)) for label, row in rules.items()
    ]
    return Table(f"RMS distance from float64 after {STEPS} steps, in units of the RMS way there", ("", *names), rows)
