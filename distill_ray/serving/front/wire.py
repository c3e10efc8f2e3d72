"""The OpenAI API as the service speaks it: requests checked, events, errors.

What is known is checked here, once, whoever answers. What is not known is refused: servers of models have fields that
show what stands in front of a client's words (vLLM: prompt_logprobs, return_token_ids), and that is the operator's.
https://platform.openai.com/docs/api-reference
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Annotated, Any, Literal, TypeVar

import pydantic_core
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)

from distill_ray.errors import ApiError

MAX_N = 128  # as OpenAI's
MAX_MESSAGES = 2048
MAX_NAME = 64  # characters of a field's name in an error

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
        for part in self.content if isinstance(self.content, list) else ():
            if not isinstance(part.get("type"), str):
                raise ValueError("each part of content needs a type")
            if part["type"] == "text" and not isinstance(part.get("text"), str):
                raise ValueError("a part of type text needs text")
        return self


class StreamOptions(_Wire):
    """What a stream has beside text."""

    include_usage: bool | None = None


class _Request(_Wire):
    model: Annotated[Name, BeforeValidator(lambda name: "auto" if name is None else name)] = "auto"  # null: left out
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


class JsonSchema(_Wire):
    """A schema and its name."""

    name: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")


class ResponseFormat(_Wire):
    """Text, any JSON, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_its_schema(self) -> ResponseFormat:
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError("type json_schema needs json_schema")
        return self


class ChatRequest(_Request):
    """Body of POST /v1/chat/completions."""

    messages: Annotated[list[ChatTurn], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    response_format: ResponseFormat | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if self.tool_choice not in (None, "none", "auto") and not self.tools:
            raise ValueError("tool_choice needs tools")
        return self


class CompletionRequest(_Request):
    """Body of POST /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: bool | None = None
    suffix: str | None = None
    best_of: Annotated[int, Field(ge=1, le=MAX_N)] | None = None


# Of OpenAI's fields those that are only handed on; and how to sample, as most servers of models have it.
_SAMPLERS = frozenset({"top_k", "min_p", "repetition_penalty", "min_tokens"})
HANDED_ON = {
    ChatRequest: _SAMPLERS
    | {"audio", "function_call", "functions", "metadata", "modalities", "parallel_tool_calls", "prediction", "store"}
    | {"prompt_cache_key", "prompt_cache_retention", "reasoning_effort", "safety_identifier", "service_tier"}
    | {"verbosity", "web_search_options"},
    CompletionRequest: _SAMPLERS,
}

RequestT = TypeVar("RequestT", ChatRequest, CompletionRequest)


def parse_request(raw: bytes, kind: type[RequestT], also: Collection[str] = ()) -> tuple[RequestT, dict[str, Any]]:
    """The request, checked, and its body as it came.

    Args:
        raw: the body.
        kind: what it is to be.
        also: names of further fields that are handed on.

    Raises:
        ApiError: 400; not JSON (or nested too deeply), or a part of it is wrong.
    """
    try:
        body = pydantic_core.from_json(raw, allow_inf_nan=False)
    except ValueError as error:  # malformed, not UTF-8, nested too deeply
        raise ApiError(400, f"the body is not JSON: {error}") from None
    if not isinstance(body, dict):
        raise ApiError(400, "the body has to be a JSON object")
    for name in body:
        if name not in kind.model_fields and name not in HANDED_ON[kind] and name not in also:
            raise ApiError(400, f"{_shown(name)}: no field of this API; leave it out", param=_shown(name))
    try:
        return kind.model_validate(body), body
    except ValidationError as error:
        where, what = wrong_part(error)
        raise ApiError(400, f"{where or 'body'}: {what}", param=where or "body") from None


def wrong_part(error: ValidationError) -> tuple[str, str]:
    """Where the first thing that is wrong is (dotted; "" for the whole), and what it is; never the value."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    return ".".join(str(part) for part in first["loc"]), first["msg"]


def _shown(name: str) -> str:
    return name if len(name) <= MAX_NAME else name[:MAX_NAME] + "..."


def error_of(status: int, payload: Any) -> ApiError:
    """The error that another server's body says, whatever shape it has."""
    error = payload.get("error", payload) if isinstance(payload, dict) else {}
    error = error if isinstance(error, dict) else {"message": error}
    message = error.get("message") or (payload if isinstance(payload, str) and payload else f"HTTP {status}")
    kind, param, code = (error.get(name) for name in ("type", "param", "code"))
    as_text = lambda value: None if value is None else str(value)  # noqa: E731
    default = "invalid_request_error" if status < 500 else "server_error"
    return ApiError(status, str(message), as_text(kind) or default, as_text(param), as_text(code))


def json_bytes(payload: Mapping[str, Any]) -> bytes:
    """As JSON. Half of a surrogate pair, which a model may well say, has no UTF-8 and becomes a question mark."""
    return json.dumps(payload, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


def event(payload: Mapping[str, Any]) -> bytes:
    """A server-sent event."""
    return b"data: " + json_bytes(payload) + b"\n\n"


DONE = b"data: [DONE]\n\n"
