"""Small parts of the service: keys, limits, breaker, latch, metrics, a remote backend, config and names."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill_ray.config import OpenAIEngineConfig, parse_config
from distill_ray.config.serve import KeysConfig, LimitsConfig
from distill_ray.errors import ApiError, ConfigError
from distill_ray.serving.backends import RemoteBackend
from distill_ray.serving.breaker import Breaker
from distill_ray.serving.chunks import as_chunks
from distill_ray.serving.collecting.answer import StreamedAnswer, whole_answer
from distill_ray.serving.front.keys import add_key, digest_of, load_keys, read_keys
from distill_ray.serving.front.limits import Limits, Usage
from distill_ray.serving.latch import Latch
from distill_ray.serving.metrics import Metrics, add_up, exposition, figures
from tests.unit.scripted_backend import chunks, make_rig, text_of, whole
from tests.unit.scripted_server import Reply, ScriptedServer, error
from tests.unit.small_bundle import REQUESTS


class Clock:
    """A clock that is set by hand."""

    def __init__(self, now: float = 1_000_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


# -- keys ------------------------------------------------------------------------------------------------------------


def test_a_key_is_shown_once_and_only_its_hash_is_stored(tmp_path: Path) -> None:
    path = tmp_path / "service" / "keys.jsonl"
    key = add_key(path, "alice")
    assert len(key) > 40
    assert key not in path.read_text()
    assert path.stat().st_mode & 0o077 == 0
    assert [(k.owner, k.digest) for k in read_keys(path)] == [("alice", digest_of(key))]
    keys = load_keys(KeysConfig(), str(path), "127.0.0.1", {})
    assert keys.required
    assert keys.owner(f"Bearer {key}") == "alice"
    with pytest.raises(ApiError):
        keys.owner(f"Bearer {key}x")


def test_keys_may_come_from_the_environment(tmp_path: Path) -> None:
    keys = load_keys(KeysConfig(), str(tmp_path / "none"), "0.0.0.0", {"DISTILL_RAY_KEYS": "bob:a-key-of-20-letters"})
    assert keys.owner("bearer a-key-of-20-letters") == "bob"
    with pytest.raises(ConfigError, match="entry 1 is not OWNER:KEY") as caught:
        load_keys(KeysConfig(), str(tmp_path / "none"), "0.0.0.0", {"DISTILL_RAY_KEYS": "bob:short"})
    assert "short" not in str(caught.value).replace("is not", "")  # never the key itself


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2"])
def test_beyond_loopback_keys_are_required_unless_the_operator_says_otherwise(tmp_path: Path, host: str) -> None:
    nowhere = str(tmp_path / "none")
    with pytest.raises(ConfigError, match=r"needs API keys and there are none.*keys add"):
        load_keys(KeysConfig(), nowhere, host, {})
    assert load_keys(KeysConfig(required=False), nowhere, host, {}).owner(None) == "anybody"
    assert load_keys(KeysConfig(), nowhere, "127.0.0.1", {}).owner("Bearer x") == "anybody"


@pytest.mark.parametrize("line", ["{", '{"owner": "a"}', '{"owner": "a", "sha256": "dr-the-key-itself"}'])
def test_a_damaged_key_file_is_said_with_its_line_and_without_its_content(tmp_path: Path, line: str) -> None:
    (tmp_path / "keys.jsonl").write_text("\n" + line + "\n")
    with pytest.raises(ConfigError, match="line 2") as caught:
        read_keys(tmp_path / "keys.jsonl")
    assert "dr-the-key" not in str(caught.value)


# -- limits ----------------------------------------------------------------------------------------------------------


def test_a_minute_has_its_requests_and_the_next_one_its_own() -> None:
    clock = Clock(60.0 * 100)
    limits = Limits(LimitsConfig(requests_per_minute=2), clock)
    limits.admit("a")
    limits.admit("a")
    with pytest.raises(ApiError) as caught:
        limits.admit("a")
    assert (caught.value.status, caught.value.retry_after) == (429, 60.0)
    limits.admit("b")
    clock.now += 60
    limits.admit("a")


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 50)), max_size=60))
def test_routers_agree_on_what_was_spent_whenever_they_report(steps: list[tuple[int, int]]) -> None:
    """Nothing is counted twice or lost; what one does not know yet is only what others have not reported."""
    clock = Clock()
    usage = Usage(clock=clock)
    routers = [Limits(LimitsConfig(teacher_tokens_per_day=10**9), clock) for _ in range(3)]
    for router, tokens in steps:
        routers[router].spent("a", tokens)
        if tokens % 2:
            routers[router].learn(usage.exchange(routers[router].report()))
    for router in routers:
        router.learn(usage.exchange(router.report()))
    [(_, used)] = usage.exchange({}).items() or [(None, 0)]
    assert used == sum(tokens for _, tokens in steps)


def test_the_days_tokens_survive_the_keeper() -> None:
    clock = Clock()
    usage = Usage(clock=clock)
    usage.exchange({("tokens", "a", int(clock.now // 86_400) * 86_400): 100})
    again = Usage(usage.exchange({}).items(), clock=clock)
    limits = Limits(LimitsConfig(teacher_tokens_per_day=100), clock)
    limits.learn(again.exchange(limits.report()))
    with pytest.raises(ApiError, match="100 tokens of the large model a day"):
        limits.admit_teacher("a")
    clock.now += 86_400
    assert again.exchange({}) == {}
    limits.admit_teacher("a")


# -- breaker and latch -----------------------------------------------------------------------------------------------


def test_a_breaker_opens_after_failures_in_a_row_and_rests_longer_each_time() -> None:
    clock = Clock()
    breaker = Breaker(clock=clock)
    breaker.failed()
    breaker.failed()
    breaker.succeeded()
    breaker.failed()
    assert not breaker.is_open
    rests = []
    for _ in range(8):
        for _ in range(3):
            breaker.failed()
        assert breaker.is_open
        since = clock.now
        while not breaker.is_due:
            clock.now += 1
        rests.append(clock.now - since)
        breaker.looked(is_up=False)
        assert breaker.is_open
        breaker.looked(is_up=True)
        assert not breaker.is_open
    assert rests == [5, 10, 20, 40, 80, 120, 120, 120]


def test_the_latch_forgets_the_oldest() -> None:
    latch = Latch(2)
    ask = lambda text: [{"role": "user", "content": text}]  # noqa: E731
    go_on = lambda text: [*ask(text), {"role": "assistant", "content": "said "}, *ask("more")]  # noqa: E731
    for text in ("a", "b", "c"):
        latch.remember(ask(text), "said")
    assert [latch.holds(go_on(text)) for text in ("a", "b", "c")] == [False, True, True]
    assert not latch.holds(ask("c"))
    off = Latch(0)
    off.remember(ask("a"), "said")
    assert not off.holds(go_on("a"))


# -- metrics ---------------------------------------------------------------------------------------------------------


def test_routers_add_up_and_the_figures_are_those_of_the_samples() -> None:
    routers = [Metrics(), Metrics()]
    for metrics, number in zip(routers, (3, 1), strict=True):
        for _ in range(number):
            metrics.requests.labels("student", "good").inc()
            metrics.first.labels("student").observe(0.02)
        metrics.requests.labels("teacher", "far").inc()
        metrics.first.labels("teacher").observe(2.0)
        metrics.bundle.labels("v1").set(1)
    added = add_up(metrics.families() for metrics in routers)
    found = figures(added)
    assert found["requests"] == {"student": 4.0, "teacher": 2.0}
    assert found["share_on_student"] == pytest.approx(4 / 6)
    assert found["first_piece"]["student"] == {"p50": 0.025, "p95": 0.025}
    assert found["first_piece"]["teacher"]["p95"] == 2.5
    assert found["routers"] == {"v1": 2.0}
    assert b'distill_requests_total{reason="good",route="student"} 4.0' in exposition(added)
    assert figures(()) == figures(Metrics().families()) | {"spool_bytes": 0.0}


# -- answers and remote servers --------------------------------------------------------------------------------------


def test_a_whole_answer_cut_into_chunks_is_the_same_answer() -> None:
    calls = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
    for response in (whole("Hello", "stop"), whole(None, "tool_calls", tool_calls=calls), whole("x", refusal="no")):
        streamed = StreamedAnswer()
        for chunk in as_chunks(response):
            streamed.add(chunk)
        assert streamed.answer == whole_answer(response)


def remote(server: ScriptedServer, **config: Any) -> RemoteBackend:
    values = {"model": "m", "base_url": server.base_url, "api_key_env": None, "timeout_s": 0.5, **config}
    return RemoteBackend(OpenAIEngineConfig(**values))


def ask(backend: RemoteBackend, **body: Any) -> list[dict[str, Any]]:
    async def collect() -> list[dict[str, Any]]:
        sent = {"messages": [{"role": "user", "content": "hi"}], "temperature": 0, "model": "auto", **body}
        return [piece async for piece in backend.answer("chat", sent)]

    return asyncio.run(collect())


def test_a_remote_server_is_asked_with_its_own_model_and_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "secret")
    with ScriptedServer() as server:
        [answer] = ask(remote(server, api_key_env="MY_KEY", extra_body={"top_k": 1}))
    assert answer["choices"][0]["message"]["content"] == "echo: hi"
    [request] = server.requests
    assert request.headers["authorization"] == "Bearer secret"
    assert (request.body["model"], request.body["top_k"]) == ("m", 1)


def test_a_remote_stream_is_read_to_its_end_and_a_broken_one_is_an_error() -> None:
    chunk = json.dumps({"object": "chat.completion.chunk", "choices": [{"index": 0, "delta": {"content": "a"}}]})
    events = {"content-type": "text/event-stream"}
    with ScriptedServer([Reply(body=f": ping\n\ndata: {chunk}\n\ndata: [DONE]\n\n", headers=events)]) as server:
        assert len(ask(remote(server), stream=True)) == 1
    with (
        ScriptedServer([Reply(body=f"data: {chunk}\n\n", headers=events)]) as server,
        pytest.raises(ApiError, match="without saying so"),
    ):
        ask(remote(server), stream=True)
    last = json.dumps({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    with ScriptedServer([Reply(body=f"data: {chunk}\n\ndata: {last}\n\n", headers=events)]) as server:
        assert len(ask(remote(server), stream=True)) == 2, "some servers leave [DONE] out"
    broken = f'data: {chunk}\n\ndata: {{"error": {{"message": "out of memory"}}}}\n\n'
    with ScriptedServer([Reply(body=broken, headers=events)]) as server, pytest.raises(ApiError, match="out of memory"):
        ask(remote(server), stream=True)


@pytest.mark.parametrize(
    ("reply", "status", "says"),
    [
        (error(400, "too long", "context_length_exceeded"), 400, "too long"),
        (error(429, "slow down", **{"retry-after": "7"}), 429, "slow down"),
        (Reply(500, "<html>oops</html>"), 500, "HTTP 500"),
        (Reply(200, "not json"), 502, "not JSON"),
        (Reply(200, '{"choices": [], "usage": NaN}'), 502, "not JSON"),
        (Reply(200, {}), 502, "without choices"),
        (Reply(200, {"choices": []}), 502, "without choices"),
        (Reply(200, {"choices": "abc"}), 502, "no answer: choices"),
        (Reply(200, {"choices": [None]}), 502, r"no answer: choices\.0"),
        (Reply(200, {"choices": [{"message": {"content": 5}}]}), 502, "no answer: choices.0.message.content"),
        (Reply(200, {"choices": [{"message": "abc"}]}), 502, "no answer: choices.0.message"),
        (Reply(200, {**whole("x"), "usage": "many"}), 502, "no answer: usage"),
        (Reply(close=True), 503, "cannot be reached"),
        (Reply(hang_s=5.0), 504, "in time"),
    ],
)
def test_a_remote_servers_failures_are_api_errors(reply: Reply, status: int, says: str) -> None:
    with ScriptedServer([reply]) as server, pytest.raises(ApiError, match=says) as caught:
        ask(remote(server))
    assert caught.value.status == status
    assert caught.value.retry_after == (7.0 if status == 429 else None)


def test_what_some_servers_do_otherwise_is_understood() -> None:
    parts = [{"type": "text", "text": "in "}, {"type": "text", "text": "parts"}]
    answer = {
        **whole("x"),
        "error": None,
        "choices": [{"index": 0, "message": {"role": "assistant", "content": parts}}],
    }
    with ScriptedServer([Reply(200, answer)]) as server:
        [got] = ask(remote(server))
    assert got["choices"][0]["message"]["content"] == "in parts"


@pytest.mark.parametrize(
    ("header", "seconds"), [("7", 7.0), ("inf", 3600.0), ("1e400", 3600.0), ("nan", None), ("-5", 0.0), ("soon", None)]
)
def test_a_servers_retry_after_is_some_time_or_none(header: str, seconds: float | None) -> None:
    with (
        ScriptedServer([error(429, "slow down", **{"retry-after": header})]) as server,
        pytest.raises(ApiError) as caught,
    ):
        ask(remote(server))
    assert caught.value.retry_after == seconds


def test_a_server_that_is_not_there_is_not_up() -> None:
    with ScriptedServer() as server:
        backend = remote(server)
        assert asyncio.run(backend.is_up())
    backend = remote(server)
    assert not asyncio.run(backend.is_up())
    with pytest.raises(ApiError) as caught:
        ask(remote(server))
    assert caught.value.status == 503


# -- config ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("serve", "says"),
    [
        ({"model_aliases": ["teacher"]}, "model_aliases"),
        ({"port": 0}, "port"),
        ({"guard": "maybe"}, "guard"),
        ({"fingerprint": {"ignore": ["("]}}, "regular expression"),
        ({"cascade": {"min_mean_logprob": 1}}, "min_mean_logprob"),
        ({"collect": {"store": {"type": "redis"}}}, "store"),
        ({"typo": 1}, "typo"),
        ({"model_aliases": [""]}, r"serve.model_aliases.0: a model name of 1 to 256 characters"),
        ({"model_aliases": ["gpt", " gpt "]}, r"serve.model_aliases.1: .* without spaces around it \(got ' gpt '\)"),
        ({"collect": {"store": {"type": "qdrant"}}}, r"serve.collect.store: type: qdrant needs the url of its server"),
        ({"teacher": {"type": "openai"}}, r"serve.teacher.model: missing; add it"),
        ({"student": {"type": "openai"}}, r"serve.student.model: missing; add it"),
        ({"keys": {"required": "maybe"}}, r"serve.keys.required: .* \(got 'maybe'\)"),
        ({"folder": "s3://bucket/mine"}, r"serve.folder: the service's folder is a local one .*collect.store.url"),
        ({"host": "not a host"}, r"serve.host: not an address to listen on; .* \(got 'not a host'\)"),
        ({"host": "http://127.0.0.1"}, r"serve.host: not an address"),
        ({"host": "127.0.0.1:8000"}, r"serve.host: not an address"),
        ({"host": "300.1.1.1"}, r"serve.host: not an address"),
        ({"host": "[::1]"}, r"serve.host: not an address"),
    ],
)
def test_what_serving_cannot_use_is_refused_when_the_config_loads(serve: dict[str, Any], says: str) -> None:
    raw = {"recipe": {"context": {"text": "x"}}, "data": {"source": "a"}, "teacher": {"type": "fake"}, "serve": serve}
    with pytest.raises(ConfigError, match=says):
        parse_config(raw)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "0.0.0.0", "localhost", "gpu-7.example.org", "gpu7"])
def test_addresses_and_names_are_hosts(host: str) -> None:
    raw = {"recipe": {"context": {"text": "x"}}, "data": {"source": "a"}, "teacher": {"type": "fake"}}
    assert parse_config({**raw, "serve": {"host": host}}).serve.host == host


def test_a_key_under_serve_keys_is_never_shown() -> None:
    raw = {"recipe": {"context": {"text": "x"}}, "data": {"source": "a"}, "teacher": {"type": "fake"}}
    for keys in ({"alice": "dr-secret"}, "dr-secret"):
        with pytest.raises(ConfigError) as caught:
            parse_config({**raw, "serve": {"keys": keys}})
        assert "dr-secret" not in str(caught.value)


@pytest.mark.parametrize(("key", "value"), [("seed", -1), ("neighbours", 0), ("neighbours", 1001)])
def test_calibration_has_bounds(key: str, value: int) -> None:
    raw = {"recipe": {"context": {"text": "x"}}, "data": {"source": "a"}, "teacher": {"type": "fake"}}
    with pytest.raises(ConfigError, match=rf"calibrate\.{key}: .*\(got {value}\)"):
        parse_config({**raw, "calibrate": {key: value}})


@pytest.mark.parametrize("stream", [True, False])
def test_a_student_may_be_a_server_somewhere_else(tmp_path: Path, stream: bool) -> None:
    def chat(sent: dict[str, Any]) -> Reply:
        if not sent.get("stream"):
            return Reply(body=whole("one two"))
        events = [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks("one ", "two")]
        return Reply(body="".join(events) + "data: [DONE]\n\n", headers={"content-type": "text/event-stream"})

    async def run(server: ScriptedServer) -> tuple[Any, list[dict[str, Any]]]:
        rig = make_rig(tmp_path)
        rig.dispatcher.swap(dataclasses.replace(rig.dispatcher.live, student=remote(server)))
        return await rig.ask(REQUESTS[0], stream=stream)

    with ScriptedServer(chat=chat) as server:
        decision, pieces = asyncio.run(run(server))
        assert (decision.route, text_of(pieces)) == ("student", "one two")
        assert server.chats[0]["messages"] == [{"role": "user", "content": REQUESTS[0]}]
