"""Deterministic answers without a model: for tests, dry runs, and breaking things on purpose.

    engine = FakeEngine(FakeEngineConfig(answer="{{ query | upper }}", transient_error_rate=0.3))

The answer is a Jinja template (sandboxed) over `query` (the last user message), `system` and `sample_index`.
What goes wrong is a function of (`failure_seed`, prompt, attempt) through a hash, so a test can name the rows
that fail, and a second run fails on the same ones. Tokens are words: usage, `max_tokens` and `max_model_len`
count whitespace-separated words. Temperature, top_p, json_schema and regex change nothing; `choice` picks one
of the choices by prompt and seed.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence

from jinja2 import StrictUndefined, TemplateError
from jinja2.sandbox import SandboxedEnvironment

from distill_ray.config.engine import FakeEngineConfig, SamplingConfig
from distill_ray.engines.base import Engine
from distill_ray.errors import ConfigError, EngineUnavailable, RequestRejected, TransientEngineError
from distill_ray.records import Completion, Message, RejectReason

REFUSAL = "I'm sorry, but I can't help with that."
_BACKOFF_S = 0.001


class FakeEngine(Engine):
    """Answers from a template; `num_calls` counts calls of `generate`, `num_attempts` the tries in them."""

    def __init__(self, config: FakeEngineConfig) -> None:
        self.config = config
        # Everything that changes an answer, so that the ledger never replays another fake's.
        answers = config.model_dump_json(
            include={"answer", "empty_rate", "cut_off_rate", "refusal_rate", "failure_seed"}
        )
        digest = hashlib.blake2b(answers.encode(), digest_size=8).hexdigest()
        self.identity = f"fake:{config.model}@{digest}"
        self.num_calls = 0
        self.num_attempts = 0
        self._slots = asyncio.Semaphore(config.max_concurrency)
        self._template = None

    async def start(self) -> None:
        """Try the template; fail if the config says so."""
        if self.config.unavailable:
            raise EngineUnavailable("the fake engine is told to be unavailable (`unavailable: true`)")
        environment = SandboxedEnvironment(undefined=StrictUndefined)
        try:
            self._template = environment.from_string(self.config.answer)
            self._template.render(query="", system="", sample_index=0)
        except TemplateError as error:
            raise ConfigError(
                f"answer: {self.config.answer!r} cannot be rendered ({error}); "
                "the names are query, system, sample_index"
            ) from error

    async def generate(
        self, messages: Sequence[Message], sampling: SamplingConfig, *, first_sample: int = 0
    ) -> list[Completion]:
        """Render the template once per sample, after the failures that the config asks for."""
        self.num_calls += 1
        prompt = self.prompt_key(messages)
        prompt_words = sum(len(m["content"].split()) for m in messages)
        longest = self.config.max_model_len
        if longest is not None and prompt_words > longest:
            raise RequestRejected(
                RejectReason.PROMPT_TOO_LONG,
                f"the prompt has {prompt_words} words, max_model_len is {longest}",
            )
        async with self._slots:
            await self._pass_failures(prompt)
            samples = [self._sample(messages, prompt, sampling, i) for i in range(first_sample, sampling.n)]
        for completion in samples[:1]:
            completion.prompt_tokens = prompt_words
        return samples

    async def close(self) -> None:
        """Forget the template, so that a call after this fails as it does on a real engine."""
        self._template = None

    async def _pass_failures(self, prompt: bytes) -> None:
        """Try until an attempt does not fail.

        Raises:
            TransientEngineError: all of them failed.
        """
        always_fails = self._chance("fatal", prompt) < self.config.fatal_error_rate
        for attempt in range(self.config.max_retries + 1):
            self.num_attempts += 1
            await asyncio.sleep(self.config.latency_s)
            if not always_fails and self._chance(f"transient {attempt}", prompt) >= self.config.transient_error_rate:
                return
            await asyncio.sleep(_BACKOFF_S)
        raise TransientEngineError(f"the fake engine failed on purpose (after {self.config.max_retries + 1} tries)")

    def _sample(self, messages: Sequence[Message], prompt: bytes, sampling: SamplingConfig, index: int) -> Completion:
        text = self._cut_at_stop(self._answer(messages, prompt, sampling, index), sampling.stop)
        words = text.split()
        finish_reason = "stop"
        if len(words) > sampling.max_tokens:
            words, finish_reason = words[: sampling.max_tokens], "length"
        elif self._chance("cut off", prompt) < self.config.cut_off_rate:
            words, finish_reason = words[: len(words) // 2], "length"
        return Completion(
            text=text if finish_reason == "stop" else " ".join(words),
            finish_reason=finish_reason,
            prompt_tokens=0,  # counted on the first sample of the call
            completion_tokens=len(words) + (finish_reason == "stop"),  # the end counts as one, as in a real model
            sample_index=index,
        )

    def _answer(self, messages: Sequence[Message], prompt: bytes, sampling: SamplingConfig, index: int) -> str:
        if self._chance("empty", prompt) < self.config.empty_rate:
            return ""
        if self._chance("refusal", prompt) < self.config.refusal_rate:
            return REFUSAL
        if sampling.structured is not None and sampling.structured.choice:
            choices = sampling.structured.choice
            return choices[int(self._chance(f"choice {sampling.seed + index}", prompt) * len(choices))]
        assert self._template is not None, "generate() before start(), or after close()"
        return self._template.render(
            query=_last(messages, "user"), system=_last(messages, "system"), sample_index=index
        )

    def _chance(self, what: str, prompt: bytes) -> float:
        """A number in [0, 1) that only `failure_seed`, `what` and the prompt decide."""
        data = f"{self.config.failure_seed} {what} ".encode() + prompt
        return int.from_bytes(hashlib.blake2b(data, digest_size=6).digest()) / 2**48

    @staticmethod
    def _cut_at_stop(text: str, stop: Sequence[str]) -> str:
        return text[: min((text.index(s) for s in stop if s in text), default=len(text))]


def _last(messages: Sequence[Message], role: str) -> str:
    return next((m["content"] for m in reversed(messages) if m["role"] == role), "")
