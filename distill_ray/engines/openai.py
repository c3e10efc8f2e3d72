"""Any OpenAI-compatible URL: llama.cpp server, Ollama, a vLLM server, a vendor.

A request's way: control-token check -> `AdaptiveLimiter` slot -> POST /chat/completions -> translate -> retry
or answer. The official client does the HTTP; its own retries are off, because ours honour every form of
Retry-After, feed the limiter and count towards `max_retries`. Bodies are read as text and parsed here:
compatible servers differ in just the fields that matter (reasoning, token ids, usage), and a proxy's HTML
page with status 200 is an error that may pass.

The key lives in an environment variable and in the client. Errors are built from scratch and raised outside
the `except` blocks, so neither a message nor a traceback carries the client's exception; a key that the
server repeats in its message is masked.

What servers differ in, and what we do:
- `n` ignored (Ollama, llama.cpp) or refused (vLLM when greedy): the missing samples are asked for one by one.
- `max_tokens` refused (OpenAI's reasoning models): `max_completion_tokens` is sent from then on.
- usage missing: counted as 0. Usage of n samples comes as one sum: the prompt is counted on the first sample,
  the completion is split evenly unless the server gives token ids.
- `regex` and `choice` are sent as vLLM's `structured_outputs`; other servers may ignore or refuse them.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import random
import re
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, stop_after_attempt

from distill_ray.config.engine import OpenAIEngineConfig, SamplingConfig, StructuredOutput
from distill_ray.engines.base import Engine
from distill_ray.errors import (
    ConfigError,
    EngineError,
    EngineUnavailable,
    RequestRejected,
    TransientEngineError,
)
from distill_ray.records import Completion, Message, RejectReason

# Spellings of control tokens in the model families that are served today. A remote server tokenises by itself
# and may turn them into the real tokens, so a user's text could end its own turn. Markup and code pass:
# `<strong>`, `<span>`, `x |> f`, `a <| b`. The one collision that we accept is HTML's strikethrough `<s>`,
# which is Llama's and Mistral's bos.
CONTROL_TOKEN_SPELLING = re.compile(
    r"<\|[^\s<>|]{1,64}\|>"  # ChatML, Llama 3, Phi, Harmony: <|im_end|>, <|eot_id|>, <|channel|>
    r"|<｜[^\s<>｜]{1,64}｜>"  # DeepSeek, with full-width bars: <｜User｜>
    r"|</?s>"  # Llama 1 and 2, Mistral
    r"|\[/?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS)\]"  # Llama 2, Mistral
    r"|<</?SYS>>"  # Llama 2
    r"|<(?:start|end)_of_(?:turn|image)>"  # Gemma
    r"|<(?:bos|eos|pad|unk|mask)>"  # Gemma and many others
    r"|<(?:BOS|EOS|PAD|UNK)_TOKEN>"  # Command R
)

_TOO_LONG = re.compile(
    r"context.{0,10}(?:length|size|window)|prompt is too long|input.{0,20}too long|too many (?:input )?tokens"
    r"|(?:input|prompt).{0,40}exceeds.{0,40}(?:maximum|limit|context)",
    re.IGNORECASE | re.DOTALL,
)
_TRANSIENT_STATUS = frozenset({408, 409, 425, 429})
_MAX_BACKOFF_S = 60.0
_FINISH_REASONS = {
    "length": "length",
    "max_tokens": "length",
    "content_filter": "content_filter",
    "abort": "abort",
}


class AdaptiveLimiter:
    """At most `limit` requests in flight: halves on 429, climbs by one per round trip on success.

    Additive increase, multiplicative decrease, as TCP does (Chiu and Jain 1989). A burst of 429s is one
    signal: requests that were admitted before the last cut do not cut again. While a server's Retry-After
    runs, nobody is admitted. First come, first served. Used from one event loop.
    """

    def __init__(self, most: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.most = most
        self.limit = float(most)
        self.num_in_flight = 0
        self._clock = clock
        self._num_admitted = 0
        self._cut_at = 0  # value of _num_admitted at the last cut
        self._paused_until = float("-inf")
        self._timer: asyncio.TimerHandle | None = None
        self._waiting: deque[asyncio.Future[None]] = deque()

    @contextlib.asynccontextmanager
    async def slot(self) -> AsyncIterator[int]:
        """Wait for a place; gives the ticket that `throttled` wants."""
        waiter = asyncio.get_running_loop().create_future()
        self._waiting.append(waiter)
        self._admit()
        try:
            await waiter
        except asyncio.CancelledError:
            if not waiter.cancelled():  # admitted and cancelled in the same turn of the loop
                self._leave()
            raise
        try:
            yield self._next_ticket()
        finally:
            self._leave()

    def succeeded(self) -> None:
        """A request was answered: climb by one place per `limit` answers."""
        self.limit = min(float(self.most), self.limit + 1.0 / self.limit)
        self._admit()

    def throttled(self, ticket: int, pause_s: float = 0.0) -> None:
        """A request met a 429: halve, once per burst, and admit nobody for `pause_s` seconds."""
        if ticket >= self._cut_at:
            self.limit = max(1.0, self.limit / 2)
            self._cut_at = self._num_admitted
        self._paused_until = max(self._paused_until, self._clock() + pause_s)

    def _next_ticket(self) -> int:
        self._num_admitted += 1
        return self._num_admitted - 1

    def _leave(self) -> None:
        self.num_in_flight -= 1
        self._admit()

    def _end_pause(self) -> None:
        self._timer = None
        self._admit()

    def _admit(self) -> None:
        pause_s = self._paused_until - self._clock()
        if pause_s > 0:
            if self._waiting and self._timer is None:
                self._timer = asyncio.get_running_loop().call_later(pause_s, self._end_pause)
            return
        while self._waiting and self.num_in_flight < int(self.limit):
            waiter = self._waiting.popleft()
            if not waiter.done():  # done here means cancelled while waiting
                self.num_in_flight += 1
                waiter.set_result(None)


class OpenAIEngine(Engine):
    """Answers through an OpenAI-compatible server.

    Args:
        config: the `teacher:` section.
        backoff_s: first wait between tries; doubles with each. Tests make it short.
    """

    def __init__(self, config: OpenAIEngineConfig, *, backoff_s: float = 0.5) -> None:
        self.config = config
        self.limiter = AdaptiveLimiter(config.max_concurrency)
        # extra_body can change every answer; its hash, not its text, for it may hold something private.
        extra_json = json.dumps(config.extra_body, sort_keys=True).encode()
        extra = f"+{hashlib.blake2b(extra_json, digest_size=4).hexdigest()}" if config.extra_body else ""
        self.identity = f"openai:{config.model}{extra}"
        self._backoff_s = backoff_s
        self._client: Any = None
        self._key = ""
        self._max_tokens_name = "max_tokens"
        self._refuses_n = False

    async def start(self) -> None:
        """Read the key and list the models, which costs nothing and shows a wrong URL or key."""
        if self._client is not None:
            return
        from openai import AsyncOpenAI

        _refuse_credentials_in_url(self.config.base_url)
        self._key = _read_key(self.config.api_key_env)
        self._client = AsyncOpenAI(
            api_key=self._key or "none",  # the client insists on one
            base_url=self.config.base_url,
            max_retries=0,
            timeout=self.config.timeout_s,
        )
        try:
            await self._check_connection()
        except BaseException:
            await self.close()
            raise

    async def generate(
        self, messages: Sequence[Message], sampling: SamplingConfig, *, first_sample: int = 0
    ) -> list[Completion]:
        _refuse_control_tokens(messages)
        samples: list[Completion] = []
        num_wanted = sampling.n - first_sample
        refused: RequestRejected | None = None
        # Greedy samples are asked for one by one: vLLM refuses n > 1 there.
        if num_wanted > 1 and sampling.temperature > 0 and not self._refuses_n:
            try:
                samples = await self._ask(messages, sampling, first_sample, num_wanted)
            except RequestRejected as error:
                if error.reason != RejectReason.BAD_REQUEST:
                    raise
                refused = error
        if len(samples) < num_wanted:  # one first: where it is refused as well, n was not the reason
            samples += await self._ask(messages, sampling, first_sample + len(samples), 1)
            self._refuses_n = self._refuses_n or refused is not None
        rest = range(first_sample + len(samples), sampling.n)
        answers = await asyncio.gather(
            *(self._ask(messages, sampling, index, 1) for index in rest), return_exceptions=True
        )
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
            samples += answer
        return samples

    async def close(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            await client.close()

    async def _check_connection(self) -> None:
        """Raise unless the server answers. One without /models (404, 405, 501) is fine; so is a busy one."""
        try:
            await self._retrying(min(self.config.max_retries, 3))(self._try_models)
        except TransientEngineError as error:
            message = error.message
        else:
            return
        raise EngineUnavailable(f"{message}; is the server running, and is base_url right?")

    async def _try_models(self) -> None:
        import openai

        failure: EngineError | None = None
        try:
            async with asyncio.timeout(min(self.config.timeout_s, 30.0)):
                await self._client.get("/models", cast_to=str)
        except (openai.OpenAIError, TimeoutError) as error:
            status = getattr(error, "status_code", None)
            if status in (401, 403) or status is None or status >= 500 and status != 501:
                failure = self._translate(error)
        if failure is not None:
            raise failure

    async def _ask(
        self, messages: Sequence[Message], sampling: SamplingConfig, first_sample: int, num_samples: int
    ) -> list[Completion]:
        """One request for `num_samples` samples, with retries. A server that ignores `n` gives fewer."""
        assert self._client is not None, "generate() before start(), or after close()"
        body = _request_body(self.config, messages, sampling, first_sample, num_samples)

        async def attempt() -> list[Completion]:
            answer = await self._try_chat(
                body | {self._max_tokens_name: sampling.max_tokens} | self.config.extra_body
            )
            return _completions(answer, first_sample, num_samples, sampling.top_logprobs)

        return await self._retrying(self.config.max_retries)(attempt)

    async def _try_chat(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """One POST in a limiter's slot, with the client's errors translated."""
        import openai

        failure: EngineError | None = None
        text = ""
        async with self.limiter.slot() as ticket:
            try:
                async with asyncio.timeout(self.config.timeout_s):
                    text = await self._client.post("/chat/completions", body=body, cast_to=str)
            except (openai.OpenAIError, TimeoutError) as error:
                failure = self._translate(error)
                status = getattr(error, "status_code", None)
                if status == 429 and isinstance(failure, TransientEngineError):
                    wait_s = failure.retry_after or 0.0
                    self.limiter.throttled(ticket, wait_s if wait_s <= self.config.timeout_s else 0.0)
        if isinstance(failure, _WrongMaxTokensName):
            self._max_tokens_name = "max_completion_tokens"
            renamed = {("max_completion_tokens" if k == "max_tokens" else k): v for k, v in body.items()}
            return await self._try_chat(renamed)
        if failure is not None:
            raise failure
        self.limiter.succeeded()
        return self._read_body(text)

    def _read_body(self, text: str) -> dict[str, Any]:
        """Parse an answer with status 200.

        Raises:
            EngineError: it is no chat completion, or carries an error (some gateways send those with status
            200).
        """
        answer: Any = None
        with contextlib.suppress(ValueError):
            answer = json.loads(text)
        if isinstance(answer, dict) and isinstance(answer.get("error"), dict) and not answer.get("choices"):
            code = answer["error"].get("code")
            raise self._translate_status(code if isinstance(code, int) else 500, answer["error"], None)
        if not _is_chat_completion(answer):
            start = " ".join(self._masked(text)[:80].split())
            raise TransientEngineError(
                f"{self.config.base_url}: no chat completion; the answer begins {start!r}"
            )
        return answer

    def _retrying(self, max_retries: int) -> AsyncRetrying:
        """The policy: what may pass, with exponential backoff and jitter, no sooner than Retry-After asks."""

        def wait_s(state: RetryCallState) -> float:
            backoff_s = min(_MAX_BACKOFF_S, self._backoff_s * 2 ** (state.attempt_number - 1))
            return (_retry_after(state) or 0.0) + random.uniform(backoff_s / 2, backoff_s)

        def is_last(state: RetryCallState) -> bool:
            # A wait beyond the time-out is the next run's business: the row is rejected as one that may pass.
            too_late = (_retry_after(state) or 0.0) > self.config.timeout_s
            return too_late or stop_after_attempt(max_retries + 1)(state)

        def give_up(state: RetryCallState) -> None:
            error = state.outcome.exception() if state.outcome else None
            assert isinstance(error, TransientEngineError)
            tries = "try" if state.attempt_number == 1 else "tries"
            message = f"{error.message} (after {state.attempt_number} {tries})"
            raise TransientEngineError(message, error.retry_after)

        return AsyncRetrying(
            retry=retry_if_exception_type(TransientEngineError),
            stop=is_last,
            wait=wait_s,
            retry_error_callback=give_up,
        )

    def _translate(self, error: Exception) -> EngineError:
        """One of our errors for one of the client's."""
        import openai

        url = self.config.base_url
        if isinstance(error, openai.APIStatusError):
            return self._translate_status(error.status_code, error.body, error.response.headers)
        if isinstance(error, openai.APITimeoutError | TimeoutError):
            return TransientEngineError(f"{url}: no answer within {self.config.timeout_s:g} s (timeout_s)")
        if isinstance(error, openai.APIConnectionError):
            return TransientEngineError(f"cannot reach {url} ({type(error.__cause__ or error).__name__})")
        return TransientEngineError(f"{url}: {type(error).__name__}")

    def _translate_status(self, status: int, body: object, headers: Mapping[str, str] | None) -> EngineError:
        """One of our errors for a status and an error body: by status and code, by text where that is all."""
        model, env = self.config.model, self.config.api_key_env
        fields = _error_fields(body)
        said = self._masked(fields["message"])
        where = f"{self.config.base_url}: {status} {said}".rstrip()
        if status == 402 or fields["code"] == "insufficient_quota":
            return EngineUnavailable(f"{where}; the account behind {env} has no quota left")
        if status in _TRANSIENT_STATUS or status >= 500:
            return TransientEngineError(where, retry_after_s(headers or {}))
        if status in (401, 403):
            key = (
                f"the key in the environment variable {env} is wrong"
                if env
                else "it wants a key: set api_key_env"
            )
            return EngineUnavailable(f"{where}; {key}, or may not use the model {model}")
        if status in (404, 405):
            return EngineUnavailable(
                f"{where}; check that it serves the model {model}, and base_url (.../v1)"
            )
        if fields["param"] == "max_tokens" and "max_completion_tokens" in said:
            return _WrongMaxTokensName(said)
        if status == 413 or "context" in fields["code"] + fields["type"] or _TOO_LONG.search(said):
            return RequestRejected(RejectReason.PROMPT_TOO_LONG, where)
        if fields["code"] == "content_filter":
            return RequestRejected(RejectReason.REFUSED, where)
        return RequestRejected(RejectReason.BAD_REQUEST, where)

    def _masked(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text


class _WrongMaxTokensName(EngineError):
    """The server wants `max_completion_tokens`. Never leaves this module."""


def _read_key(name: str | None) -> str:
    if name is None:
        return ""
    key = os.environ.get(name, "").strip()
    if not key:
        raise ConfigError(
            f"api_key_env: the environment variable {name} is not set; run `export {name}=...`, "
            "or give `api_key_env: null` for a server that asks for no key"
        )
    # The HTTP library would put such a header into its error message.
    if not (key.isascii() and key.isprintable()):
        raise ConfigError(f"api_key_env: the value of {name} holds characters that no key has; set it again")
    return key


def _refuse_credentials_in_url(url: str) -> None:
    if "@" in urlsplit(url).netloc:  # it would appear in every log line of the HTTP library
        raise ConfigError("base_url: holds a user name or password; use the variable of api_key_env")


def _refuse_control_tokens(messages: Sequence[Message]) -> None:
    for message in messages:
        found = CONTROL_TOKEN_SPELLING.search(message["content"])
        if found:
            raise RequestRejected(
                RejectReason.CONTROL_TOKENS,
                f"the {message['role']} message spells the control token {found.group()!r}, which a remote "
                "server may take for a real one; the engines vllm and hf keep it as text",
            )


def _request_body(
    config: OpenAIEngineConfig,
    messages: Sequence[Message],
    sampling: SamplingConfig,
    first_sample: int,
    num_samples: int,
) -> dict[str, Any]:
    body: dict[str, Any] = {
        "model": config.model,
        "messages": [dict(m) for m in messages],
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "seed": sampling.seed + first_sample,
    }
    if num_samples > 1:
        body["n"] = num_samples
    if sampling.stop:
        body["stop"] = sampling.stop
    if sampling.top_logprobs:
        body |= {"logprobs": True, "top_logprobs": sampling.top_logprobs}
    return body | (_structured_fields(sampling.structured) if sampling.structured else {})


def _structured_fields(structured: StructuredOutput) -> dict[str, Any]:
    if structured.json_schema is not None:
        schema = {"name": "answer", "schema": structured.json_schema, "strict": True}
        return {"response_format": {"type": "json_schema", "json_schema": schema}}
    return {"structured_outputs": structured.model_dump(include={"regex", "choice"}, exclude_none=True)}


def _is_chat_completion(answer: object) -> bool:
    choices = answer.get("choices") if isinstance(answer, dict) else None
    return (
        isinstance(choices, list)
        and bool(choices)
        and all(isinstance(c, dict) and isinstance(c.get("message"), dict) for c in choices)
    )


def _completions(
    answer: Mapping[str, Any], first_sample: int, num_samples: int, top_logprobs: int
) -> list[Completion]:
    """The choices in order of their index, at most `num_samples`."""
    choices = sorted(answer["choices"], key=lambda choice: choice.get("index") or 0)
    usage = answer.get("usage") or {}
    share, remainder = divmod(usage.get("completion_tokens") or 0, len(choices))
    completions = []
    for i, choice in enumerate(choices[:num_samples]):
        message = choice["message"]
        text, finish_reason = _text_and_finish_reason(choice)
        ids = choice.get("token_ids")  # vLLM, with extra_body {return_token_ids: true}
        topk_ids, topk_logprobs = _topk(choice, top_logprobs)
        completions.append(
            Completion(
                text=text,
                finish_reason=finish_reason,
                prompt_tokens=(usage.get("prompt_tokens") or 0) if i == 0 else 0,
                completion_tokens=len(ids) if ids else share + (i < remainder),
                sample_index=first_sample + i,
                reasoning=message.get("reasoning") or message.get("reasoning_content") or None,
                token_ids=ids or None,
                topk_ids=topk_ids,
                topk_logprobs=topk_logprobs,
            )
        )
    return completions


def _text_and_finish_reason(choice: Mapping[str, Any]) -> tuple[str, str]:
    message = choice["message"]
    content = message.get("content") or ""
    if isinstance(content, list):  # parts; those that are not text (thinking, tool use) are no answer
        content = "".join(part.get("text", "") for part in content if part.get("type") == "text")
    if not content and message.get("refusal"):
        return "", "content_filter"
    return content, _FINISH_REASONS.get(choice.get("finish_reason") or "stop", "stop")


def _topk(choice: Mapping[str, Any], k: int) -> tuple[np.ndarray | None, np.ndarray | None]:
    """The top k per position, best first: ids [T, K] int32, logprobs [T, K] float32 filled up with -inf.

    Ids only where the server names tokens by id: vLLM with extra_body {return_tokens_as_token_ids: true}.
    """
    positions = (choice.get("logprobs") or {}).get("content") or []
    if not k or not positions:
        return None, None
    ids = np.zeros((len(positions), k), dtype=np.int32)
    logprobs = np.full((len(positions), k), -np.inf, dtype=np.float32)
    has_ids = True
    for t, position in enumerate(positions):
        # vLLM puts the sampled token first, whatever its rank
        best = sorted(position.get("top_logprobs") or [], key=lambda top: -top["logprob"])[:k]
        for rank, top in enumerate(best):
            logprobs[t, rank] = top["logprob"]
            named = re.fullmatch(r"token_id:(\d+)", top["token"])
            has_ids = has_ids and named is not None
            ids[t, rank] = int(named.group(1)) if named else 0
    return (ids if has_ids else None), logprobs


def _retry_after(state: RetryCallState) -> float | None:
    error = state.outcome.exception() if state.outcome else None
    return error.retry_after if isinstance(error, TransientEngineError) else None


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


def _error_fields(body: object) -> dict[str, str]:
    """`message`, `code`, `type`, `param` of an error body, whatever its shape; empty where missing."""
    fields = body.get("error", body) if isinstance(body, Mapping) else body
    if not isinstance(fields, Mapping):
        return {"message": " ".join(str(fields or "")[:200].split()), "code": "", "type": "", "param": ""}
    message = fields.get("message") or fields.get("detail") or ""
    return {
        "message": " ".join(str(message)[:500].split()),
        **{name: str(fields.get(name) or "") for name in ("code", "type", "param")},
    }
