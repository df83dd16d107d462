"""Storage formats: of what dtype and shape new states are, and conversions between formats. Bits and formulas: docs/formats.md."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import numpy as np

from gradstep import _core

Compressed = Literal["q8", "q4"]

FLOATS = ("float64", "float32", "bfloat16", "float16")
FORMATS = (*FLOATS, "q8", "q4")
AVERAGES = ("ema", "swa", "slow")
"""Arrays beside the rule's own states: they have floating-point formats only."""

LEAST_COMPRESSED = 4096
"""Elements from which on a state is compressed: under it there is nothing to save."""

_STATES = frozenset(state for rule in _core.rules.values() for state in rule.states)
_BLOCK = {"q8": 256, "q4": 128}
_LARGEST = {("q8", False): 127, ("q8", True): 255, ("q4", False): 7, ("q4", True): 15}
_PER_BYTE = {"q8": 1, "q4": 2}


class Array(NamedTuple):
    """An array to be made."""

    shape: tuple[int, ...]
    dtype: str
    fill: float
    """What every element begins with; NaN: the parameter itself."""


def is_unsigned(name: str) -> bool:
    """Whether state `name` of the rules is never negative: a second moment."""
    return name in _core.unsigned_states


def scale_name(name: str) -> str:
    """Return the name under which the scales of state `name` stand."""
    return f"{name}_scale"


def check_state_dtype(value: Any, states: tuple[str, ...] | list[str]) -> None:
    """Refuse a `state_dtype` that names no format, or no state.

    Args:
        value: the option.
        states: the rule's states.

    Raises:
        TypeError: if it is neither text nor a dict.
        ValueError: for a format that there is not, or that a state can't have; for a name that is no state.
    """
    if value is None:
        return
    if not isinstance(value, (str, Mapping)):
        raise TypeError(f"state_dtype must be a format or a dict of formats, got {value!r}")
    subtracted = ("square_avg", "grad_avg") if "grad_avg" in states else ()
    for name, form in value.items() if isinstance(value, Mapping) else [(None, value)]:
        what = "state_dtype" if name is None else f"state_dtype[{name!r}]"
        if not isinstance(form, str) or form not in FORMATS:
            raise ValueError(f"{what} must be one of {', '.join(map(repr, FORMATS))}, got {form!r}")
        if name is not None and name not in _STATES and name not in AVERAGES:
            raise ValueError(f"{what}: there is no such state, there are {', '.join(map(repr, (*states, *AVERAGES)))}")
        if name in AVERAGES and form not in FLOATS:
            raise ValueError(f"{what} must be one of {', '.join(map(repr, FLOATS))}, got {form!r}")
        if form not in FLOATS and subtracted and (name is None or name in subtracted):
            raise ValueError(f"{what}={form!r}: centered RMSprop subtracts states, their difference would be lost in rounding")


def arrays_of_state(
    name: str, settings: Mapping[str, Any], dtype: str, shape: tuple[int, ...], fill: float
) -> dict[str, Array]:
    """Return the arrays that a new state consists of.

    Args:
        name: of the state, or of an array beside: an average, or what `precision` keeps.
        settings: of the parameter's group.
        dtype: of the parameter, as NumPy and torch spell it.
        shape: of the parameter.
        fill: what the state begins with.

    Raises:
        ValueError: for a format that a complex parameter can't have.
    """
    computing = dtype if dtype.startswith("complex") else "float64" if dtype == "float64" else "float32"
    if name == "master":
        return {name: Array(shape, "float32", math.nan)}
    if name == "compensation":
        return {name: Array(shape, dtype, 0.0)}
    if name == "remainder":
        return {name: Array(shape, "int16", 0.0)}
    fill = math.nan if name == "slow" else fill
    chosen = settings.get("state_dtype")
    form = chosen.get(name) if isinstance(chosen, Mapping) else None if name in AVERAGES else chosen
    if form is None:
        return {name: Array(shape, computing, fill)}
    if dtype.startswith("complex"):
        raise ValueError("state_dtype is for real parameters: the states of complex ones have their dtype")
    if form in FLOATS:
        return {name: Array(shape, form, fill)}
    size = math.prod(shape)
    if size < LEAST_COMPRESSED:
        return {name: Array(shape, computing, fill)}
    return _compressed(name, form, size, fill)


def compressed_arrays(name: str, size: int, part: str) -> list[Array]:
    """Return what array `part` of the compressed state `name` of so many elements may be, a format each."""
    return [_compressed(name, form, size, 0.0)[part] for form in _BLOCK]


def _compressed(name: str, form: str, size: int, fill: float) -> dict[str, Array]:
    code = _LARGEST[form, is_unsigned(name)] if fill else 0
    return {
        name: Array((-(-size // _PER_BYTE[form]),), "uint8", code | code << 4 if form == "q4" else code),
        scale_name(name): Array((-(-size // _BLOCK[form]),), "float32", fill),
    }


def numpy_dtype(name: str) -> np.dtype[Any]:
    """Return the NumPy dtype of a format.

    Raises:
        ImportError: for bfloat16, if ml_dtypes is not installed.
    """
    if name != "bfloat16":
        return np.dtype(name)
    try:
        import ml_dtypes  # noqa: PLC0415
    except ImportError:
        raise ImportError("bfloat16 in NumPy is that of ml_dtypes: pip install ml_dtypes") from None
    dtype: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
    return dtype


# ---- conversions ----------------------------------------------------------------------------------------------------------


def convert_(target: Any, source: Any) -> None:
    """Copy an array into one of another dtype, in place; each number is rounded to nearest, ties to even, once.

    Args:
        target: float64, float32, float16 or bfloat16, of any layout.
        source: as `target`, of the same shape.

    Raises:
        TypeError: for another dtype.
        ValueError: if the shapes differ, or the arrays share memory. Nothing has been written then.
    """
    _core.convert((target,), (source,), False, "convert_")


def quantize(array: Any, form: Compressed, *, unsigned: bool = False) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return an array as codes and the scales of their blocks.

    Args:
        array: of floating-point numbers, any shape.
        form: ``"q8"`` or ``"q4"``.
        unsigned: whether the numbers are second moments, which have no sign: it is dropped.

    Returns:
        Codes, uint8, of shape (n,) or ((n + 1) div 2,), n the number of elements in the order of C; scales, float32, of shape
        (ceil(n / 256),) or (ceil(n / 128),).

    Example:
        >>> import numpy as np
        >>> from gradstep import formats
        >>> x = np.linspace(-1, 1, 1000, dtype=np.float32)
        >>> codes, scale = formats.quantize(x, "q8")
        >>> y = formats.dequantize(codes, scale, x.shape, "q8")
        >>> bool((abs(y - x) <= abs(x) / 16 + 2e-5).all())
        True

    Raises:
        TypeError: for a complex array.
        ValueError: for another format, or an array without elements; for one of a single element as q4.
    """
    given = np.ascontiguousarray(array)
    if given.dtype.kind == "c":
        raise TypeError("quantize: array is complex: quantize its parts, array.real and array.imag")
    size = given.size
    _check(form, size)
    codes = np.empty(-(-size // _PER_BYTE[form]), np.uint8)
    scale = np.empty(-(-size // _BLOCK[form]), np.float32)
    _core.convert((codes, scale), (given.reshape(-1),), unsigned, "quantize")
    return codes, scale


def dequantize(
    codes: Any, scale: Any, shape: tuple[int, ...], form: Compressed, *, unsigned: bool = False
) -> np.ndarray[Any, Any]:
    """Return the numbers that codes and scales stand for, as float32 of shape `shape`.

    Args:
        codes, scale: as from `quantize`.
        shape: of the array.
        form: ``"q8"`` or ``"q4"``.
        unsigned: as for `quantize`.

    Raises:
        TypeError: for codes that are not uint8, or scales that are not float32.
        ValueError: for another format, or if shapes do not fit.
    """
    array = np.empty(shape, np.float32)
    _check(form, array.size)
    if codes.shape != (-(-array.size // _PER_BYTE[form]),):
        raise ValueError(f"dequantize: codes has shape {tuple(codes.shape)}, {form} of shape {shape} has other codes")
    _core.convert((array.reshape(-1),), (codes, scale), unsigned, "dequantize")
    return array


def _check(form: str, size: int) -> None:
    if form not in _BLOCK:
        raise ValueError(f"the format must be 'q8' or 'q4', got {form!r}")
    least = 2 if form == "q4" else 1
    if size < least:
        raise ValueError(f"{form} is for arrays of {least} elements at least, got {size}")
