"""What backends are sent, and how their answers are shaped before a client sees them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distill_ray.config import ParseConfig, SamplingConfig
from distill_ray.errors import RowError
from distill_ray.recipes.parse import parse_answer
from distill_ray.serving.request import Asked
from distill_ray.serving.routing.conversation import with_context

# Servers add more, the tokens of the prompt among it: the context is not the client's to see.
_SHOWN = frozenset({"id", "object", "created", "model", "choices", "usage", "system_fingerprint", "service_tier"})
_SHOWN_OF_CHOICE = frozenset({"index", "message", "delta", "text", "logprobs", "finish_reason"})


def teachers_body(asked: Asked, *, whole: bool = False) -> dict[str, Any]:
    """What the teacher is sent; `whole`: never as a stream."""
    call, live = asked.call, asked.live
    body = with_defaults(call.body, live.teacher_sampling)
    if call.method == "chat":
        body["messages"] = with_context(asked.messages, live.context)
    return body | {"stream": False, "stream_options": None} if whole else body


def students_body(asked: Asked, *, whole: bool = False) -> dict[str, Any]:
    """What the bundle's student is sent; `whole`: never as a stream."""
    assert asked.live.bundle is not None
    spec = asked.live.bundle.manifest.student
    body = with_defaults(asked.call.body, spec.sampling) | {"messages": spec.form.messages(asked.messages)}
    return body | {"stream": False, "stream_options": None} if whole else body


def with_defaults(body: Mapping[str, Any], sampling: SamplingConfig | None) -> dict[str, Any]:
    """The body with what it leaves open as the bundle was measured, and usage asked for at a stream's end."""
    filled = dict(body)
    if sampling is not None:
        for name, value in (("temperature", sampling.temperature), ("top_p", sampling.top_p)):
            if filled.get(name) is None:
                filled[name] = value
        if filled.get("max_tokens") is None and filled.get("max_completion_tokens") is None:
            filled["max_tokens"] = sampling.max_tokens
        if sampling.stop and not filled.get("stop"):
            filled["stop"] = sampling.stop
    if filled.get("stream"):
        filled["stream_options"] = {**(filled.get("stream_options") or {}), "include_usage": True}
    return filled


def parse_response(response: dict[str, Any], parse: ParseConfig) -> bool:
    """Leave of each choice what the student learns. False: one has nothing of the kind, and stays as it is."""
    is_whole = True
    for choice in response.get("choices") or ():
        message = choice.get("message") or {}
        try:
            found = parse_answer(message.get("content") or "", parse)
        except RowError:
            found = None
        if found is None:
            is_whole = is_whole and bool(message.get("tool_calls"))
            continue
        message["content"] = found
        choice["logprobs"] = None  # they spell the rest
        for name in ("reasoning", "reasoning_content"):
            message.pop(name, None)
    return is_whole


def mean_logprob(response: Mapping[str, Any]) -> float | None:
    """Of the tokens of a whole response's first choice, in nats. None: the server gave none."""
    choice = next(iter(response.get("choices") or ()), {})
    tokens = (choice.get("logprobs") or {}).get("content") or ()
    values = [token["logprob"] for token in tokens if isinstance(token.get("logprob"), int | float)]
    return sum(values) / len(values) if values else None


def for_client(
    piece: dict[str, Any], request: Mapping[str, Any], *, shows_route: bool = False
) -> dict[str, Any] | None:
    """A piece as the client is to see it: under the model name that it asked for, and with what it asked for.

    None: nothing is left of it. Who answered is not the client's to see (it may tell what the service was trained on).
    """
    for name in piece.keys() - _SHOWN:
        del piece[name]
    for choice in piece.get("choices") or ():
        for name in choice.keys() - _SHOWN_OF_CHOICE:
            del choice[name]
    piece["model"] = str(request.get("model") or "auto")
    if not shows_route:
        piece.pop("system_fingerprint", None)  # names the engine
    wants_usage = (request.get("stream_options") or {}).get("include_usage") or not request.get("stream")
    if not wants_usage and piece.pop("usage", None) is not None and not piece.get("choices"):
        return None
    if not request.get("logprobs"):
        for choice in piece.get("choices") or ():
            if choice.get("logprobs") is not None:
                choice["logprobs"] = None
    return piece
