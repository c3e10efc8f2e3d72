"""Runs held against one another: pairs of rows, not two clouds of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from distill_ray.errors import DistillError
from distill_ray.pipeline.folder import RunFolder
from distill_ray.pipeline.reporting.comparison import compare
from distill_ray.pipeline.reporting.facts import Facts
from distill_ray.pipeline.reporting.report import write_comparison
from tests.unit.test_report import config, predictions, put_evaluation
from tests.unit.test_report_page import Reader


def made(folder: Path, wrong: set[int], **keys: Any) -> Facts:
    """A run whose student is wrong on some of the rows, besides the one that it is always wrong on."""
    rows = [{**row, **({"student_after": "no"} if n in wrong else {})} for n, row in enumerate(predictions())]
    put_evaluation(RunFolder(folder), config(**keys), rows)
    return Facts(RunFolder(folder), config(**keys))


@pytest.fixture
def runs(tmp_path: Path) -> dict[str, Facts]:
    """The second is right on one row more, and wrong on three others."""
    return {
        "a": made(tmp_path / "a", {5}),
        "b": made(tmp_path / "b", {6, 7, 8}, train={"epochs": 2}, student={"model": "small-model"}),
    }


def rows_of(runs: dict[str, Facts], title: str) -> list[list[str]]:
    [found] = [table for table in compare(runs) if table.title == title]
    return found.rows


def test_the_difference_is_of_pairs_of_rows(runs: dict[str, Facts]) -> None:
    [row, *_] = rows_of(runs, "Against a, row by row")
    assert row[:5] == ["b", "exact match", "20", "1", "3"]
    assert row[5].startswith("-0.100 [")
    low, high = (float(end) for end in row[5].split("[")[1].rstrip("]").split(","))
    differences = np.array([1] + [-1] * 3 + [0] * 16)  # by hand, and resampled by somebody else
    means = np.random.default_rng(1).choice(differences, (20_000, 20)).mean(axis=1)
    assert (low, high) == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.051)


def test_a_run_against_itself_is_no_different(runs: dict[str, Facts]) -> None:
    [row, *_] = rows_of({"a": runs["a"], "again": runs["a"]}, "Against a, row by row")
    assert row[3:] == ["0", "0", "+0.000 [+0.000, +0.000]"]
    assert "What was set differently" not in [table.title for table in compare({"a": runs["a"], "again": runs["a"]})]


def test_only_rows_that_both_have_are_compared(tmp_path: Path, runs: dict[str, Facts]) -> None:
    folder = RunFolder(tmp_path / "c")
    others = [{**row, "query": f"{row['query']} of another test set"} for row in predictions()[:15]]
    put_evaluation(folder, config(), [*others, *predictions()[15:]])
    [row, *_] = rows_of({"a": runs["a"], "c": Facts(folder, config())}, "Against a, row by row")
    assert row[2] == "5"


def test_settings_that_differ_are_named_and_no_others(runs: dict[str, Facts]) -> None:
    assert rows_of(runs, "What was set differently") == [
        ["student.lora.rank", "8", "-"],
        ["train.epochs", str(runs["a"].config.train.epochs), "2"],
    ]


def test_what_looks_like_markup_is_text(tmp_path: Path, runs: dict[str, Facts]) -> None:
    odd = made(tmp_path / "odd", {5}, recipe={"context": {"text": "x"}, "query": "{{ q }} [/INST] [a-z]+"})
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    for table in compare({"[red]": runs["a"], "odd": odd}):
        console.print(table.for_terminal())
    shown = console.export_text()
    assert "[/INST] [a-z]+" in shown
    assert "[red]" in shown
    assert "Against [red], row by row" in shown


def test_a_run_that_is_not_evaluated_is_named(tmp_path: Path, runs: dict[str, Facts]) -> None:
    with pytest.raises(DistillError, match="later: not evaluated yet"):
        compare({**runs, "later": Facts(RunFolder(tmp_path / "later"), config())})


def test_it_fits_a_terminal_and_a_page(tmp_path: Path, runs: dict[str, Facts]) -> None:
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    tables = compare(runs)
    for table in tables:
        console.print(table.for_terminal())
    shown = console.export_text()
    assert all(len(line) <= 80 for line in shown.splitlines())
    assert "[0.750, 1.000]" in shown
    write_comparison(tmp_path / "new" / "c.html", runs, tables)
    page = Reader((tmp_path / "new" / "c.html").read_text(encoding="utf-8"))
    assert {"svg", "table"} <= page.tags
    assert "not told apart" in "".join(page.texts)


def test_a_page_that_cannot_be_written_is_said(tmp_path: Path, runs: dict[str, Facts]) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(DistillError, match="cannot write it"):
        write_comparison(tmp_path / "file" / "c.html", runs, compare(runs))
