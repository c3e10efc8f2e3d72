"""What is asked, from rows that say it as a conversation, as an instruction, or as a role's prompt (`data.layout`).

| layout         | row                                                              | seen in                       |
|----------------|------------------------------------------------------------------|-------------------------------|
| `messages`     | {messages: [{role, content}]}                                    | OpenAI's fine-tuning, TRL     |
| `sharegpt`     | {conversations: [{from, value}], system}                         | ShareGPT, Vicuna              |
| `alpaca`       | {instruction, input, output, system}                             | Alpaca                        |
| `role_prompts` | {role, system, task_type, task, contents, generation}            | context-distillation examples |

All give the columns `text` (what is asked last), `system` ("" where there is none) and, where the row has one,
`answer`; the row's own columns stay.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from distill_ray.config.data import Layout
from distill_ray.errors import DataError
from distill_ray.pipeline.planning.readers import SourceRow
from distill_ray.recipes.template import kind_of
from distill_ray.records import Message, to_json

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "model": "assistant",
}


class _Misshapen(ValueError):
    """The row is not of the layout."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Asked:
    text: str
    system: str = ""
    answer: str | None = None
    history: tuple[Message, ...] = ()


def with_layout(rows: Iterator[SourceRow], layout: Layout, role: str | None = None) -> Iterator[SourceRow]:
    """Rows with the columns of a layout. A row that is not of the layout comes with `error` set.

    Args:
        rows: as they were read.
        layout: `data.layout`.
        role: only this role's, with `role_prompts`.

    Raises:
        DataError: no row has this role.
    """
    if layout == "columns":
        yield from rows
        return
    others: dict[str, None] = {}
    has_role = role is None
    for row in rows:
        if row.error is None and role is not None:
            if row.columns.get("role") != role:
                others.setdefault(str(row.columns.get("role")))
                continue
            has_role = True
        yield from _shaped(row, layout)
    if not has_role:
        raise DataError(f"data.role: no role {role!r}; there are: {', '.join(others)}")


def _shaped(row: SourceRow, layout: Layout) -> Iterator[SourceRow]:
    if row.error is not None:
        yield row
        return
    try:
        asked = _LAYOUTS[layout](row.columns)
    except _Misshapen as error:
        yield dataclasses.replace(row, error=f"not of layout {layout}: {error}")
        return
    for number, each in enumerate(asked, start=1):
        columns = {**row.columns, "text": each.text, "system": each.system}
        if each.answer is not None:
            columns["answer"] = each.answer
        label = row.label if len(asked) == 1 else f"{row.label}/{number}"
        yield SourceRow(label, columns, to_json(columns), history=list(each.history))


def _messages(columns: Mapping[str, Any]) -> list[_Asked]:
    return [_conversation(columns, "messages", "role", "content")]


def _sharegpt(columns: Mapping[str, Any]) -> list[_Asked]:
    return [_conversation(columns, "conversations", "from", "value")]


def _conversation(columns: Mapping[str, Any], column: str, who: str, what: str) -> _Asked:
    """The last user turn is what is asked, what stands before it its history, the turn behind it the answer."""
    given = columns.get(column)
    if not isinstance(given, list):
        raise _Misshapen(f"column `{column}` is {_found(columns, column)}, expected a list of turns")
    turns = [_turn(number, turn, who, what) for number, turn in enumerate(given, start=1)]
    system = columns.get("system")
    system = system if isinstance(system, str) else ""
    if turns and turns[0]["role"] == "system":
        system = turns.pop(0)["content"]
    answer = turns.pop()["content"] if turns and turns[-1]["role"] == "assistant" else None
    if not turns or turns[-1]["role"] != "user":
        raise _Misshapen("no user turn at the end, before the answer")
    if any(turn["role"] == "system" for turn in turns):
        raise _Misshapen("a system turn that is not the first")
    return _Asked(turns[-1]["content"], system, answer, tuple(turns[:-1]))


def _turn(number: int, turn: object, who: str, what: str) -> Message:
    if not isinstance(turn, dict):
        raise _Misshapen(f"turn {number} is {kind_of(turn)}, expected {{{who}, {what}}}")
    role, content = turn.get(who), turn.get(what)
    if not isinstance(role, str) or role not in ROLES:
        raise _Misshapen(f"turn {number}: {who} {role!r} is none of {', '.join(ROLES)}")
    if isinstance(content, list):  # OpenAI's parts
        if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
            raise _Misshapen(f"turn {number} has parts that are not text")
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise _Misshapen(f"turn {number}: {what} is {_found(turn, what)}, expected text")
    return {"role": ROLES[role], "content": content}  # pyright: ignore[reportReturnType]


def _alpaca(columns: Mapping[str, Any]) -> list[_Asked]:
    parts = [_text(columns, "instruction"), _text(columns, "input", optional=True)]
    answer = _text(columns, "output", optional=True)
    text = "\n\n".join(part for part in parts if part.strip())
    return [_Asked(text, _text(columns, "system", optional=True), answer if "output" in columns else None)]


def _role_prompts(columns: Mapping[str, Any]) -> list[_Asked]:
    task = columns.get("task", "")
    tasks = task if columns.get("task_type") == "list" else [task]
    if not isinstance(tasks, list) or not all(isinstance(each, str) for each in tasks):
        raise _Misshapen(
            f"column `task` is {_found(columns, 'task')}, expected text, or with task_type list a list of it"
        )
    system = _text(columns, "system")
    around = [_text(columns, name, optional=True) for name in ("contents", "generation")]
    texts = ["\n".join(part.strip("\n") for part in (each, *around) if part.strip()) for each in tasks]
    return [_Asked(text, system.strip()) for text in texts]


def _text(columns: Mapping[str, Any], column: str, *, optional: bool = False) -> str:
    value = columns.get(column)
    if value is None and optional:
        return ""
    if not isinstance(value, str):
        raise _Misshapen(f"column `{column}` is {_found(columns, column)}, expected text")
    return value


def _found(columns: Mapping[str, Any], column: str) -> str:
    return kind_of(columns[column]) if column in columns else "not there"


_LAYOUTS: dict[str, Callable[[Mapping[str, Any]], list[_Asked]]] = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "role_prompts": _role_prompts,
}
