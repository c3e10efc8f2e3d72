"""Any OpenAI-compatible URL: llama.cpp server, Ollama, a vLLM server, a vendor.

A request's way: control-token check -> `limiter.AdaptiveLimiter` slot -> POST /chat/completions ->
`openai_errors.ErrorTranslator` -> retry, or `openai_wire.completions`. The official client does the HTTP; its own
retries are off, because ours honour every form of Retry-After, feed the limiter and count towards `max_retries`.
Bodies are read as text and parsed here: compatible servers differ in just the fields that matter (reasoning, token
ids, usage), and a proxy's HTML page with status 200 is an error that may pass.

The key lives in an environment variable, in the client and in the translator, which masks it; no error holds it.

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
from collections.abc import Mapping, Sequence
from typing import Any

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, stop_after_attempt

from distill_ray.config.engine import TOKEN_ID_SWITCHES, OpenAIEngineConfig, SamplingConfig
from distill_ray.engines.base import Engine, request_seed
from distill_ray.engines.limiter import AdaptiveLimiter
from distill_ray.engines.openai_errors import ErrorTranslator, WrongMaxTokensName
from distill_ray.engines.openai_wire import completions, is_chat_completion, request_body
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

_MAX_BACKOFF_S = 60.0


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
        self._errors = ErrorTranslator(config, key="")  # `start` reads the key
        self._max_tokens_name = "max_tokens"
        self._refuses_n = False
        self._has_given_logprobs = False

    async def start(self) -> None:
        """Read the key and list the models, which costs nothing and shows a wrong URL or key."""
        if self._client is not None:
            return
        from openai import AsyncOpenAI

        key = read_key(self.config.api_key_env)
        self._errors = ErrorTranslator(self.config, key)
        self._client = AsyncOpenAI(
            api_key=key or "none",  # the client insists on one
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
        """Ask for all samples at once, and one by one for those that the server does not give that way."""
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
        try:
            if len(samples) < num_wanted:  # one first: where it is refused as well, n was not the reason
                samples += await self._ask(messages, sampling, first_sample + len(samples), 1)
                self._refuses_n = self._refuses_n or refused is not None
            rest = range(first_sample + len(samples), sampling.n)
            answers = await asyncio.gather(
                *(self._ask(messages, sampling, index, 1) for index in rest), return_exceptions=True
            )
            samples += [sample for answer in answers if not isinstance(answer, BaseException) for sample in answer]
            for answer in answers:
                if isinstance(answer, BaseException):
                    raise answer
        except EngineError as error:
            error.paid = samples
            raise
        return samples

    async def close(self) -> None:
        """Close the client's connections."""
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
            if status in (401, 403) or status is None or (status >= 500 and status != 501):
                failure = self._errors.translate(error)
        if failure is not None:
            raise failure

    async def _ask(
        self, messages: Sequence[Message], sampling: SamplingConfig, first_sample: int, num_samples: int
    ) -> list[Completion]:
        """One request for `num_samples` samples, with retries. A server that ignores `n` gives fewer."""
        assert self._client is not None, "generate() before start(), or after close()"
        seed = request_seed(sampling.seed, self.prompt_key(messages)) + first_sample
        body = request_body(self.config, messages, sampling, seed, num_samples)

        async def attempt() -> list[Completion]:
            answer = await self._try_chat(body | {self._max_tokens_name: sampling.max_tokens} | self.config.extra_body)
            try:
                samples = completions(answer, first_sample, num_samples, sampling.top_logprobs)
            except (TypeError, ValueError, KeyError, AttributeError) as error:
                message = f"the server's answer is not what the protocol says ({type(error).__name__})"
                raise TransientEngineError(message) from error
            if sampling.top_logprobs and not self._has_given_logprobs:
                self._require_logprobs(samples)
            return samples

        return await self._retrying(self.config.max_retries)(attempt)

    def _require_logprobs(self, samples: Sequence[Completion]) -> None:
        """Look at the first answers for what was asked for, so that a server that cannot give it is not paid for all.

        Raises:
            EngineUnavailable: log-probabilities are missing, or ids that `extra_body` asks for.
        """
        for sample in samples:
            if not sample.text:
                continue
            missing = "log-probabilities (sampling.top_logprobs)" if sample.topk_logprobs is None else None
            for name, found in zip(TOKEN_ID_SWITCHES, (sample.token_ids, sample.topk_ids), strict=True):
                if missing is None and self.config.extra_body.get(name) and found is None:
                    missing = f"token ids (extra_body.{name})"
            if missing is not None:
                raise EngineUnavailable(
                    f"{self.config.base_url}: the server answers without {missing} for the model {self.config.model}; "
                    "take another server or model, or set top_logprobs to 0 and train with cross_entropy"
                )
            self._has_given_logprobs = True

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
                failure = self._errors.translate(error)
                status = getattr(error, "status_code", None)
                if status == 429 and isinstance(failure, TransientEngineError):
                    wait_s = failure.retry_after or 0.0
                    self.limiter.throttled(ticket, wait_s if wait_s <= self.config.timeout_s else 0.0)
        if isinstance(failure, WrongMaxTokensName):
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
            raise self._errors.translate_status(code if isinstance(code, int) else 500, answer["error"], None)
        if not is_chat_completion(answer):
            start = " ".join(self._errors.masked(text)[:80].split())
            raise TransientEngineError(f"{self.config.base_url}: no chat completion; the answer begins {start!r}")
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
            if (error.retry_after or 0.0) > self.config.timeout_s:
                message += f"; it asks to wait {error.retry_after:g} s, longer than teacher.timeout_s"
            raise TransientEngineError(message, error.retry_after)

        def count(_: RetryCallState) -> None:
            self.num_retries += 1

        return AsyncRetrying(
            retry=retry_if_exception_type(TransientEngineError),
            stop=is_last,
            wait=wait_s,
            before_sleep=count,
            retry_error_callback=give_up,
        )


def read_key(name: str | None, where: str = "api_key_env") -> str:
    """The key in an environment variable; empty where none is named.

    Args:
        name: of the variable.
        where: the dotted config key that names it.

    Raises:
        ConfigError: it is not set, or holds no key.
    """
    if name is None:
        return ""
    key = os.environ.get(name, "").strip()
    if not key:
        raise ConfigError(
            f"{where}: the environment variable {name} is not set; run `export {name}=...`, "
            "or give `api_key_env: null` for a server that asks for no key"
        )
    # The HTTP library would put such a header into its error message.
    if not (key.isascii() and key.isprintable()):
        raise ConfigError(f"{where}: the value of {name} holds characters that no key has; set it again")
    return key


def _refuse_control_tokens(messages: Sequence[Message]) -> None:
    for message in messages:
        found = CONTROL_TOKEN_SPELLING.search(message["content"])
        if found:
            raise RequestRejected(
                RejectReason.CONTROL_TOKENS,
                f"the {message['role']} message spells the control token {found.group()!r}, which a remote "
                "server may take for a real one; the engines vllm and hf keep it as text",
            )


def _retry_after(state: RetryCallState) -> float | None:
    error = state.outcome.exception() if state.outcome else None
    return error.retry_after if isinstance(error, TransientEngineError) else None
