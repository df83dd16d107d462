"""What the monitor's settings and values must be, and the errors when they are not."""

from __future__ import annotations

import math
from typing import Any


def number(where: str, value: Any) -> float:
    """Return a number, or an array or tensor of one element, as a float.

    Raises:
        TypeError: if it is neither.
    """
    try:
        if isinstance(value, (str, bytes)):
            raise TypeError
        # item() reads tensors that require gradients without torch's warning.
        return float(value.item() if hasattr(value, "item") else value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{where} must be a number or an array of one element, got {_brief(value)}") from None


def check_positive(where: str, value: Any, *, zero: bool = False) -> None:
    """Refuse what is no finite number above zero; `zero` allows zero itself.

    Raises:
        TypeError: if it is no int or float.
        ValueError: if it is out of range.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{where} must be a number, got {_brief(value)}")
    if not (0 <= value < math.inf) or (value == 0 and not zero):
        raise ValueError(f"{where} must be finite and {'at least' if zero else 'greater than'} 0, got {value}")


def check_count(where: str, value: Any, least: int = 1) -> None:
    """Refuse what is no integer from `least` on.

    Raises:
        TypeError: if it is no int.
        ValueError: if it is less than `least`.
    """
    if type(value) is not int:
        raise TypeError(f"{where} must be an int, got {_brief(value)}")
    if value < least:
        raise ValueError(f"{where} must be at least {least}, got {value}")


def check_choice(where: str, value: Any, choices: tuple[str, ...]) -> None:
    """Refuse what is none of the `choices`.

    Raises:
        ValueError: if it is something else.
    """
    if value not in choices:
        raise ValueError(f"{where} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def _brief(value: Any) -> str:
    shape = getattr(value, "shape", None)
    if shape is not None:
        return f"{type(value).__name__} of shape {tuple(shape)}"
    return repr(value) if isinstance(value, (str, int, float, type(None))) else type(value).__name__
