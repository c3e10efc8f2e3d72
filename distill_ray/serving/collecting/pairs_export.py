"""Collected pairs as files.

| format     | a row                                                     | read by                                  |
|------------|-----------------------------------------------------------|------------------------------------------|
| `messages` | JSON line: {"messages": [..., the answer], "tools": [..]} | fine-tuning APIs, TRL, many others       |
| `parquet`  | pair_id, messages (with the answer), owner, teacher, ...  | `data: {layout: messages, id: pair_id}`  |

Parquet holds what `data:` can train on: turns of text. Pairs with tool calls are left out of it, and counted.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from distill_ray.errors import ConfigError, DistillError
from distill_ray.pipeline.export import appearing_whole, require_free
from distill_ray.serving.collecting.store.base import PairStore, Selection

FORMATS = ("messages", "parquet")
ROLES = ("system", "developer", "user", "assistant")

EXPORT_SCHEMA = pa.schema(
    [
        ("pair_id", pa.string()),
        ("messages", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
        ("owner", pa.string()),
        ("teacher", pa.string()),
        ("fingerprint", pa.string()),
        ("created", pa.timestamp("ns", tz="UTC")),
    ]
)
_COLUMNS = ["messages", "request", "completion", "tool_calls"]


def export_pairs(store: PairStore, out: Path, format: str, where: Selection) -> tuple[int, int]:
    """Write pairs to a file; returns (written, left out). What is there already is not overwritten.

    Raises:
        ConfigError: an unknown format, or `out` is there.
        DistillError: there is nothing to write, or it cannot be written.
        StoreError: the store cannot be used.
    """
    if format not in FORMATS:
        raise ConfigError(f"--format {format}: unknown; there are: {', '.join(FORMATS)}")
    require_free(out)
    with appearing_whole(out) as temporary:
        write = _write_messages if format == "messages" else _write_parquet
        num_written, num_left_out = write(store, temporary, where)
        if not num_written:
            without = f" ({num_left_out} have tool calls: take --format messages)" if num_left_out else ""
            raise DistillError(f"{out}: no pair to write{without}; `distill-ray pairs list` shows what there is")
    return num_written, num_left_out


def conversation(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The messages of a pair as the client sent them, and the answer as the last one."""
    answer: dict[str, Any] = {"role": "assistant", "content": record["completion"]}
    if record["tool_calls"]:
        answer = {**answer, "content": record["completion"] or None, "tool_calls": json.loads(record["tool_calls"])}
    return [*json.loads(record["messages"]), answer]


def _write_messages(store: PairStore, path: Path, where: Selection) -> tuple[int, int]:
    num_written = 0
    with path.open("w", encoding="utf-8") as file:
        for record in _records(store, where, _COLUMNS):
            line: dict[str, Any] = {"messages": conversation(record)}
            tools = json.loads(record["request"]).get("tools")
            if tools:
                line["tools"] = tools
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            num_written += 1
    return num_written, 0


def _write_parquet(store: PairStore, path: Path, where: Selection) -> tuple[int, int]:
    num_written = num_left_out = 0
    columns = list(dict.fromkeys([*EXPORT_SCHEMA.names, *_COLUMNS]))
    with pq.ParquetWriter(path, EXPORT_SCHEMA, compression="zstd") as writer:
        for batch in store.scan(where, columns):
            rows = []
            for record in batch.to_pylist():
                turns = text_turns(conversation(record))
                if turns is None:
                    num_left_out += 1
                else:
                    rows.append({**{name: record[name] for name in EXPORT_SCHEMA.names}, "messages": turns})
            writer.write_table(pa.Table.from_pylist(rows, schema=EXPORT_SCHEMA))
            num_written += len(rows)
    return num_written, num_left_out


def text_turns(messages: list[dict[str, Any]]) -> list[dict[str, str]] | None:
    """Role and text of each turn; None where there is more to one than that."""
    turns = []
    for message in messages:
        content = message.get("content")
        if isinstance(content, list):
            content = "".join(part["text"] for part in content)
        if not isinstance(content, str) or message.get("tool_calls") or message.get("role") not in ROLES:
            return None
        turns.append({"role": message["role"], "content": content})
    return turns


def _records(store: PairStore, where: Selection, columns: list[str]) -> Iterator[dict[str, Any]]:
    for batch in store.scan(where, columns):
        yield from batch.to_pylist()
