"""Progress of a stage: a live panel on a terminal, a plain line now and then elsewhere.

Ray, vLLM and DeepSpeed write to the standard error stream at every level, C++ included. `noise_to` sends that stream to
a file for the length of a run, and keeps the real one for progress and errors.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.status import Status
from rich.table import Table
from rich.text import Text

from distill_ray.errors import cannot_write

MEASURED_S = 2.0  # before this a speed is a guess
LINE_EVERY_S = 30.0  # away from a terminal: a line after so long,
TENTH_EVERY_S = 5.0  # or at the next tenth of all there is, but not more often than this
WIDEST = 120  # of what is laid out: longer lines are hard to read
LABEL_WIDTH = len("validation loss")  # the widest there is: the panel does not move when it appears

_people: TextIO | None = None  # the real standard error stream while `noise_to` is active
_live: Console | None = None  # where a panel is drawn: a line beside it has to know of it, or it is drawn over


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


class People(Console):
    """A console that breaks lines between words on a terminal, and not at all elsewhere: files are searched.

    With `soft_wrap=True` the terminal alone breaks them, and what is copied from it is one line: paths, commands.
    """

    def __init__(self, *, file: TextIO | None = None, stderr: bool = False, markup: bool = True) -> None:
        super().__init__(file=file, stderr=stderr, markup=markup, highlight=False)

    def print(self, *objects: Any, soft_wrap: bool | None = None, **options: Any) -> None:
        """As rich does, but tables and panels do not stretch; without line breaks their cells would be cut."""
        is_text = all(isinstance(each, str) for each in objects)
        if not is_text:
            options.setdefault("width", min(self.width, WIDEST))
        if soft_wrap is None:
            soft_wrap = is_text and not self.is_interactive
        super().print(*objects, soft_wrap=soft_wrap, **options)


def say(message: str) -> None:
    """One line for people, wherever progress goes: above the panel where there is one."""
    _console().print(message, markup=False)


def tell(message: str, *, stderr: bool = False) -> None:
    """A line of a command's own for people: broken between words on a terminal."""
    People(stderr=stderr).print(message, markup=False)


@contextlib.contextmanager
def waiting(what: str) -> Iterator[None]:
    """Show on a terminal what takes its time before there is anything to count; no trace of it stays."""
    with _shown(Status(what, console=_console(), spinner="line", spinner_style="none")):
        yield


@contextlib.contextmanager
def _shown(live: Live | Status) -> Iterator[None]:
    """Draw until the end of the block; nothing where it cannot be drawn, or something else is being drawn."""
    global _live
    if _live is not None or not live.console.is_interactive:
        yield
        return
    _live = live.console
    try:
        with live:
            yield
    finally:
        _live = None


def _console() -> Console:
    return _live or People(file=_people or sys.stderr)


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
        self._moved = 0.0  # when more was done, the last time
        self._last_line, self._last_tenth = -math.inf, 0
        self._panel = contextlib.ExitStack()

    def __enter__(self) -> Self:
        self._started = time.monotonic()
        self._panel.enter_context(_shown(Live(self, console=self.console, refresh_per_second=4, transient=True)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._panel.close()
        self.console.print(self.line(is_last=True), markup=False)

    def update(self, done: int, **figures: object) -> None:
        """Set how much is done, and the figures beside it (`rejects="empty_answer 3"`); empty values are hidden."""
        now = time.monotonic()
        if self._base is None and done > 0:
            self._base = (now, done)  # start-up and replayed work are no measure of the speed to come
        self._moved = now if done != self.done else self._moved
        self.done = done
        self.figures = {
            name.replace("_", " "): f"{value:,}" if isinstance(value, int) else str(value)
            for name, value in figures.items()
            if value not in ("", None)
        }
        if not self.console.is_interactive and self._is_due(now):
            self._last_line, self._last_tenth = now, self._tenths()
            self.console.print(self.line(), markup=False)

    def line(self, *, is_last: bool = False) -> str:
        """The state in one line of plain text."""
        total = f"/{self.total:,}" if self.total is not None else ""
        parts = [f"{self.done:,}{total} {self.unit}{self._percent(' (', ')')}"]
        parts += [f"{name} {value}" for name, value in self.figures.items()]
        eta = None if is_last else self._eta_s()
        if eta is not None:
            parts.append(f"ETA {duration(eta)}")
        return f"{self.stage}: " + ", ".join([*parts, f"elapsed {duration(time.monotonic() - self._started)}"])

    def _is_due(self, now: float) -> bool:
        if self.total and self.done >= self.total and not self.figures:
            return False  # the last line says it
        waited = now - self._last_line
        return waited >= LINE_EVERY_S or (waited >= TENTH_EVERY_S and self._tenths() > self._last_tenth)

    def _tenths(self) -> int:
        return 10 * self.done // self.total if self.total else 0

    def _percent(self, before: str, after: str = "") -> str:
        """Of what is under way; "" where all of it is done."""
        if not self.total or self.done >= self.total:
            return ""
        return f"{before}{100 * self.done // self.total} %{after}"

    def _eta_s(self) -> float | None:
        """Counts down while nothing moves, and goes when that takes longer than it should: it would only grow."""
        since, before = self._base or (0.0, 0)
        gained, took = self.done - before, self._moved - since
        if not self.total or gained <= 0 or self.done >= self.total or took < MEASURED_S:
            return None
        eta = took * (self.total - self.done) / gained - (time.monotonic() - self._moved)
        return eta if eta >= 1 else None

    def __rich__(self) -> Table:
        table = Table.grid(padding=(0, 2))
        table.add_column(style="bold", min_width=LABEL_WIDTH)
        table.add_column()
        total = f" / {self.total:,}" if self.total is not None else ""
        table.add_row(self.stage, f"{self.done:,}{total} {self.unit}{self._percent('   ')}")
        table.add_row("", ProgressBar(total=self.total or None, completed=self.done, width=40, pulse=not self.total))
        for name, value in self.figures.items():
            table.add_row(name, Text(value))
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
