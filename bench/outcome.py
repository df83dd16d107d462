"""What remains of a session: the summary on the screen, and the document with all figures."""

from __future__ import annotations

import dataclasses
import datetime as dt
import shlex
from collections.abc import Iterable, Sequence
from typing import Any

from . import machine
from .chains import Chain
from .format_tables import distance_table, time_table
from .report import Reporter
from .session import Session, Skip
from .tables import summary_table


def conclude(session: Session, reporter: Reporter) -> None:
    """Show the summary, and what was not measured."""
    if not session.records:
        reporter.line("nothing was measured")
    else:
        reporter.table(summary_table(session.records))
        if session.distances:
            reporter.table(time_table(session.records))
            reporter.table(distance_table(session.distances.values()))
        notes = dict.fromkeys((record.contender, record.note) for record in session.records if record.note)
        for contender, note in notes:
            reporter.line(f"* {contender}: {note}")
    for note in session.notes:
        reporter.line(note)
    for title, skips in (("FAILED", session.failures), ("left out", session.skips)):
        for (contender, reason), where in _grouped(skips).items():
            reporter.line(f"{title}: {contender + ', ' if contender else ''}{where}: {reason}")


def _grouped(skips: Iterable[Skip], most: int = 4) -> dict[tuple[str, str], str]:
    groups: dict[tuple[str, str], list[str]] = {}
    for skip in skips:
        where = f"{skip.rule} {skip.dtype}{', ' if skip.case else ''}{skip.case}"
        groups.setdefault((skip.contender, skip.reason), []).append(where)
    return {
        key: "; ".join(where[:most]) + (f"; {len(where) - most} more" if len(where) > most else "")
        for key, where in groups.items()
    }


def document(session: Session, arguments: Sequence[str], busy_cores: float | None) -> dict[str, Any]:
    """Return all that was measured, with what it depends on, for JSON.

    Args:
        session: the session, measured.
        arguments: of the command.
        busy_cores: how many cores other programs kept busy when it began.
    """
    names = {(record.rule, record.chain) for record in session.records}
    measured = [task for task in session.order.tasks if (task.rule.name, task.rule.chain.name) in names]
    return {
        "format": 3,
        "date": dt.datetime.now(dt.timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", "gradstep", *arguments]),
        "machine": machine.machine() | {"busy_cores": busy_cores} | session.order.place.describe(),
        "versions": machine.versions(),
        "config": machine.configuration(),
        "effort": dataclasses.asdict(session.order.effort),
        "settings": {task.rule.name: task.rule.settings for task in measured},
        "formats": {task.form.name: {"dtype": task.form.dtype, **task.form.options} for task in measured},
        "chains": {task.rule.chain.name: _keywords(task.rule.chain) for task in measured if task.rule.chain},
        "records": [dataclasses.asdict(record) | {"spread": record.spread} for record in session.records],
        "distances": [dataclasses.asdict(distance) | {"share": distance.share} for distance in session.distances.values()],
        "notes": session.notes,
        "failures": [dataclasses.asdict(skip) for skip in session.failures],
        "left_out": [dataclasses.asdict(skip) for skip in session.skips],
    }


def _keywords(chain: Chain) -> dict[str, Any]:
    return {"constructor": dict(chain.options), "step": dict(chain.call)}
