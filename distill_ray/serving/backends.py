"""Who answers OpenAI requests behind the router: one method, whoever it is.

A remote server is here; a model in this cluster is a `models.DeployedBackend`; tests bring their own.
"""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Mapping
from typing import Any, Literal

import httpx

from distill_ray.config import OpenAIEngineConfig
from distill_ray.errors import ApiError
from distill_ray.serving.front.wire import error_of

Method = Literal["chat", "completions"]

PATHS: dict[str, str] = {"chat": "/chat/completions", "completions": "/completions"}
UP_S = 2.0  # for a look whether somebody is there


class Backend(ABC):
    """Someone who answers.

    `name` is what answers, for people and for the store: "vllm:demo@1f3a".
    """

    name: str

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
                    yield _payload(await response.aread())
                    return
                async for line in response.aiter_lines():
                    if not line.startswith("data:"):
                        continue
                    data = line[5:].strip()
                    if data == "[DONE]":
                        return
                    yield _payload(data)
        except httpx.TimeoutException as error:
            raise ApiError(504, f"{self.name} did not answer in time", "server_error") from error
        except httpx.HTTPError as error:
            raise ApiError(503, f"{self.name} cannot be reached ({type(error).__name__})", "server_error") from error
        if body.get("stream"):
            raise ApiError(502, f"{self.name} ended its answer without saying so", "server_error")

    async def is_up(self) -> bool:
        """Whether the server answers at all."""
        try:
            response = await self._client.get(self._config.base_url + "/models", timeout=UP_S)
        except httpx.HTTPError:
            return False
        return response.status_code < 500

    async def close(self) -> None:
        """Close its connections."""
        await self._client.aclose()


def _payload(data: str | bytes) -> dict[str, Any]:
    try:
        payload = json.loads(data)
    except ValueError as error:
        raise ApiError(502, "what the model's server sent is not JSON", "server_error") from error
    if not isinstance(payload, dict) or "error" in payload:
        raise error_of(502, payload)
    return payload


def _refusal(response: httpx.Response, body: bytes) -> ApiError:
    try:
        payload = json.loads(body)
    except ValueError:
        payload = None
    error = error_of(response.status_code, payload)
    try:
        error.retry_after = float(response.headers.get("retry-after", ""))
    except ValueError:
        error.retry_after = None
    return error
