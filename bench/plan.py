"""What to measure: which rules, on which cases, with how many threads."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
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

# On a GPU: as large as most of its memory, larger than its caches, and where launching takes longer than running.
_LARGEST, _LARGE = one(1_000_000_000), one(32_000_000)
_QUICK_LARGE = one(4_000_000)
_GPU_CHAIN = "unscale-clip"
_GPU_FORMATS = [FORMATS[name] for name in ("bf16", "bf16-all", "q8")]


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
    format_cases = choice.cases or (CASES if choice.full else _QUICK_FORMAT_CASES if choice.quick else _FORMAT_CASES)
    if tasks := _chosen(choice, threads, dtypes, cases, whole_cases, format_cases):
        return tasks
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


def make_cuda_tasks(choice: Choice) -> list[Task]:
    """Return the tasks for a choice on a GPU.

    An axis that was left open takes its usual values: AdamW, float32, one tensor of 10^9 elements and one of 32 million, and many
    small ones; formats and chains the largest, and the chain many small ones too. Left open altogether, a chain and some formats
    are added; with `full`, each rule, all chains and all formats. What matters most comes first.
    """
    threads = (1,)
    dtypes = choice.dtypes or [FLOAT32]
    largest, large = (_QUICK_LARGE, _QUICK_LARGE) if choice.quick else (_LARGEST, _LARGE)
    cases = choice.cases or list(dict.fromkeys([largest, MANY[0], large, MANY[1]]))
    whole_cases, format_cases = choice.cases or [largest, MANY[0]], choice.cases or [largest]
    if tasks := _chosen(choice, threads, dtypes, cases, whole_cases, format_cases):
        return tasks
    first, *others = RULES.values()
    names = ("all", "each") if choice.full else (_GPU_CHAIN,)
    steps = [step for name in names for step in whole_steps(name, [first]) if step not in others]
    stored = [form for form in FORMATS.values() if not form.plain] if choice.full else _GPU_FORMATS
    ordered = [
        *_product([first], dtypes, cases[:2]),
        *_product(steps, dtypes, whole_cases),
        *([] if choice.dtypes else _product([first], stored, format_cases)),
        *_product([first], dtypes, cases[2:]),
        *(_product(others, dtypes, choice.cases or [large, MANY[0]]) if choice.full else []),
    ]
    if choice.cases and not choice.full:
        ordered = _product([first], dtypes, cases)
    return [Task(rule, form, case, threads) for rule, form, case in ordered]


def _chosen(
    choice: Choice,
    threads: tuple[int, ...],
    dtypes: Sequence[Format],
    cases: Sequence[Case],
    whole_cases: Sequence[Case],
    format_cases: Sequence[Case],
) -> list[Task]:
    """Return the tasks for what was chosen by rule, chain or format; none if nothing was."""
    first = next(iter(RULES.values()))
    rules = choice.rules or [first]
    if choice.formats:
        wanted = _product(rules, dict.fromkeys([*(choice.dtypes or ()), *choice.formats]), format_cases)
    elif choice.chains:
        wanted = _product([step for name in choice.chains for step in whole_steps(name, rules)], dtypes, whole_cases)
    else:
        wanted = _product(choice.rules or [], dtypes, cases)
    return [Task(rule, form, case, threads) for rule, form, case in wanted]


def _product(rules: Iterable[Rule], forms: Iterable[Format], cases: Iterable[Case]) -> list[tuple[Rule, Format, Case]]:
    return list(itertools.product(rules, forms, cases))
