"""Averages of the parameters that a step keeps: finding them, and exchanging them with the parameters."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

from gradstep import _core

Average = Literal["ema", "swa"]


class HoldsAverages:
    """Mixin of the optimizers: `swap_ema` and `averaged`."""

    param_groups: list[dict[str, Any]]

    @abstractmethod
    def _state_of(self, group: int, index: int) -> Mapping[str, Any]:
        """Return the states of a parameter of a group; empty if it has none yet."""

    def swap_ema(self) -> None:
        """Exchange parameters and exponential moving averages, in place; a second call exchanges them back.

        Raises:
            RuntimeError: if there are no averages yet.
        """
        self._swap("ema")

    @contextmanager
    def averaged(self, name: Average | None = None) -> Iterator[None]:
        """Let the parameters hold their averages inside a ``with`` block, for evaluation.

        Args:
            name: ``"ema"`` or ``"swa"``; None for the one that there is, the exponential one if there are both.

        Raises:
            RuntimeError: if there are no averages yet.
        """
        if name is None:
            only_swa = all(group.get("ema_decay") is None for group in self.param_groups) and any(
                group.get("swa") is not None for group in self.param_groups
            )
            name = "swa" if only_swa else "ema"
        params, averages = self._swap(name)
        try:
            yield
        finally:
            _core.swap(params, averages, type(self).__name__)

    def _averages(self, name: Average) -> list[list[Any]]:
        """Return the averages, group by group; None for a parameter that has none yet."""
        states = [[self._state_of(i, j) for j in range(len(group["params"]))] for i, group in enumerate(self.param_groups)]
        return [[state.get(name) if state.get(f"{name}_count") else None for state in group] for group in states]

    def _swap(self, name: Average) -> tuple[list[Any], list[Any]]:
        params, averages = [], []
        for group, theirs in zip(self.param_groups, self._averages(name), strict=True):
            for param, average in zip(group["params"], theirs, strict=True):
                if average is not None:
                    params.append(param)
                    averages.append(average)
        if not params:
            option = "ema_decay" if name == "ema" else name
            raise RuntimeError(
                f"{type(self).__name__}: there are no averages yet; the option {option} keeps them, step by step"
            )
        _core.swap(params, averages, type(self).__name__)
        return params, averages
