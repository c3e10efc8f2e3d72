"""The held-out rows of a run, and what its teacher said to each: rows/ and examples/ with the split `test`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from distill_ray.config import RunConfig, StepByStepRecipeConfig
from distill_ray.errors import DistillError
from distill_ray.models import prompts_of
from distill_ray.pipeline.folder import RunFolder
from distill_ray.pipeline.planning.planner import reference_of
from distill_ray.recipes import make_recipe
from distill_ray.recipes.answers import is_blank
from distill_ray.records import ROW_SCHEMA, Row, row_from_record

EXAMPLE_COLUMNS = ["row_id", "split", "task", "messages", "completion", "sample_index", "teacher_answer", "draft"]
ROW_COLUMNS = [name for name in ROW_SCHEMA.names if name != "reject_detail"]
IS_TEST = pc.field("split") == "test"
IS_RATIONALE = pc.field("task") == "rationale"  # not asked for in service


def held_out_rows(config: RunConfig, folder: RunFolder, most: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """One record per test row that the teacher answered, with the prompts' lengths for the student's tokenizer.

    Args:
        config: of the run.
        folder: of the run.
        most: how many rows; the first by id are taken, and nothing is done with the others.

    Returns:
        Beside them those whose answer was rejected (unparsable, cut off, ...): they are only counted.

    Raises:
        DistillError: the teacher answered none.
    """
    is_usable = IS_TEST & pc.field("reject_reason").is_null()
    rows = [table.filter(is_usable) for table in folder.read_tables("rows", columns=ROW_COLUMNS)]
    examples = [table.filter(IS_TEST) for table in folder.read_tables("examples", columns=EXAMPLE_COLUMNS)]
    answered = set(_ids([table.filter(~IS_RATIONALE) for table in examples]))
    unanswered = [{"row_id": row_id, "teacher_answer": None} for row_id in _ids(rows) if row_id not in answered]
    chosen = sorted(row_id for row_id in _ids(rows) if row_id in answered)[:most]
    if not chosen:
        raise DistillError(
            f"{folder.root}: no test row has a teacher answer; raise data.holdout or give data.test, "
            "and run generate again"
        )
    records = _records(config, _only(rows, chosen), _only(examples, chosen))
    return sorted(records, key=lambda record: record["row_id"]), unanswered


def _ids(tables: Sequence[pa.Table]) -> list[str]:
    return [row_id for table in tables for row_id in table["row_id"].to_pylist()]


def _only(tables: Sequence[pa.Table], row_ids: list[str]) -> list[dict[str, Any]]:
    is_one = pc.field("row_id").isin(row_ids)
    return [record for table in tables for record in table.filter(is_one).to_pylist()]


def _records(config: RunConfig, rows: list[dict[str, Any]], examples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    recipe, chat = make_recipe(config.recipe), prompts_of(config.student, key="student.model")
    best: dict[str, dict[str, Any]] = {}
    rationale_tokens: dict[str, int] = {}
    for example in examples:
        row_id = example["row_id"]
        if example["task"] == "rationale":
            rationale_tokens[row_id] = len(chat.text_ids(example["completion"]))
        elif row_id not in best or example["sample_index"] < best[row_id]["sample_index"]:
            best[row_id] = example
    records = []
    for row in map(row_from_record, rows):
        example = best[row.row_id]
        prompt_ids = chat.prompt_ids(example["messages"])
        records.append(
            {
                "row_id": row.row_id,
                "query": row.query,
                # From the row itself: `evaluate.reference` may be set after generating.
                "reference": reference_of(row.columns, config.evaluate.reference) or _gold(config, example),
                "teacher_answer": teachers_answer(config, example, row),
                "is_datas_own": has_only_a_label(config, row),
                "draft": example["draft"],
                "messages": example["messages"],
                "prompt_ids": prompt_ids,
                "completion_ids": chat.completion_ids(example["completion"]),
                "prompt_tokens_before": len(chat.prompt_ids(recipe.teacher_messages(row))),
                "prompt_tokens_after": len(prompt_ids),
                "rationale_tokens": rationale_tokens.get(row.row_id),
            }
        )
    return records


def _gold(config: RunConfig, example: Mapping[str, Any]) -> str | None:
    """The label to learn, where no teacher was asked: what is right is known then, whatever the config names."""
    return example["completion"] if config.recipe.learns_gold_only else None


def teachers_answer(config: RunConfig, example: Mapping[str, Any], row: Row) -> str:
    """What the teacher itself said: with gold labels the completion is not that. "" where it gave no label.

    Where it said nothing at all the data's own label stands in for it (`has_only_a_label`).
    """
    if isinstance(config.recipe, StepByStepRecipeConfig):
        if has_only_a_label(config, row):
            return example["completion"].removeprefix(config.recipe.marker).strip()
        return example["teacher_answer"] or ""
    return example["completion"] if example["teacher_answer"] is None else example["teacher_answer"]


def has_only_a_label(config: RunConfig, row: Row) -> bool:
    """Whether nobody answered a held-out row: nobody was asked, or rationales come from a column and it has none."""
    recipe = config.recipe
    if recipe.learns_gold_only:
        return True
    if not isinstance(recipe, StepByStepRecipeConfig) or recipe.rationale_column is None:
        return False
    return is_blank(row.columns.get(recipe.rationale_column))
