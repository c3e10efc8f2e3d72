"""FakeEngine: every knob, and that all of it is a function of (failure_seed, prompt, attempt)."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from typing import Any

import pytest

from distill_ray.config.engine import FakeEngineConfig, HfEngineConfig, SamplingConfig, StructuredOutput
from distill_ray.engines import make_engine
from distill_ray.engines.fake import REFUSAL, FakeEngine
from distill_ray.errors import ConfigError, EngineUnavailable, RequestRejected, TransientEngineError
from distill_ray.records import Completion, Message, RejectReason

PROMPTS = [f"question number {i}" for i in range(200)]


def user(text: str) -> list[Message]:
    return [{"role": "user", "content": text}]


async def started(**config: Any) -> FakeEngine:
    engine = FakeEngine(FakeEngineConfig.model_validate(config))
    await engine.start()
    return engine


def ask(messages: list[Message], sampling: SamplingConfig | None = None, **config: Any) -> list[Completion]:
    async def run() -> list[Completion]:
        return await (await started(**config)).generate(messages, sampling or SamplingConfig())

    return asyncio.run(run())


def outcomes(**config: Any) -> list[str]:
    """Per prompt of PROMPTS: the answer's text, or the name of the error."""

    async def run() -> list[str]:
        engine = await started(**config)
        answers = await asyncio.gather(
            *(engine.generate(user(p), SamplingConfig()) for p in PROMPTS), return_exceptions=True
        )
        return [type(a).__name__ if isinstance(a, BaseException) else a[0].text for a in answers]

    return asyncio.run(run())


def test_the_answer_is_a_template_over_query_system_and_sample_index() -> None:
    messages: list[Message] = [
        {"role": "system", "content": "Shout."},
        {"role": "user", "content": "first"},
        {"role": "assistant", "content": "draft"},
        {"role": "user", "content": "last"},
    ]
    answer = "{{ system }} {{ query | upper }} {{ sample_index }}"
    samples = ask(messages, SamplingConfig(n=2), answer=answer)
    assert [s.text for s in samples] == ["Shout. LAST 0", "Shout. LAST 1"]


def test_tokens_are_words_and_the_prompt_is_counted_once() -> None:
    samples = ask(user("one two three"), SamplingConfig(n=2), answer="a b")
    assert [(s.prompt_tokens, s.completion_tokens) for s in samples] == [
        (3, 3),
        (0, 3),
    ]  # the end counts as one


def test_max_tokens_cuts_the_answer_off() -> None:
    [completion] = ask(user("a b c d"), SamplingConfig(max_tokens=2))
    assert (completion.text, completion.finish_reason, completion.completion_tokens) == ("a b", "length", 2)


def test_a_stop_string_ends_the_answer_and_is_no_part_of_it() -> None:
    [completion] = ask(user("one END two STOP"), SamplingConfig(stop=["STOP", "END"]))
    assert (completion.text, completion.finish_reason) == ("one ", "stop")


def test_a_choice_is_one_of_the_choices_and_depends_on_the_seed() -> None:
    def choices(seed: int) -> list[str]:
        structured = StructuredOutput(choice=["yes", "no"])
        return [s.text for s in ask(user("?"), SamplingConfig(n=16, seed=seed, structured=structured))]

    assert set(choices(0)) == {"yes", "no"}
    assert choices(1)[:15] == choices(0)[1:]  # sample i uses seed + i


def test_a_prompt_of_too_many_words_is_rejected() -> None:
    with pytest.raises(RequestRejected, match="the prompt has 4 words, max_model_len is 3") as caught:
        ask(user("a b c d"), max_model_len=3)
    assert caught.value.reason == RejectReason.PROMPT_TOO_LONG


@pytest.mark.parametrize(
    ("knob", "failed"),
    [
        ("empty_rate", lambda text: text == ""),
        ("refusal_rate", lambda text: text == REFUSAL),
        ("cut_off_rate", lambda text: text == "question"),
        ("fatal_error_rate", lambda text: text == "TransientEngineError"),
    ],
)
def test_a_rate_fails_its_share_of_prompts_and_the_same_ones_again(knob: str, failed: Any) -> None:
    first = outcomes(**{knob: 0.25, "max_retries": 0})
    assert 30 <= sum(map(failed, first)) <= 70  # 50 expected of 200
    assert outcomes(**{knob: 0.25, "max_retries": 0}) == first
    assert outcomes(**{knob: 0.25, "max_retries": 0, "failure_seed": 1}) != first
    assert not any(map(failed, outcomes(**{knob: 0.0})))
    assert all(map(failed, outcomes(**{knob: 1.0, "max_retries": 0})))


def test_a_cut_off_answer_says_length() -> None:
    [completion] = ask(user("a b c d"), cut_off_rate=1.0)
    assert (completion.text, completion.finish_reason) == ("a b", "length")


def test_transient_errors_are_retried_within_milliseconds() -> None:
    began = time.monotonic()
    assert outcomes(transient_error_rate=0.5, max_retries=20) == PROMPTS
    assert time.monotonic() - began < 5
    lost = outcomes(transient_error_rate=0.5, max_retries=1).count("TransientEngineError")
    assert 25 <= lost <= 75  # a quarter of 200: two tries, each fails half the time


def test_a_fatal_error_says_how_often_it_was_tried() -> None:
    with pytest.raises(TransientEngineError, match="after 3 tries"):
        ask(user("x"), fatal_error_rate=1.0, max_retries=2)


def test_calls_and_attempts_are_counted() -> None:
    async def run() -> FakeEngine:
        engine = await started(transient_error_rate=0.5, max_retries=20)
        for prompt in PROMPTS[:20]:
            await engine.generate(user(prompt), SamplingConfig(n=2))
        return engine

    engine = asyncio.run(run())
    assert engine.num_calls == 20
    assert 25 <= engine.num_attempts <= 70


def test_latency_and_concurrency_are_kept() -> None:
    async def run() -> float:
        engine = await started(latency_s=0.05, max_concurrency=5)
        began = time.monotonic()
        await asyncio.gather(*(engine.generate(user(p), SamplingConfig()) for p in PROMPTS[:10]))
        return time.monotonic() - began

    assert 0.1 <= asyncio.run(run()) < 0.4  # two rounds of five


def test_an_unavailable_engine_fails_at_the_start() -> None:
    with pytest.raises(EngineUnavailable, match="unavailable"):
        ask(user("x"), unavailable=True)


@pytest.mark.parametrize("answer", ["{{ query", "{{ nonsense }}", "{{ query.__class__.__mro__ }}"])
def test_a_bad_template_is_a_config_error_at_the_start(answer: str) -> None:
    with pytest.raises(ConfigError, match="cannot be rendered"):
        ask(user("x"), answer=answer)


def test_the_identity_changes_with_the_answers_only() -> None:
    def identity(**config: Any) -> str:
        return FakeEngine(FakeEngineConfig.model_validate(config)).identity

    assert identity() == identity(latency_s=1.0, max_retries=0, transient_error_rate=0.5, unavailable=True)
    assert len({identity(), identity(answer="x"), identity(empty_rate=0.5), identity(failure_seed=1)}) == 4


def test_importing_the_package_and_making_a_fake_loads_nothing_heavy() -> None:
    code = (
        "import sys; from distill_ray.engines import make_engine; "
        "from distill_ray.config.engine import FakeEngineConfig; make_engine(FakeEngineConfig()); "
        "print([m for m in ('torch', 'vllm', 'openai', 'transformers', 'ray') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_a_missing_package_is_a_config_error_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("hf", "hf_model"):
        monkeypatch.delitem(sys.modules, f"distill_ray.engines.{module}", raising=False)
    monkeypatch.setitem(sys.modules, "torch", None)  # import torch raises ModuleNotFoundError
    with pytest.raises(ConfigError, match=r"type: hf needs the package torch, .*make install"):
        make_engine(HfEngineConfig())
