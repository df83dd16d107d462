"""What to measure: which rules, on which cases, with how many threads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .cases import CASES, MANY, MATRIX, Case, one
from .formats import DTYPES, FLOAT32, FORMATS, Format
from .rules import RULES, Rule, whole_steps

_QUICK_CASES = [one(1_000), one(100_000), one(1_000_000), *MANY]
_NORMAL_CASES = [one(1_000), one(10_000), one(100_000), one(1_000_000), one(4_000_000), one(16_000_000), *MANY]
_QUICK_WHOLE_CASES = [one(100_000), MANY[0]]
_WHOLE_CASES = [MATRIX, MANY[0]]
_QUICK_FORMAT_CASES = [one(100_000), one(1_000_000)]
_FORMAT_CASES = [one(100_000), one(1_000_000), one(16_000_000), MANY[0]]
_FULL_FORMAT_CASES = [one(1_000_000), one(48_000_000)]
_FULL_RULE_CASES = [one(1_000), one(100_000), one(1_000_000), one(48_000_000)]


@dataclass(frozen=True)
class Task:
    """One rule on one case, with each of some numbers of threads in turn."""

    rule: Rule
    form: Format
    case: Case
    threads: tuple[int, ...]


@dataclass(frozen=True)
class Choice:
    """What was asked for; None for an axis that was left open."""

    rules: Sequence[Rule] | None = None
    chains: Sequence[str] | None = None
    """Names from `STEPS`."""
    dtypes: Sequence[Format] | None = None
    """From `DTYPES`."""
    formats: Sequence[Format] | None = None
    """Any; dtypes are measured beside them."""
    cases: Sequence[Case] | None = None
    threads: Sequence[int] | None = None
    quick: bool = False
    full: bool = False


def doubling(n: int) -> tuple[int, ...]:
    """Return 1, 2, 4, ... and `n`."""
    counts = []
    count = 1
    while count < n:
        counts.append(count)
        count *= 2
    return (*counts, n)


def make_tasks(choice: Choice, available_threads: int) -> list[Task]:
    """Return the tasks for a choice.

    An axis that was left open takes its usual values (AdamW, float32, sizes up to 16 million and many small tensors, one thread
    and all), or with `full` all values. Left open altogether, a whole step is added, and each other rule, on one tensor. Chains
    have cases of their own: one large matrix, and many small tensors; so have formats.
    """
    threads = tuple(choice.threads or (doubling(available_threads) if choice.full else sorted({1, available_threads})))
    dtypes = choice.dtypes or (list(DTYPES.values()) if choice.full else [FLOAT32])
    cases = choice.cases or (CASES if choice.full else _QUICK_CASES if choice.quick else _NORMAL_CASES)
    first, *others = RULES.values()
    whole_cases = choice.cases or (_QUICK_WHOLE_CASES if choice.quick else _WHOLE_CASES)
    if choice.formats:
        forms = dict.fromkeys([*(choice.dtypes or ()), *choice.formats])
        cases = choice.cases or (CASES if choice.full else _QUICK_FORMAT_CASES if choice.quick else _FORMAT_CASES)
        return [Task(rule, form, case, threads) for rule in choice.rules or [first] for form in forms for case in cases]
    if choice.chains:
        steps = [step for name in choice.chains for step in whole_steps(name, choice.rules or [first])]
        return [Task(step, dtype, case, threads) for step in steps for dtype in dtypes for case in whole_cases]
    if choice.rules:
        return [Task(rule, dtype, case, threads) for rule in choice.rules for dtype in dtypes for case in cases]
    tasks = [Task(first, dtype, case, threads) for dtype in dtypes for case in cases]
    if choice.cases and not choice.full:
        return tasks
    if choice.full:
        rule_cases, rule_threads = choice.cases or _FULL_RULE_CASES, threads
        stored = [] if choice.dtypes else [form for form in FORMATS.values() if not form.plain]
        tasks += [Task(first, form, case, threads) for form in stored for case in choice.cases or _FULL_FORMAT_CASES]
    else:
        rule_cases, rule_threads = [one(100_000 if choice.quick else 8_000_000)], threads[-1:]
        whole_cases = [MANY[0]]
    names = ("all", "each") if choice.full else ("full",)
    steps = [step for name in names for step in whole_steps(name, [first]) if step not in others]
    tasks += [Task(step, dtype, case, rule_threads) for step in steps for dtype in dtypes for case in whole_cases]
    return tasks + [Task(rule, dtype, case, rule_threads) for rule in others for dtype in dtypes for case in rule_cases]
