"""Progress of a stage: a live panel on a terminal, one plain line every few seconds elsewhere.

Ray, vLLM and DeepSpeed write to the standard error stream at every level, C++ included. `noise_to` sends that stream to
a file for the length of a run, and keeps the real one for progress and errors.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self, TextIO

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from distill_ray.pipeline.folder import cannot_write

LINE_EVERY_S = 5.0

_people: TextIO | None = None  # the real standard error stream while `noise_to` is active


@contextlib.contextmanager
def noise_to(path: Path) -> Iterator[None]:
    """Append what libraries write to file descriptor 2 to a file; progress still reaches the terminal.

    Raises:
        RunFolderError: it cannot be written.
    """
    global _people
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("ab")
    except OSError as error:
        raise cannot_write(path, error) from error
    sys.stderr.flush()
    saved = os.dup(2)
    try:
        with file, os.fdopen(os.dup(saved), "w", encoding="utf-8", errors="replace") as _people:
            os.dup2(file.fileno(), 2)
            yield
    finally:
        with contextlib.suppress(OSError):  # its disk is full
            sys.stderr.flush()
        os.dup2(saved, 2)
        os.close(saved)
        _people = None


def say(message: str) -> None:
    """One line for people, wherever progress goes."""
    _console().print(message, markup=False)


def _console() -> Console:
    return Console(file=_people or sys.stderr, soft_wrap=True, highlight=False)


class Progress:
    """Shows how far a stage is. Call `update` as often as you like.

    Args:
        stage: its name (generate, train, evaluate).
        total: how much there is, in `unit`; None while unknown.
        unit: rows, steps, ...
        console: where to; default the standard error stream, so that results can be piped.
    """

    def __init__(
        self, stage: str, *, total: int | None = None, unit: str = "rows", console: Console | None = None
    ) -> None:
        self.stage, self.total, self.unit = stage, total, unit
        self.console = console or _console()
        self.done = 0
        self.figures: dict[str, str] = {}
        self._started = time.monotonic()
        self._base: tuple[float, int] | None = None  # when work was first seen, and how much was done by then
        self._last_line = 0.0
        self._live = Live(self, console=self.console, refresh_per_second=4, transient=True)

    def __enter__(self) -> Self:
        self._started = time.monotonic()
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.console.is_terminal:
            self._live.stop()
        self.console.print(self.line(), markup=False)

    def update(self, done: int, **figures: object) -> None:
        """Set how much is done, and the figures beside it (`rejects="empty_answer 3"`); empty values are hidden."""
        if self._base is None and done > 0:
            self._base = (time.monotonic(), done)  # start-up and replayed work are no measure of the speed to come
        self.done = done
        self.figures = {
            name.replace("_", " "): str(value) for name, value in figures.items() if value not in ("", None)
        }
        now = time.monotonic()
        if not self.console.is_terminal and now - self._last_line >= LINE_EVERY_S:
            self._last_line = now
            self.console.print(self.line(), markup=False)

    def line(self) -> str:
        """The state in one line of plain text."""
        total = f"/{self.total}" if self.total is not None else ""
        parts = [f"{self.done}{total} {self.unit}", *(f"{name} {value}" for name, value in self.figures.items())]
        eta = self._eta_s()
        if eta is not None:
            parts.append(f"ETA {duration(eta)}")
        return f"{self.stage}: " + ", ".join([*parts, f"elapsed {duration(time.monotonic() - self._started)}"])

    def _eta_s(self) -> float | None:
        since, before = self._base or (0.0, 0)
        gained = self.done - before
        if not self.total or gained <= 0 or self.done >= self.total:
            return None
        return (time.monotonic() - since) * (self.total - self.done) / gained

    def __rich__(self) -> Table:
        table = Table.grid(padding=(0, 2))
        table.add_column(style="bold")
        table.add_column()
        total = f" / {self.total}" if self.total is not None else ""
        table.add_row(self.stage, f"{self.done}{total} {self.unit}")
        table.add_row("", ProgressBar(total=self.total or None, completed=self.done, width=40, pulse=not self.total))
        for name, value in self.figures.items():
            table.add_row(name, value)
        eta = self._eta_s()
        table.add_row(
            "elapsed", duration(time.monotonic() - self._started) + (f"   ETA {duration(eta)}" if eta else "")
        )
        return table


def duration(seconds: float) -> str:
    """Seconds for people: `42s`, `3m 05s`, `2h 07m`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    return f"{whole // 60}m {whole % 60:02d}s" if whole < 3600 else f"{whole // 3600}h {whole % 3600 // 60:02d}m"
