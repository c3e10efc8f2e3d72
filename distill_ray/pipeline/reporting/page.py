"""The report as a page: one file, no script, nothing from other hosts, readable on a phone.

The text is that of `report.md`. Of HTML in it only `<br>` is let through, which `markdown.cell` writes for the end of a
line.
"""

from __future__ import annotations

import functools
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markdown_it import MarkdownIt
from markdown_it.token import Token
from markupsafe import Markup

from distill_ray.look import LOOK
from distill_ray.pipeline.reporting.sections import Section

WIDE = 4  # columns from which a table takes the width of the page, and is a list of cards on a phone
_TEMPLATE = Path(__file__).parent / "report.html"


def page(name: str, sections: Sequence[Section], charts: Mapping[str, Sequence[str]]) -> str:
    """The whole of it.

    Args:
        name: of the run.
        sections: what is said.
        charts: SVG by the title of its section.
    """
    shown = [
        (section.title, Markup(as_html(section.text)), [Markup(chart) for chart in charts.get(section.title, ())])
        for section in sections
    ]
    return _template().render(look=Markup(LOOK), name=name, sections=shown)


def as_html(markdown: str) -> str:
    """Markdown with tables as HTML; every cell knows its column's title."""
    parser = _parser()
    tokens = parser.parse(markdown)
    _label_cells(tokens)
    return str(parser.renderer.render(tokens, parser.options, {}))


def _label_cells(tokens: Sequence[Token]) -> None:
    table, titles, column = None, list[str](), 0
    for place, token in enumerate(tokens):
        if token.type == "table_open":
            table, titles = token, []
        elif token.type == "tr_open":
            column = 0
        elif token.type == "th_open":
            titles.append(tokens[place + 1].content)
        elif token.type == "td_open":
            token.attrSet("data-label", titles[column])
            token.attrSet("dir", "auto")  # some write from the right
            column += 1
        elif token.type == "thead_close" and table is not None and len(titles) >= WIDE:
            table.attrSet("class", "wide")


@functools.cache
def _parser() -> MarkdownIt:
    parser = MarkdownIt("commonmark", {"html": True}).enable("table")

    def only_line_ends(_: Any, tokens: Sequence[Token], place: int, *__: Any) -> str:
        content = tokens[place].content
        return content if content == "<br>" else html.escape(content)

    for kind in ("html_inline", "html_block"):
        parser.add_render_rule(kind, only_line_ends)
    return parser


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    return environment.from_string(_TEMPLATE.read_text())
