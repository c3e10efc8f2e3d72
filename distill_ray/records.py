"""The contracts between the stages: Row, Completion, Example, Reject, and their Arrow schemas.

One module, one `SCHEMA_VERSION` (written into every Parquet file's metadata as `distill_ray.schema`). Stages exchange
files with these columns and nothing else, so any of them can be replaced, inspected or repeated alone.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal, TypedDict

import numpy as np
import pyarrow as pa

SCHEMA_VERSION = 2

Split = Literal["train", "validation", "test"]


class Message(TypedDict):
    """One turn of a chat."""

    role: Literal["system", "user", "assistant"]
    content: str


class RejectedChain(TypedDict):
    """A draft whose revision was not accepted."""

    draft: str
    revision: str
    reward_before: float
    reward_after: float


class RejectReason(StrEnum):
    """Why a row has no example. A closed set: reports and tests rely on the codes."""

    UNREADABLE_ROW = "unreadable_row"
    MISSING_COLUMN = "missing_column"
    NOT_TEXT = "not_text"
    EMPTY_QUERY = "empty_query"
    EMPTY_CONTEXT = "empty_context"
    DUPLICATE = "duplicate"
    DUPLICATE_ID = "duplicate_id"
    PROMPT_TOO_LONG = "prompt_too_long"
    CONTROL_TOKENS = "control_tokens"
    EMPTY_ANSWER = "empty_answer"
    CUT_OFF = "cut_off"
    UNPARSABLE_ANSWER = "unparsable_answer"
    REFUSED = "refused"
    NOT_ACCEPTED = "not_accepted"
    NO_REWARD = "no_reward"
    BAD_REQUEST = "bad_request"
    ENGINE_ERROR = "engine_error"
    TOKEN_BUDGET = "token_budget"
    TOO_LONG_TO_TRAIN = "too_long_to_train"
    NO_SOFT_TARGETS = "no_soft_targets"


# Reasons that may pass: a finished partition that holds one of them is taken up again on the next run.
RETRYABLE_REASONS = frozenset({RejectReason.ENGINE_ERROR, RejectReason.TOKEN_BUDGET})


@dataclass(slots=True)
class Row:
    """One input row, planned. `columns` are the user's own; `query` is the rendered template."""

    row_id: str
    split: Split
    query: str
    columns: dict[str, Any]
    reference: str | None = None
    history: list[Message] = field(default_factory=list)  # turns before the query
    source: str = ""  # "queries.jsonl:17": where a person finds the row


@dataclass(slots=True)
class Completion:
    """One sample of an engine's answer. Logprobs are natural logs, of the untempered distribution."""

    text: str
    finish_reason: str  # stop | length | abort | content_filter
    prompt_tokens: int
    completion_tokens: int
    sample_index: int = 0
    reasoning: str | None = None
    token_ids: list[int] | None = None  # [T], the end token included
    topk_ids: np.ndarray | None = None  # [T, K] int32, most probable first
    topk_logprobs: np.ndarray | None = None  # [T, K] float32


@dataclass(frozen=True, slots=True)
class Answered:
    """A conversation and one answer to it."""

    messages: tuple[Message, ...]
    answer: str

    @property
    def query(self) -> str:
        """What was asked: the last user turn."""
        return next((m["content"] for m in reversed(self.messages) if m["role"] == "user"), "")


@dataclass(slots=True)
class Example:
    """One training example: what the student sees (`messages`) and should say (`completion`)."""

    row_id: str
    split: Split
    messages: list[Message]
    completion: str
    task: str = "answer"
    weight: float = 1.0
    finish_reason: str = "stop"
    teacher: str = ""
    sample_index: int = 0
    reasoning: str | None = None
    reference: str | None = None
    teacher_answer: str | None = None  # what the teacher itself said, where the completion is the data's own label
    draft: str | None = None  # what the completion is a revision of
    accepted: bool | None = None  # whether a reward preferred it to the draft; of the test split both kinds are kept
    reward_before: float | None = None
    reward_after: float | None = None
    rejected_chains: list[RejectedChain] | None = None  # of the same row, on its first example
    completion_ids: list[int] | None = None
    topk_ids: np.ndarray | None = None  # [T, K] int32
    topk_logprobs: np.ndarray | None = None  # [T, K] float32
    tail_logprob: np.ndarray | None = None  # [T] float32

    @property
    def example_id(self) -> str:
        """Unique and stable: the row, the task, the sample."""
        return f"{self.row_id}/{self.task}/{self.sample_index}"


@dataclass(slots=True)
class Reject:
    """A row that gave no example, with the reason. `row` is the raw row, so nothing is lost."""

    row_id: str
    stage: str  # read | generate | train
    reason: RejectReason
    detail: str
    row: dict[str, Any] = field(default_factory=dict)


_TEXT = pa.string()
_MESSAGES = pa.list_(pa.struct([("role", _TEXT), ("content", _TEXT)]))
_CHAIN = pa.struct(
    [("draft", _TEXT), ("revision", _TEXT), ("reward_before", pa.float32()), ("reward_after", pa.float32())]
)
_METADATA = {"distill_ray.schema": str(SCHEMA_VERSION)}

ROW_SCHEMA = pa.schema(
    [
        ("row_id", _TEXT),
        ("split", _TEXT),
        ("query", _TEXT),
        ("history", _MESSAGES),
        ("columns", _TEXT),  # JSON: sources of any shape share one schema
        ("reference", _TEXT),
        ("source", _TEXT),
        ("reject_reason", _TEXT),  # set where the row was unusable when it was read
        ("reject_detail", _TEXT),
    ],
    metadata=_METADATA,
)

EXAMPLE_SCHEMA = pa.schema(
    [
        ("example_id", _TEXT),
        ("row_id", _TEXT),
        ("split", _TEXT),
        ("task", _TEXT),
        ("messages", _MESSAGES),
        ("completion", _TEXT),
        ("weight", pa.float32()),
        ("finish_reason", _TEXT),
        ("teacher", _TEXT),
        ("sample_index", pa.int32()),
        ("reasoning", _TEXT),
        ("reference", _TEXT),
        ("teacher_answer", _TEXT),
        ("draft", _TEXT),
        ("accepted", pa.bool_()),
        ("reward_before", pa.float32()),
        ("reward_after", pa.float32()),
        ("rejected_chains", pa.list_(_CHAIN)),
        ("completion_ids", pa.list_(pa.int32())),
        ("topk_ids", pa.list_(pa.list_(pa.int32()))),
        ("topk_logprobs", pa.list_(pa.list_(pa.float32()))),
        ("tail_logprob", pa.list_(pa.float32())),
    ],
    metadata=_METADATA,
)

_ARRAYS = ("topk_ids", "topk_logprobs", "tail_logprob")  # columns that come as numpy arrays

PREFERENCE_SCHEMA = pa.schema(
    [
        ("row_id", _TEXT),
        ("split", _TEXT),
        ("prompt", _MESSAGES),
        ("chosen", _TEXT),
        ("rejected", _TEXT),
        ("reward_chosen", pa.float32()),
        ("reward_rejected", pa.float32()),
    ],
    metadata=_METADATA,
)

REJECT_SCHEMA = pa.schema(
    [("row_id", _TEXT), ("stage", _TEXT), ("reason", _TEXT), ("detail", _TEXT), ("row", _TEXT)],
    metadata=_METADATA,
)


def examples_table(examples: Iterable[Example]) -> pa.Table:
    """Build an `EXAMPLE_SCHEMA` table, in the order given."""
    examples = list(examples)
    return with_arrays(
        pa.Table.from_pylist([_plain(example) for example in examples], schema=EXAMPLE_SCHEMA),
        {name: [getattr(example, name) for example in examples] for name in _ARRAYS},
    )


def _plain(example: Example) -> dict[str, Any]:
    values = {f.name: getattr(example, f.name) for f in dataclasses.fields(example) if f.name not in _ARRAYS}
    return {"example_id": example.example_id, **values}


def with_arrays(table: pa.Table, columns: Mapping[str, Sequence[np.ndarray | None]]) -> pa.Table:
    """Fill list columns of a table from numpy arrays, one per row: through Python's numbers it takes 20 times as long.

    An array of two dimensions becomes a list of lists, or one list, row by row, if that is the column's type.
    """
    for name, arrays in columns.items():
        index = table.schema.get_field_index(name)
        table = table.set_column(index, table.schema.field(index), _lists(arrays, table.schema.field(index).type))
    return table


def _lists(arrays: Sequence[np.ndarray | None], kind: pa.ListType) -> pa.Array:
    there = [a for a in arrays if a is not None]
    if pa.types.is_list(kind.value_type):
        values = _lists([row for a in there for row in a], kind.value_type)
        lengths = [0 if a is None else len(a) for a in arrays]
    else:
        flat = np.concatenate([a.ravel() for a in there]) if there else np.empty(0)
        values = pa.array(flat, type=kind.value_type)
        lengths = [0 if a is None else a.size for a in arrays]
    offsets = pa.array(np.cumsum([0, *lengths]), type=pa.int32())
    return pa.ListArray.from_arrays(offsets, values, type=kind, mask=pa.array([a is None for a in arrays], pa.bool_()))


def preferences_table(examples: Iterable[Example]) -> pa.Table:
    """Build a `PREFERENCE_SCHEMA` table of the accepted revisions whose reward is higher than their draft's.

    `accept` may let others pass (`metropolis` on purpose), and those would teach a preference the wrong way round.
    """
    records = [
        {
            "row_id": example.row_id,
            "split": example.split,
            "prompt": example.messages,
            "chosen": example.completion,
            "rejected": example.draft,
            "reward_chosen": example.reward_after,
            "reward_rejected": example.reward_before,
        }
        for example in examples
        if example.draft is not None and example.split != "test" and _rose(example)
    ]
    return pa.Table.from_pylist(records, schema=PREFERENCE_SCHEMA)


def _rose(example: Example) -> bool:
    before, after = example.reward_before, example.reward_after
    return before is not None and after is not None and after > before


def rejects_table(rejects: Iterable[Reject]) -> pa.Table:
    """Build a `REJECT_SCHEMA` table, in the order given."""
    return pa.Table.from_pylist(
        [{**dataclasses.asdict(r), "reason": r.reason.value, "row": to_json(r.row)} for r in rejects],
        schema=REJECT_SCHEMA,
    )


def row_from_record(record: Mapping[str, Any]) -> Row:
    """Rebuild a Row from one record of a `ROW_SCHEMA` table (whose `reject_reason` is null)."""
    return Row(
        row_id=record["row_id"],
        split=record["split"],
        query=record["query"],
        columns=json.loads(record["columns"]),
        reference=record["reference"],
        history=record["history"],
        source=record["source"],
    )


def to_json(value: Any) -> str:
    """JSON with any leaf that JSON lacks (dates, bytes, decimals) as text."""
    return json.dumps(value, ensure_ascii=False, default=str)
