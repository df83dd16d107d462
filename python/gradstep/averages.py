"""Averages of the parameters that a step keeps: finding them, and exchanging them with the parameters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

from gradstep import _core
from gradstep.device_arrays import assign, exchange, is_on_device
from gradstep.formats import convert_
from gradstep.holder import Holder

Average = Literal["ema", "swa"]


class HoldsAverages(Holder):
    """Mixin of the optimizers: `swap_ema` and `averaged`."""

    def swap_ema(self) -> None:
        """Exchange parameters and exponential moving averages, in place; a second call exchanges them back.

        Raises:
            RuntimeError: if there are no averages yet.
            ValueError: if an average has another dtype than its parameter, and would be rounded: `averaged` leaves it as it is.
        """
        where = type(self).__name__
        params, averages = self._pairs("ema")
        for param, average in zip(params, averages, strict=True):
            if param.dtype != average.dtype:
                raise ValueError(
                    f"{where}.swap_ema: an average is {average.dtype}, its parameter {param.dtype}: exchanging would round it; "
                    "averaged() leaves it as it is"
                )
        self._begin_writing()
        _swap(params, averages, where)

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
        pairs = list(zip(*self._pairs(name), strict=True))
        alike = [pair for pair in pairs if pair[0].dtype == pair[1].dtype]  # these change places, others lend their values
        params, averages = [param for param, _ in alike], [average for _, average in alike]
        lent = [(param, average, _copy(param)) for param, average in pairs if param.dtype != average.dtype]
        swapped = False
        try:
            self._begin_writing()
            _swap(params, averages, type(self).__name__)
            swapped = True
            for param, average, _ in lent:
                _lend(param, average)
            yield
        finally:
            self._begin_writing()
            if swapped:
                _swap(params, averages, type(self).__name__)
            for param, _, kept in lent:
                _lend(param, kept)

    def _averages(self, name: Average) -> list[list[Any]]:
        """Return the averages, group by group; None for a parameter that has none yet."""
        states = [[self._state_of(i, j) for j in range(len(group["params"]))] for i, group in enumerate(self.param_groups)]
        return [[state.get(name) if state.get(f"{name}_count") else None for state in group] for group in states]

    def _pairs(self, name: Average) -> tuple[list[Any], list[Any]]:
        """Return the parameters that have an average, and the averages."""
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
        return params, averages


def _swap(params: list[Any], averages: list[Any], where: str) -> None:
    pairs = list(zip(params, averages, strict=True))
    on_host = [pair for pair in pairs if not is_on_device(pair[0])]
    _core.swap([param for param, _ in on_host], [average for _, average in on_host], where)
    for param, average in pairs:
        if is_on_device(param):
            exchange(param, average)


def _lend(param: Any, values: Any) -> None:
    (assign if is_on_device(param) else convert_)(param, values)


def _copy(param: Any) -> Any:
    return param.detach().clone() if hasattr(param, "detach") else param.copy()
