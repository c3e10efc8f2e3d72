"""Who answers OpenAI requests behind the router: one method, whoever it is.

A remote server is here; a model in this cluster is a `models.deployed`; tests bring their own.
"""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Mapping
from typing import Any, Literal

import httpx
from pydantic import BaseModel, ValidationError

from distill_ray.config import OpenAIEngineConfig, RunConfig
from distill_ray.errors import ApiError
from distill_ray.serving.front.wire import error_of
from distill_ray.serving.routing.manifest import StudentSpec

Method = Literal["chat", "completions"]

PATHS: dict[str, str] = {"chat": "/chat/completions", "completions": "/completions"}
LONGEST_RETRY_S = 3600.0  # of what a server says in Retry-After
# Of a server somewhere else: its key is wrong, or its model gone. That is not about the request, nor for its sender.
SHUT = frozenset({401, 403, 404})
UP_S = 2.0  # for a look whether somebody is there


class Backend(ABC):
    """Someone who answers.

    `name` is what answers, for people and for the store: "vllm:demo@1f3a".
    """

    name: str

    is_here = False
    """In this cluster: whether it is up may be asked every second."""

    @abstractmethod
    def answer(self, method: Method, body: Mapping[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """Pieces of the answer: the whole response, or with `stream` its chunks. Closing the iterator ends the work.

        Raises:
            ApiError: 4xx, this request cannot be answered here; 5xx (and 429), not now.
        """

    async def is_up(self) -> bool:
        """Whether it would answer now."""
        return True

    async def close(self) -> None:  # noqa: B027 (most have nothing to close)
        """Free what it holds."""


class RemoteBackend(Backend):
    """An OpenAI-compatible URL.

    Args:
        config: its address and limits. The key is read from the environment, now.
    """

    def __init__(self, config: OpenAIEngineConfig) -> None:
        self.name = f"openai:{config.model}"
        self._config = config
        key = os.environ.get(config.api_key_env or "")
        self._lacks_key = config.api_key_env is not None and not key
        self._client = httpx.AsyncClient(
            headers={"authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(config.timeout_s, connect=10.0),
            limits=httpx.Limits(max_connections=config.max_concurrency),
            trust_env=False,  # a proxy in the environment is for other traffic
        )

    async def answer(self, method: Method, body: Mapping[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """See `Backend.answer`."""
        sent = {**body, **self._config.extra_body, "model": self._config.model}
        try:
            async with self._client.stream("POST", self._config.base_url + PATHS[method], json=sent) as response:
                if response.status_code >= 400:
                    raise _refusal(response, await response.aread())
                if not body.get("stream"):
                    whole = _payload(await response.aread())
                    if not whole["choices"]:
                        raise ApiError(502, f"{self.name} sent an answer without choices", "server_error")
                    yield whole
                    return
                is_over = False
                async for line in response.aiter_lines():
                    if not line.startswith("data:"):
                        continue
                    data = line[5:].strip()
                    if data == "[DONE]":
                        return
                    chunk = _payload(data)
                    is_over = is_over or any(choice.get("finish_reason") for choice in chunk["choices"])
                    yield chunk
                if is_over:  # some servers leave [DONE] out
                    return
        except httpx.TimeoutException as error:
            raise ApiError(504, f"{self.name} did not answer in time", "server_error") from error
        except httpx.HTTPError as error:
            raise ApiError(503, f"{self.name} cannot be reached ({type(error).__name__})", "server_error") from error
        if body.get("stream"):
            raise ApiError(502, f"{self.name} ended its answer without saying so", "server_error")

    async def is_up(self) -> bool:
        """Whether the server answers at all, and lets us in."""
        if self._lacks_key:
            return False
        try:
            response = await self._client.get(self._config.base_url + "/models", timeout=UP_S)
        except httpx.HTTPError:
            return False
        return response.status_code < 500 and response.status_code != 401

    async def close(self) -> None:
        """Close its connections."""
        await self._client.aclose()


def student_server(config: RunConfig, spec: StudentSpec) -> OpenAIEngineConfig | None:
    """The server that has a student; None: it runs in this cluster.

    Where a remote student is, its bundle says; the rest (limits, time-out) is `serve.student`'s, if that is one too.
    """
    engine = config.serve.student
    known = engine if isinstance(engine, OpenAIEngineConfig) else None
    if spec.kind != "remote":
        return known
    there = {"model": spec.base, "base_url": spec.base_url, "api_key_env": spec.api_key_env}
    return known.model_copy(update=there) if known is not None else OpenAIEngineConfig.model_validate(there)


class _Said(BaseModel):
    """Content as text, or as the parts of text that some servers send."""

    content: str | list[dict[str, Any]] | None = None


class _Choice(BaseModel):
    message: _Said | None = None
    delta: _Said | None = None
    text: str | None = None
    finish_reason: str | None = None


class _Usage(BaseModel):
    prompt_tokens: int | float | None = None
    completion_tokens: int | float | None = None


class _Answer(BaseModel):
    """What everything behind this relies on."""

    choices: list[_Choice] | None = None
    usage: _Usage | None = None


def _payload(data: str | bytes) -> dict[str, Any]:
    try:
        payload = json.loads(data, parse_constant=_no_number)
    except ValueError as error:
        raise ApiError(502, "what the model's server sent is not JSON", "server_error") from error
    if not isinstance(payload, dict) or payload.get("error") is not None:
        raise error_of(502, payload)
    try:
        _Answer.model_validate(payload, strict=True)
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"]))
        raise ApiError(502, f"what the model's server sent is no answer: {where}", "server_error") from error
    payload["choices"] = payload.get("choices") or []
    for choice in payload["choices"]:
        said = choice.get("message") or choice.get("delta") or {}
        if isinstance(said.get("content"), list):
            said["content"] = "".join(str(part.get("text") or "") for part in said["content"])
    return payload


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _refusal(response: httpx.Response, body: bytes) -> ApiError:
    try:
        payload = json.loads(body)
    except ValueError:
        payload = None
    error = error_of(response.status_code, payload)
    try:
        error.retry_after = min(max(float(response.headers.get("retry-after", "")), 0.0), LONGEST_RETRY_S)
    except ValueError:  # a date, or nothing
        error.retry_after = None
    if error.retry_after != error.retry_after:  # NaN
        error.retry_after = None
    return error
