"""The command ``gradstep bench``."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterable, Sequence

from . import machine
from .cases import CASES
from .contenders import Contender
from .formats import FLOAT32, FORMATS
from .options import MisuseError, add_arguments, known_contenders, place_of, read
from .outcome import conclude, document
from .plot import panels_of, plot
from .problem import moved_bytes
from .report import Reporter, make_reporter
from .rules import RULES, STEPS, whole_steps
from .session import Session

__all__ = ["MisuseError", "add_arguments", "run"]

_MANY = 1 << 20  # elements, of which a format takes so many bytes each


def run(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    """Run the command; return its exit status: 1 if a contender failed, 130 if the user had enough, else 0.

    Args:
        options: what the parser made of `arguments`.
        arguments: the command's, to be written down with the figures.

    Raises:
        MisuseError: for options that make no sense.
    """
    place = place_of(options)
    known = known_contenders(options, place)
    reporter = make_reporter()
    if options.list:
        _list([place.limit, *known.values()], reporter)
        return 0
    session = Session(read(options, known, place), reporter)
    busy = machine.busy_cores()
    if busy is not None and busy > 0.1 * (os.cpu_count() or 1):
        reporter.line(f"Other programs keep {busy:.1f} cores busy: figures will be rough, and OpenMP's threads suffer most.")
    status = 0
    try:
        session.measure()
    except KeyboardInterrupt:
        status = 130  # what has been measured is still worth showing
    finally:
        reporter.close()
    conclude(session, reporter)
    if options.json:
        options.json.write_text(json.dumps(document(session, arguments, busy), indent=1, default=str) + "\n", encoding="utf-8")
        reporter.line(f"figures: {options.json}")
    if options.plot and panels_of(session.records):
        plot(session.records, machine.machine(), options.plot)
        reporter.line(f"picture: {options.plot}")
    return status or (1 if session.failures else 0)


def _list(known: Iterable[Contender], reporter: Reporter) -> None:
    reporter.line("rules")
    for rule in RULES.values():
        moved = moved_bytes(rule, ((1,),), FLOAT32)
        reporter.line(f"  {rule.name:<26} {rule.optimizer:<8} {moved:>3} bytes a float32 parameter")
    reporter.line("chains, around AdamW")
    for name in STEPS:
        steps = whole_steps(name, [RULES["adamw"]])
        about = ", ".join(step.chain.name or step.name for step in steps) if len(steps) > 1 else steps[0].about
        moves = f"{moved_bytes(steps[0], ((1,),), FLOAT32):>3} bytes a float32 parameter" if len(steps) == 1 else ""
        reporter.line(f"  {name:<26} {moves:<30} {about}")
    reporter.line("formats, with AdamW")
    for form in FORMATS.values():
        each = moved_bytes(RULES["adamw"], ((_MANY,),), form) / _MANY
        reporter.line(f"  {form.name:<26} {each:>5.4g} bytes a parameter   {form.about}")
    reporter.line("cases")
    for case in CASES:
        name, tensors = case.name.replace(" ", ""), len(case.shapes)
        reporter.line(f"  {name:<12} {case.kind:<6} {tensors:>5} tensors {case.elements:>12,} elements")
    reporter.line("contenders")
    for contender in known:
        missing = "" if contender.installed() else f" (not installed: {contender.where()})"
        reporter.line(f"  {contender.name:<26} {contender.about}{missing}")
