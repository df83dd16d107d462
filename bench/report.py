"""Showing progress and results: with rich where it is installed, as plain text elsewhere."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence

from .records import Record
from .tables import Table, case_table


class Reporter(ABC):
    """Where text goes."""

    def show(self, records: Sequence[Record]) -> None:
        """Show the results of one case."""
        if records:
            self.table(case_table(records))

    @abstractmethod
    def table(self, table: Table) -> None:
        """Show a table."""

    @abstractmethod
    def line(self, text: str) -> None:
        """Show a line."""

    @abstractmethod
    def progress(self, text: str, done: int, total: int) -> None:
        """Show what is being measured, and how much of all is done."""

    def close(self) -> None:
        """Take the progress away."""


class PlainReporter(Reporter):
    """Plain text; progress only on a terminal."""

    def __init__(self) -> None:
        self._shown = 0  # characters of progress that stand in the line

    def table(self, table: Table) -> None:
        rows = [table.header, *table.rows]
        widths = [max(len(row[i]) for row in rows) for i in range(len(table.header))]
        self.line("")
        self.line(table.title)
        for row in rows:
            cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
            self.line("  ".join(cells).rstrip())

    def line(self, text: str) -> None:
        self.close()
        print(text, flush=True)

    def progress(self, text: str, done: int, total: int) -> None:
        self.close()
        if sys.stderr.isatty():
            shown = f"[{done}/{total}] {text}"
            print(shown, end="", file=sys.stderr, flush=True)
            self._shown = len(shown)

    def close(self) -> None:
        if self._shown:
            print("\r" + " " * self._shown + "\r", end="", file=sys.stderr, flush=True)
            self._shown = 0


class RichReporter(Reporter):
    """Tables and a progress bar of rich. The bar is drawn by hand: a thread that did it would disturb the measurement."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        console = Console(highlight=False)
        if not console.is_terminal:
            console = Console(highlight=False, width=160)
        self._progress = Progress(
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.description}"),
            console=console,
            auto_refresh=False,
            transient=True,
        )
        self._task = self._progress.add_task("", total=None)

    def table(self, table: Table) -> None:
        from rich import box
        from rich.table import Table as RichTable

        shown = RichTable(title=table.title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
        for i, name in enumerate(table.header):
            widest = max(len(row[i]) for row in table.rows)
            shown.add_column(name.replace("-", "-\n"), justify="right" if i else "left", min_width=widest, vertical="bottom")
        for i, row in enumerate(table.rows):
            shown.add_row(*row, style="bold green" if i in table.emphasized else None)
        self._progress.console.print(shown)

    def line(self, text: str) -> None:
        self._progress.console.print(text, markup=False)

    def progress(self, text: str, done: int, total: int) -> None:
        if self._progress.console.is_terminal:
            self._progress.start()
            self._progress.update(self._task, completed=done, total=total, description=text, refresh=True)

    def close(self) -> None:
        self._progress.stop()


def make_reporter() -> Reporter:
    """Return a reporter that uses rich if it is installed."""
    try:
        return RichReporter()
    except ImportError:
        return PlainReporter()
