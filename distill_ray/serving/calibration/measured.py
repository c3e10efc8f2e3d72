"""What a run folder knows about its student: the requests it was trained on, and how it does on those it never saw.

    rows/ + examples/ (train)          -> Trained    what the client would have asked
    rows/ + examples/ (test) + answers -> Measured   the same, with the student's answer and the teacher's

The answers of the student are those of `evaluate` where it looked at this very student, else it is asked now. A request
is what a client sends: the turns, without the context and without the words that the recipe puts around the query.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow.compute as pc

from distill_ray.config import RunConfig
from distill_ray.errors import DistillError
from distill_ray.pipeline.evaluate import answered_with, ask_student
from distill_ray.pipeline.folder import RunFolder
from distill_ray.pipeline.held_out import teachers_answer
from distill_ray.pipeline.planning.planner import reference_of
from distill_ray.records import Message, Row, row_from_record
from distill_ray.serving.routing.conversation import RequestKey, request_key

COLUMNS = ["row_id", "example_id", "split", "task", "messages", "completion", "sample_index", "teacher_answer"]
MORE_ANSWERS = ("eval", "more_answers.json")  # of rows beyond `evaluate.max_rows`


@dataclass(frozen=True, slots=True)
class Trained:
    """A request that the student was trained on."""

    example_id: str
    key: RequestKey


@dataclass(frozen=True, slots=True)
class Measured:
    """A request that the student never saw, with both answers."""

    row_id: str
    key: RequestKey
    messages: tuple[Message, ...]
    """What the client asks."""

    student_answer: str
    teacher_answer: str
    reference: str | None
    """What is right, where the run knows."""


def trained_requests(config: RunConfig, folder: RunFolder) -> list[Trained]:
    """One per row that was trained on, in the order of their ids."""
    examples = _examples(folder, "train")
    for reject in folder.read_table("train", "rejects.parquet")["row_id"].to_pylist() if _has_rejects(folder) else []:
        examples.pop(reject, None)
    ignore = config.serve.fingerprint.ignore
    found = [
        Trained(examples[row.row_id]["example_id"], request_key({"messages": asked(row)}, ignore))
        for row in _rows(folder, "train")
        if row.row_id in examples
    ]
    return sorted(found, key=lambda trained: trained.example_id)


def measured_requests(config: RunConfig, folder: RunFolder) -> tuple[str, list[Measured]]:
    """The split that was measured, and its requests by id: `test`, or `validation` where a run has no test split.

    Asks the student where `evaluate` has not. At most `calibrate.max_pairs`.

    Raises:
        DistillError: no request was held out.
    """
    split = "test" if _examples(folder, "test") else "validation"
    examples = _examples(folder, split)
    rows = sorted((row for row in _rows(folder, split) if row.row_id in examples), key=lambda row: row.row_id)
    rows = rows[: config.calibrate.max_pairs]
    if not rows:
        raise DistillError(
            f"{folder.root}: no test row has a teacher answer, so nothing shows how good the student is; raise "
            "data.holdout or give data.test, and run again"
        )
    known = _known_answers(config, folder)
    missing = [row for row in rows if row.row_id not in known]
    if missing:
        answers = ask_student(config, folder, [examples[row.row_id]["messages"] for row in missing])
        known |= {row.row_id: answer for row, answer in zip(missing, answers, strict=True)}
        folder.write_json({"answered_with": answered_with(config, folder), "answers": known}, *MORE_ANSWERS)
    ignore = config.serve.fingerprint.ignore
    return split, [
        Measured(
            row_id=row.row_id,
            key=request_key({"messages": asked(row)}, ignore),
            messages=tuple(asked(row)),
            student_answer=known[row.row_id],
            teacher_answer=teachers_answer(config, examples[row.row_id], row),
            reference=reference_of(row.columns, config.evaluate.reference),
        )
        for row in rows
    ]


def asked(row: Row) -> list[Message]:
    """What a client sends for a row: earlier turns and the query, nothing that the recipe puts around it."""
    return [*row.history, {"role": "user", "content": row.query}]


def _known_answers(config: RunConfig, folder: RunFolder) -> dict[str, str]:
    """Row id -> this very student's answer, as `evaluate` got it, or a calibration before this one."""
    known: dict[str, str | None] = {}
    current = answered_with(config, folder)
    if folder.manifest().get("answered_with") == current and folder.exists("eval", "predictions.parquet"):
        table = folder.read_table("eval", "predictions.parquet", columns=["row_id", "student_after"])
        known = dict(zip(table["row_id"].to_pylist(), table["student_after"].to_pylist(), strict=True))
    if folder.exists(*MORE_ANSWERS):
        more = folder.read_json(*MORE_ANSWERS)
        known |= more["answers"] if more["answered_with"] == current else {}
    return {row_id: answer for row_id, answer in known.items() if answer is not None}


def _examples(folder: RunFolder, split: str) -> dict[str, dict[str, Any]]:
    """Row id -> its first example that is an answer; a rationale is not asked for in service."""
    found: dict[str, dict[str, Any]] = {}
    for table in folder.read_tables("examples", columns=COLUMNS):
        for record in table.filter((pc.field("split") == split) & (pc.field("task") != "rationale")).to_pylist():
            best = found.get(record["row_id"])
            if best is None or record["sample_index"] < best["sample_index"]:
                found[record["row_id"]] = record
    return found


def _rows(folder: RunFolder, split: str) -> Iterator[Row]:
    for table in folder.read_tables("rows"):
        for record in table.filter((pc.field("split") == split) & pc.field("reject_reason").is_null()).to_pylist():
            yield row_from_record(record)


def _has_rejects(folder: RunFolder) -> bool:
    return folder.exists("train", "rejects.parquet")
