"""One answer of an OpenAI-compatible server, whole: from its response, or from the chunks of its stream.

What such servers send varies (null where a list belongs, usage left out, an error in the middle of a stream), so
nothing is taken for granted here, and what is missing reads as unfinished.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MAX_TOKENS = 2**31  # what a column of the store holds; a server that says more is wrong


@dataclass(frozen=True, slots=True)
class Answer:
    """What a server said, of its first choice."""

    text: str
    finish_reason: str | None  # None: it never came to an end
    tool_calls: tuple[dict[str, Any], ...] = ()
    refusal: str | None = None
    model: str = ""
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    num_choices: int = 1
    is_error: bool = False


def whole_answer(response: Mapping[str, Any]) -> Answer:
    """The answer in the body of a response: of `/v1/chat/completions`, or of `/v1/completions`."""
    choices = response.get("choices") or []
    choice = choices[0] if choices else {}
    message = choice.get("message") or {}
    return Answer(
        text=_text(message.get("content")) or _text(choice.get("text")),
        finish_reason=choice.get("finish_reason"),
        tool_calls=tuple(message.get("tool_calls") or ()),
        refusal=_text(message.get("refusal")) or None,
        model=_text(response.get("model")),
        num_choices=len(choices),
        is_error=bool(response.get("error")),
        **_usage(response),
    )


class StreamedAnswer:
    """An answer that arrives in chunks. Give each one's JSON to `add`; `answer` is what came so far."""

    def __init__(self) -> None:
        self._text: list[str] = []
        self._refusal: list[str] = []
        self._tool_calls: dict[int, dict[str, Any]] = {}
        self._finish_reason: str | None = None
        self._model = ""
        self._usage: dict[str, int | None] = {}
        self._choices = {0}
        self._is_error = False

    def add(self, chunk: Mapping[str, Any]) -> None:
        """Take in one chunk (of a chat or of a completion), or the error event that ends a broken stream."""
        self._is_error |= bool(chunk.get("error"))
        self._model = _text(chunk.get("model")) or self._model
        if chunk.get("usage"):
            self._usage = _usage(chunk)
        for choice in chunk.get("choices") or []:
            self._choices.add(choice.get("index") or 0)
            if not choice.get("index"):
                self._add_choice(choice)

    def _add_choice(self, choice: Mapping[str, Any]) -> None:
        delta = choice.get("delta") or {}
        self._text.append(_text(delta.get("content")) or _text(choice.get("text")))
        self._refusal.append(_text(delta.get("refusal")))
        self._finish_reason = choice.get("finish_reason") or self._finish_reason
        for part in delta.get("tool_calls") or []:
            # The first part of a call has its id and name, the others continue its arguments.
            call = self._tool_calls.setdefault(
                part.get("index") or 0, {"id": "", "type": "function", "function": {"name": "", "arguments": ""}}
            )
            function = part.get("function") or {}
            call["id"] = part.get("id") or call["id"]
            call["function"]["name"] += function.get("name") or ""
            call["function"]["arguments"] += function.get("arguments") or ""

    @property
    def answer(self) -> Answer:
        """What came so far. Without a finish reason it is unfinished."""
        return Answer(
            text="".join(self._text),
            finish_reason=self._finish_reason,
            tool_calls=tuple(self._tool_calls[index] for index in sorted(self._tool_calls)),
            refusal="".join(self._refusal) or None,
            model=self._model,
            num_choices=len(self._choices),
            is_error=self._is_error,
            **self._usage,
        )


def _usage(response: Mapping[str, Any]) -> dict[str, int | None]:
    usage = response.get("usage") or {}
    given = {name: usage.get(name) for name in ("prompt_tokens", "completion_tokens")}
    return {name: n if isinstance(n, int) and 0 <= n < MAX_TOKENS else None for name, n in given.items()}


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""
