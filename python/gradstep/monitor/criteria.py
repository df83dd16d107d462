"""Criteria that tell from a series of values when to stop: each is a small object, of use with a monitor or without."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, TypeAlias

from gradstep.monitor.checks import check_choice, check_count, check_positive, number

Mode: TypeAlias = Literal["min", "max"]
"""Whether small values are good, or large ones."""


class Criterion(ABC):
    """Base of the criteria. A subclass looks at one value after the other and tells when its condition is met.

    Attributes:
        reached: whether the newest value met the condition.
    """

    _STATE: ClassVar[tuple[str, ...]]  # names of the attributes that a saved state consists of
    reached: bool

    def __init__(self) -> None:
        self.reset()

    def update(self, value: Any, step: int | None = None) -> bool:
        """Look at the next value and return whether the condition is met now.

        Args:
            value: a number, or an array or tensor of one element.
            step: the number that hints call it by; by default values are counted from 1.

        Raises:
            TypeError: if `value` is no number.
        """
        value = number(f"{type(self).__name__}.update: value", value)
        self._count += 1
        self.reached = self._update(value, self._count if step is None else step)
        return self.reached

    def reset(self) -> None:
        """Forget all values."""
        self.reached = False
        self._count = 0
        self._reset()

    @abstractmethod
    def describe(self) -> str:
        """Return in words what the condition found."""

    @abstractmethod
    def _update(self, value: float, step: int) -> bool: ...

    @abstractmethod
    def _reset(self) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        """Return what a later run needs to go on, as plain numbers and lists."""
        values = {name: getattr(self, name) for name in ("reached", "_count", *self._STATE)}
        return {name.lstrip("_"): list(value) if isinstance(value, deque) else value for name, value in values.items()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over what `state_dict` of a criterion of the same kind returned; settings stay as they are.

        Raises:
            ValueError: if it is the state of something else.
        """
        names = {name.lstrip("_"): name for name in ("reached", "_count", *self._STATE)}
        if state_dict.keys() != names.keys():
            where = f"{type(self).__name__}.load_state_dict: state_dict"
            raise ValueError(f"{where} must have {', '.join(names)}, got {', '.join(map(str, state_dict))}")
        for key, name in names.items():
            value, old = state_dict[key], getattr(self, name)
            setattr(self, name, deque(value, old.maxlen) if isinstance(old, deque) else value)


class EarlyStopping(Criterion):
    """Stop when a value has not become better for some time.

    A value counts as better if it is beyond the best one so far by more than `min_delta`; NaN and infinity never do.

    Args:
        patience: how many values in a row may be no better before it is enough.
        mode: "min" if small values are good (losses), "max" if large ones are (accuracies).
        min_delta: by how much a value must be better.

    Attributes:
        best: the best value, None before the first.
        best_step: its step: that of the parameters to restore.
        improved: whether the newest value is the best: the moment to save the parameters.
        waited: how many values have come since the best.

    Raises:
        TypeError: if a setting has the wrong type.
        ValueError: if a setting is out of range.

    >>> stopping = EarlyStopping(patience=2, mode="max")
    >>> [stopping.update(accuracy, step) for step, accuracy in [(100, 0.7), (200, 0.8), (300, 0.78), (400, 0.79)]]
    [False, False, False, True]
    >>> stopping.best, stopping.best_step
    (0.8, 200)
    """

    _STATE: ClassVar = ("best", "best_step", "improved", "waited")

    def __init__(self, patience: int = 10, *, mode: Mode = "min", min_delta: float = 0.0) -> None:
        check_count("EarlyStopping: patience", patience)
        check_choice("EarlyStopping: mode", mode, ("min", "max"))
        check_positive("EarlyStopping: min_delta", min_delta, zero=True)
        self.patience, self.mode, self.min_delta = patience, mode, min_delta
        super().__init__()

    def _reset(self) -> None:
        self.best: float | None = None
        self.best_step: int | None = None
        self.improved = False
        self.waited = 0

    def _update(self, value: float, step: int) -> bool:
        sign = 1 if self.mode == "min" else -1
        self.improved = math.isfinite(value) and (self.best is None or sign * (self.best - value) > self.min_delta)
        if self.improved:
            self.best, self.best_step, self.waited = value, step, 0
        else:
            self.waited += 1
        return self.waited >= self.patience

    def describe(self) -> str:
        """Return how long nothing has become better, and what to restore."""
        best = "there is no best" if self.best is None else f"the best is {self.best:.6g}, of step {self.best_step}"
        return f"no better for {self.waited} values; {best}"

    def __repr__(self) -> str:
        return f"EarlyStopping(patience={self.patience}, mode={self.mode!r}, min_delta={self.min_delta})"


class Plateau(Criterion):
    """Tell when a noisy value has stopped becoming better: the moment to lower the learning rate.

    With a the mean of the newest `window` values and b that of the `window` values before, the condition is

        b - a <= tolerance |b|    (a - b for mode "max")

    A value that is not finite starts the windows anew. After acting on it call `reset`.

    Args:
        window: values in each of the two means: the more noise, the more.
        tolerance: relative gain that counts as none.
        mode: "min" if small values are good, "max" if large ones are.

    Raises:
        TypeError: if a setting has the wrong type.
        ValueError: if a setting is out of range.

    >>> plateau = Plateau(window=2, tolerance=0.01)
    >>> [plateau.update(loss) for loss in [4.0, 2.0, 1.0, 1.2, 1.0, 1.2]]
    [False, False, False, False, False, True]
    """

    _STATE: ClassVar = ("_values",)

    def __init__(self, window: int = 100, *, tolerance: float = 1e-3, mode: Mode = "min") -> None:
        check_count("Plateau: window", window)
        check_positive("Plateau: tolerance", tolerance, zero=True)
        check_choice("Plateau: mode", mode, ("min", "max"))
        self.window, self.tolerance, self.mode = window, tolerance, mode
        super().__init__()

    def _reset(self) -> None:
        self._values: deque[float] = deque(maxlen=2 * self.window)

    def _update(self, value: float, step: int) -> bool:  # noqa: ARG002
        if not math.isfinite(value):
            self._values.clear()
            return False
        self._values.append(value)
        if len(self._values) < 2 * self.window:
            return False
        older, newer = self._means()
        gain = older - newer if self.mode == "min" else newer - older
        return gain <= self.tolerance * abs(older)

    def _means(self) -> tuple[float, float]:
        values = list(self._values)
        return math.fsum(values[: self.window]) / self.window, math.fsum(values[self.window :]) / self.window

    def describe(self) -> str:
        """Return the two means that do not differ enough."""
        if len(self._values) < 2 * self.window:
            return f"{len(self._values)} of {2 * self.window} values seen"
        older, newer = self._means()
        return f"the mean of {self.window} values is {newer:.6g}, that of the {self.window} before {older:.6g}"

    def __repr__(self) -> str:
        return f"Plateau(window={self.window}, tolerance={self.tolerance}, mode={self.mode!r})"


class RelativeChange(Criterion):
    """Tell when a value without noise has converged: it has stayed the same over a window, up to a tolerance.

    With x_1 ... x_n the newest `window` values, the condition is

        max(x) - min(x) <= tolerance max(|x|)

    A value that is not finite starts the window anew.

    Args:
        tolerance: the largest relative change; 0 waits until values repeat.
        window: how many values must agree, at least 2.

    Raises:
        TypeError: if a setting has the wrong type.
        ValueError: if a setting is out of range.

    >>> change = RelativeChange(1e-3, window=3)
    >>> [change.update(loss) for loss in [2.0, 1.0, 0.9999, 0.9998]]
    [False, False, False, True]
    """

    _STATE: ClassVar = ("_values",)

    def __init__(self, tolerance: float = 1e-6, *, window: int = 10) -> None:
        check_positive("RelativeChange: tolerance", tolerance, zero=True)
        check_count("RelativeChange: window", window, least=2)
        self.tolerance, self.window = tolerance, window
        super().__init__()

    def _reset(self) -> None:
        self._values: deque[float] = deque(maxlen=self.window)

    def _update(self, value: float, step: int) -> bool:  # noqa: ARG002
        if not math.isfinite(value):
            self._values.clear()
            return False
        self._values.append(value)
        low, high = min(self._values), max(self._values)
        return len(self._values) == self.window and high - low <= self.tolerance * max(abs(low), abs(high))

    def describe(self) -> str:
        """Return the range in which the values lie."""
        if len(self._values) < self.window:
            return f"{len(self._values)} of {self.window} values seen"
        return f"the last {self.window} values lie between {min(self._values):.6g} and {max(self._values):.6g}"

    def __repr__(self) -> str:
        return f"RelativeChange({self.tolerance}, window={self.window})"
