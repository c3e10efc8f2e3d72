"""What the router looks at in a request: its kind, and the text to compare; and the bundle's context, on and off.

    chat body -> RequestKey(fingerprint, text, problem)

The fingerprint stands for what the client's program says: system prompt, tools, response format. It must be equal to
that of a trained request, because the same last message asks for something else under another system prompt. The text
stands for what its user says: all turns in order, never the last one alone. Parts that vary from request to request
(dates, ids) are masked in both.

    with_context    the teacher's messages: context, then the client's own
    strip_context   the client's own messages, where it sends the context itself

Nothing here raises on a strange body: what is no text is a `problem`, and goes to the teacher.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Literal

import regex

from distill_ray.records import Message

MASK = "[…]"
MASK_LIMIT_S = 0.1  # for all patterns over all of a request: the router does nothing else meanwhile

Problem = Literal["empty", "not_text"]

_SYSTEM_ROLES = ("system", "developer")
# What is of the program beside its system prompt: a value that is missing, null or empty says nothing.
_PROGRAM_FIELDS = ("tools", "functions", "response_format", "structured_outputs", "web_search_options")
_MARKS = re.compile(rf"\s*(?:{re.escape(MASK)}\s*)+")
_TOOL_CHOICES = ("tool_choice", "function_call")


@dataclass(frozen=True, slots=True)
class RequestKey:
    """A request as the router sees it."""

    fingerprint: str
    """16 hex characters: requests of one kind have the same."""

    text: str
    """The turns; what is embedded."""

    problem: Problem | None = None
    """Why only the teacher can answer: `empty` (a user turn without text, or none), `not_text` (images, audio)."""


def request_key(body: Mapping[str, Any], ignore: Sequence[str]) -> RequestKey:
    """What the router looks at.

    One user turn is its text alone; a longer conversation has a line "role: text" for each turn.

    Args:
        body: of a chat completion, without the bundle's context (`strip_context`).
        ignore: regular expressions of what varies. If they take longer than MASK_LIMIT_S the rest stays unmasked: such
            a request is unlike any trained one, and goes to the teacher.
    """
    messages = body.get("messages")
    messages = messages if isinstance(messages, list) else []
    mask = _Mask(ignore)
    texts = [(_role(message), _text_of(message)) for message in messages]
    system = [mask(text or "") for role, text in texts if role in _SYSTEM_ROLES]
    turns = [(role, mask(text or "")) for role, text in texts if role not in _SYSTEM_ROLES]
    try:
        fingerprint = _fingerprint(system, body, mask)
    except RecursionError:  # nested deeper than any real schema
        return RequestKey("", "", "not_text")
    return RequestKey(fingerprint, _rendered(turns), _problem(texts, turns, body))


def strip_context(
    messages: Sequence[Mapping[str, Any]], context: Sequence[Message]
) -> tuple[list[Mapping[str, Any]], bool]:
    """The client's own messages, and whether it had sent the bundle's context (or its system prompt alone) itself.

    Of a system prompt that begins with the context's, followed by a blank line, the rest stays.
    """
    wanted, few_shot = _split(context)
    given, turns = _split(messages)
    own = _without(wanted, given)
    has_few_shot = bool(few_shot) and _plain(turns[: len(few_shot)]) == _plain(few_shot) and len(turns) > len(few_shot)
    if own is None or not (wanted or has_few_shot):
        return list(messages), False
    return [*own, *turns[len(few_shot) if has_few_shot else 0 :]], True


def with_context(messages: Sequence[Mapping[str, Any]], context: Sequence[Message]) -> list[Mapping[str, Any]]:
    """What the teacher gets: one system message (the context's text, then the client's own), few-shot turns, turns."""
    wanted, few_shot = _split(context)
    given, turns = _split(messages)
    if wanted and _are_text(given):  # many chat templates know one system message, and that first
        given = [{"role": "system", "content": _joined([*wanted, *given])}]
    else:
        given = [*wanted, *given]
    return [*given, *few_shot, *turns]


class _Mask:
    """Replaces what the patterns match, and the white space around it, by one MASK."""

    def __init__(self, patterns: Sequence[str]) -> None:
        self._patterns = patterns
        self._deadline = time.monotonic() + MASK_LIMIT_S

    def __call__(self, text: str) -> str:
        text = text.strip()
        masked = text
        for pattern in self._patterns:
            left = self._deadline - time.monotonic()
            try:
                masked = regex.sub(pattern, _mark, masked, timeout=max(left, 1e-6), concurrent=True)
            except TimeoutError:
                return text
        return text if masked == text else _MARKS.sub(f" {MASK} ", masked).strip()


def _mark(match: regex.Match[str]) -> str:
    return MASK if match.group() else ""  # `\d*` also matches where there is nothing


def _fingerprint(system: Sequence[str], body: Mapping[str, Any], mask: _Mask) -> str:
    # Two system messages say what one with both texts says; tools mean the same in another order.
    kind: dict[str, Any] = {"system": "\n\n".join(text for text in system if text)}
    kind |= {name: _masked(body[name], mask) for name in _PROGRAM_FIELDS if body.get(name)}
    if kind.get("response_format") == {"type": "text"}:  # the default, spelt out
        del kind["response_format"]
    for name in ("tools", "functions"):
        if isinstance(kind.get(name), list):
            kind[name] = sorted(map(_canonical, kind[name]))
    if "tools" in kind or "functions" in kind:  # without tools there is no choice
        kind |= {name: body[name] for name in _TOOL_CHOICES if body.get(name) not in (None, "auto")}
    return hashlib.blake2b(_canonical(kind).encode(errors="surrogatepass"), digest_size=8).hexdigest()


def _masked(value: Any, mask: _Mask) -> Any:
    if isinstance(value, str):
        return mask(value)
    if isinstance(value, Mapping):
        return {name: _masked(item, mask) for name, item in value.items()}
    return [_masked(item, mask) for item in value] if isinstance(value, list) else value


def _canonical(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"))


def _rendered(turns: Sequence[tuple[str, str]]) -> str:
    if len(turns) == 1 and turns[0][0] == "user":
        return turns[0][1]
    return "\n".join(f"{role}: {text}" for role, text in turns)


def _problem(
    texts: Sequence[tuple[str, str | None]], turns: Sequence[tuple[str, str]], body: Mapping[str, Any]
) -> Problem | None:
    modalities = body.get("modalities") or ["text"]
    if modalities != ["text"] or any(text is None for _, text in texts):
        return "not_text"
    asked = [text for role, text in turns if role == "user"]
    return None if asked and all(asked) else "empty"


def _role(message: Any) -> str:
    return str(message.get("role", "")) if isinstance(message, Mapping) else ""


def _text_of(message: Any) -> str | None:
    """A message as text, calls of tools included; None if a part of it is none."""
    if not isinstance(message, Mapping) or message.get("audio"):
        return None
    content = message.get("content")
    parts = content if isinstance(content, list) else [content or ""]
    calls = message.get("tool_calls") or []
    calls = calls if isinstance(calls, list) else [None]
    legacy = message.get("function_call")
    texts = [
        *map(_part, parts),
        *([message["refusal"]] if message.get("refusal") else []),
        *map(_call, [*calls, *([{"function": legacy}] if legacy else [])]),
    ]
    if not all(isinstance(text, str) for text in texts):
        return None
    return "\n".join(text for text in texts if text)  # as vLLM joins parts


def _part(part: Any) -> Any:
    """The text of a content part."""
    if isinstance(part, Mapping):
        return part.get(part["type"]) if part.get("type") in ("text", "refusal") else None
    return part


def _call(call: Any) -> str | None:
    """A call of a tool without its id, which is another each time."""
    called = (call.get("function") or call.get("custom")) if isinstance(call, Mapping) else None
    if not isinstance(called, Mapping):
        return None
    return f"{called.get('name')}({called.get('arguments', called.get('input', ''))})"


def _split(messages: Iterable[Mapping[str, Any]]) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
    """The leading system messages, and the rest."""
    messages = list(messages)
    leading = list(takewhile(lambda message: _role(message) in _SYSTEM_ROLES, messages))
    return leading, messages[len(leading) :]


def _joined(messages: Sequence[Mapping[str, Any]]) -> str:
    texts = [(_text_of(message) or "").strip() for message in messages]
    return "\n\n".join(text for text in texts if text)


def _without(wanted: Sequence[Mapping[str, Any]], given: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]] | None:
    """What system messages say behind the wanted ones and a blank line; None if they begin otherwise."""
    if not wanted:
        return list(given)
    text, prefix = _joined(given), _joined(wanted)
    rest = text[len(prefix) :]
    if not text.startswith(prefix) or not _are_text(given) or not re.match(r"$|[ \t]*\r?\n[ \t]*\r?\n", rest):
        return None
    return [{"role": "system", "content": rest.strip()}] if rest.strip() else []


def _are_text(messages: Sequence[Mapping[str, Any]]) -> bool:
    return all(_text_of(message) is not None for message in messages)


def _plain(messages: Sequence[Mapping[str, Any]]) -> list[tuple[str, str | None]]:
    return [(_role(message), (_text_of(message) or "").strip()) for message in messages]
