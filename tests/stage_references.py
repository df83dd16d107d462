"""The whole step of docs/stages.md in plain NumPy: every stage around the rules of `references`, in the order stated there.

Elements are computed in the dtype of the arrays, one operation after another; factors and sums in double, rounded once. Noise has
no reference here: which numbers it draws is not specified.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

from .references import coupled, decoupled

# ---- the tree of sums ---------------------------------------------------------------------------------------------------------

LEAF, LANES, BLOCK, CHUNK, TOGETHER = 1024, 32, 16, 16384, 256


def in_order(x: Any) -> Any:
    """Sums over the last axis, one element after another."""
    return np.add.accumulate(x, axis=-1)[..., -1] if x.shape[-1] else np.zeros(x.shape[:-1])


def in_groups(x: Any, size: int) -> Any:
    """The sums of groups of `size` elements of a vector, each in order."""
    padded = np.zeros(-(-x.size // size) * size)
    padded[: x.size] = x
    return in_order(padded.reshape(-1, size))


def leaf_sums(x: Any) -> Any:
    """Sums of the leaves of each row of x: 32 lanes, each in order, then the lanes pairwise."""
    rows, length = x.shape
    padded = np.zeros((rows, -(-length // LANES) * LANES))
    padded[:, :length] = x
    leaves, rest = length // LEAF, -(-(length % LEAF) // LANES)
    whole = padded[:, : leaves * LEAF].reshape(rows, leaves, LEAF // LANES, LANES)
    parts = [whole, padded[:, leaves * LEAF :].reshape(rows, 1, rest, LANES)] if length % LEAF else [whole]
    sums = []
    for part in parts:
        lanes = in_order(part.swapaxes(2, 3))
        while lanes.shape[2] > 1:
            half = lanes.shape[2] // 2
            lanes = lanes[..., :half] + lanes[..., half:]
        sums.append(lanes[..., 0])
    return np.concatenate(sums, axis=1)


def order_in_memory(p: Any) -> tuple[int, ...]:
    """The axes by which the elements of p are visited: as they lie in memory if p is dense, as in C otherwise."""
    axes = tuple(sorted(range(p.ndim), key=lambda axis: -p.strides[axis]))
    return axes if p.transpose(axes).flags.c_contiguous else tuple(range(p.ndim))


class Tree:
    """How the elements of arrays like p are summed: as one, or by row."""

    def __init__(self, p: Any, by_row: bool = False, whole_is_row: bool = False) -> None:
        self.by_row = (by_row and p.ndim >= 2) or whole_is_row
        self.rows = p.shape[0] if self.by_row and p.ndim >= 2 else 1
        self.length = p.size // self.rows if self.rows else 0
        self.axes = tuple(range(p.ndim)) if self.by_row else order_in_memory(p)

    def leaves(self, x: Any) -> Any:
        return leaf_sums(np.asarray(x, np.float64).transpose(self.axes).reshape(self.rows, self.length))

    def sums(self, x: Any) -> Any:
        """The sum of each row."""
        return in_order(self.leaves(x))

    def sum(self, x: Any) -> float:
        leaves = self.leaves(x)
        size = max(1, CHUNK // max(1, self.length)) * leaves.shape[1] if self.by_row else BLOCK
        return float(in_order(in_groups(in_groups(leaves.ravel(), max(1, size)), TOGETHER)))

    def norms(self, x: Any) -> Any:
        """The norm of each row."""
        return np.sqrt(self.sums(np.square(x, dtype=np.float64)))

    def squares(self, x: Any) -> float:
        return self.sum(np.square(x, dtype=np.float64))

    def norm(self, x: Any) -> float:
        return math.sqrt(self.squares(x))

    @staticmethod
    def spread(factors: Any, x: Any) -> Any:
        """Numbers, one for each row, rounded and in a shape that goes with x."""
        return factors.astype(x.dtype).reshape(-1, *[1] * (x.ndim - 1)) if x.ndim else x.dtype.type(factors[0])


def global_norm(arrays: list[Any]) -> float:
    return math.sqrt(float(in_order(np.array([Tree(a).squares(a) for a in arrays]))))


def clip_factor(limit: float, norm: float) -> float:
    """The least of limit / (norm + 1e-6) and 1; NaN for a NaN norm."""
    factor = limit / (norm + 1e-6)
    return 1.0 if factor > 1 else factor


# ---- the step -----------------------------------------------------------------------------------------------------------------

OFF: dict[str, Any] = {
    "maximize": False,
    "clip_value": None,
    "agc": None,
    "agc_eps": 1e-3,
    "clip_norm_per_tensor": None,
    "centralize": False,
    "weight_decay": 0.0,
    "decay_mode": None,
    "cautious": False,
    "trust_ratio": False,
    "always_adapt": True,
    "decay_in_ratio": True,
    "l1": 0.0,
    "l2": 0.0,
    "bounds": None,
    "group_lasso": None,
    "max_norm": None,
    "lookahead": None,
    "ema_decay": None,
    "ema_correction": None,
    "swa": None,
}
"""The stages that may differ by parameter, left out. What is none of them is a setting of the rule."""


class Stepper:
    """Optimizer of a list of parameters, which it copies. Options have the names of the constructors' keywords.

    Args:
        rule: a reference of `references`.
        start: makes the rule's states for a shape and a dtype.
        params: the parameters.
        options: settings of the rule and of the stages; a list has those of each parameter.
        clip_norm, on_nonfinite, zero_grad: as the constructors have them.

    Attributes:
        tensors: what the last step made of each parameter that had a gradient.
        factor: what its clip_norm multiplied all gradients by.
    """

    def __init__(
        self,
        rule: Any,
        start: Callable[..., dict[str, Any]],
        params: list[Any],
        options: Any,
        *,
        clip_norm: float | None = None,
        on_nonfinite: str = "propagate",
        zero_grad: bool = False,
    ) -> None:
        self.rule, self.start = rule, start
        self.params = [p.copy(order="K") for p in params]
        self.options = options if isinstance(options, list) else [options] * len(params)
        self.clip_norm, self.on_nonfinite, self.zero_grad = clip_norm, on_nonfinite, zero_grad
        self.state: dict[int, dict[str, Any]] = {}
        self.tensors: list[Tensor] = []
        self.factor = 1.0

    @np.errstate(all="ignore")
    def step(self, sources: list[tuple[float, list[Any]]], grad_scale: float = 1.0) -> bool:
        """Move the parameters that have gradients, and tell whether they moved. Gradients are never written."""
        self.tensors = tensors = []
        for i, (p, options) in enumerate(zip(self.params, self.options, strict=True)):
            if sources[0][1][i] is not None:
                state = self.state.get(i) or {**self.start(p.shape, p.dtype), "step": 0}
                tensors.append(Tensor(self.rule, i, p, dict(state), options))
                tensors[-1].load([(w, grads[i]) for w, grads in sources], grad_scale, self.on_nonfinite == "zero")
        if self.on_nonfinite in ("skip", "raise") and not all(np.isfinite(tensor.raw).all() for tensor in tensors):
            return False
        self.factor = 1.0
        if self.clip_norm is not None:
            squares = [tensor.factor * tensor.factor * tensor.squares for tensor in tensors]
            self.factor = clip_factor(self.clip_norm, math.sqrt(float(in_order(np.array(squares)))))
        for tensor in tensors:
            tensor.clip(self.factor)
            tensor.update()
            tensor.move()
            tensor.average()
            self.params[tensor.index], self.state[tensor.index] = tensor.p, tensor.s
        return True


class Tensor:
    """One parameter in one step.

    Attributes:
        p, s: parameter and states, which become the new ones.
        raw: the gradient as it comes: scaled, sources added up.
        clipped: the gradient before coupled decay.
        factor: what clip_norm_per_tensor multiplies it by; after `clip`, the product with clip_norm's.
        before: the parameter before the step.
        u: what is subtracted from it.
    """

    def __init__(self, rule: Any, index: int, p: Any, s: dict[str, Any], options: dict[str, Any]) -> None:
        self.rule, self.index, self.p, self.s = rule, index, p, s
        self.before = p
        self.settings = {name: value for name, value in options.items() if name not in OFF}
        self.o = o = SimpleNamespace(**{name: options.get(name, value) for name, value in OFF.items()})
        self.t = p.dtype.type
        self.lr = options["lr"]
        if rule.adapts:
            o.trust_ratio = (o.always_adapt or o.weight_decay != 0) and options.get("trust_ratio", True)
        by_row = o.agc is not None or o.centralize or o.group_lasso is not None or o.max_norm is not None
        self.tree = Tree(p, by_row, whole_is_row=o.agc is not None)
        s["step"] += 1

    def load(self, sources: list[tuple[float, Any]], grad_scale: float, zero_nonfinite: bool) -> None:
        """Sources to agc; the norm and the factor of the tensor."""
        o, t, tree = self.o, self.t, self.tree
        scale = -grad_scale if o.maximize else grad_scale
        (weight, grad), *others = sources
        g = t(weight * scale) * grad
        for weight, grad in others:
            g = g + t(weight * scale) * grad
        self.raw = g
        if zero_nonfinite:
            g = np.where(np.isfinite(g), g, t(0))
        if o.clip_value is not None:
            g = limited(g, t(-o.clip_value), t(o.clip_value))
        self.squares, self.row_sums = tree.squares(g), tree.sums(g)
        self.row_factors = np.ones(tree.rows)
        if o.agc is not None:
            norms, limits = tree.norms(g), o.agc * np.maximum(tree.norms(self.p), o.agc_eps)
            self.row_factors = np.where(norms > limits, limits / np.maximum(norms, 1e-6), 1.0)
            g = tree.spread(self.row_factors, g) * g
            self.squares = tree.squares(g)
        self.factor = 1.0 if o.clip_norm_per_tensor is None else clip_factor(o.clip_norm_per_tensor, math.sqrt(self.squares))
        self.g = g

    def clip(self, overall: float) -> None:
        """Norms, centralization, coupled decay: the gradient as the rule gets it."""
        o, t = self.o, self.t
        self.factor *= overall
        self.decay_mode = o.decay_mode or self.rule.decay_mode if o.weight_decay != 0 else None
        factor, factor_of_both = self.factor, 1.0
        if self.rule.factor is not None:
            norms = self.tree.norm(self.p), self.factor * math.sqrt(self.squares)
            decay = o.weight_decay if self.decay_mode == "coupled" else 0.0
            of_rule = self.rule.factor(self.s, self.s["step"], *norms, decay, **self.settings)
            if self.rule.factor_of_decay and self.decay_mode == "coupled":
                factor_of_both = of_rule
            else:
                factor *= of_rule
        g = t(factor) * self.g
        if o.centralize and g.ndim >= 2:
            g = g - self.tree.spread(self.row_factors * factor * self.row_sums / max(1, self.tree.length), g)
        self.clipped = g
        self.g = t(factor_of_both) * coupled(self.p, g, o.weight_decay) if self.decay_mode == "coupled" else g

    def update(self) -> None:
        """Rule to trust ratio."""
        o, t, p, g, lr = self.o, self.t, self.p, self.g, self.lr
        u = self.rule.update(g, self.s, self.s["step"], **self.settings)
        if o.cautious:
            agree = ((u > 0) & (g > 0)) | ((u < 0) & (g < 0))
            u = np.where(agree, t(p.size / max(np.count_nonzero(agree), p.size / 1000)) * u, t(0)) if p.size else u
        rates = {"decoupled": lr * o.weight_decay, "independent": o.weight_decay}
        rate = rates.get(self.decay_mode)
        if rate is not None and o.decay_in_ratio:
            u = decoupled(p, u, rate)
        if o.trust_ratio is not False:
            u = t(trust_ratio(self.tree.norm(p), self.tree.norm(u), lr, o.trust_ratio)) * u
        if rate is not None and not o.decay_in_ratio:
            u = decoupled(p, u, rate)
        self.u = u

    def move(self) -> None:
        """The subtraction, to max_norm."""
        o, t, lr, tree = self.o, self.t, self.lr, self.tree
        p = self.p - self.u
        if o.l1 or o.l2:
            p = np.sign(p) * np.maximum(np.abs(p) - t(lr * o.l1), t(0)) * t(1 / (1 + lr * o.l2))
        if o.bounds is not None:
            low, high = o.bounds
            p = limited(p, t(-np.inf if low is None else low), t(np.inf if high is None else high))
        if o.group_lasso is not None and p.ndim >= 2:
            norms = tree.norms(p)
            shares = np.divide(lr * o.group_lasso, norms, out=np.full_like(norms, np.inf), where=norms != 0)
            p = tree.spread(np.maximum(1 - shares, 0.0), p) * p
        if o.max_norm is not None and p.ndim >= 2:
            norms = tree.norms(p)
            p = tree.spread(np.divide(o.max_norm, norms, out=np.ones_like(norms), where=norms > o.max_norm), p) * p
        self.p = np.asarray(p)

    def average(self) -> None:
        """Lookahead, and the averages."""
        o, s, step = self.o, self.s, self.s["step"]
        if o.lookahead is not None:
            every, alpha = o.lookahead
            s.setdefault("slow", self.before)
            if step % every == 0:
                self.p = s["slow"] = s["slow"] + self.t(alpha) * (self.p - s["slow"])
        for name in ("ema",) * (o.ema_decay is not None) + ("swa",) * (o.swa is not None):
            s.setdefault(name, np.zeros_like(self.p))
            s.setdefault(f"{name}_count", 0)
        if o.ema_decay is not None:
            self.take("ema", lambda n: ema_weight(o.ema_decay, o.ema_correction, n))
        if o.swa is not None:
            start, every = o.swa
            if step > start and (step - start) % every == 0:
                self.take("swa", lambda n: 1 / n)

    def take(self, name: str, weight: Callable[[int], float]) -> None:
        self.s[f"{name}_count"] += 1
        self.s[name] = self.s[name] + self.t(weight(self.s[f"{name}_count"])) * (self.p - self.s[name])


def limited(x: Any, low: Any, high: Any) -> Any:
    """Replace what is beyond the limits; NaN stays, and so does the sign of a zero that a limit of zero meets."""
    x = np.where(x < low, low, x)
    return np.where(x > high, high, x)


def trust_ratio(param: float, update: float, lr: float, limits: Any) -> float:
    if param == 0 or update == 0:
        return 1.0
    ratio = lr * param / update
    return ratio if limits is True else min(max(ratio, limits[0]), limits[1])


def ema_weight(decay: float, correction: str | None, n: int) -> float:
    if correction == "bias":
        return (1 - decay) / (1 - decay**n)
    if n == 1:
        return 1.0
    return 1 - min(decay, (1 + n) / (10 + n)) if correction == "warmup" else 1 - decay
