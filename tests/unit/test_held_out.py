"""Which held-out rows are evaluated, and that nothing is done with the others. A token is a character."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from distill_ray.config import RunConfig, parse_config
from distill_ray.errors import DistillError
from distill_ray.pipeline import held_out
from distill_ray.pipeline.folder import RunFolder
from distill_ray.pipeline.held_out import held_out_rows
from distill_ray.records import ROW_SCHEMA, Example, examples_table


class Chat:
    """Counts what it is asked to tokenise."""

    def __init__(self) -> None:
        self.completions: list[str] = []

    def prompt_ids(self, messages: list[Any]) -> list[int]:
        return [0] * sum(len(message["content"]) for message in messages)

    def completion_ids(self, text: str) -> list[int]:
        self.completions.append(text)
        return [0] * len(text)

    text_ids = completion_ids


@pytest.fixture
def chat(monkeypatch: pytest.MonkeyPatch) -> Chat:
    made = Chat()
    monkeypatch.setattr(held_out, "prompts_of", lambda student, key: made)
    return made


@pytest.fixture
def config() -> RunConfig:
    return parse_config(
        {
            "recipe": {"context": {"text": "Be short."}, "query": "{{ text }}"},
            "data": {"source": "x"},
            "teacher": {"type": "fake"},
            "evaluate": {"reference": "gold"},
        }
    )


def row(row_id: str, split: str = "test", reason: str | None = None) -> dict[str, Any]:
    columns = json.dumps({"text": f"ask {row_id}", "gold": f"gold {row_id}"})
    return {
        "row_id": row_id,
        "split": split,
        "query": f"ask {row_id}",
        "history": [],
        "columns": columns,
        "reject_reason": reason,
    }


def example(row_id: str, split: str = "test", **changes: Any) -> Example:
    said = {"completion": f"answer {row_id}", "teacher": "t", **changes}
    return Example(row_id=row_id, split=split, messages=({"role": "user", "content": row_id},), **said)  # type: ignore[arg-type]


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """Partitions in an order that is not that of the ids; e is rejected, g was unusable, h and i are not held out."""
    made = RunFolder(tmp_path)
    partitions = [
        ([row("d"), row("a"), row("h", "train")], [example("d"), example("a"), example("h", "train")]),
        ([row("e"), row("g", reason="no_query"), row("i", "validation")], [example("i", "validation")]),
        (
            [row("c"), row("b")],
            [
                example("c", sample_index=1, completion="second"),
                example("c", sample_index=0),
                example("b"),
                example("b", task="rationale", completion="because"),
                example("e", task="rationale", completion="why"),
            ],
        ),
    ]
    for number, (rows, examples) in enumerate(partitions):
        made.write_table(pa.Table.from_pylist(rows, schema=ROW_SCHEMA), "rows", f"{number}.parquet")
        made.write_table(examples_table(examples), "examples", f"{number}.parquet")
    return made


def test_every_answered_test_row_is_there_once_by_id_with_its_first_sample(
    config: RunConfig, folder: RunFolder, chat: Chat
) -> None:
    rows, unanswered = held_out_rows(config, folder, sys.maxsize)
    assert [(r["row_id"], r["query"], r["reference"], r["teacher_answer"]) for r in rows] == [
        (row_id, f"ask {row_id}", f"gold {row_id}", f"answer {row_id}") for row_id in "abcd"
    ]
    assert [r["rationale_tokens"] for r in rows] == [None, len("because"), None, None]
    assert {(r["prompt_tokens_after"], r["prompt_tokens_before"]) for r in rows} == {(1, len("Be short.ask a"))}
    assert unanswered == [{"row_id": "e", "teacher_answer": None}]


@pytest.mark.parametrize("most", [1, 2, 4, 9])
def test_fewer_rows_are_the_first_by_id_and_nothing_else_is_tokenised(
    most: int, config: RunConfig, folder: RunFolder, chat: Chat
) -> None:
    rows, unanswered = held_out_rows(config, folder, most)
    tokenised = sorted(chat.completions)
    assert rows == held_out_rows(config, folder, sys.maxsize)[0][:most]
    assert tokenised == sorted([f"answer {r['row_id']}" for r in rows] + ["because"] * (most > 1))
    assert [r["row_id"] for r in unanswered] == ["e"]


def test_where_the_teacher_answered_none_it_is_said(config: RunConfig, tmp_path: Path, chat: Chat) -> None:
    with pytest.raises(DistillError, match=r"no test row has a teacher answer; raise data\.holdout"):
        held_out_rows(config, RunFolder(tmp_path), 5)
