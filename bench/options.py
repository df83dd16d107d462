"""The options of ``gradstep bench``: what they are, and what they ask for."""

from __future__ import annotations

import argparse
import difflib
import importlib.util
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from gradstep import config

from .cases import KINDS, Case, named, one, parse_size
from .contenders import Contender
from .cuda import Cuda
from .formats import DTYPES, FLOAT32, FORMATS, Format
from .measure import Effort
from .places import Cpu, Place
from .plan import Choice, Task
from .rules import RULES, STEPS

T = TypeVar("T")

_PICTURES = (".png", ".svg", ".pdf")
_SHORT = {"f32": DTYPES["float32"], "f64": DTYPES["float64"]}
_PLACES: dict[str, type[Place]] = {place.device: place for place in (Cpu, Cuda)}
_OF_CPU = ("threads", "isa", "plot")
_FILTERS = ("rule", "chain", "dtype", "format", "size", "case", "threads", "contender", "isa")


_SHOWN = ("all", "full", "clip", "norm", "stats", "off", "each", "...")


class MisuseError(Exception):
    """Raised for options that make no sense; the message is for the user."""


@dataclass(frozen=True)
class Order:
    """What the options ask for."""

    tasks: list[Task]
    contenders: list[Contender]
    patient: bool
    """Whether contenders that compile for long are waited for."""
    effort: Effort
    longest: float
    """Seconds after which no task is begun."""
    place: Place = field(default_factory=Cpu)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command to `parser`."""
    parser.description = (
        "Measure optimizer steps: gradstep's, and those of NumPy, numba, torch, DeepSpeed and optax where they are installed; on a "
        "GPU those of torch, apex, bitsandbytes and torchao. "
        "Options that take a list take it separated by commas."
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="fewer and smaller cases, shorter measurements: some seconds")
    add("--full", action="store_true", help="everything, or all of what other options leave open: up to an hour")
    add("--device", choices=list(_PLACES), default="cpu", help="cpu, or cuda: torch's current GPU")
    add("--seconds", metavar="N", type=float, help="begin nothing new after so many seconds")
    add("--rule", metavar="LIST", help=f"rules: {', '.join(RULES)}")
    add("--chain", metavar="LIST", help=f"whole steps, with what stands around the rule, see --list: {', '.join(_SHOWN)}")
    add("--dtype", metavar="LIST", help="float32 (f32), float64 (f64)")
    formats = ", ".join(["f32", *(name for name in FORMATS if name not in DTYPES), "all"])
    add("--format", metavar="LIST", help=f"storage formats, see --list: {formats}; float32 throughout is measured beside each")
    add("--size", metavar="LIST", help="one tensor of so many elements: 1000, 1e5, 32M")
    add("--case", metavar="LIST", help=f"cases by kind ({', '.join(KINDS)}) or name, see --list")
    add("--threads", metavar="LIST", help="numbers of threads")
    add("--contender", metavar="LIST", help="contenders, see --list; the face of gradstep that each is compared with is added")
    add("--isa", metavar="LIST", help="measure gradstep on each of these instruction sets; 'all' for all of this processor")
    add("--json", metavar="FILE", type=Path, help="write all figures to FILE")
    add("--plot", metavar="FILE", type=Path, help="draw bandwidth over size to FILE (.png, .svg or .pdf; needs matplotlib)")
    add("--list", action="store_true", help="list rules, formats, cases and contenders, and measure nothing")


def place_of(options: argparse.Namespace) -> Place:
    """Return the device that is measured."""
    return _PLACES[options.device]()


def known_contenders(options: argparse.Namespace, place: Place) -> dict[str, Contender]:
    """Return all contenders there, by name.

    Raises:
        MisuseError: for instruction sets that there are not.
    """
    names = {name: name for name in config.isas()}
    return place.contenders(list(names) if options.isa == "all" else _pick(options.isa, "--isa", names) or [])


def read(options: argparse.Namespace, known: Mapping[str, Contender], place: Place) -> Order:
    """Return what the options ask for.

    Raises:
        MisuseError: if they make no sense, or the device is not there.
    """
    if options.quick and options.full:
        raise MisuseError("--quick and --full exclude each other")
    if options.format is not None and options.chain is not None:
        raise MisuseError("--format is for the steps of rules alone: leave --chain out")
    for name in _OF_CPU:
        if not place.threaded and getattr(options, name) is not None:
            raise MisuseError(f"--{name} is for the CPU: leave it out, or --device {place.device}")
    if options.seconds is not None and not options.seconds > 0:
        raise MisuseError(f"--seconds must be above 0, got {options.seconds:g}")
    if reason := place.missing():
        raise MisuseError(f"--device {place.device}: {reason}")
    effort = place.quick if options.quick else place.full if options.full else place.normal
    filtered = any(getattr(options, name) is not None for name in _FILTERS)
    order = Order(
        _tasks(options, place),
        _contenders(options.contender, known),
        patient=options.full or options.contender is not None,
        effort=effort,
        longest=options.seconds or (math.inf if filtered else effort.longest),
        place=place,
    )
    _check_files(options, order.tasks)
    return order


def _pick(text: str | None, option: str, known: Mapping[str, T]) -> list[T] | None:
    if text is None:
        return None
    found: list[T] = []
    for name in _split(text, option):
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {near[0]}?" if near else f"; there are {', '.join(known)}"
            raise MisuseError(f"{option}: there is no {name!r}{hint}")
        if known[name] not in found:
            found.append(known[name])
    return found


def _each(text: str | None, option: str, read_one: Callable[[str], T]) -> list[T]:
    found = []
    for part in _split(text, option) if text is not None else ():
        try:
            found.append(read_one(part))
        except ValueError as error:
            raise MisuseError(f"{option}: {error}") from None
    return found


def _split(text: str, option: str) -> list[str]:
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise MisuseError(f"{option} must be a list separated by commas, got {text!r}")
    return parts


def _thread_count(text: str) -> int:
    if not (text.isdecimal() and 1 <= int(text) <= 4096):
        raise ValueError(f"a number of threads is from 1 to 4096, got {text!r}")
    return int(text)


def _tasks(options: argparse.Namespace, place: Place) -> list[Task]:
    cases: list[Case] = [case for found in _each(options.case, "--case", named) for case in found]
    cases += [one(size) for size in _each(options.size, "--size", parse_size)]
    choice = Choice(
        rules=_pick(options.rule, "--rule", RULES),
        chains=_pick(options.chain, "--chain", {name: name for name in STEPS}),
        dtypes=_pick(options.dtype, "--dtype", _SHORT | DTYPES),
        formats=_formats(options.format),
        cases=list(dict.fromkeys(cases)),
        threads=sorted(set(_each(options.threads, "--threads", _thread_count))),
        quick=options.quick,
        full=options.full,
    )
    return place.tasks(choice, config.num_threads())


def _formats(text: str | None) -> list[Format] | None:
    stored = [form for form in FORMATS.values() if not form.plain]
    return [FLOAT32, *stored] if text == "all" else _pick(text, "--format", _SHORT | FORMATS)


def _contenders(names: str | None, known: Mapping[str, Contender]) -> list[Contender]:
    """Return those named, with the faces that they are compared with; without names, all that are installed."""
    by_face = {contender.face: contender.face for contender in known.values() if contender.face}
    picked = _pick(names, "--contender", {**by_face, **{name: name for name in known}})
    if picked is None:
        return [contender for contender in known.values() if contender.installed() and not contender.on_request]
    wanted = {name for name in picked if name in known}
    faces = {name for name in picked if name in by_face} | {known[name].peer for name in wanted if not known[name].face}
    chosen = [contender for contender in known.values() if contender.name in wanted or contender.face in faces]
    for contender in chosen:
        if not contender.installed():
            raise MisuseError(f"contender {contender.name} is not installed: {contender.where()}")
    return chosen


def _check_files(options: argparse.Namespace, tasks: Iterable[Task]) -> None:
    for path in (options.json, options.plot):
        if path is not None and not path.absolute().parent.is_dir():
            raise MisuseError(f"there is no folder {path.parent}")
    if options.plot is None:
        return
    if options.chain is not None:
        raise MisuseError("--plot draws the steps of rules alone: leave --chain out")
    if options.format is not None:
        raise MisuseError("--plot draws float32 and float64 throughout: leave --format out")
    if options.plot.suffix not in _PICTURES:
        raise MisuseError(f"--plot: the name must end in {', '.join(_PICTURES)}, got {options.plot.name}")
    if importlib.util.find_spec("matplotlib") is None:
        raise MisuseError("--plot needs matplotlib: pip install matplotlib")
    if len({task.case.elements for task in tasks if task.case.kind == "one"}) < 2:
        raise MisuseError("--plot needs cases of one tensor in two sizes at least: --size 1e5,1e6")
