"""State dicts of the optimizers for NumPy loops: what may be wrong with one, and reading what is right."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from gradstep import device_arrays
from gradstep.device_arrays import assign, dtype_of, has_interface, is_on_device, to_host
from gradstep.formats import FLOATS, compressed_arrays, scale_name

NUMBERS: dict[str, int | float] = {"step": 0, "ema_count": 0, "swa_count": 0, "grad_norm_sq": 0.0}
"""States that are numbers, and where they begin: counts are integers."""


def check_form(where: str, state_dict: Any) -> None:
    """Refuse what is not put together as a state dict is: the right keys, dicts and lists in their places.

    Raises:
        TypeError: if something is no dict or list.
        ValueError: if a key is missing.
    """
    _check_dict(f"{where}: state_dict", state_dict, "state", "param_groups", "steps")
    _check_dict(f"{where}: state", state_dict["state"])
    _check_list(f"{where}: param_groups", state_dict["param_groups"])
    for i, group in enumerate(state_dict["param_groups"]):
        _check_dict(f"{where}: param_groups[{i}]", group, "params")
        _check_list(f"{where}: param_groups[{i}]['params']", group["params"])


def read_state(where: str, state: Any, param: Any) -> dict[str, Any]:
    """Return a copy of the states of a parameter: of a NumPy array as such, of one on a device there.

    Raises:
        TypeError: if something is no dict or array.
        ValueError: if a count is missing or none; if an array is not like its parameter.
    """
    _check_dict(where, state, "step")
    fresh: dict[str, Any] = {}
    on_device = is_on_device(param)
    for name, value in state.items():
        what = f"{where}[{name!r}]"
        if name in NUMBERS:
            number = read_count(what, value) if isinstance(NUMBERS[name], int) else read_float(what, value)
            fresh[name] = device_arrays.number(number, param) if on_device else number
            continue
        if not isinstance(value, (np.ndarray, np.generic)) and not has_interface(value):
            raise TypeError(f"{what} must be an array, got {type(value).__name__}")
        _check_array(what, name, value, state, param)
        if on_device:
            fresh[name] = device_arrays.empty(tuple(value.shape), dtype_of(value), param)
            assign(fresh[name], value)
            continue
        host = value if isinstance(value, np.generic) else to_host(value)
        fresh[name] = np.empty_like(param, host.dtype, subok=False) if host.shape == param.shape else np.empty_like(host)
        fresh[name][...] = host
    return fresh


def _check_array(what: str, name: str, value: Any, state: Mapping[str, Any], param: np.ndarray[Any, Any]) -> None:
    """Refuse an array of a dtype or shape that no state of the parameter has."""
    dtype, shape, of_param = dtype_of(value), tuple(value.shape), tuple(param.shape)
    if scale_name(name) in state or name.removesuffix("_scale") in state.keys() - {name}:
        expected = "float32" if name.endswith("_scale") else "uint8"
        shapes = [array.shape for array in compressed_arrays(name.removesuffix("_scale"), math.prod(of_param), name)]
        if dtype != expected:
            raise ValueError(f"{what} has dtype {dtype}, must be {expected}")
        if shape not in shapes:
            raise ValueError(f"{what} has shape {shape}, must have one of {', '.join(map(str, shapes))}")
        return
    if shape != of_param:
        raise ValueError(f"{what} has shape {shape}, its parameter has {of_param}")
    complex_one = dtype_of(param).startswith("complex")
    allowed = (dtype_of(param),) if complex_one else (*FLOATS, "int16") if name == "remainder" else FLOATS
    if dtype not in allowed:
        raise ValueError(f"{what} has dtype {dtype}, must be {' or '.join(allowed)}")


def read_count(what: str, value: Any) -> int:
    """Return a whole number, or an array of one, as an int.

    Raises:
        ValueError: if it is none, or beyond what a step can count.
    """
    number = _item(value)
    if type(number) not in (int, float) or not 0 <= number < 2**53 or number != int(number):
        raise ValueError(f"{what} must be a whole number from 0 to 2^53 - 1, got {value!r}")
    return int(number)


def read_float(what: str, value: Any) -> float:
    """Return a float that is not negative, or an array of one, as a float.

    Raises:
        ValueError: if it is none.
    """
    number = _item(value)
    if type(number) is not float or number < 0:  # infinity and NaN come from gradients, and are what they are
        raise ValueError(f"{what} must be a float >= 0, got {value!r}")
    return number


def _item(value: Any) -> Any:
    """Return the number in an array or tensor of one element; anything else as it is."""
    shape = getattr(value, "shape", None)
    return value.item() if isinstance(shape, tuple) and math.prod(shape) == 1 else value


def _check_dict(what: str, value: Any, *keys: str) -> None:
    if not isinstance(value, Mapping):
        raise TypeError(f"{what} must be a dict, got {type(value).__name__}")
    for key in keys:
        if key not in value:
            raise ValueError(f"{what} has no {key!r}")


def _check_list(what: str, value: Any) -> None:
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{what} must be a list, got {type(value).__name__}")
