"""The report's page: it says what `report.md` says, opens offline, and nothing that a model wrote becomes markup."""

from __future__ import annotations

import html
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill_ray.pipeline.folder import RunFolder
from distill_ray.pipeline.reporting.charts import (
    calls,
    charts,
    completion_lengths,
    intervals,
    learning_curve,
    of_runs,
    prompt_lengths,
    rejects,
    rewards,
    soft_targets,
    wins,
)
from distill_ray.pipeline.reporting.facts import Facts
from distill_ray.pipeline.reporting.markdown import text_table
from distill_ray.pipeline.reporting.page import as_html
from distill_ray.pipeline.reporting.report import write_report
from distill_ray.pipeline.reporting.sections import sections
from tests.unit.test_report import config, run  # noqa: F401  (a fixture)

SVG = "{http://www.w3.org/2000/svg}"


class Reader(HTMLParser):
    """The tags of a page, its text, and what its tags point to."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.texts: list[str] = []
        self.targets: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.targets += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "action")]

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def page_of(folder: RunFolder, **keys: Any) -> Reader:
    write_report(folder, config(**keys))
    return Reader(folder.read_bytes("report.html").decode())


def texts_of(svg: str) -> list[str]:
    """What is written in a picture."""
    return ["".join(text.itertext()) for text in ET.fromstring(svg).iter(f"{SVG}text")]


def test_every_cell_of_the_markdown_is_on_the_page(run: RunFolder) -> None:  # noqa: F811
    page = page_of(run)
    cells = re.findall(r"<td[^>]*>(.*?)</td>", run.read_bytes("report.html").decode(), flags=re.DOTALL)
    shown = {html.unescape(re.sub(r"<[^>]+>", "", text)).strip() for text in cells}
    said = run.read_bytes("report.md").decode()
    for text in ("0.950 [0.850, 1.000]", "400.0", "48,000", "1m 01s", "abc123", "2.60.0", "0.1333"):
        assert text in said
        assert text in shown
    assert {"svg", "table", "section"} <= page.tags
    assert [section.title for section in sections(Facts(run, config()))][1:] == re.findall(
        r"<h2>(.*?)</h2>", run.read_bytes("report.html").decode()
    )


def test_the_page_needs_nobody_and_runs_nothing(run: RunFolder) -> None:  # noqa: F811
    page = page_of(run)
    assert not page.tags & {"script", "img", "iframe", "link", "object", "form", "a"}
    assert all(target.startswith("#") for target in page.targets)  # the shapes inside a picture
    assert "default-src 'none'" in run.read_bytes("report.html").decode()


def test_what_a_model_wrote_is_text_on_the_page(run: RunFolder) -> None:  # noqa: F811
    assert "<script>alert(1)</script> *x* [l](u)" in "".join(page_of(run).texts)


@given(st.text())
def test_no_text_becomes_markup(text: str) -> None:
    tags = Reader(as_html(text_table(["a", "b"], [["x", text]]))).tags
    assert tags <= {"table", "thead", "tbody", "tr", "th", "td", "br"}


def test_a_run_that_has_hardly_begun_has_a_page_without_pictures(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    assert "svg" not in page_of(folder).tags
    assert not any(charts(Facts(folder, config())).values())


def test_pictures_say_what_the_files_say(run: RunFolder) -> None:  # noqa: F811
    shown = charts(Facts(run, config()))
    assert {title: len(drawn) for title, drawn in shown.items()} == {
        "Result": 3,
        "Rows": 1,
        "What the teacher gave": 0,
        "Training": 1,
        "Cost": 1,
    }
    assert {"calls made 100", "replayed 17"} <= set(texts_of(shown["Cost"][0]))
    assert {"exact match", "agreement with the teacher", "student after"} <= set(texts_of(shown["Result"][0]))
    assert {"before", "after"} <= set(texts_of(shown["Result"][1]))
    assert {"cut_off", "2", "empty_answer", "1"} <= set(texts_of(shown["Rows"][0]))
    assert {"training", "validation", "kept"} <= set(texts_of(shown["Training"][0]))
    for drawn in shown.values():
        assert not any("#0" in svg and "var(--" not in svg for svg in drawn)


def test_long_names_of_runs_lose_their_middle(run: RunFolder) -> None:  # noqa: F811
    facts = Facts(run, config())
    shown = texts_of(of_runs({"short": facts, "support-desk-german-2026-11-rank-32-seed-1": facts}))
    assert [text for text in shown if "…" in text] == ["support-desk…k-32-seed-1"]
    assert "short" in shown


def test_a_point_stands_where_its_value_is() -> None:
    """Three metrics' values, found again from the places of the points between those of 0 and 1."""
    figures = {"exact_match": 0.0, "agreement": 0.25, "token_f1": 1.0}
    ends = {f"{name}_{end}": value for name, value in figures.items() for end in ("low", "high")}
    svg = intervals({"student_after": {**figures, **ends}})
    groups = [group.findall(f"{SVG}use") for group in ET.fromstring(svg).iter(f"{SVG}g")]
    [points] = [uses for uses in groups if len(uses) == 3 and len({use.get("y") for use in uses}) == 3]
    zero, quarter, one = (float(use.get("x", "")) for use in points)
    assert (quarter - zero) / (one - zero) == pytest.approx(0.25, abs=1e-4)


def test_a_judges_verdicts_and_calls_are_bars_with_their_counts() -> None:
    shown = texts_of(wins({"wins": {"won": 1200, "tied": 30, "turned": 2, "lost": 4, "without_verdict": 9}}))
    assert {"won 1,200", "neither 32", "lost 4"} <= set(shown)
    assert {"calls made 5", "replayed 7"} <= set(texts_of(calls({"teacher_calls": 5, "teacher_calls_replayed": 7})))


def test_the_entropy_of_soft_targets_is_a_curve_from_none_to_all() -> None:
    svg = soft_targets({"entropy_counts": [6, 0, 2, 2]})
    [curve] = [
        path.get("d", "") for path in ET.fromstring(svg).iter(f"{SVG}path") if "var(--teacher)" in path.get("style", "")
    ]
    heights = [float(point.split()[-1]) for point in re.split("[ML]", curve)[1:]]
    low, high = heights[0], heights[-1]
    assert [(low - y) / (low - high) for y in heights] == pytest.approx([0.0, 0.6, 0.6, 0.8, 1.0], abs=1e-3)


def test_lengths_of_answers_are_drawn_where_they_are_known() -> None:
    assert "tokens of an answer to learn" in texts_of(completion_lengths([{"completion_tokens": n} for n in (2, 3, 2)]))
    assert completion_lengths([{"completion_tokens": None}, {}]) == ""


def test_nothing_is_drawn_of_nothing(tmp_path: Path) -> None:
    assert wins({}) == calls({}) == soft_targets(None) == soft_targets({"entropy_counts": []}) == ""
    assert intervals({}) == rejects({}) == rewards(None) == rewards({"scored": 0}) == learning_curve({}, None) == ""
    assert prompt_lengths(Facts(RunFolder(tmp_path / "run"), config()).predictions) == ""
    assert learning_curve({1: {"loss": float("nan")}, 2: {"loss": None}, 3: {"loss": 1.0}}, 1) == ""


def test_a_dollar_in_a_reason_is_a_dollar() -> None:
    assert "costs $5 and $6" in texts_of(rejects({"rejects": {"costs $5 and $6": 3}}))
