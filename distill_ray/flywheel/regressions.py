"""Prompts that every student has to answer rightly: the user's own, as JSON lines.

    {"text": "Is soup vegan?", "contains": "ask the cook"}
    {"messages": [...], "matches": "(?i)^(yes|no)$"}

`equals`, `contains` and `lacks` compare with white space at the ends taken off; `matches` is a regular expression that
is looked for. A prompt may have several of them; all have to hold.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from distill_ray.config.base import Config, Marker, Pattern
from distill_ray.errors import ConfigError, RowError
from distill_ray.recipes.patterns import any_matches
from distill_ray.recipes.template import kind_of
from distill_ray.records import Message


class Turn(Config):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: Annotated[str, Field(min_length=1)]


class Regression(Config):
    """One prompt, and what its answer has to be like."""

    text: Annotated[str, Field(min_length=1)] | None = None
    """What the user says; or `messages`."""

    messages: Annotated[list[Turn], Field(min_length=1)] | None = None
    """A whole conversation, up to what the user says last."""

    equals: str | None = None
    contains: Marker | None = None
    lacks: Marker | None = None
    matches: Pattern | None = None

    @model_validator(mode="after")
    def _asks_and_expects(self) -> Regression:
        if self.messages is not None and self.messages[-1].role != "user":
            raise ValueError("messages: the last turn has to be the user's: it is what the student answers")
        if (self.text is None) == (self.messages is None):
            raise ValueError("give either `text` or `messages`")
        if all(each is None for each in (self.equals, self.contains, self.lacks, self.matches)):
            raise ValueError("say what the answer has to be like: equals, contains, lacks or matches")
        return self

    @property
    def turns(self) -> list[Message]:
        """The conversation."""
        if self.messages is not None:
            return [{"role": turn.role, "content": turn.content} for turn in self.messages]
        return [{"role": "user", "content": self.text or ""}]

    @property
    def shown(self) -> str:
        """What is asked, for people."""
        return self.turns[-1]["content"]

    def broken(self, answer: str) -> str | None:
        """What an answer breaks; None: it is right."""
        answer = answer.strip()
        if self.equals is not None and answer != self.equals.strip():
            return f"equals {self.equals!r}"
        if self.contains is not None and self.contains not in answer:
            return f"contains {self.contains!r}"
        if self.lacks is not None and self.lacks in answer:
            return f"lacks {self.lacks!r}"
        try:
            if self.matches is not None and not any_matches([self.matches], answer):
                return f"matches {self.matches!r}"
        except RowError as error:
            return f"matches {self.matches!r} ({error.detail})"
        return None


_SAID = {
    "extra_forbidden": "unknown key; there are: text, messages, equals, contains, lacks, matches",
    "missing": "missing; a turn has role and content",
    "string_too_short": "empty",
    "too_short": "empty; give at least the user's turn",
    "model_type": "a turn is an object with role and content",
}


def read_regressions(path: str | None) -> list[Regression]:
    """The prompts of a file; none without one.

    Raises:
        ConfigError: it cannot be read, or a line is not one.
    """
    if path is None:
        return []
    try:
        # JSON may have U+2028 and its like in a text, at which `splitlines` would tear it.
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"flywheel.gate.regressions: {path}: cannot be read ({error}); give JSON lines") from error
    found = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            found.append(_parsed(line, f"flywheel.gate.regressions: {path}:{number}"))
    if not found:
        raise ConfigError(f"flywheel.gate.regressions: {path}: no prompt in it; write some, or leave the key out")
    return found


def _parsed(line: str, where: str) -> Regression:
    try:
        record: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: not a JSON object ({error})") from error
    if not isinstance(record, dict):
        raise ConfigError(f'{where}: not a JSON object but {kind_of(record)}; write {{"text": ..., "contains": ...}}')
    try:
        return Regression.model_validate(record)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        reason = _SAID.get(first["type"]) or first["msg"].removeprefix("Value error, ")
        got = f" (got {first['input']!r})" if isinstance(first["input"], str | int | float) else ""
        raise ConfigError(f"{where}: {name + ': ' if name else ''}{reason}{got}") from error
