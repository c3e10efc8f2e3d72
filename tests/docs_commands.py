"""The commands that README and docs/*.md name, as they stand there."""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
SPAN = re.compile(r"`([^`\n]+)`")
OPTIONAL = re.compile(r"\[([^\[\]]+)\]")  # [VERSION|none]
SAID = ("distill-ray", "make", "python")  # a span that begins so is a command


@dataclass(frozen=True)
class Command:
    """One command of a page. `words` are without the program; `is_line`: it stands in a block, to be pasted."""

    page: str
    program: str
    words: tuple[str, ...]
    is_line: bool

    @property
    def text(self) -> str:
        """As one would type it, without the folder of the program."""
        return shlex.join([self.program, *self.words])

    def __str__(self) -> str:
        return f"{self.page}: {self.text}"


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return [content for kind, content in FENCE.findall(text) if kind == language]


def spans(text: str) -> list[str]:
    """What stands in backticks, outside of blocks."""
    return SPAN.findall(FENCE.sub("", text))


def commands(page: Path) -> list[Command]:
    """All commands of a page: the lines of its `bash` blocks, and spans that begin with one of SAID and go on."""
    text = page.read_text(encoding="utf-8")
    lines = itertools.chain.from_iterable(block.replace("\\\n", " ").splitlines() for block in blocks(text, "bash"))
    found = [command for line in lines for command in _commands(page.name, line, is_line=True)]
    said = [span for span in spans(text) if span.split()[0] in SAID and len(span.split()) > 1]
    return [*found, *(command for span in said for command in _commands(page.name, span, is_line=False))]


def _commands(page: str, line: str, *, is_line: bool) -> Iterator[Command]:
    words = shlex.split(line, comments=True)
    if ">" in words:
        words = words[: words.index(">")]
    for between, group in itertools.groupby(words, key=lambda word: word in ("&&", "--")):
        if not between:
            program, *rest = group
            name = program.removeprefix(".venv/bin/")
            yield Command(page, name, tuple(rest), is_line)


def variants(command: Command) -> list[Command]:
    """What may be left out and what may be chosen, written out: `[A|B]` is nothing, A or B."""
    choices = [["", *found[1].split("|")] if (found := OPTIONAL.fullmatch(w)) else [w] for w in command.words]
    return [
        Command(command.page, command.program, tuple(filter(None, words)), command.is_line)
        for words in itertools.product(*choices)
    ]
