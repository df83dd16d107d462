"""docs/formats.md in plain NumPy: numbers of 16 bits, random rounding, blocks of codes, and whole steps between them.

`FormatStepper` decodes what is stored, has `stage_references` compute the step in float32 or float64, and encodes what comes out.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np

from .stage_references import Stepper

bfloat16 = ml_dtypes.bfloat16
FLOATS: dict[str, Any] = {
    "float64": np.dtype(np.float64),
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(bfloat16),
}
UNSIGNED = {"exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum"}
"""States that are second moments."""

SMALLEST_COMPRESSED = 4096

# ---- rounding to nearest ------------------------------------------------------------------------------------------------------


def bits_of(x: Any) -> Any:
    return x.view({2: np.uint16, 4: np.uint32, 8: np.uint64}[x.dtype.itemsize])


@np.errstate(all="ignore")
def rounded(x: Any, dtype: Any) -> Any:
    """x in another floating-point format: exact, or rounded once, to nearest, ties to even."""
    x = np.asarray(x)
    if x.dtype == np.float64 and dtype == bfloat16:
        x = rounded_to_odd(x)  # the cast of ml_dtypes goes by way of float32, and would round twice
    return x.astype(dtype)


def rounded_to_odd(x: Any) -> Any:
    """float32 of a float64, the last bit set where it is inexact: what is rounded to fewer bits then is rounded right."""
    y = x.astype(np.float32)
    exact = (y == x) | np.isnan(x)
    y = np.where(np.abs(y) > np.abs(x), np.nextafter(y, np.float32(0)), y)
    return np.where(exact, y, (bits_of(y) | np.uint32(1)).view(np.float32))


# ---- random numbers -----------------------------------------------------------------------------------------------------------


def philox(counter: tuple[Any, Any, Any, Any], key: tuple[int, int]) -> tuple[Any, ...]:
    """Philox4x32-10 (Random123, Salmon et al. 2011). Words of the counter are integers or arrays of them."""
    low = np.uint64(2**32 - 1)
    c = [np.asarray(word, np.uint64) for word in counter]
    k = [np.uint64(word) for word in key]
    for _ in range(10):
        a, b = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        c = [(b >> np.uint64(32)) ^ c[1] ^ k[0], b & low, (a >> np.uint64(32)) ^ c[3] ^ k[1], a & low]
        k = [np.uint64((int(k[0]) + 0x9E3779B9) % 2**32), np.uint64((int(k[1]) + 0xBB67AE85) % 2**32)]
    return tuple(word.astype(np.uint32) for word in c)


def draws(size: int, seed: int, step: int, position: int, operand: int) -> Any:
    """The 16 bits of each of an operand's elements, as uint32."""
    blocks = -(-size // 128)
    counter = (np.arange(16 * blocks), np.full(16 * blocks, (1 + operand) << 24), position, step)
    words = np.stack(philox(counter, (seed % 2**32, seed // 2**32))).reshape(4, blocks, 16)
    halves = np.stack([words & np.uint32(0xFFFF), words >> np.uint32(16)])  # half, word, block, element mod 16
    return halves.transpose(2, 0, 1, 3).ravel()[:size]


@np.errstate(all="ignore")
def rounded_by_chance(x: Any, dtype: Any, d: Any) -> Any:
    """x as float16 or bfloat16, up or down as the draws d say."""
    x = np.asarray(x).astype(np.float32)
    d, bits = d.reshape(x.shape), np.asarray(bits_of(x))
    magnitude, sign = bits & np.uint32(0x7FFFFFFF), (bits >> np.uint32(16)) & np.uint32(0x8000)
    if dtype == bfloat16:
        chosen = (magnitude + d) >> np.uint32(16)
    else:
        normal = ((magnitude + d // 8) >> np.uint32(13)) - np.uint32((127 - 15) << 10)
        normal = np.where(magnitude >= np.uint32((127 + 16) << 23), np.uint32(0x7C00), np.minimum(normal, np.uint32(0x7C00)))
        below = np.abs(x) < np.float32(2**-14)
        whole = np.where(below, np.abs(x), np.float32(0)).astype(np.float64) * 2.0**40
        chosen = np.where(below, ((whole.astype(np.uint64) + d) >> np.uint64(16)).astype(np.uint32), normal)
    by_chance = np.asarray((chosen | sign).astype(np.uint16)).view(dtype)
    return np.where(np.isfinite(x), by_chance, rounded(x, dtype))


# ---- compressed states --------------------------------------------------------------------------------------------------------


def code_of(fmt: str, unsigned: bool) -> SimpleNamespace:
    bits, mantissa, block = (8, 3, 256) if fmt == "q8" else (4, 1, 128)
    top = 2 ** (bits if unsigned else bits - 1) - 1
    below = (127 << mantissa) - top
    m = np.arange(1, top + 1, dtype=np.uint32)
    values = np.concatenate([np.zeros(1, np.float32), ((m + np.uint32(below)) << np.uint32(23 - mantissa)).view(np.float32)])
    return SimpleNamespace(bits=bits, k=mantissa, block=block, top=top, below=below, F=values, sign=0 if unsigned else top + 1)


def in_blocks(x: Any, block: int) -> Any:
    """The elements of x in the order of C, one block a row, filled up with zeros."""
    padded = np.zeros(-(-x.size // block) * block, x.dtype)
    padded[: x.size] = np.ravel(x)
    return padded.reshape(-1, block)


@np.errstate(all="ignore")
def encoded(x: Any, fmt: str, unsigned: bool, d: Any = None) -> tuple[Any, Any]:
    """Codes and scales of an array, to nearest or by the draws d."""
    size, c = np.size(x), code_of(fmt, unsigned)
    x = in_blocks(np.asarray(x).astype(np.float32), c.block)
    a = np.abs(x)
    scale = a.max(axis=1, initial=0)
    scale[scale < np.float32(2**-126)] = 0
    down = np.where(scale >= np.float32(2**125), np.float32(2**-4), np.float32(1))
    y = (a * down[:, None]) * (np.float32(1) / (scale * down))[:, None]
    bits = bits_of(y)
    half = np.uint32(2 ** (22 - c.k)) if d is None else in_blocks(d, c.block) << np.uint32(7 - c.k)
    m = ((bits + half) >> np.uint32(23 - c.k)).astype(np.int64) - c.below
    m = np.where(m < 1, unsigned | (y >= c.F[1] / 2), np.minimum(m, c.top))
    m = np.where(a == 0, 0, m) | np.where(np.signbit(x), c.sign, 0)
    scale[~np.isfinite(scale)] = np.nan
    codes = np.where(((scale == 0) | ~np.isfinite(scale))[:, None], 0, m).ravel()[:size].astype(np.uint8)
    if fmt == "q4":
        codes = np.append(codes, np.zeros(size % 2, np.uint8))
        codes = codes[::2] | codes[1::2] << np.uint8(4)
    return codes, scale


@np.errstate(all="ignore")
def decoded(codes: Any, scale: Any, shape: tuple[int, ...], fmt: str, unsigned: bool) -> Any:
    c, size = code_of(fmt, unsigned), int(np.prod(shape, dtype=int))
    if fmt == "q4":
        codes = np.stack([codes & np.uint8(15), codes >> np.uint8(4)], axis=1).ravel()
    x = c.F[codes[:size] & c.top] * np.repeat(scale, c.block)[:size]
    return np.where(codes[:size] & c.sign, -x, x).reshape(shape)


# ---- parameters and states of a step ------------------------------------------------------------------------------------------

DEFAULTS: dict[str, Any] = {"state_dtype": None, "state_rounding": "nearest", "precision": "nearest", "seed": 0}
AVERAGES = {"ema": "ema_decay", "swa": "swa", "slow": "lookahead"}
EXTRA = ("compensation", "master", "remainder")


class Storage:
    """One parameter and its states, before and after a step.

    Attributes:
        t: the type that the step computes in.
        names: states and averages that the step goes over, in their order.
    """

    def __init__(self, index: int, p: Any, state: dict[str, Any], formats: Any, options: Any, start: Any, grads: Any) -> None:
        self.index, self.p, self.state = index, p, state
        self.f = f = SimpleNamespace(**{**DEFAULTS, **formats})
        own = [name for name, value in start((), np.float32).items() if isinstance(value, np.ndarray)]
        self.names = own + [name for name, option in AVERAGES.items() if options.get(option) is not None]
        new = f.state_dtype if isinstance(f.state_dtype, dict) else dict.fromkeys(own, f.state_dtype)
        self.formats = {name: self.format_of(name, new.get(name)) for name in self.names}
        wide = [a.dtype == np.float64 for a in (p, *grads)] + [fmt == "float64" for fmt in self.formats.values()]
        self.t = np.float64 if any(wide) else np.float32
        self.is_short = p.dtype.itemsize == 2
        self.start = start(p.shape, self.t)

    def format_of(self, name: str, new: str | None) -> str | None:
        """The format of a state that is there, or that of a new one; None is the type of computing."""
        if name in self.state:
            stored = self.state[name]
            if f"{name}_scale" in self.state:
                return "q8" if stored.size == self.p.size else "q4"
            return next(fmt for fmt, dtype in FLOATS.items() if dtype == stored.dtype)
        if new is None or (new in ("q8", "q4") and self.p.size < SMALLEST_COMPRESSED):
            return "float64" if self.p.dtype == np.float64 else "float32"
        return new

    def before(self) -> tuple[Any, dict[str, Any]]:
        """Parameter and states as the step computes with them."""
        compressed = {name for name in self.names if self.formats[name] in ("q8", "q4")}
        s = {"step": 0, **self.start}
        for name, value in self.state.items():
            if name in compressed:
                scale = self.state[f"{name}_scale"]
                s[name] = decoded(value, scale, self.p.shape, self.formats[name] or "", name in UNSIGNED).astype(self.t)
            elif name.removesuffix("_scale") not in compressed and name not in EXTRA:
                s[name] = value.astype(self.t) if isinstance(value, np.ndarray) else value
        p = self.before_rounding()
        if "slow" in self.names and "slow" not in self.state and self.formats["slow"]:
            s["slow"] = rounded(self.p, FLOATS[self.formats["slow"]]).astype(self.t)
        in_order = compressed or "stochastic" in (self.f.precision, self.f.state_rounding)
        return self.laid_out(p, "C" if in_order else "K"), s

    def before_rounding(self) -> Any:
        """The parameter with all that precision keeps of it."""
        p, wide, precision = self.p, self.p.astype(self.t), self.f.precision if self.is_short else "nearest"
        if precision == "kahan" and "compensation" in self.state:
            rest = self.state["compensation"].astype(self.t)
            digits, least = (8, 0.0) if p.dtype == bfloat16 else (11, 2.0**-25)
            ulp = 2.0 ** (np.frexp(np.asarray(p).astype(np.float64))[1] - 1)
            return wide + np.where(np.abs(rest) <= np.maximum(np.where(wide == 0, 0, ulp) * 2.0**-digits, least), rest, 0)
        if precision == "master" and "master" in self.state:
            master = self.state["master"]
            return np.where(bits_of(rounded(master, p.dtype)) == bits_of(p), master.astype(self.t), wide)
        if precision == "split" and "remainder" in self.state:
            bits = (np.asarray(bits_of(p)).astype(np.int64) << 16) + self.state["remainder"]
            whole = np.asarray(bits % 2**32).astype(np.uint32).view(np.float32)
            return np.where(bits_of(split(whole)[0]) == bits_of(p), whole.astype(self.t), wide)
        return wide

    def after(self, p: Any, s: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Parameter and states as they are stored."""
        by_chance = self.f.state_rounding == "stochastic"
        state = {name: value for name, value in s.items() if name not in self.names}
        for operand, name in enumerate(self.names, 2):
            fmt = self.formats[name]
            d = draws(self.p.size, self.f.seed, s["step"], self.index, operand) if by_chance and fmt is not None else None
            if fmt in ("q8", "q4"):
                state[name], state[f"{name}_scale"] = encoded(s[name], fmt, name in UNSIGNED, d)
            else:
                dtype = FLOATS[fmt] if fmt else np.dtype(self.t)
                by_draws = d is not None and dtype.itemsize == 2
                near = rounded_by_chance(s[name], dtype, d) if by_draws else rounded(s[name], dtype)
                state[name] = not_zero(near, s[name]) if name in UNSIGNED else near
        stored, state = self.after_rounding(np.asarray(p), state)
        return self.laid_out(stored), state

    def laid_out(self, x: Any, order: Any = "K") -> Any:
        """x as the parameter lies in memory, which sums go by."""
        y = np.empty_like(self.p, x.dtype, order)
        y[...] = x
        return y

    @np.errstate(all="ignore")
    def after_rounding(self, p: Any, state: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        dtype, precision = self.p.dtype, self.f.precision if self.is_short else "nearest"
        if precision == "stochastic":
            return rounded_by_chance(p, dtype, draws(p.size, self.f.seed, state["step"], self.index, 0)), state
        if precision in ("master", "split"):
            p = p.astype(np.float32)
        stored = rounded(p, dtype)
        if precision == "kahan":
            rest = p - stored.astype(self.t)
            state["compensation"] = rounded(np.where(np.isfinite(rest), rest, 0), dtype)
        elif precision == "master":
            state["master"] = p
        elif precision == "split":
            stored, state["remainder"] = split(p)
        return stored, state


def not_zero(stored: Any, x: Any) -> Any:
    """A second moment as it is stored: in float16 what is not zero stays so."""
    return np.where((x > 0) & (stored == 0), np.float16(2**-24), stored) if stored.dtype == np.float16 else stored


def split(x: Any) -> tuple[Any, Any]:
    """The bfloat16 nearest to each float32, ties away from zero, and what makes up the rest of its bits."""
    bits = np.asarray(bits_of(x)).astype(np.int64)
    upper = np.where(np.isnan(x), bits >> 16 | 0x40, (bits + 2**15) >> 16)
    rest = np.where(np.isnan(x), 0, bits - (upper << 16))
    return upper.astype(np.uint16).view(bfloat16), rest.astype(np.int16)


class FormatStepper(Stepper):
    """A `Stepper` whose parameters and states are stored in other formats than those it computes in.

    Args:
        formats: the keywords of docs/formats.md; a list has those of each parameter.
    """

    def __init__(self, rule: Any, start: Any, params: list[Any], options: Any, formats: Any = None, **overall: Any) -> None:
        super().__init__(rule, start, params, options, **overall)
        self.formats = formats if isinstance(formats, list) else [formats or {}] * len(params)

    @np.errstate(all="ignore")
    def step(self, sources: list[tuple[float, list[Any]]], grad_scale: float = 1.0) -> bool:
        params, state = self.params, self.state
        storages = {}
        for i, p in enumerate(params):
            if sources[0][1][i] is not None:
                grads = [source[i] for _, source in sources]
                storages[i] = Storage(i, p, state.get(i, {}), self.formats[i], self.options[i], self.start, grads)
        self.params, self.state = [*params], {}
        for i, storage in storages.items():
            self.params[i], self.state[i] = storage.before()
        wide = [(w, [g if g is None else g.astype(storages[i].t) for i, g in enumerate(grads)]) for w, grads in sources]
        moved = super().step(wide, grad_scale)
        if moved:
            for i, storage in storages.items():
                params[i], state[i] = storage.after(self.params[i], self.state[i])
        self.params, self.state = params, state
        return moved
