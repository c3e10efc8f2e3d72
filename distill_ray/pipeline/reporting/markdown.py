"""Plain Markdown: tables, and foreign text that must not become markup."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence

MAX_CELL_CHARS = 300

_MARKUP = re.compile(r"([\\`*_\[\]|~$#])")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")


def cell(value: object, max_chars: int = MAX_CELL_CHARS) -> str:
    """Any text as one table cell: cut, markup and HTML shown as text, line ends as <br>."""
    text = "" if value is None else str(value)
    if len(text) > max_chars:
        text = text[: max_chars - 3] + "..."
    text = html.escape(_CONTROL.sub("", text), quote=False)
    return "<br>".join(_MARKUP.sub(r"\\\1", text).split("\n"))


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of cells that are Markdown already. The first column is left-aligned, numbers go right."""
    rule = ["---", *("---:" for _ in header[1:])]
    return "\n".join(f"| {' | '.join(line)} |" for line in [header, rule, *rows])


def text_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table of foreign text, left-aligned."""
    rule = ["---" for _ in header]
    return "\n".join(f"| {' | '.join(line)} |" for line in [header, rule, *([*map(cell, row)] for row in rows)])


def code(text: str, language: str = "") -> str:
    """A fenced block whose fence is longer than any run of backticks inside."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"
