"""What an OpenAI-compatible server or its client reports, as one of our errors: the engine's only place for that.

Our errors are built from scratch and the engine raises them outside its `except` blocks, so neither a message nor a
traceback carries the client's exception, which holds the key. A key that the server repeats in its message is masked.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime

from distill_ray.config.engine import OpenAIEngineConfig
from distill_ray.errors import EngineError, EngineUnavailable, RequestRejected, TransientEngineError
from distill_ray.records import RejectReason

_TOO_LONG = re.compile(
    r"context.{0,10}(?:length|size|window)|prompt is too long|input.{0,20}too long|too many (?:input )?tokens"
    r"|(?:input|prompt).{0,40}exceeds.{0,40}(?:maximum|limit|context)",
    re.IGNORECASE | re.DOTALL,
)
TRANSIENT_STATUS = frozenset({408, 409, 425, 429})


class WrongMaxTokensName(EngineError):
    """The server wants `max_completion_tokens`. The engine asks again; it never leaves the engine."""


class ErrorTranslator:
    """Turns foreign errors into ours, for one server.

    Args:
        config: names the server, the model and the key's variable in messages.
        key: masked wherever the server repeats it; empty for none.
    """

    def __init__(self, config: OpenAIEngineConfig, key: str) -> None:
        self._config = config
        self._key = key

    def translate(self, error: Exception) -> EngineError:
        """One of our errors for one of the client's."""
        import openai

        url = self._config.base_url
        if isinstance(error, openai.APIStatusError):
            return self.translate_status(error.status_code, error.body, error.response.headers)
        if isinstance(error, openai.APITimeoutError | TimeoutError):
            return TransientEngineError(f"{url}: no answer within {self._config.timeout_s:g} s (timeout_s)")
        if isinstance(error, openai.APIConnectionError):
            return TransientEngineError(f"cannot reach {url} ({type(error.__cause__ or error).__name__})")
        return TransientEngineError(f"{url}: {type(error).__name__}")

    def translate_status(self, status: int, body: object, headers: Mapping[str, str] | None) -> EngineError:
        """One of our errors for a status and an error body: by status and code, by text where that is all."""
        model, env = self._config.model, self._config.api_key_env
        fields = error_fields(body)
        said = self.masked(fields["message"])
        where = f"{self._config.base_url}: {status} {said}".rstrip()
        if status == 402 or fields["code"] == "insufficient_quota":
            return EngineUnavailable(f"{where}; the account behind {env} has no quota left")
        if status in TRANSIENT_STATUS or status >= 500:
            return TransientEngineError(where, retry_after_s(headers or {}))
        if status in (401, 403):
            key = f"the key in the environment variable {env} is wrong" if env else "it wants a key: set api_key_env"
            return EngineUnavailable(f"{where}; {key}, or may not use the model {model}")
        if status in (404, 405):
            return EngineUnavailable(f"{where}; check that it serves the model {model}, and base_url (.../v1)")
        if fields["param"] == "max_tokens" and "max_completion_tokens" in said:
            return WrongMaxTokensName(said)
        if status == 413 or "context" in fields["code"] + fields["type"] or _TOO_LONG.search(said):
            return RequestRejected(RejectReason.PROMPT_TOO_LONG, where)
        if fields["code"] == "content_filter":
            return RequestRejected(RejectReason.REFUSED, where)
        return RequestRejected(RejectReason.BAD_REQUEST, where)

    def masked(self, text: str) -> str:
        """The text without the key."""
        return text.replace(self._key, "***") if self._key else text


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Seconds that a server asks to wait: `retry-after-ms`, or `retry-after` as seconds or an HTTP date."""
    with contextlib.suppress(ValueError):
        return max(0.0, float(headers.get("retry-after-ms", "")) / 1000)
    value = headers.get("retry-after", "")
    with contextlib.suppress(ValueError):
        return max(0.0, float(value))
    with contextlib.suppress(ValueError, TypeError):
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    return None


def error_fields(body: object) -> dict[str, str]:
    """`message`, `code`, `type`, `param` of an error body, whatever its shape; empty where missing."""
    fields = body.get("error", body) if isinstance(body, Mapping) else body
    if not isinstance(fields, Mapping):
        return {"message": " ".join(str(fields or "")[:200].split()), "code": "", "type": "", "param": ""}
    message = fields.get("message") or fields.get("detail") or ""
    return {
        "message": " ".join(str(message)[:500].split()),
        **{name: str(fields.get(name) or "") for name in ("code", "type", "param")},
    }
