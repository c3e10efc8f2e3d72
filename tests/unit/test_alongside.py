"""Columns from files of their own: element i for row i, and an error where the numbers differ."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from distill_ray.config import parse_config
from distill_ray.errors import ConfigError, DataError
from distill_ray.pipeline.folder import RunFolder
from distill_ray.pipeline.planning.plan import plan_rows
from distill_ray.recipes import make_recipe


def plan(folder: Path, rows: int, *parts: list[str], limit: int | None = None) -> list[dict[str, Any]]:
    (folder / "q.json").write_text("".join(json.dumps({"input": f"q{i}", "label": f"{i}"}) + "\n" for i in range(rows)))
    for number, part in enumerate(parts):
        (folder / f"part{number}.json").write_text(json.dumps(part))
    config = parse_config(
        {
            "recipe": {"type": "step_by_step", "label_column": "label", "rationale_column": "answer"},
            "data": {"source": "q.json", "alongside": {"answer": [f"part{i}.json" for i in range(len(parts))]}},
        },
        base=folder,
    )
    run = RunFolder(folder / "run")
    plan_rows(config, make_recipe(config.recipe), run, limit)
    return [json.loads(r["columns"]) for table in run.read_tables("rows") for r in table.to_pylist()]


def test_several_files_are_one_list_whose_elements_belong_to_the_rows(tmp_path: Path) -> None:
    rows = plan(tmp_path, 4, ["a0", "a1"], ["a2", "a3"])
    assert {row["input"]: row["answer"] for row in rows} == {f"q{i}": f"a{i}" for i in range(4)}


def test_a_file_that_is_shorter_than_the_data_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data.alongside.answer: ends after 2 elements and data.source goes on"):
        plan(tmp_path, 3, ["a0", "a1"])


def test_a_file_that_is_longer_than_the_data_is_an_error_unless_only_a_part_is_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has more than 2 elements, and data.source has 2 rows"):
        plan(tmp_path, 2, ["a0", "a1", "a2"])
    assert len(plan(tmp_path, 2, ["a0", "a1", "a2"], limit=1)) == 1


def test_objects_one_after_the_other_are_rows(tmp_path: Path) -> None:
    records = [{"input": f"q{i}", "label": "l", "rationale": "why {not}"} for i in range(3)]
    (tmp_path / "q.json").write_text("\n".join(json.dumps(record, indent=4) for record in records))
    config = parse_config(
        {
            "recipe": {"type": "step_by_step", "label_column": "label", "rationale_column": "rationale"},
            "data": {"source": "q.json"},
        },
        base=tmp_path,
    )
    run = RunFolder(tmp_path / "run")
    assert plan_rows(config, make_recipe(config.recipe), run).rows_in == 3
    found = [json.loads(r["columns"]) for table in run.read_tables("rows") for r in table.to_pylist()]
    assert sorted(found, key=lambda r: r["input"]) == records


def with_test_set(folder: Path, recipe: dict[str, Any], rows: list[dict[str, Any]], split: str = "test") -> RunFolder:
    (folder / "train.jsonl").write_text('{"input": "q", "label": "l", "d": "bad", "r": "good", "sb": 0, "sa": 1}\n')
    (folder / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "why.json").write_text('["because. The answer is l"]')
    data = {"source": "train.jsonl", split: "held_out.jsonl", "alongside": {"why": "why.json"}}
    config = parse_config({"recipe": {"query": "{{ input }}", **recipe}, "data": data}, base=folder)
    run = RunFolder(folder / "run")
    plan_rows(config, make_recipe(config.recipe), run)
    return run


BY_RATIONALE = {"type": "step_by_step", "label_column": "label", "rationale_column": "why"}


@pytest.mark.parametrize("split", ["test", "validation"])
def test_a_held_out_source_of_its_own_needs_only_query_and_label(split: str, tmp_path: Path) -> None:
    run = with_test_set(tmp_path, BY_RATIONALE, [{"input": "held out", "label": "l"}], split)
    rows = [row for table in run.read_tables("rows") for row in table.to_pylist()]
    assert {(row["split"], row["reject_reason"]) for row in rows if row["query"] == "held out"} == {(split, None)}


@pytest.mark.parametrize(
    ("split", "recipe", "rows", "message"),
    [
        ("test", BY_RATIONALE, [{"input": "x"}], "recipe.label_column: unknown column `label`; data.test has: input"),
        (
            "validation",
            {**BY_RATIONALE, "mode": "single"},
            [{"input": "x", "label": "l"}],
            "recipe.rationale_column: unknown column `why`; data.validation has: input, label. data.alongside adds "
            "columns to data.source alone",
        ),
        (
            "test",
            {"type": "self_critique", "chains": {"draft": "d", "revision": "r"}, "accept": {"type": "always"}},
            [{"input": "x"}],
            "recipe.chains.draft: unknown column `d`; recipe.chains.revision: unknown column `r`; data.test has: "
            "input. Its rows are compared with the chains",
        ),
    ],
    ids=["label", "alongside", "chains"],
)
def test_a_held_out_source_that_lacks_a_column_is_named(
    split: str, recipe: dict[str, Any], rows: list[dict[str, Any]], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        with_test_set(tmp_path, recipe, rows, split)
    assert message in str(caught.value)
