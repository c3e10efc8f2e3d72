"""Any engine of ours as a replica."""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import AsyncGenerator, Mapping
from typing import Any

from pydantic import ValidationError

from distill_ray.config import SamplingConfig
from distill_ray.config.engine import BaseEngineConfig
from distill_ray.engines import make_engine
from distill_ray.errors import ApiError, EngineError, RequestRejected
from distill_ray.pipeline.cluster import redirect_output
from distill_ray.pipeline.folder import RunFolder
from distill_ray.records import Completion, Message
from distill_ray.serving.backends import Method
from distill_ray.serving.chunks import as_chunks
from distill_ray.serving.front.wire import wrong_part
from distill_ray.serving.models.student import InstalledStudent, engine_here

# What `EngineModel` passes on, and what says nothing about the answer.
_KNOWN = frozenset(
    {"model", "messages", "stream", "stream_options", "temperature", "top_p", "max_tokens", "max_completion_tokens"}
    | {"n", "stop", "seed", "user", "metadata", "store", "safety_identifier", "prompt_cache_key"}
)
_NEUTRAL: dict[str, Any] = {
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "logprobs": False,
    "top_logprobs": 0,
    "tools": [],
    "tool_choice": "none",
    "logit_bias": {},
    "response_format": {"type": "text"},
    "parallel_tool_calls": True,
}


class EngineModel:
    """Replica: an engine of ours (`hf` for encoder-decoder students, `fake`, another package's).

    Its answers are made whole and, where a stream is asked for, sent as one chunk.
    """

    async def __init__(self, config: BaseEngineConfig | InstalledStudent, role: str, folder: RunFolder) -> None:
        redirect_output(folder, f"{role}-{os.getpid()}")
        self._config, self._name = await engine_here(config), role
        self._engine = make_engine(self._config)
        await self._engine.start()

    async def answer(self, method: Method, body: Mapping[str, Any]) -> AsyncGenerator[str, None]:
        """See the module docstring."""
        try:
            messages, sampling = self._request(method, body)
            samples = await self._engine.generate(messages, sampling)
        except ValidationError as error:
            yield json.dumps({**ApiError(400, ": ".join(wrong_part(error))).body, "status": 400})
            return
        except ApiError as error:
            yield json.dumps({**error.body, "status": error.status})
            return
        except RequestRejected as error:
            yield json.dumps({**ApiError(400, error.detail, code=error.reason).body, "status": 400})
            return
        except EngineError as error:
            yield json.dumps({**ApiError(503, str(error), "server_error").body, "status": 503})
            return
        response = _response(samples, self._name)
        for piece in as_chunks(response) if body.get("stream") else [response]:
            yield json.dumps(piece, ensure_ascii=False)

    async def ping(self) -> None:
        """Answers when it is up."""

    def _request(self, method: Method, body: Mapping[str, Any]) -> tuple[list[Message], SamplingConfig]:
        if method != "chat":
            raise ApiError(400, f"the `{self._config.type}` engine answers chats only; use /v1/chat/completions")
        for name, value in body.items():
            if name not in _KNOWN and value is not None and value != _NEUTRAL.get(name):
                raise ApiError(400, f"the `{self._config.type}` engine cannot do `{name}`; leave it out", param=name)
        default = self._config.sampling
        stop = body.get("stop")
        chosen = {
            "temperature": body.get("temperature"),
            "top_p": body.get("top_p"),
            "max_tokens": body.get("max_completion_tokens") or body.get("max_tokens"),
            "n": body.get("n"),
            "stop": [stop] if isinstance(stop, str) else stop,
            "seed": body.get("seed"),
        }
        values = default.model_dump() | {name: value for name, value in chosen.items() if value is not None}
        if values["temperature"] == 0 and values["n"] > 1:
            raise ApiError(400, "n: with temperature 0 all answers would be the same", param="n")
        return [_plain(message) for message in body["messages"]], SamplingConfig(**values)


def _plain(message: Mapping[str, Any]) -> Message:
    role, content = message["role"], message.get("content")
    if isinstance(content, list):
        if any(part.get("type") != "text" for part in content):
            raise ApiError(400, "this model reads text only", param="messages")
        content = "".join(part.get("text", "") for part in content)
    if role == "developer":
        role = "system"
    if role not in ("system", "user", "assistant") or message.get("tool_calls"):
        raise ApiError(400, "this model knows no tools", param="messages")
    return {"role": role, "content": content or ""}


def _response(samples: list[Completion], model: str) -> dict[str, Any]:
    prompt_tokens = sum(sample.prompt_tokens for sample in samples)
    completion_tokens = sum(sample.completion_tokens for sample in samples)
    reasons = {"stop": "stop", "length": "length", "content_filter": "content_filter"}
    return {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "system_fingerprint": model,
        "choices": [
            {
                "index": index,
                "message": {"role": "assistant", "content": sample.text, "refusal": None},
                "logprobs": None,
                "finish_reason": reasons.get(sample.finish_reason, "stop"),
            }
            for index, sample in enumerate(samples)
        ],
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        },
    }
