"""The OpenAI API as the service speaks it: requests checked, pieces of a stream put together, errors.

What is known is checked here, once, whoever answers; what is not known is handed on, and whoever answers refuses it.
https://platform.openai.com/docs/api-reference
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeVar

import pydantic_core
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from distill_ray.errors import ApiError

MAX_N = 128  # as OpenAI's
MAX_MESSAGES = 2048

Name = Annotated[str, StringConstraints(min_length=1, max_length=256)]


class _Wire(BaseModel):
    model_config = ConfigDict(extra="allow", allow_inf_nan=False, hide_input_in_errors=True)


class ToolCall(_Wire):
    """A call that an assistant's turn makes."""

    id: str
    type: Literal["function", "custom"] = "function"


class ChatTurn(_Wire):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[dict[str, Any]] | None = None
    tool_calls: list[ToolCall] | None = None

    @model_validator(mode="after")
    def _says_something(self) -> ChatTurn:
        if self.content is None and self.role not in ("assistant", "function"):
            raise ValueError(f"a {self.role} message needs content")
        if isinstance(self.content, list) and not all(isinstance(part.get("type"), str) for part in self.content):
            raise ValueError("each part of content needs a type")
        return self


class StreamOptions(_Wire):
    """What a stream has beside text."""

    include_usage: bool | None = None


class _Request(_Wire):
    model: Name = "auto"
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MAX_N)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[str, float] | None = None
    user: str | None = None


class ResponseFormat(_Wire):
    """Text, any JSON, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema", "structural_tag"]


class ChatRequest(_Request):
    """Body of POST /v1/chat/completions."""

    messages: Annotated[list[ChatTurn], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    response_format: ResponseFormat | None = None


class CompletionRequest(_Request):
    """Body of POST /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: bool | None = None
    suffix: str | None = None
    best_of: Annotated[int, Field(ge=1, le=MAX_N)] | None = None


RequestT = TypeVar("RequestT", ChatRequest, CompletionRequest)


def parse_request(raw: bytes, kind: type[RequestT]) -> tuple[RequestT, dict[str, Any]]:
    """The request, checked, and its body as it came.

    Raises:
        ApiError: 400; not JSON (or nested too deeply), or a part of it is wrong.
    """
    try:
        body = pydantic_core.from_json(raw, allow_inf_nan=False)
    except ValueError as error:  # malformed, not UTF-8, nested too deeply
        raise ApiError(400, f"the body is not JSON: {error}") from None
    if not isinstance(body, dict):
        raise ApiError(400, "the body has to be a JSON object")
    try:
        return kind.model_validate(body), body
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "body"
        raise ApiError(400, f"{where}: {first['msg']}", param=where) from None


def error_of(status: int, payload: Any) -> ApiError:
    """The error that another server's body says, whatever shape it has."""
    error = payload.get("error", payload) if isinstance(payload, dict) else {}
    error = error if isinstance(error, dict) else {"message": error}
    message = error.get("message") or (payload if isinstance(payload, str) and payload else f"HTTP {status}")
    kind, param, code = (error.get(name) for name in ("type", "param", "code"))
    as_text = lambda value: None if value is None else str(value)  # noqa: E731
    default = "invalid_request_error" if status < 500 else "server_error"
    return ApiError(status, str(message), as_text(kind) or default, as_text(param), as_text(code))


def event(payload: Mapping[str, Any]) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(payload, ensure_ascii=False, separators=(',', ':'))}\n\n"


DONE = "data: [DONE]\n\n"


@dataclass
class Gathered:
    """One answer, from a whole response or from the chunks of a stream: what is kept of it."""

    content: str = ""
    refusal: str = ""
    tool_calls: dict[int, dict[str, Any]] = field(default_factory=dict)
    finish_reason: str | None = None
    model: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    logprobs: list[float] = field(default_factory=list)

    def add(self, piece: Mapping[str, Any]) -> None:
        """Add a response or a chunk. Of several choices, the first."""
        self.model = piece.get("model") or self.model
        if usage := piece.get("usage"):
            self.prompt_tokens = usage.get("prompt_tokens") or 0
            self.completion_tokens = usage.get("completion_tokens") or 0
        for choice in piece.get("choices") or ():
            if choice.get("index", 0) != 0:
                continue
            said = choice.get("message") or choice.get("delta") or {}
            self.content += said.get("content") or choice.get("text") or ""
            self.refusal += said.get("refusal") or ""
            self._add_tool_calls(said.get("tool_calls") or ())
            self.finish_reason = choice.get("finish_reason") or self.finish_reason
            tokens = (choice.get("logprobs") or {}).get("content") or ()
            self.logprobs += [token["logprob"] for token in tokens]

    def _add_tool_calls(self, calls: Iterable[Mapping[str, Any]]) -> None:
        for position, call in enumerate(calls):
            known = self.tool_calls.setdefault(call.get("index", position), {"id": "", "type": "function"})
            known["id"] = call.get("id") or known["id"]
            known["type"] = call.get("type") or known["type"]
            function, piece = known.setdefault("function", {"name": "", "arguments": ""}), call.get("function") or {}
            function["name"] += piece.get("name") or ""
            function["arguments"] += piece.get("arguments") or ""

    @property
    def is_empty(self) -> bool:
        """Nothing was said and nothing called."""
        return not self.content.strip() and not self.tool_calls and not self.refusal


def says_something(piece: Mapping[str, Any]) -> bool:
    """Whether a response or chunk has any content: before that, another model can still answer instead."""
    gathered = Gathered()
    gathered.add(piece)
    return bool(gathered.content or gathered.tool_calls or gathered.refusal)
