"""What the settings of schedules must be: each rule returns the setting as a plain Python value, or says what is wrong."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")


def settle(schedule: object, /, **rules: Callable[[str, Any], Any]) -> None:
    """Check settings of a (frozen) schedule, each by its rule, and leave in their place what the rules return."""
    for name, rule in rules.items():
        where = f"{type(schedule).__name__}: {name}"
        object.__setattr__(schedule, name, rule(where, getattr(schedule, name)))


def number(where: str, value: Any) -> float:
    """Take a finite number that is not negative."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"{where} must be a number, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{where} must be finite, got {value}")
    if value < 0:
        raise ValueError(f"{where} must not be negative, got {value}")
    return float(value)


def positive(where: str, value: Any) -> float:
    """Take a finite number above zero."""
    if number(where, value) == 0:
        raise ValueError(f"{where} must be positive, got {value}")
    return float(value)


def share(where: str, value: Any) -> float:
    """Take a number in [0, 1]."""
    if number(where, value) > 1:
        raise ValueError(f"{where} must be in [0, 1], got {value}")
    return float(value)


def _integer(where: str, value: Any, least: int) -> int:
    if isinstance(value, (bool, np.bool_)) or not hasattr(value, "__index__"):
        raise TypeError(f"{where} must be an integer, got {value!r}")
    if operator.index(value) < least:
        raise ValueError(f"{where} must be at least {least}, got {value}")
    return operator.index(value)


from_zero = partial(_integer, least=0)
"""Take an integer from 0."""

from_one = partial(_integer, least=1)
"""Take an integer from 1."""


def flag(where: str, value: Any) -> bool:
    """Take a truth value."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{where} must be True or False, got {value!r}")
    return bool(value)


def one_of(*names: str) -> Callable[[str, Any], str]:
    """Return the rule that takes one of these names."""

    def rule(where: str, value: Any) -> str:
        if value not in names:
            raise ValueError(f"{where} must be one of {', '.join(map(repr, names))}, got {value!r}")
        return str(value)

    return rule


def optional(rule: Callable[[str, Any], T]) -> Callable[[str, Any], T | None]:
    """Return the rule that takes None, or what `rule` takes."""
    return lambda where, value: None if value is None else rule(where, value)


def tuple_of(rule: Callable[[str, Any], T]) -> Callable[[str, Any], tuple[T, ...]]:
    """Return the rule that takes a sequence of what `rule` takes."""

    def rule_of_all(where: str, values: Any) -> tuple[T, ...]:
        if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
            raise TypeError(f"{where} must be a sequence, got {values!r}")
        return tuple(rule(f"{where}[{i}]", value) for i, value in enumerate(values))

    return rule_of_all


def increasing(rule: Callable[[str, Any], int]) -> Callable[[str, Any], tuple[int, ...]]:
    """Return the rule that takes a sequence of ever larger integers that `rule` takes."""

    def rule_of_all(where: str, values: Any) -> tuple[int, ...]:
        taken = tuple_of(rule)(where, values)
        for i in range(1, len(taken)):
            if taken[i] <= taken[i - 1]:
                raise ValueError(f"{where} must increase, got {taken[i]} after {taken[i - 1]}")
        return taken

    return rule_of_all
