"""Progress on stderr: bars on a terminal, elsewhere a line now and then, so that a log stays readable."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TransferSpeedColumn,
)


class _Bar:
    """A bar on a terminal, or a place to write lines to. ``with`` it, then ``update``."""

    def __init__(
        self,
        title: str,
        columns: tuple[ProgressColumn, ...],
        transient: bool,
        write: Callable[[str], object] | None,
    ) -> None:
        self._title = title
        self._write = sys.stderr.write if write is None else write
        on_terminal = write is None and sys.stderr.isatty()
        shown = (TextColumn(title), BarColumn(), TaskProgressColumn(), *columns)
        self._bar = (
            Progress(*shown, console=Console(stderr=True), transient=transient) if on_terminal else None
        )
        self._task = self._bar.add_task("", total=None) if self._bar is not None else None
        self._last = -1

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _show(self, done: float, total: float, part: int, line: str, description: str = "") -> None:
        """Move the bar, or write the line if ``part``, a count that grows, is a new one."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, total=total, description=description)
        elif part > self._last:
            self._last = part
            self._write(f"{self._title}: {line}\n")
            if self._write == sys.stderr.write:
                sys.stderr.flush()


class LoadingBar(_Bar):
    """Progress of loading weights, in bytes; without a terminal one line for each 10 %."""

    def __init__(self, write: Callable[[str], object] | None = None) -> None:
        super().__init__("Loading weights", (DownloadColumn(), TransferSpeedColumn()), True, write)
        self._started = time.perf_counter()

    def update(self, done: int, total: int) -> None:
        """Show that ``done`` of ``total`` bytes are loaded."""
        tenths = 10 * done // total if total else 10
        rate = done / 1e9 / max(time.perf_counter() - self._started, 1e-9)
        self._show(done, total, tenths, f"{10 * tenths}% of {total / 1e6:.0f} MB, {rate:.2f} GB/s")


class PhaseBar(_Bar):
    """Progress of long work as a share, with a text; without a terminal one line for each percent."""

    def __init__(self, title: str) -> None:
        super().__init__(title, (TimeElapsedColumn(), TextColumn("{task.description}")), False, None)

    def update(self, share: float, text: str) -> None:
        """share: 0 to 1."""
        percent = int(100 * share)
        self._show(min(share, 1.0), 1.0, percent, f"{percent}%, {text}", text)
