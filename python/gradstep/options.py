"""The options around a rule: what scales, clips, constrains, averages and watches. Formulas and order: docs/stages.md.

All optimizers and all faces take them as keywords, and they come to the engine here.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from os import PathLike
from typing import Any, Literal, TypedDict

import numpy as np

OnNonfinite = Literal["propagate", "skip", "raise", "zero"]
DecayMode = Literal["coupled", "decoupled", "independent"]
EmaCorrection = Literal["bias", "warmup"]
Precision = Literal["nearest", "stochastic", "kahan", "master", "split"]
Rounding = Literal["nearest", "stochastic"]
StateFormat = Literal["float64", "float32", "bfloat16", "float16", "q8", "q4"]
Stages = tuple[tuple[Any, ...], ...]
Conditions = tuple[float | None, str, bool, bool, tuple[float, ...] | None]


class FunctionOptions(TypedDict, total=False):
    """Options of one step: of the functions, and of the optimizers."""

    clip_norm: float | None
    """Largest norm of all gradients together."""
    clip_norm_per_tensor: float | None
    """Largest norm of the gradient of each tensor."""
    clip_value: float | None
    """Largest absolute value of an element of a gradient."""
    agc: float | None
    """Adaptive gradient clipping: largest norm of a row of the gradient, in units of the norm of that row of the parameter."""
    agc_eps: float
    """Least norm that a row of a parameter counts as, for `agc`: 1e-3 if not given."""
    centralize: bool
    """Subtract from each row of the gradient its mean."""
    noise: float | None
    """Variance of Gaussian noise on the gradient, before its decay: eta / (1 + t)^noise_decay."""
    noise_decay: float
    """How fast the variance falls: 0.55 if not given."""
    seed: int
    """Of what is drawn at random, noise and stochastic rounding: 0 if not given."""
    on_nonfinite: OnNonfinite
    """What to do with a gradient that is not finite."""
    decay_mode: DecayMode | None
    """How `weight_decay` acts, if not as the rule has it."""
    cautious: bool
    """Leave out elements whose update goes against the gradient."""
    trust_ratio: bool | tuple[float, float]
    """Make each tensor's step lr times as long as the tensor; a pair limits the ratio."""
    l1: float | None
    """Factor of an L1 penalty, as a proximal map."""
    l2: float | None
    """Factor of an L2 penalty, as a proximal map: with `l1` an elastic net."""
    bounds: tuple[float | None, float | None] | None
    """Least and largest value of a parameter."""
    group_lasso: float | None
    """Factor of a penalty on the norms of rows, as a proximal map."""
    max_norm: float | None
    """Largest norm of a row of a parameter."""
    zero_grad: bool
    """Zero the gradients on the way."""
    precision: Precision
    """What becomes of the bits that a 16-bit parameter has no room for."""
    state_rounding: Rounding
    """How states of 16 bits or less are rounded."""


class Options(FunctionOptions, total=False):
    """Options of the optimizers: those of a step, and what keeps arrays beside the parameters."""

    state_dtype: StateFormat | Mapping[str, StateFormat] | None
    """Format of new states: of all of the rule's, or by name."""

    lookahead: tuple[int, float] | None
    """Steps between two moves of the slow weights, and how far they move: (k, alpha)."""
    ema_decay: float | None
    """Decay rate of an exponential moving average of the parameters, in `ema`."""
    ema_correction: EmaCorrection | None
    """How the average begins."""
    swa: tuple[int, int] | None
    """Equal average of the parameters, in `swa`: (steps before the first, steps from one to the next)."""
    state_dir: str | PathLike[str] | None
    """Folder for states in memory-mapped files."""


CONDITIONS: dict[str, Any] = {"clip_norm": None, "on_nonfinite": "propagate", "zero_grad": False}
"""Options that hold for all parameters of an optimizer together, and what they are if not given."""

OPTIONS = frozenset(Options.__annotations__)
GROUP_OPTIONS = OPTIONS - CONDITIONS.keys() - {"state_dir"}
_NEEDS = {"agc_eps": "agc", "noise_decay": "noise", "ema_correction": "ema_decay"}
_PAIRS = ("betas", "bounds", "lookahead", "swa", "trust_ratio")
_DECAYS = ("coupled", "decoupled", "independent")
_ON_NONFINITE = ("propagate", "skip", "raise", "zero")
_CORRECTIONS = (None, "bias", "warmup")
_PRECISIONS = ("nearest", "stochastic", "kahan", "master", "split")
_KEEPING = _PRECISIONS[2:]  # an array beside the parameter
_RANDOM = ("noise", "precision", "state_rounding")  # what a seed may be for


def make_stages(settings: Mapping[str, Any], *, decay: str, grad_scale: float = 1.0, momentum: bool = True) -> Stages:
    """Return the stages that the settings ask for; those that would change nothing are left out.

    Args:
        settings: a group's settings and options, or a function's; besides options, `maximize` and `weight_decay`.
        decay: how `weight_decay` acts unless `decay_mode` says otherwise.
        grad_scale: number that the gradients are multiplied by.
        momentum: whether the rule's update differs in sign from its gradient, as `cautious` needs.

    Raises:
        TypeError, ValueError: for options that contradict each other, or are of the wrong kind.
    """
    maximize, weight_decay = settings["maximize"], settings.get("weight_decay", 0.0)
    stages: Stages = ()
    if maximize or grad_scale != 1:
        stages += (("scale", -grad_scale if maximize else grad_scale),)
    if not OPTIONS.isdisjoint(settings):
        stages += _option_stages(settings, momentum)
        mode = settings.get("decay_mode")
        decay = decay if mode is None else mode
        if decay not in _DECAYS:
            raise ValueError(f"decay_mode must be None, 'coupled', 'decoupled' or 'independent', got {decay!r}")
    if weight_decay != 0:
        stages += ((f"{decay}_decay", weight_decay),)
    return stages


def _option_stages(settings: Mapping[str, Any], momentum: bool) -> Stages:
    get = settings.get
    for name, needed in _NEEDS.items():
        if get(name) is not None and needed not in settings:  # one that is None is off, where others have it
            raise ValueError(f"{name} needs {needed}")
    stages: list[tuple[Any, ...]] = []
    if get("on_nonfinite") == "zero":
        stages.append(("zero_nonfinite",))
    for name in ("clip_value", "clip_norm_per_tensor", "group_lasso", "max_norm"):
        if get(name) is not None:
            stages.append((name, settings[name]))
    if get("agc") is not None:
        stages.append(("agc", settings["agc"], get("agc_eps", 1e-3)))
    if _flag(settings, "centralize"):
        stages.append(("centralize",))
    if get("noise") is not None:
        stages.append(("noise", settings["noise"], get("noise_decay", 0.55)))
    stages += _rounding_stages(settings)
    if _flag(settings, "cautious"):
        if not momentum:
            raise ValueError("cautious needs a rule with momentum: without, an update always goes along its gradient")
        stages.append(("cautious",))
    trust = get("trust_ratio")
    if isinstance(trust, np.bool_):
        trust = bool(trust)
    if trust is not None and trust is not False:
        low, high = (0.0, math.inf) if trust is True else _ordered(settings, "trust_ratio")
        stages.append(("trust_ratio", low, high, float(get("decay_in_ratio", True))))
    if get("l1") is not None or get("l2") is not None:
        stages.append(("elastic_net", _given(settings, "l1", 0.0), _given(settings, "l2", 0.0)))
    if get("bounds") is not None:
        stages.append(("bounds", *_ordered(settings, "bounds")))
    return (*stages, *_kept_stages(settings))


def _kept_stages(settings: Mapping[str, Any]) -> Stages:
    """Return the stages that keep arrays beside the parameters."""
    get = settings.get
    stages: list[tuple[Any, ...]] = []
    if get("lookahead") is not None:
        steps, alpha = pair("lookahead", settings["lookahead"])
        steps = _count("lookahead[0]", steps, 1)
        if not _is_number(alpha) or not 0 < alpha <= 1:
            raise ValueError(f"lookahead[1] must be in (0, 1], got {alpha!r}")
        stages.append(("lookahead", steps, alpha))
    if get("ema_decay") is not None:
        correction = get("ema_correction")
        if correction not in _CORRECTIONS:
            raise ValueError(f"ema_correction must be None, 'bias' or 'warmup', got {correction!r}")
        stages.append(("ema", settings["ema_decay"], _CORRECTIONS.index(correction)))
    if get("swa") is not None:
        start, every = pair("swa", settings["swa"])
        stages.append(("swa", _count("swa[0]", start, 0), _count("swa[1]", every, 1)))
    return tuple(stages)


def _rounding_stages(settings: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    precision, rounding = (_given(settings, name, "nearest") for name in ("precision", "state_rounding"))
    if precision not in _PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(map(repr, _PRECISIONS))}, got {precision!r}")
    if rounding not in _PRECISIONS[:2]:
        raise ValueError(f"state_rounding must be 'nearest' or 'stochastic', got {rounding!r}")
    stages: list[tuple[Any, ...]] = []
    if precision != "nearest":
        stages.append(("precision", _PRECISIONS.index(precision)))
    if rounding != "nearest":
        stages.append(("stochastic_states",))
    if settings.get("seed") is not None:
        if settings.keys().isdisjoint(_RANDOM):
            raise ValueError("seed needs noise, precision or state_rounding")
        seed = _count("seed", settings["seed"], 0)
        if seed >= 2**53:
            raise ValueError(f"seed must be below 2^53, got {seed!r}")
        stages.append(("seed", float(seed)))
    return stages


def make_conditions(
    options: Mapping[str, Any], *, stats: bool = False, weights: tuple[float, ...] | None = None
) -> Conditions | None:
    """Return what holds for a whole step; None if that is nothing but the defaults.

    Args:
        options: may have `clip_norm`, `on_nonfinite` and `zero_grad`.
        stats: whether to gather statistics.
        weights: of several gradients.

    Raises:
        TypeError, ValueError: for options of the wrong kind or out of range.
    """
    clip_norm, on_nonfinite = options.get("clip_norm"), options.get("on_nonfinite", "propagate")
    zero_grad = _flag(options, "zero_grad")
    if on_nonfinite not in _ON_NONFINITE:
        raise ValueError(f"on_nonfinite must be 'propagate', 'skip', 'raise' or 'zero', got {on_nonfinite!r}")
    if clip_norm is not None:
        clip_norm = check_number("clip_norm", clip_norm)
        if not 0 <= clip_norm < math.inf:
            raise ValueError(f"clip_norm must be >= 0 and finite, got {clip_norm!r}")
    if clip_norm is None and on_nonfinite in ("propagate", "zero") and not zero_grad and not stats and weights is None:
        return None
    return clip_norm, "propagate" if on_nonfinite == "zero" else on_nonfinite, bool(stats), zero_grad, weights


def refuse_chance(options: Mapping[str, Any]) -> None:
    """Refuse options that draw random numbers, which follow from the number of the step."""
    if options.get("noise") is not None:
        raise TypeError("noise needs the number of the step")
    if "stochastic" in (options.get("precision"), options.get("state_rounding")):
        raise TypeError("stochastic rounding needs the number of the step")


def refuse_keeping(options: Mapping[str, Any]) -> None:
    """Refuse options that keep an array beside the parameter."""
    if options.get("precision") in _KEEPING:
        raise ValueError(f"precision={options['precision']!r} keeps an array beside the parameter: take an optimizer")


def check_weights(weights: tuple[Any, ...], total: float | None) -> tuple[float, ...]:
    """Return the weights of several gradients as floats.

    Raises:
        TypeError: for a weight that is no number.
        ValueError: for a weight that is not finite; if they do not add up to `total`, unless that is None.
    """
    checked = tuple(check_number(f"the weight of grads[{i}]", weight) for i, weight in enumerate(weights))
    for i, weight in enumerate(checked):
        if not math.isfinite(weight):
            raise ValueError(f"the weight of grads[{i}] must be finite, got {weight!r}")
    if total is not None and not math.isclose(math.fsum(checked), total, rel_tol=1e-9, abs_tol=1e-12):
        raise ValueError(f"the weights of grads must add up to {total!r}, got {math.fsum(checked)!r}")
    return checked


def keep(defaults: Mapping[str, Any], options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the options that groups hold, as far as they are on, and all that hold for the whole optimizer.

    Args:
        defaults: the settings of the optimizer itself.
        options: keywords that its constructor got beside them.

    Raises:
        TypeError: for an unknown option.
    """
    for name in options:
        if name not in OPTIONS or name in defaults:
            raise TypeError(f"got an unexpected keyword argument {name!r}")
    groups = {
        name: value for name, value in options.items() if name in GROUP_OPTIONS and value is not None and value is not False
    }
    return groups, {name: options.get(name, default) for name, default in CONDITIONS.items()}


# ---- checks ---------------------------------------------------------------------------------------------------------------


def _is_number(value: Any) -> bool:
    return not isinstance(value, (bool, str)) and hasattr(value, "__float__")


def check_number(name: str, value: Any) -> float:
    """Return a number as a float.

    Raises:
        TypeError: if it is none, or none that a float can hold.
    """
    try:
        if _is_number(value):
            return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # an array or tensor, an integer of hundreds of digits
        pass
    raise TypeError(f"{name} must be a number, got {value!r}")


def _count(name: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    number = operator.index(value)
    if number < least:
        raise ValueError(f"{name} must be at least {least}, got {value!r}")
    return number


def check_flag(name: str, value: Any) -> bool:
    """Return a flag as a bool.

    Raises:
        TypeError: if it is none.
    """
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return bool(value)


def check_no_arrays(where: str, settings: Mapping[str, Any]) -> None:
    """Refuse arrays in the place of a number, flag or word: comparing them would be no yes or no.

    Raises:
        TypeError: for an array of other than one element.
    """
    for name, value in settings.items():
        if name not in _PAIRS and getattr(value, "ndim", 0) > 0 and math.prod(value.shape) != 1:
            raise TypeError(f"{where}: {name} must be no array, got {value!r}")


def _flag(settings: Mapping[str, Any], name: str) -> bool:
    return check_flag(name, settings.get(name, False))


def _given(settings: Mapping[str, Any], name: str, default: Any) -> Any:
    value = settings.get(name)
    return default if value is None else value


def pair(name: str, values: Any) -> tuple[Any, Any]:
    """Return `values` if there are two.

    Raises:
        TypeError: if not.
    """
    try:
        first, second = values
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be two numbers, got {values!r}") from None
    return first, second


def _ordered(settings: Mapping[str, Any], name: str) -> tuple[float, float]:
    low, high = pair(name, settings[name])
    least = 0.0 if name == "trust_ratio" else -math.inf
    low = least if low is None else check_number(f"{name}[0]", low)
    high = math.inf if high is None else check_number(f"{name}[1]", high)
    if not low <= high:
        raise ValueError(f"{name} must be (low, high) with low <= high, got {settings[name]!r}")
    return low, high


def call(settings: Mapping[str, Any], steps_done: Callable[[], int]) -> Mapping[str, Any]:
    """Return the settings with those that are callables called with the number of steps done."""
    if not any(map(callable, settings.values())):
        return settings
    steps = steps_done()
    return {name: value(steps) if callable(value) else value for name, value in settings.items()}
