"""What a stage shows: a panel that fits its terminal, plain lines elsewhere, and messages that stay."""

from __future__ import annotations

import io
from types import SimpleNamespace

import pytest
from rich.console import Console
from rich.table import Table
from rich.text import Text

from distill_ray.pipeline import progress
from distill_ray.pipeline.progress import LABEL_WIDTH, People, Progress, say, waiting

FIGURES = {"calls": 12_345, "tokens/s": "59,620", "rejects": "empty_answer 3 " * 12}


class Clock:
    """Time that passes when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=found.monotonic))
    return found


def terminal(width: int = 80) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, force_interactive=True, width=width, color_system=None)


def file() -> People:
    return People(file=io.StringIO())


def text_of(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [80, 200])
def test_the_panel_is_no_wider_than_its_terminal_and_does_not_stretch(width: int) -> None:
    shown = Progress("generate", total=1_234_567, console=terminal(width))
    shown.update(400_000, **FIGURES)
    lines = "".join(segment.text for segment in shown.console.render(shown)).splitlines()
    assert max(map(len, lines)) <= width
    bar = next(line.rstrip() for line in lines if "━" in line)
    assert len(bar) < 80
    assert lines[0].split() == ["generate", "400,000", "/", "1,234,567", "rows", "32", "%"]


def test_the_panel_does_not_move_when_a_figure_appears() -> None:
    shown = Progress("train", total=10, unit="steps", console=terminal())

    def at() -> int:
        lines = "".join(segment.text for segment in shown.console.render(shown)).splitlines()
        return lines[0].index("0 /")

    before = at()
    shown.update(0, validation_loss="5")
    assert at() == before == LABEL_WIDTH + 2


def test_what_is_said_beside_a_panel_stays_above_it() -> None:
    console = terminal()
    with Progress("train", total=2, unit="steps", console=console) as shown:
        shown.update(2)
        say("train: student/ has the weights of step 2")
    assert text_of(console).count("train: student/ has the weights of step 2\n") == 1
    assert progress._live is None


def test_the_cursor_is_back_after_an_interrupt() -> None:
    console = terminal()
    with pytest.raises(KeyboardInterrupt), Progress("train", total=2, console=console):
        raise KeyboardInterrupt
    text = text_of(console)
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")
    assert text.rpartition("\x1b[2K")[2] == "train: 0/2 rows (0 %), elapsed 0s\n"


@pytest.mark.parametrize("kind", ["file", "dumb"])
def test_a_file_and_a_dumb_terminal_get_whole_plain_lines(
    kind: str, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setenv("TTY_COMPATIBLE", "0" if kind == "file" else "1")
    console = file()
    with Progress("generate", total=1000, console=console) as shown:
        for done in range(0, 1001, 10):
            shown.update(done, **FIGURES)
            clock.now += 1
    lines = text_of(console).splitlines()
    assert all(line.startswith("generate: ") and "elapsed" in line for line in lines)
    assert not set("\x1b\r━") & set(text_of(console))
    assert len(lines) == 1 + 10 + 1  # the first, each tenth, the last
    assert lines[-1].startswith("generate: 1,000/1,000 rows, calls 12,345, ")


def test_a_slow_stage_says_a_line_every_half_minute_and_a_fast_one_few(clock: Clock) -> None:
    slow, fast = file(), file()
    with Progress("generate", total=10**6, console=slow) as shown:
        for done in range(120):
            shown.update(done)
            clock.now += 1
    assert len(text_of(slow).splitlines()) == 4 + 1
    with Progress("generate", total=100, console=fast) as shown:
        for done in range(101):
            shown.update(done)
            clock.now += 0.01
    assert len(text_of(fast).splitlines()) == 2


def test_a_stage_that_was_done_before_says_so_once() -> None:
    console = file()
    with Progress("train", total=18, unit="steps", console=console) as shown:
        shown.update(18)
    assert text_of(console) == "train: 18/18 steps, elapsed 0s\n"


def test_there_is_no_eta_before_there_is_a_speed(clock: Clock) -> None:
    shown = Progress("evaluate", total=800, unit="answers", console=file())
    for done in (1, 128):
        shown.update(done)
        clock.now += 0.1
    assert "ETA" not in shown.line()


def test_the_eta_counts_down_while_nothing_moves_and_goes_when_it_is_over(clock: Clock) -> None:
    shown = Progress("evaluate", total=300, unit="answers", console=file())
    for done in (0, 100, 200):
        clock.now += 10
        shown.update(done)
    assert "200/300 answers (66 %), ETA 10s" in shown.line()
    clock.now += 4
    shown.update(200)
    assert "ETA 6s" in shown.line()
    clock.now += 6
    assert "ETA" not in shown.line()
    assert "ETA" not in shown.line(is_last=True)


def test_waiting_leaves_no_trace_and_says_nothing_to_a_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with waiting("starting Ray"):
        pass
    assert capsys.readouterr().err == ""
    console = terminal()
    monkeypatch.setattr(progress, "_console", lambda: console)
    with waiting("starting Ray"):
        assert progress._live is console
    assert "starting Ray" in text_of(console)
    assert "\n" not in text_of(console).replace("\x1b[1A", "\n").split("\x1b[2K")[-1].strip("\n")


def people(monkeypatch: pytest.MonkeyPatch, *, is_terminal: bool) -> People:
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("TTY_COMPATIBLE", "1" if is_terminal else "0")
    return People(file=io.StringIO())


SENTENCE = "the student is taken to learn whole answers; it learns a part"


def test_a_terminal_breaks_lines_between_words_and_a_path_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    console = people(monkeypatch, is_terminal=True)
    console.print(SENTENCE)
    assert text_of(console).split() == SENTENCE.split()
    assert max(map(len, text_of(console).splitlines())) <= 40
    console.print("wrote: " + "a/long/path" * 9, soft_wrap=True)
    assert text_of(console).endswith("wrote: " + "a/long/path" * 9 + "\n")


def test_a_table_does_not_stretch_over_a_wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    console = people(monkeypatch, is_terminal=True)
    console.width = 200
    table = Table()
    table.add_row("why", SENTENCE * 5)
    console.print(table)
    assert max(map(len, Text.from_ansi(text_of(console)).plain.splitlines())) == progress.WIDEST


def test_a_file_gets_whole_lines_and_whole_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    console = people(monkeypatch, is_terminal=False)
    console.print(SENTENCE)
    assert text_of(console) == SENTENCE + "\n"
    table = Table()
    table.add_row("step", SENTENCE)
    console.print(table)
    assert all(word in text_of(console).partition("\n")[2] for word in SENTENCE.split())
