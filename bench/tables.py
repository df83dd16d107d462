"""What is shown of records: numbers as text, in rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from .records import Record


@dataclass(frozen=True)
class Table:
    """Rows of text under a title. The first column is aligned to the left, the others to the right."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    emphasized: frozenset[int] = field(default_factory=frozenset)
    """Numbers of the rows that are gradstep's."""


def time_text(seconds: float) -> str:
    """Return `seconds` with three digits and a unit."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}" if seconds < 1000 * size else f"{seconds / size:.0f} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def _threads_text(record: Record) -> str:
    return f"{record.threads} thread{'s' if record.threads > 1 else ''}" if record.device == "cpu" else "GPU"


def _ratio_text(ratio: float) -> str:
    return f"{ratio:.0f}x" if ratio >= 99.5 else f"{ratio:.1f}x" if ratio >= 9.95 else f"{ratio:.2f}x"


def _name(record: Record) -> str:
    return record.contender + "*" * bool(record.note)


def _gain(record: Record) -> str:
    return _ratio_text(record.speed_up[record.peer]) if record.peer else ""


def case_table(records: Sequence[Record]) -> Table:
    """Return all figures of one case."""
    first = records[0]
    tensors = f"{first.tensors:,} tensors, " * (first.tensors > 1)
    moved = records[min(1, len(records) - 1)].bytes / first.elements  # of the first contender, behind the loop without math
    what = first.case if first.kind == "one" else f"{first.case}: {tensors}{first.elements:,}"
    rows = []
    by_host = any(record.wall is not None for record in records)
    for record in records:
        rows.append(
            (
                _name(record),
                time_text(record.median),
                *([time_text(record.wall or 0.0)] * by_host),
                f"±{100 * record.spread:.0f}%",
                f"{record.ns_per_parameter:.3g}",
                f"{record.gb_per_s:.1f}",
                f"{100 * record.share_of_limit:.0f}%",
                _gain(record),
            )
        )
    return Table(
        f"{first.label}, {first.dtype}, {what} elements, {_threads_text(first)}, {moved:.4g} bytes a parameter",
        ("", "time a step", *(["by the host"] * by_host), "spread", "ns/param", "GB/s", "of limit", "gradstep's gain"),
        rows,
        frozenset(i for i, record in enumerate(records) if record.contender.startswith("gradstep")),
    )


def summary_table(records: Iterable[Record]) -> Table:
    """Return for each case the share of the machine's bandwidth, and the speed-up over each contender."""
    cases: dict[tuple[str, str, str, str], dict[str, Record]] = {}
    for record in records:
        key = (record.label, record.dtype, record.case, str(record.threads) if record.device == "cpu" else "GPU")
        cases.setdefault(key, {})[record.contender] = record
    everyone = [record for case in cases.values() for record in case.values()]
    shown = [record for record in everyone if not record.is_limit and not record.in_float32]
    ours = list(
        dict.fromkeys(record.contender for record in shown if record.contender.startswith("gradstep") and not record.peer)
    )
    others = list(dict.fromkeys(record.contender for record in shown if record.contender not in ours))
    rows = []
    for (label, dtype, case, threads), by_name in cases.items():
        shares = [f"{100 * by_name[name].share_of_limit:.0f}%" if name in by_name else "" for name in ours]
        ratios = [_gain(by_name[name]) + "*" * bool(by_name[name].note) if name in by_name else "" for name in others]
        rows.append((f"{label} {dtype}, {case}", threads, *shares, *ratios))
    return Table(
        "Share of the limit that gradstep reaches, and how many times faster it is than others",
        ("", "threads", *ours, *others),
        rows,
    )
