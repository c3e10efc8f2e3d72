"""The HTTP face, on a real server with scripted models behind it: the OpenAI API as its official client sees it."""

from __future__ import annotations

import base64
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import uvicorn
from prometheus_client.parser import text_string_to_metric_families

from distill_ray.config import ServeConfig
from distill_ray.serving.front.ingress import build
from distill_ray.serving.front.keys import Key, Keys, digest_of
from distill_ray.serving.metrics import exposition
from tests.unit.scripted_backend import DOWN, Rig, chunks, make_rig, whole
from tests.unit.small_bundle import REQUESTS

TRAINED, UNLIKE = REQUESTS[0], "Explain the French revolution to a child"
KEY = "dr-0123456789abcdefghij"


class StubService:
    """What `ingress` needs, around a rig."""

    def __init__(self, rig: Rig, config: ServeConfig, keys: Keys) -> None:
        self.rig, self.config, self.keys = rig, config, keys
        self.limits, self.metrics, self.dispatcher = rig.limits, rig.metrics, rig.dispatcher

    async def status(self) -> dict[str, Any]:
        return {"name": "small"}

    async def exposition(self) -> bytes:
        return exposition(self.metrics.families())


class Running:
    """A service on loopback."""

    def __init__(self, folder: Path, *, keys: Keys | None = None, **config: Any) -> None:
        self.rig = make_rig(folder, **config)
        self.service = StubService(self.rig, ServeConfig.model_validate(config), keys or Keys([], required=False))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        settings = uvicorn.Config(build(self.service), port=self.port, log_level="warning", lifespan="off")
        self.server = uvicorn.Server(settings)
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Running:
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        return self

    def __exit__(self, *_: object) -> None:
        self.server.should_exit = True
        self.thread.join(10)

    def post(self, body: Any = None, path: str = "/v1/chat/completions", **kwargs: Any) -> httpx.Response:
        if body is not None:
            kwargs["json"] = body
        return httpx.post(self.url + path, timeout=120, **kwargs)

    def client(self, key: str = "anything") -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url + "/v1", api_key=key, max_retries=0)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with Running(tmp_path_factory.mktemp("service"), headers=True, model_aliases=["gpt-4o-mini"]) as service:
        yield service


@pytest.fixture(autouse=True)
def _well_behaved(running: Running) -> Iterator[None]:
    yield
    running.rig.student.script = running.rig.teacher.script = None
    running.rig.dispatcher.swap(running.rig.dispatcher.live)


def turn(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


# -- the official client ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["auto", "gpt-4o-mini", "teacher", "student"])
def test_the_official_client_gets_an_answer_whole_and_streamed(running: Running, model: str) -> None:
    client = running.client()
    answer = client.chat.completions.create(model=model, messages=turn(TRAINED))
    assert answer.choices[0].message.content == f"the {'teacher' if model == 'teacher' else 'student'} says"
    assert answer.model == model
    assert answer.usage is not None
    stream = client.chat.completions.create(
        model=model, messages=turn(TRAINED), stream=True, stream_options={"include_usage": True}
    )
    pieces = list(stream)
    assert "".join(p.choices[0].delta.content or "" for p in pieces if p.choices).strip().endswith("says")
    assert pieces[-1].usage is not None


def test_models_are_listed_and_looked_up(running: Running) -> None:
    client = running.client()
    assert [model.id for model in client.models.list()] == ["auto", "teacher", "student", "gpt-4o-mini"]
    assert client.models.retrieve("auto").id == "auto"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-9")


def test_completions_go_to_the_teacher(running: Running) -> None:
    running.rig.teacher.script = lambda body: [
        {"id": "c", "object": "text_completion", "created": 1, "model": "m",
         "choices": [{"index": 0, "text": "on and on", "finish_reason": "stop", "logprobs": None}]}
    ]  # fmt: skip
    assert running.client().completions.create(model="auto", prompt="It went").choices[0].text == "on and on"
    with pytest.raises(openai.BadRequestError, match="answers chats only"):
        running.client().completions.create(model="student", prompt="It went")


def test_headers_say_who_answered_and_why_where_the_operator_wants_it(running: Running, tmp_path: Path) -> None:
    response = running.post({"messages": turn(TRAINED)})
    assert response.headers["x-distill-route"] == "student"
    assert response.headers["x-distill-reason"] == "good"
    assert response.headers["x-distill-bundle"] == "0123456789ab"
    assert float(response.headers["x-distill-similarity"]) == pytest.approx(1.0)
    with Running(tmp_path) as silent:
        response = silent.post({"messages": turn(TRAINED)})
        assert not [name for name in response.headers if name.startswith("x-distill")]
        assert "access-control-allow-origin" not in response.headers


def test_a_stream_that_breaks_ends_with_an_error_event(running: Running) -> None:
    running.rig.teacher.script = lambda body: [*chunks("Half ", "an ")[:3], DOWN]
    with pytest.raises(openai.APIError, match="stopped in the middle"):
        list(running.client().chat.completions.create(model="teacher", messages=turn(UNLIKE), stream=True))
    text = running.post({"messages": turn(UNLIKE), "stream": True}).text
    events = [line[6:] for line in text.splitlines() if line.startswith("data: ")]
    assert json.loads(events[-1])["error"]["message"] == "the model stopped in the middle of its answer"
    assert "[DONE]" not in text


def test_a_teacher_that_is_down_is_503_with_retry_after(running: Running) -> None:
    running.rig.teacher.script = lambda body: [DOWN]
    response = running.post({"messages": turn(UNLIKE)})
    assert (response.status_code, response.headers["retry-after"]) == (503, "5")
    with pytest.raises(openai.InternalServerError):
        running.client().chat.completions.create(model="auto", messages=turn(UNLIKE))


def test_a_client_that_leaves_ends_the_work(running: Running) -> None:
    running.rig.teacher.script = lambda body: [*chunks("word ")[:2], *([0.05, chunks("word ")[1]] * 200)]
    before = running.rig.teacher.num_closed
    kept = len(running.rig.kept)
    with httpx.stream(
        "POST", running.url + "/v1/chat/completions", json={"messages": turn(UNLIKE), "stream": True}
    ) as r:
        next(r.iter_lines())
    deadline = time.monotonic() + 60
    while running.rig.teacher.num_closed == before and time.monotonic() < deadline:
        time.sleep(0.02)
    assert running.rig.teacher.num_closed == before + 1
    assert len(running.rig.kept) == kept


# -- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "status", "says"),
    [
        (b"", 400, "not JSON"),
        (b'{"messages"', 400, "not JSON"),
        (b"[" * 100_000, 400, "recursion"),
        (b'{"messages":' + b"[" * 5000 + b"]" * 5000 + b"}", 400, "recursion"),
        (b'{"messages":[{"role":"user","content":"\xff"}]}', 400, "not JSON"),
        (b'{"messages":[{"role":"user","content":"x"}],"temperature":NaN}', 400, "not JSON"),
        (b"[]", 400, "JSON object"),
        (b'{"messages":[{"role":"user","content":"' + b"x" * 10_000_000 + b'"}]}', 413, "4000000 bytes"),
    ],
)
def test_a_body_that_is_none_is_refused(running: Running, raw: bytes, status: int, says: str) -> None:
    response = running.post(content=raw, headers={"content-type": "application/json"})
    assert response.status_code == status
    assert says in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "x"}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user"}]}, "messages.0"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages.0.content"),
        ({"messages": turn("x"), "n": 1000}, "n"),
        ({"messages": turn("x"), "max_tokens": -1}, "max_tokens"),
        ({"messages": turn("x"), "max_tokens": 10**12}, "max_tokens"),
        ({"messages": turn("x"), "temperature": "hot"}, "temperature"),
        ({"messages": turn("x"), "top_logprobs": 99}, "top_logprobs"),
        ({"messages": turn("x"), "stop": [1]}, "stop"),
        ({"messages": turn("x"), "tools": "x"}, "tools"),
        ({"messages": turn("x"), "response_format": {"type": "poem"}}, "response_format.type"),
        ({"messages": turn("x"), "model": ""}, "model"),
    ],
)
def test_a_wrong_part_of_a_request_is_named(running: Running, body: dict[str, Any], param: str) -> None:
    response = running.post(body)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"].startswith(param)


@pytest.mark.parametrize(
    "field", ["prompt_logprobs", "return_token_ids", "echo", "chat_template", "priority", "x" * 500]
)
def test_fields_that_are_not_openais_are_refused_by_name(running: Running, field: str) -> None:
    answer = running.post({"messages": turn(UNLIKE), field: 0})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"].removesuffix("...") in field
    assert len(answer.text) < 400


def test_fields_that_the_operator_names_are_handed_on(tmp_path: Path) -> None:
    with Running(tmp_path, pass_fields=["guided_regex"]) as running:
        assert running.post({"messages": turn(UNLIKE), "guided_regex": "a|b", "top_k": 5}).status_code == 200
        assert running.rig.teacher.bodies[-1]["guided_regex"] == "a|b"
        assert running.rig.teacher.bodies[-1]["top_k"] == 5


@pytest.mark.parametrize("stream", [False, True])
def test_half_of_a_character_in_an_answer_is_no_error(running: Running, stream: bool) -> None:
    half = "odd \ud83d"
    running.rig.teacher.script = lambda body: chunks(half) if stream else [whole(half)]
    answer = running.post({"messages": turn(UNLIKE), "stream": stream})
    assert answer.status_code == 200
    assert "odd ?" in answer.text
    assert not stream or answer.text.endswith("data: [DONE]\n\n")


def test_unknown_models_paths_and_methods_are_openai_errors(running: Running) -> None:
    response = running.post({"messages": turn("x"), "model": "gpt-9"})
    assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")
    for response, status in (
        (httpx.get(running.url + "/nowhere"), 404),
        (httpx.get(running.url + "/v1/chat/completions"), 405),
        (running.post(content=b"{}", headers={"content-type": "text/plain"}), 415),
    ):
        assert response.status_code == status
        assert response.json()["error"]["message"]


def test_a_bug_is_500_without_a_traceback(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(call: Any) -> Any:
        raise ZeroDivisionError("secret")

    monkeypatch.setattr(running.rig.dispatcher, "answer", broken)
    response = running.post({"messages": turn("x")})
    assert response.status_code == 500
    assert "secret" not in response.text
    assert "Traceback" not in response.text


def test_control_characters_in_headers_do_not_come_back(running: Running) -> None:
    headers = {"x-request-id": "a", "idempotency-key": "k" * 255, "user-agent": "x"}
    response = running.post({"messages": turn(UNLIKE), "model": "teacher"}, headers=headers)
    assert response.status_code == 200
    assert running.rig.kept[-1][0].call.idempotency_key == "k" * 255


# -- who may come in -------------------------------------------------------------------------------------------------


def test_with_keys_nobody_else_comes_in(tmp_path: Path) -> None:
    keys = Keys([Key("alice", digest_of(KEY)), Key("bob", digest_of("dr-other-key-of-bob"))], required=True)
    with Running(tmp_path, keys=keys) as service:
        for path in ("/v1/models", "/metrics", "/status.json", "/"):
            assert httpx.get(service.url + path).status_code == 401, path
        assert httpx.get(service.url + "/healthz").status_code == 200  # a load balancer has no key
        for header in ("", "Bearer", "Bearer wrong", f"Basic {KEY}", f"bearer{KEY}"):
            response = service.post({"messages": turn(UNLIKE)}, headers={"authorization": header})
            assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key")
        assert service.client(KEY).chat.completions.create(model="auto", messages=turn(UNLIKE)).choices
        assert service.rig.kept[-1][0].call.owner == "alice"
        basic = base64.b64encode(f"whoever:{KEY}".encode()).decode()
        assert httpx.get(service.url + "/status.json", headers={"authorization": f"Basic {basic}"}).status_code == 200
        assert "Basic" in httpx.get(service.url + "/").headers["www-authenticate"]


def test_a_page_on_another_site_cannot_use_a_service_on_loopback(running: Running) -> None:
    simple = running.post(content=json.dumps({"messages": turn("x")}), headers={"content-type": "text/plain"})
    assert simple.status_code == 415  # what a browser sends without asking first
    asks_first = httpx.options(
        running.url + "/v1/chat/completions",
        headers={"origin": "https://evil.example", "access-control-request-method": "POST"},
    )
    assert "access-control-allow-origin" not in asks_first.headers
    rebound = running.post({"messages": turn("x")}, headers={"host": f"evil.example:{running.port}"})
    assert rebound.status_code == 403


def test_too_many_requests_of_an_owner_are_429_and_too_many_at_once_503(tmp_path: Path) -> None:
    with Running(tmp_path / "a", limits={"requests_per_minute": 2}) as service:
        answers = [service.post({"messages": turn(TRAINED)}) for _ in range(4)]
        assert sorted(r.status_code for r in answers)[:2] == [200, 200]
        assert answers[-1].status_code == 429
        assert 1 <= int(answers[-1].headers["retry-after"]) <= 60
    with Running(tmp_path / "b", router={"max_ongoing": 1, "max_queued": 1}) as service:
        service.rig.teacher.script = lambda body: [0.4, whole("late")]
        answers: list[httpx.Response] = []
        threads = [
            threading.Thread(target=lambda: answers.append(service.post({"messages": turn(UNLIKE)}))) for _ in range(6)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(response.status_code for response in answers) == [200, 200, 503, 503, 503, 503]
        assert service.post({"messages": turn(UNLIKE)}).status_code == 200  # places are given back


# -- pages -----------------------------------------------------------------------------------------------------------


def test_metrics_are_what_prometheus_reads(running: Running) -> None:
    running.post({"messages": turn(TRAINED)})
    response = httpx.get(running.url + "/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    families = {family.name: family for family in text_string_to_metric_families(response.text)}
    assert {"distill_requests", "distill_first_piece_seconds", "distill_tokens", "distill_pairs"} <= families.keys()
    requests = {tuple(sorted(s.labels.items())): s.value for s in families["distill_requests"].samples}
    assert requests[("reason", "good"), ("route", "student")] >= 1


def test_a_prompt_can_be_tried_without_asking_anybody(running: Running) -> None:
    before = len(running.rig.student.bodies)
    found = running.post({"messages": turn(TRAINED)}, path="/route").json()
    assert (found["route"], found["nearest"][0]["text"]) == ("student", TRAINED)
    assert len(running.rig.student.bodies) == before
    page = httpx.get(running.url + "/")
    assert page.status_code == 200
    assert "frame-ancestors 'none'" in page.headers["content-security-policy"]


# -- edges -----------------------------------------------------------------------------------------------------------


def test_what_the_service_can_be_asked_is_for_those_with_a_key(tmp_path: Path, running: Running) -> None:
    assert "/v1/chat/completions" in httpx.get(running.url + "/openapi.json").json()["paths"]
    with Running(tmp_path, keys=Keys([Key("alice", digest_of(KEY))], required=True)) as service:
        assert httpx.get(service.url + "/openapi.json").status_code == 401
        allowed = httpx.get(service.url + "/openapi.json", headers={"authorization": f"Bearer {KEY}"})
        assert allowed.status_code == 200


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("[::1]", 200),
        ("[::1]:8000", 200),
        ("localhost.", 200),
        ("LOCALHOST:8000", 200),
        ("127.0.0.1", 200),
        ("evil.example", 403),
        ("localhost.evil.example", 403),
        ("localhost@evil.example", 403),
        ("[::2]", 403),
        ("[::1", 403),
        ("", 403),
    ],
)
def test_loopback_has_many_names_and_no_others(running: Running, host: str, status: int) -> None:
    assert httpx.get(running.url + "/v1/models", headers={"host": host}).status_code == status


def test_a_model_that_is_null_is_auto(running: Running) -> None:
    response = running.post({"messages": turn(TRAINED), "model": None})
    assert (response.status_code, response.headers["x-distill-route"]) == (200, "student")


def test_an_idempotency_key_that_is_too_long_is_refused_and_not_cut(running: Running) -> None:
    kept = len(running.rig.kept)
    response = running.post({"messages": turn(UNLIKE)}, headers={"idempotency-key": "k" * 256})
    assert response.status_code == 400
    assert "may have 255 characters, and has 256" in response.json()["error"]["message"]
    assert len(running.rig.kept) == kept
