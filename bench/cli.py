"""The command ``gradstep bench``."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import difflib
import importlib.util
import json
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from gradstep import config

from . import machine
from .cases import CASES, KINDS, Case, named, one, parse_size
from .contenders import LIMIT, Contender, contenders
from .measure import FULL, NORMAL, QUICK
from .plan import DTYPES, Choice, Task, make_tasks
from .plot import plot
from .problem import moved_bytes
from .report import Reporter, make_reporter
from .rules import RULES
from .session import Session, Skip
from .tables import summary_table

T = TypeVar("T")


class Misuse(Exception):
    """Raised for options that make no sense; the message is for the user."""


_PICTURES = (".png", ".svg", ".pdf")
_DTYPE_NAMES = {"f32": "float32", "f64": "float64", **{name: name for name in DTYPES}}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command to `parser`."""
    parser.description = (
        "Measure optimizer steps: gradstep's, and those of NumPy, numba, torch, DeepSpeed and optax, as far as they are installed. "
        "Options that take a list take it separated by commas."
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="fewer and smaller cases, shorter measurements: some seconds")
    add("--full", action="store_true", help="everything, or all of what other options leave open: up to an hour")
    add("--rule", metavar="LIST", help=f"rules: {', '.join(RULES)}")
    add("--dtype", metavar="LIST", help="float32 (f32), float64 (f64)")
    add("--size", metavar="LIST", help="one tensor of so many elements: 1000, 1e5, 32M")
    add("--case", metavar="LIST", help=f"cases by kind ({', '.join(KINDS)}) or name, see --list")
    add("--threads", metavar="LIST", help="numbers of threads")
    add("--contender", metavar="LIST", help="contenders, see --list; the face of gradstep that each is compared with is added")
    add("--isa", metavar="LIST", help="measure gradstep on each of these instruction sets; 'all' for all that the processor has")
    add("--json", metavar="FILE", type=Path, help="write all figures to FILE")
    add("--plot", metavar="FILE", type=Path, help="draw bandwidth over size to FILE (.png, .svg or .pdf; needs matplotlib)")
    add("--list", action="store_true", help="list rules, cases and contenders, and measure nothing")


def run(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    """Run the command; return its exit status.

    Raises:
        Misuse: for options that make no sense.
    """
    if options.quick and options.full:
        raise Misuse("--quick and --full exclude each other")
    isas = _pick(options.isa, "--isa", {name: name for name in config.isas()}, everything="all") or []
    known = contenders(isas)
    if options.list:
        _list(known)
        return 0
    tasks = _tasks(options)
    chosen = _contenders(options.contender, known)
    _check_files(options, tasks)
    effort = QUICK if options.quick else FULL if options.full else NORMAL
    reporter = make_reporter()
    session = Session(chosen, options.contender is not None or options.full, effort, reporter)
    status = 0
    try:
        session.measure(tasks)
    except KeyboardInterrupt:
        status = 130  # what has been measured is still worth showing
    finally:
        reporter.close()
    _conclude(session, reporter)
    if options.json:
        options.json.write_text(json.dumps(_document(session, arguments), indent=1) + "\n")
        reporter.line(f"figures: {options.json}")
    if options.plot and session.records:
        plot(session.records, machine.machine(), options.plot)
        reporter.line(f"picture: {options.plot}")
    return status or (1 if session.failures else 0)


def _pick(text: str | None, option: str, known: Mapping[str, T], everything: str = "") -> list[T] | None:
    if text is None:
        return None
    if everything and text == everything:
        return list(known.values())
    found = []
    for name in _split(text, option):
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {near[0]}?" if near else f"; there are {', '.join(known)}"
            raise Misuse(f"{option}: there is no {name!r}{hint}")
        found.append(known[name])
    return list(dict.fromkeys(found))


def _split(text: str, option: str) -> list[str]:
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise Misuse(f"{option} must be a list separated by commas, got {text!r}")
    return parts


def _each(text: str | None, option: str, read: Callable[[str], T]) -> list[T]:
    found = []
    for part in _split(text, option) if text is not None else ():
        try:
            found.append(read(part))
        except ValueError as error:
            raise Misuse(f"{option}: {error}") from None
    return found


def _thread_count(text: str) -> int:
    if not (text.isdecimal() and 1 <= int(text) <= 4096):
        raise Misuse(f"a number of threads is from 1 to 4096, got {text!r}")
    return int(text)


def _tasks(options: argparse.Namespace) -> list[Task]:
    cases: list[Case] = [case for found in _each(options.case, "--case", named) for case in found]
    cases += [one(size) for size in _each(options.size, "--size", parse_size)]
    dtypes = _pick(options.dtype, "--dtype", {alias: DTYPES[name] for alias, name in _DTYPE_NAMES.items()})
    choice = Choice(
        rules=_pick(options.rule, "--rule", RULES),
        dtypes=dtypes,
        cases=list(dict.fromkeys(cases)),
        threads=sorted(set(_each(options.threads, "--threads", _thread_count))),
        quick=options.quick,
        full=options.full,
    )
    return make_tasks(choice, config.num_threads())


def _contenders(names: str | None, known: Mapping[str, Contender]) -> list[Contender]:
    """Return the contenders to measure: those named, with the faces that they are compared with, or all that are installed."""
    by_face = {contender.face: contender.face for contender in known.values() if contender.face}
    picked = _pick(names, "--contender", {**by_face, **{name: name for name in known}})
    if picked is None:
        return [contender for contender in known.values() if contender.installed() and not contender.on_request]
    wanted = {name for name in picked if name in known}
    faces = {name for name in picked if name in by_face} | {known[name].peer for name in wanted if not known[name].face}
    chosen = [contender for contender in known.values() if contender.name in wanted or contender.face in faces]
    for contender in chosen:
        if not contender.installed():
            raise Misuse(f"contender {contender.name} is not installed: pip install {contender.package}")
    return chosen


def _check_files(options: argparse.Namespace, tasks: Iterable[Task]) -> None:
    for path in (options.json, options.plot):
        if path is not None and not path.absolute().parent.is_dir():
            raise Misuse(f"there is no folder {path.parent}")
    if options.plot is None:
        return
    if options.plot.suffix not in _PICTURES:
        raise Misuse(f"--plot: the name must end in {', '.join(_PICTURES)}, got {options.plot.name}")
    if importlib.util.find_spec("matplotlib") is None:
        raise Misuse("--plot needs matplotlib: pip install matplotlib")
    if len({task.case.elements for task in tasks if task.case.kind == "one"}) < 2:
        raise Misuse("--plot needs cases of one tensor in two sizes at least: --size 1e5,1e6")


def _list(known: Mapping[str, Contender]) -> None:
    reporter = make_reporter()
    reporter.line("rules")
    for rule in RULES.values():
        moved = moved_bytes(rule, 1, DTYPES["float32"])
        reporter.line(f"  {rule.name:<26} {rule.optimizer:<8} {moved:>3} bytes a float32 parameter")
    reporter.line("cases")
    for case in CASES:
        reporter.line(f"  {case.name.replace(' ', ''):<12} {case.kind:<6} {len(case.shapes):>5} tensors {case.elements:>12,} elements")
    reporter.line("contenders")
    for contender in (LIMIT, *known.values()):
        missing = "" if contender.installed() else f" (not installed: pip install {contender.package})"
        reporter.line(f"  {contender.name:<26} {contender.about}{missing}")


def _conclude(session: Session, reporter: Reporter) -> None:
    if not session.records:
        reporter.line("nothing was measured")
    else:
        reporter.table(summary_table(session.records))
        notes = {(record.contender, record.threads_note): None for record in session.records if record.threads_note}
        for contender, note in notes:
            reporter.line(f"* {contender}: {note}")
    for title, skips in (("FAILED", session.failures), ("left out", session.skips)):
        for (contender, reason), where in _grouped(skips).items():
            reporter.line(f"{title}: {contender or 'all'}, {where}: {reason}")


def _grouped(skips: Iterable[Skip]) -> dict[tuple[str, str], str]:
    groups: dict[tuple[str, str], list[str]] = {}
    for skip in skips:
        where = f"{skip.rule} {skip.dtype}{', ' if skip.case else ''}{skip.case}"
        groups.setdefault((skip.contender, skip.reason), []).append(where)
    return {key: "; ".join(where) for key, where in groups.items()}


def _document(session: Session, arguments: Sequence[str]) -> dict[str, Any]:
    return {
        "format": 1,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", "gradstep", *arguments]),
        "machine": machine.machine(),
        "versions": machine.versions(),
        "config": machine.configuration(),
        "effort": dataclasses.asdict(session.effort),
        "settings": {record.rule: RULES[record.rule].settings for record in session.records},
        "records": [dataclasses.asdict(record) | {"spread": record.spread} for record in session.records],
        "failures": [dataclasses.asdict(skip) for skip in session.failures],
        "left_out": [dataclasses.asdict(skip) for skip in session.skips],
    }
