"""OpenAIEngine against a server that misbehaves by script: right error, number of tries, the key nowhere."""

from __future__ import annotations

import asyncio
import logging
import pickle
import traceback
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import numpy as np
import pytest

from distill_ray.config import parse_config
from distill_ray.config.engine import OpenAIEngineConfig, SamplingConfig, StructuredOutput
from distill_ray.engines.base import request_seed
from distill_ray.engines.limiter import AdaptiveLimiter
from distill_ray.engines.openai import CONTROL_TOKEN_SPELLING, OpenAIEngine
from distill_ray.engines.openai_errors import retry_after_s
from distill_ray.engines.openai_wire import completions
from distill_ray.errors import (
    ConfigError,
    EngineError,
    EngineUnavailable,
    RequestRejected,
    TransientEngineError,
)
from distill_ray.records import Completion, Message, RejectReason
from tests.unit.scripted_server import Reply, ScriptedServer, answer_chat, error

KEY = "sk-canary-0123456789"
HELLO: list[Message] = [{"role": "user", "content": "hello there"}]


@pytest.fixture(autouse=True)
def key_canary(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Every test runs with a key, and no log line at any level may hold it."""
    monkeypatch.setenv("TEST_API_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    yield
    assert KEY not in caplog.text


def make_engine(server: ScriptedServer, **config: Any) -> OpenAIEngine:
    fields = {
        "model": "m",
        "base_url": server.base_url,
        "api_key_env": "TEST_API_KEY",
        "max_retries": 2,
    } | config
    return OpenAIEngine(OpenAIEngineConfig.model_validate(fields), backoff_s=0.001)


def ask(
    server: ScriptedServer,
    sampling: SamplingConfig | None = None,
    *,
    messages: list[Message] = HELLO,
    first_sample: int = 0,
    **config: Any,
) -> list[Completion]:
    """Start an engine, ask once, close."""

    async def run() -> list[Completion]:
        engine = make_engine(server, **config)
        await engine.start()
        try:
            return await engine.generate(messages, sampling or SamplingConfig(), first_sample=first_sample)
        finally:
            await engine.close()

    return asyncio.run(run())


def start(server: ScriptedServer, **config: Any) -> None:
    async def run() -> None:
        engine = make_engine(server, **config)
        await engine.start()
        await engine.close()

    asyncio.run(run())


def assert_no_key(error: BaseException) -> None:
    """Neither the message, nor the traceback a user may see, nor what Ray would pickle holds the key."""
    assert KEY not in str(error) + repr(error) + "".join(traceback.format_exception(error))
    assert KEY.encode() not in pickle.dumps(error)
    assert pickle.loads(pickle.dumps(error)).args == error.args


# -- what may pass -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "failure",
    [
        error(429, "slow down"),
        error(429, "slow down", **{"retry-after": "0.01"}),
        error(500, "oops"),
        Reply(503, "<html>loading</html>", {"content-type": "text/html"}),
        Reply(200, "<html>a proxy's page</html>", {"content-type": "text/html"}),
        Reply(200, '{"choices": [{"mess'),
        Reply(200, ""),
        Reply(200, "null"),
        Reply(200, {"choices": []}),
        Reply(200, {"choices": None}),
        Reply(200, {"choices": [{"index": 0}]}),
        Reply(200, {"error": {"message": "upstream", "code": 502}}),
        Reply(close=True),
        Reply(hang_s=5),
    ],
    ids=lambda reply: f"{reply.status}-{str(reply.body)[:20]}-{reply.close}-{reply.hang_s}",
)
def test_a_failure_that_passes_is_tried_again(failure: Reply) -> None:
    with ScriptedServer([failure, failure]) as server:
        [completion] = ask(server, SamplingConfig(temperature=0), timeout_s=0.3)
        assert completion.text == "echo: hello there"
        assert len(server.chats) == 3


@pytest.mark.parametrize(
    ("failure", "says"),
    [
        (error(429, f"slow down, {KEY}"), "429 slow down, *** (after 3 tries)"),
        (error(500, "oops"), "500 oops (after 3 tries)"),
        (Reply(503, "<html>loading</html>"), "503 <html>loading</html> (after 3 tries)"),
        (Reply(200, f"garbage {KEY}"), "no chat completion; the answer begins 'garbage ***' (after 3 tries)"),
        (Reply(200, ""), "no chat completion; the answer begins '' (after 3 tries)"),
        (Reply(close=True), "cannot reach http://127.0.0.1:"),
        (Reply(hang_s=5), "no answer within 0.2 s (timeout_s) (after 3 tries)"),
    ],
)
def test_a_failure_that_does_not_pass_is_one_clear_error(failure: Reply, says: str) -> None:
    with ScriptedServer([failure] * 9) as server:
        with pytest.raises(TransientEngineError) as caught:
            ask(server, timeout_s=0.2)
        assert says in str(caught.value)
        assert len(server.chats) == 3
        assert_no_key(caught.value)


def test_no_retries_means_one_try() -> None:
    with ScriptedServer([Reply(500)] * 9) as server:
        with pytest.raises(TransientEngineError, match=r"500 \(after 1 try\)"):
            ask(server, max_retries=0)
        assert len(server.chats) == 1


def test_retry_after_is_honoured() -> None:
    async def run(server: ScriptedServer) -> float:
        engine = make_engine(server)
        await engine.start()
        began = asyncio.get_running_loop().time()
        await engine.generate(HELLO, SamplingConfig())
        await engine.close()
        return asyncio.get_running_loop().time() - began

    with ScriptedServer([error(429, "slow down", **{"retry-after": "0.3"})]) as server:
        assert asyncio.run(run(server)) >= 0.3


def test_a_wait_beyond_the_timeout_is_not_waited_for() -> None:
    with ScriptedServer([error(429, "tomorrow", **{"retry-after": "86400"})]) as server:
        with pytest.raises(TransientEngineError) as caught:
            ask(server, timeout_s=2)
        assert caught.value.retry_after == 86400
        assert len(server.chats) == 1


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after": "7"}, 7),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after-ms": "250", "retry-after": "1"}, 0.25),
        ({"retry-after": "soon"}, None),
        ({}, None),
    ],
)
def test_retry_after_is_read_in_every_form(headers: dict[str, str], seconds: float | None) -> None:
    assert retry_after_s(headers) == seconds


@pytest.mark.parametrize(("from_now_s", "seconds"), [(1000, pytest.approx(1000, abs=60)), (-1000, 0)])
def test_retry_after_as_a_date_is_seconds_from_now(from_now_s: float, seconds: Any) -> None:
    date = datetime.now(UTC) + timedelta(seconds=from_now_s)
    assert retry_after_s({"retry-after": format_datetime(date, usegmt=True)}) == seconds


# -- what cannot pass --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("failure", "error_class", "says"),
    [
        (
            error(401, f"Incorrect API key provided: {KEY}"),
            EngineUnavailable,
            "variable TEST_API_KEY is wrong",
        ),
        (error(403, "not yours"), EngineUnavailable, "or may not use the model m"),
        (error(404, "The model `m` does not exist"), EngineUnavailable, "check that it serves the model m"),
        (error(402, "pay"), EngineUnavailable, "no quota left"),
        (error(429, "You exceeded your quota", "insufficient_quota"), EngineUnavailable, "no quota left"),
        (error(400, "nope"), RequestRejected, "bad_request: "),
        (error(422, f"bad field {KEY}"), RequestRejected, "bad_request: "),
        (Reply(400, {"detail": "odd"}), RequestRejected, "400 odd"),
        (Reply(418, "teapot"), RequestRejected, "bad_request: "),
        (Reply(200, {"error": {"message": "no", "code": 401}}), EngineUnavailable, "401 no"),
        (error(400, "flagged", "content_filter"), RequestRejected, "refused: "),
    ],
)
def test_a_failure_that_cannot_pass_is_tried_once(failure: Reply, error_class: type[EngineError], says: str) -> None:
    with ScriptedServer([failure] * 9) as server:
        with pytest.raises(error_class) as caught:
            ask(server)
        assert says in str(caught.value)
        assert len(server.chats) == 1
        assert_no_key(caught.value)


@pytest.mark.parametrize(
    "failure",
    [
        error(400, "too long", "context_length_exceeded"),
        error(400, "This model's maximum context length is 1024 tokens. However, you requested 2000 tokens."),
        Reply(400, {"error": {"code": 400, "message": "exceeds", "type": "exceed_context_size_error"}}),
        error(400, "the request exceeds the available context size. try increasing the context size"),
        error(400, "prompt is too long: 210000 tokens > 200000 maximum"),
        error(400, "The input token count (1200000) exceeds the maximum number of tokens allowed (1048576)."),
        Reply(413, "Payload Too Large"),
    ],
)
def test_a_prompt_that_is_too_long_is_rejected_as_such(failure: Reply) -> None:
    with ScriptedServer([failure]) as server:
        with pytest.raises(RequestRejected) as caught:
            ask(server)
        assert caught.value.reason == RejectReason.PROMPT_TOO_LONG
        assert len(server.chats) == 1


def test_samples_answered_before_one_fails_come_with_the_error() -> None:
    def one_choice(body: dict[str, Any]) -> Reply:
        if body["seed"] == server.chats[0]["seed"] + 2:
            return error(400, "flagged", "content_filter")
        return answer_chat(body | {"n": 1})

    with ScriptedServer(chat=one_choice) as server:
        with pytest.raises(RequestRejected) as caught:
            ask(server, SamplingConfig(n=4, temperature=1.0, seed=0))
        assert [sample.sample_index for sample in caught.value.paid] == [0, 1, 3]


# -- the start ---------------------------------------------------------------------------------------------


def test_a_missing_key_names_the_variable_and_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TEST_API_KEY")
    with ScriptedServer() as server:
        with pytest.raises(ConfigError, match=r"TEST_API_KEY is not set; run `export TEST_API_KEY=\.\.\.`"):
            start(server)
        assert server.requests == []


def test_a_key_that_no_header_can_hold_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_API_KEY", f"{KEY}\nx")
    with (
        ScriptedServer() as server,
        pytest.raises(ConfigError, match="TEST_API_KEY holds characters") as caught,
    ):
        start(server)
    assert_no_key(caught.value)


def test_a_key_with_a_line_end_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_API_KEY", f"{KEY}\n")
    with ScriptedServer() as server:
        ask(server)
        assert {request.headers["authorization"] for request in server.requests} == {f"Bearer {KEY}"}


def test_a_server_without_keys_needs_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TEST_API_KEY")
    with ScriptedServer() as server:
        assert ask(server, api_key_env=None)


def test_credentials_in_the_url_are_refused() -> None:
    teacher = {"type": "openai", "model": "m", "base_url": f"http://user:{KEY}@127.0.0.1:1/v1"}
    recipe = {"type": "context", "context": {"text": "Answer in French."}}
    with pytest.raises(ConfigError, match=r"teacher\.base_url: has a user name or a query in it") as caught:
        parse_config({"data": {"source": "q.jsonl"}, "recipe": recipe, "teacher": teacher})
    assert_no_key(caught.value)


@pytest.mark.parametrize("status", [404, 405, 501, 429, 400])
def test_a_server_without_a_list_of_models_is_fine(status: int) -> None:
    with ScriptedServer(models=Reply(status, "no")) as server:
        assert ask(server)


def test_a_wrong_key_is_noticed_at_the_start() -> None:
    with ScriptedServer(models=error(401, f"wrong: {KEY}")) as server:
        with pytest.raises(EngineUnavailable, match=r"401 wrong: .*; the key in the environment variable") as caught:
            start(server)
        assert len(server.requests) == 1
        assert_no_key(caught.value)


def test_a_server_that_is_not_there_is_named_after_some_tries() -> None:
    with ScriptedServer() as server:
        port = server.port
    with pytest.raises(EngineUnavailable) as caught:
        start(server)
    assert f"cannot reach http://127.0.0.1:{port}/v1" in str(caught.value)
    assert "after 3 tries" in str(caught.value)
    assert "is the server running" in str(caught.value)


def test_a_server_that_is_still_loading_is_waited_for() -> None:
    with ScriptedServer(models=Reply(503, "loading")) as server:
        with pytest.raises(EngineUnavailable, match=r"503 loading \(after 3 tries\)"):
            start(server)
        assert len(server.requests) == 3


# -- answers -----------------------------------------------------------------------------------------------


def test_the_request_holds_what_the_config_says() -> None:
    sampling = SamplingConfig(temperature=0.5, top_p=0.9, max_tokens=7, n=3, stop=["\n"], seed=40, top_logprobs=2)
    with ScriptedServer() as server:
        ask(server, sampling, first_sample=1, extra_body={"min_p": 0.1})
        assert server.chats == [
            {
                "model": "m",
                "messages": HELLO,
                "temperature": 0.5,
                "top_p": 0.9,
                "seed": request_seed(40, make_engine(server).prompt_key(HELLO)) + 1,
                "n": 2,
                "stop": ["\n"],
                "logprobs": True,
                "top_logprobs": 2,
                "max_tokens": 7,
                "min_p": 0.1,
            }
        ]


@pytest.mark.parametrize(
    ("structured", "fields"),
    [
        (StructuredOutput(regex="a+"), {"structured_outputs": {"regex": "a+"}}),
        (StructuredOutput(choice=["a", "b"]), {"structured_outputs": {"choice": ["a", "b"]}}),
        (
            StructuredOutput(json_schema={"type": "object"}),
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "answer", "schema": {"type": "object"}, "strict": True},
                }
            },
        ),
    ],
)
def test_structured_output_is_asked_for(structured: StructuredOutput, fields: dict[str, Any]) -> None:
    with ScriptedServer() as server:
        ask(server, SamplingConfig(structured=structured))
        assert fields.items() <= server.chats[0].items()


def test_usage_of_n_samples_adds_up() -> None:
    with ScriptedServer() as server:
        samples = ask(server, SamplingConfig(n=3))
        assert len(server.chats) == 1
    assert [s.prompt_tokens for s in samples] == [2, 0, 0]
    assert sum(s.completion_tokens for s in samples) == 15


def test_samples_that_the_server_does_not_give_are_asked_for_one_by_one() -> None:
    with ScriptedServer(chat=lambda body: answer_chat(body | {"n": 1})) as server:
        samples = ask(server, SamplingConfig(n=4, seed=10))
        seeds = [chat["seed"] for chat in server.chats]
    assert seeds == list(range(seeds[0], seeds[0] + 4))
    assert [s.sample_index for s in samples] == [0, 1, 2, 3]
    assert [s.text for s in samples] == [f"echo: hello there seed {seed}" for seed in seeds]


def test_every_prompt_has_a_seed_of_its_own_and_the_same_prompt_the_same() -> None:
    keys = [f"prompt {i}".encode() for i in range(200)]
    seeds = [request_seed(7, key) for key in keys]
    assert seeds == [request_seed(7, key) for key in keys]
    assert len(set(seeds)) == 200
    assert not set(seeds) & {request_seed(8, key) for key in keys}
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert request_seed(-1, b"x") != request_seed(1, b"x")  # any int is a seed


def test_a_server_that_refuses_n_is_asked_one_by_one_from_then_on() -> None:
    async def run(server: ScriptedServer) -> None:
        engine = make_engine(server)
        await engine.start()
        for _ in range(2):
            assert len(await engine.generate(HELLO, SamplingConfig(n=3))) == 3
        await engine.close()

    refuses = lambda body: error(400, "n must be 1") if body.get("n", 1) > 1 else answer_chat(body)  # noqa: E731
    with ScriptedServer(chat=refuses) as server:
        asyncio.run(run(server))
        assert [chat.get("n", 1) for chat in server.chats] == [3, 1, 1, 1, 1, 1, 1]


def test_more_samples_than_asked_for_are_dropped() -> None:
    with ScriptedServer(chat=lambda body: answer_chat(body | {"n": 5})) as server:
        assert len(ask(server, SamplingConfig(n=2))) == 2


def test_nothing_is_asked_when_all_samples_are_there() -> None:
    with ScriptedServer() as server:
        assert ask(server, SamplingConfig(n=2), first_sample=2) == []
        assert server.chats == []


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
def test_reasoning_is_kept_apart(name: str) -> None:
    with ScriptedServer(chat=lambda body: answer_chat(body, **{name: "hmm"})) as server:
        [completion] = ask(server, SamplingConfig(temperature=0))
    assert (completion.text, completion.reasoning) == ("echo: hello there", "hmm")


@pytest.mark.parametrize(
    ("message", "finish_reason", "expected"),
    [
        ({"content": None}, "stop", ("", "stop")),
        ({"content": "cut"}, "length", ("cut", "length")),
        ({"content": ""}, "content_filter", ("", "content_filter")),
        ({"content": None, "refusal": "I cannot"}, "stop", ("", "content_filter")),
        (
            {"content": [{"type": "thinking", "thinking": []}, {"type": "text", "text": "a"}]},
            "stop",
            ("a", "stop"),
        ),
        ({"content": "a"}, None, ("a", "stop")),
        ({"content": "a"}, "eos", ("a", "stop")),
    ],
)
def test_content_and_finish_reason_are_translated(
    message: dict[str, Any], finish_reason: str | None, expected: tuple[str, str]
) -> None:
    reply = Reply(body={"choices": [{"index": 0, "finish_reason": finish_reason, "message": message}]})
    with ScriptedServer([reply]) as server:
        [completion] = ask(server)
    assert (completion.text, completion.finish_reason) == expected
    assert (completion.prompt_tokens, completion.completion_tokens) == (0, 0)  # no usage was sent


def test_top_logprobs_are_sorted_and_of_one_width() -> None:
    tops = [[("b", -2.0), ("a", -0.1), ("c", -3.0)], [("d", -0.5)]]
    content = [{"token": "x", "top_logprobs": [{"token": t, "logprob": v} for t, v in top]} for top in tops]
    choice = {
        "index": 0,
        "finish_reason": "stop",
        "message": {"content": "x x"},
        "logprobs": {"content": content},
    }
    with ScriptedServer([Reply(body={"choices": [choice]})]) as server:
        [completion] = ask(server, SamplingConfig(top_logprobs=2))
    assert completion.topk_ids is None
    assert completion.topk_logprobs is not None
    np.testing.assert_allclose(completion.topk_logprobs, [[-0.1, -2.0], [-0.5, -np.inf]], rtol=1e-6)


def test_token_ids_are_kept_where_the_server_gives_them() -> None:
    content = [{"token": "token_id:5", "top_logprobs": [{"token": f"token_id:{i}", "logprob": -i} for i in (5, 6)]}]
    choice = {
        "index": 0,
        "finish_reason": "stop",
        "message": {"content": "x"},
        "token_ids": [5, 2],
        "logprobs": {"content": content},
    }
    with ScriptedServer([Reply(body={"choices": [choice]})]) as server:
        [completion] = ask(server, SamplingConfig(top_logprobs=2))
    assert completion.token_ids == [5, 2]
    assert completion.completion_tokens == 2
    assert completion.topk_ids is not None
    assert completion.topk_ids.tolist() == [[5, 6]]


WORDS = {"content": [{"token": "x", "top_logprobs": [{"token": "x", "logprob": -0.1}]}]}  # by text, not by id


def chosen(**fields: Any) -> Reply:
    return Reply(body={"choices": [{"index": 0, "finish_reason": "stop", "message": {"content": "x"}, **fields}]})


@pytest.mark.parametrize(
    ("fields", "extra_body", "missing"),
    [
        ({}, {}, r"without log-probabilities \(sampling.top_logprobs\) for the model m"),
        ({"logprobs": None}, {}, "without log-probabilities"),
        ({"logprobs": {"content": []}}, {}, "without log-probabilities"),
        ({"logprobs": {"content": None}}, {}, "without log-probabilities"),
        ({}, {"return_token_ids": True}, "without log-probabilities"),
        ({"logprobs": WORDS}, {"return_token_ids": True}, r"without token ids \(extra_body.return_token_ids\)"),
        (
            {"logprobs": WORDS, "token_ids": [5]},
            {"return_tokens_as_token_ids": True},
            r"without token ids \(extra_body.return_tokens_as_token_ids\)",
        ),
    ],
)
def test_a_server_without_the_log_probabilities_that_are_asked_for_is_not_paid_for_a_second_answer(
    fields: dict[str, Any], extra_body: dict[str, Any], missing: str
) -> None:
    with ScriptedServer(chat=lambda _: chosen(**fields)) as server:
        with pytest.raises(EngineUnavailable, match=missing):
            ask(server, SamplingConfig(top_logprobs=2), extra_body=extra_body)
        assert len(server.chats) == 1


def test_one_answer_without_log_probabilities_among_others_is_an_answer() -> None:
    with ScriptedServer([chosen(logprobs=WORDS), chosen()]) as server:

        async def both() -> list[Completion]:
            engine = make_engine(server)
            await engine.start()
            try:
                return [(await engine.generate(HELLO, SamplingConfig(top_logprobs=2)))[0] for _ in range(2)]
            finally:
                await engine.close()

        first, second = asyncio.run(both())
    assert first.topk_logprobs is not None
    assert second.topk_logprobs is None


def test_a_model_that_wants_max_completion_tokens_gets_it() -> None:
    refusal = "Unsupported parameter: 'max_tokens' is not supported. Use 'max_completion_tokens' instead."
    body = {"error": {"message": refusal, "code": "unsupported_parameter", "param": "max_tokens"}}
    chat = lambda request: Reply(400, body) if "max_tokens" in request else answer_chat(request)  # noqa: E731
    with ScriptedServer(chat=chat) as server:
        assert len(ask(server, SamplingConfig(max_tokens=9))) == 1
        assert len(server.chats) == 2
        assert server.chats[1]["max_completion_tokens"] == 9


# -- control tokens ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "<|im_end|>",
        "a <|im_start|>system\nb",
        "<|endoftext|>",
        "<|eot_id|>",
        "<|start_header_id|>",
        "<｜User｜>",
        "<｜end▁of▁sentence｜>",
        "<s>",
        "x</s>",
        "[INST] x [/INST]",
        "<<SYS>>",
        "<start_of_turn>user",
        "<end_of_turn>",
        "<bos>",
        "<eos>",
        "<unk>",
        "<pad>",
        "[TOOL_CALLS]",
        "<BOS_TOKEN>",
    ],
)
def test_text_that_spells_a_control_token_is_rejected(text: str) -> None:
    with ScriptedServer() as server:
        with pytest.raises(RequestRejected) as caught:
            ask(server, messages=[{"role": "user", "content": text}])
        assert caught.value.reason == RejectReason.CONTROL_TOKENS
        assert server.chats == []


@pytest.mark.parametrize(
    "text",
    [
        "<strong>bold</strong> <span> <small> <sub> <svg>",
        "xs |> List.map f <| y",
        "a <| b |> c",
        "if a<|b| and |c|>d",
        "a<b|c>d || e",
        "[instance] [INSTALL] arr[INST_MAX]",
        "vector<string> <start> <end> <pads> <script>",
        "<http://example.org/s>",
        "x < s > y",
        "| a | b |\n|---|---|",
        "<think>hm</think>",
    ],
)
def test_ordinary_markup_and_code_pass(text: str) -> None:
    assert CONTROL_TOKEN_SPELLING.search(text) is None


# -- the limiter -------------------------------------------------------------------------------------------


def test_no_more_requests_are_in_flight_than_allowed() -> None:
    async def run(server: ScriptedServer) -> None:
        engine = make_engine(server, max_concurrency=3)
        await engine.start()
        await asyncio.gather(*(engine.generate(HELLO, SamplingConfig()) for _ in range(12)))
        await engine.close()

    with ScriptedServer(latency_s=0.02) as server:
        asyncio.run(run(server))
        assert server.most_in_flight == 3
        assert len(server.chats) == 12


def test_concurrency_adapts_to_a_server_that_throttles() -> None:
    """A server that takes two at once and answers 429 above: everything is answered, at a rate near two."""

    async def run(server: ScriptedServer) -> float:
        engine = make_engine(server, max_concurrency=16, max_retries=8)
        await engine.start()
        answers = await asyncio.gather(*(engine.generate(HELLO, SamplingConfig()) for _ in range(60)))
        await engine.close()
        assert len(answers) == 60
        return engine.limiter.limit

    def chat(body: dict[str, Any]) -> Reply:
        return error(429, "slow down", **{"retry-after": "0.01"}) if server.num_in_flight > 2 else answer_chat(body)

    with ScriptedServer(chat=chat, latency_s=0.005) as server:
        assert asyncio.run(run(server)) < 8
        assert len(server.chats) < 240


def test_the_limit_halves_once_per_burst_and_climbs_back() -> None:
    async def run() -> None:
        limiter = AdaptiveLimiter(8)
        async with limiter.slot() as first, limiter.slot() as second, limiter.slot() as third:
            limiter.throttled(first)
            limiter.throttled(second)
            limiter.throttled(third)
        assert limiter.limit == 4
        async with limiter.slot() as later:
            limiter.throttled(later)
        assert limiter.limit == 2
        for _ in range(5):  # one place per `limit` answers: 2 -> 2.5 -> 2.9 -> 3.24 ...
            limiter.succeeded()
        assert 3.5 < limiter.limit < 4
        for _ in range(100):
            limiter.succeeded()
        assert limiter.limit == 8

    asyncio.run(run())


def test_the_limit_never_falls_below_one() -> None:
    async def run() -> None:
        limiter = AdaptiveLimiter(2)
        for _ in range(5):
            async with limiter.slot() as ticket:
                limiter.throttled(ticket)
        assert limiter.limit == 1

    asyncio.run(run())


def test_nobody_is_admitted_while_the_server_asks_to_wait() -> None:
    async def run() -> None:
        now = 0.0
        limiter = AdaptiveLimiter(4, clock=lambda: now)
        async with limiter.slot() as ticket:
            limiter.throttled(ticket, pause_s=0.02)
        waiting = asyncio.create_task(_hold(limiter, asyncio.Event()))
        await asyncio.sleep(0.05)
        assert limiter.num_in_flight == 0  # the clock stands still
        now = 1.0
        await asyncio.sleep(0.05)
        assert limiter.num_in_flight == 1
        waiting.cancel()

    asyncio.run(run())


async def _hold(limiter: AdaptiveLimiter, until: asyncio.Event) -> None:
    async with limiter.slot():
        await until.wait()


def test_a_cancelled_request_gives_its_place_back() -> None:
    async def run() -> None:
        limiter = AdaptiveLimiter(1)
        release = asyncio.Event()
        tasks = [asyncio.create_task(_hold(limiter, release)) for _ in range(4)]
        await asyncio.sleep(0)
        tasks[1].cancel()  # waiting
        await asyncio.sleep(0)
        tasks[0].cancel()  # holding; tasks[2] is admitted ...
        await asyncio.sleep(0)
        tasks[2].cancel()  # ... and cancelled before or after it runs
        await asyncio.sleep(0.01)
        assert limiter.num_in_flight == 1
        release.set()
        await tasks[3]
        assert limiter.num_in_flight == 0

    asyncio.run(run())


# -- identity ----------------------------------------------------------------------------------------------


def test_the_identity_names_the_model_and_holds_no_url_or_key() -> None:
    config = OpenAIEngineConfig(model="m", base_url="http://127.0.0.1:9/v1", api_key_env="TEST_API_KEY")
    assert OpenAIEngine(config).identity == "openai:m"
    with_extra = OpenAIEngine(config.model_copy(update={"extra_body": {"secret": KEY}})).identity
    assert with_extra.startswith("openai:m+")
    assert KEY not in with_extra


def test_close_twice_is_harmless() -> None:
    async def run() -> None:
        with ScriptedServer() as server:
            engine = make_engine(server)
            await engine.close()
            await engine.start()
            await engine.close()
            await engine.close()

    asyncio.run(run())


def test_half_of_a_surrogate_pair_is_no_answer() -> None:
    answer = {"choices": [{"message": {"content": "bad \ud800"}, "finish_reason": "stop"}]}
    assert [c.finish_reason for c in completions(answer, 0, 1, 0)] == ["abort"]
