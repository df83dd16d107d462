"""A table of numbers that grows by rows, in bounded memory if asked for."""

from __future__ import annotations

from array import array
from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray


class Table:
    """Rows of numbers, read by column. A column begins with the first row that has it; what a row lacks is NaN.

    With a bound, the table holds rows spread evenly over all that were added: once it is full, every second row is dropped, and
    from then on only every second row is kept, then every fourth, and so on.

    Args:
        keep: the most rows to hold, None for no bound.

    >>> table = Table(keep=4)
    >>> for step in range(10):
    ...     table.append({"step": step, "loss": 1 / (1 + step)})
    >>> table["step"]
    array([0., 4., 8.])
    """

    def __init__(self, keep: int | None = None) -> None:
        self._keep = keep
        self._columns: dict[Hashable, array[float]] = {}
        self._rows = self._added = 0
        self._stride = 1

    @property
    def names(self) -> list[Hashable]:
        """The columns' names, in the order in which they came."""
        return list(self._columns)

    def __len__(self) -> int:
        return self._rows

    def __contains__(self, name: Hashable) -> bool:
        return name in self._columns

    def __getitem__(self, name: Hashable) -> NDArray[np.float64]:
        """Return a copy of a column."""
        return np.array(self._columns[name], np.float64)

    @property
    def keeps_next(self) -> bool:
        """Whether the next row will be kept; if not, what is in it does not matter."""
        return self._keep != 0 and self._added % self._stride == 0

    def append(self, row: Mapping[Any, float]) -> None:
        """Add a row: numbers by the names of their columns."""
        if self.keeps_next:
            for name in row:
                if name not in self._columns:
                    self._columns[name] = array("d", [np.nan]) * self._rows
            for name, column in self._columns.items():
                column.append(row.get(name, np.nan))
            self._rows += 1
        self._added += 1
        self._thin()

    def _thin(self) -> None:
        while self._keep is not None and self._rows > max(self._keep, 1):
            self._columns = {name: column[::2] for name, column in self._columns.items()}
            self._rows = (self._rows + 1) // 2
            self._stride *= 2

    def state_dict(self) -> dict[str, Any]:
        """Return the rows, and how many were added, as plain lists and numbers."""
        columns = [[name, column.tolist()] for name, column in self._columns.items()]
        return {"columns": columns, "rows": self._rows, "added": self._added, "stride": self._stride}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over the rows of a table, and thin them out if its bound was another."""
        self._columns = {
            tuple(name) if isinstance(name, list) else name: array("d", values)  # JSON has lists for tuples
            for name, values in state_dict["columns"]
        }
        self._rows, self._added, self._stride = (state_dict[name] for name in ("rows", "added", "stride"))
        self._thin()
