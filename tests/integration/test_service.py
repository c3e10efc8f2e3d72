"""The service as real processes: `distill-ray serve` with two routers, a keeper, a student; the teacher is a scripted
HTTP server, so that it can be made to fail. Everything that can be killed is killed, under load.

With real vLLM models behind it: test_service_vllm.py.
"""

from __future__ import annotations

import itertools
import json
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pyarrow as pa
import pytest

from distill_ray.config import SamplingConfig
from distill_ray.config.serve import EmbedderConfig
from distill_ray.serving.routing.bundle import ENTRIES_SCHEMA, write_bundle
from distill_ray.serving.routing.bundles import Bundles, Candidate
from distill_ray.serving.routing.conversation import request_key
from distill_ray.serving.routing.embedder import load_embedder
from distill_ray.serving.routing.index import NearestIndex
from distill_ray.serving.routing.manifest import PromptForm, StudentSpec
from distill_ray.serving.routing.moves import Moves
from tests.integration.running_service import Service, serving, until
from tests.unit.scripted_server import Reply, ScriptedServer
from tests.unit.small_bundle import REQUESTS, body, manifest

UNLIKE = "Explain the French revolution to a child of number"
ONE, TWO, MEASURED = "aaaaaaaaaaa1", "aaaaaaaaaaa2", "aaaaaaaaaaa4"
TOKENS = 15  # that the teacher takes for an answer


def make_bundle(folder: Path, version: str, **changes: Any) -> Path:
    """A bundle with the real embedder, whose student is asked with its version in front. `changes`: of its manifest."""
    embedder = load_embedder(EmbedderConfig())
    fingerprints = [request_key(body(text), []).fingerprint for text in REQUESTS]
    student = folder.parent / "weights"
    student.mkdir(parents=True, exist_ok=True)
    (student / "config.json").write_text("{}")
    columns = {
        "example_id": [f"r{n}" for n in range(len(REQUESTS))],
        "text": REQUESTS,
        "fingerprint": fingerprints,
        "outcome": pa.array([1.0] * len(REQUESTS), pa.float32()),
    }
    spec = StudentSpec(kind="full", sampling=SamplingConfig(temperature=0.0), form=PromptForm(prefix=f"{version} "))
    return write_bundle(
        folder,
        manifest(
            **{"version": version, "embedder_identity": embedder.identity, "student": spec, "far": 0.3, **changes}
        ),
        student=student,
        index=NearestIndex.build(embedder.embed(REQUESTS), fingerprints),
        entries=pa.table(columns).cast(ENTRIES_SCHEMA),
        reports={"curve.json": b"{}"},
    )


def streaming_teacher(sent: dict[str, Any]) -> Reply:
    """Answers, whole or as a stream."""
    said = "teacher: " + sent["messages"][-1]["content"]
    usage = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
    if not sent.get("stream"):
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": said}}
        head = {"id": "x", "object": "chat.completion", "created": 1, "model": "big"}
        return Reply(body={**head, "choices": [choice], "usage": usage})
    head = {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": "big"}
    chunks: list[dict[str, Any]] = [
        {**head, "choices": [{"index": 0, "delta": {"content": word + " "}, "finish_reason": None}]}
        for word in said.split()
    ]
    chunks.append({**head, "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    chunks.append({**head, "choices": [], "usage": usage})
    text = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"
    return Reply(body=text, headers={"content-type": "text/event-stream"})


def house(folder: Path, teacher: ScriptedServer, **serve: Any) -> dict[str, Any]:
    """The config of a service of two routers, whose teacher streams and whose student says what it is asked."""
    router = {"replicas": 2, "cpus": 0.1, **serve.pop("router", {})}
    collect = {"flush_s": 0.5, **serve.pop("collect", {})}
    return {
        "name": "house",
        "recipe": {"type": "context", "context": {"text": "You are a home assistant."}},
        "data": {"source": "unused.jsonl"},
        "teacher": {"type": "openai", "model": "big", "base_url": teacher.base_url, "api_key_env": None},
        "serve": {
            "folder": str(folder / "service"),
            "student": {"type": "fake", "answer": "{{ query }}", "cpus": 0.1},
            "router": router,
            "headers": True,
            "collect": collect,
            **serve,
        },
    }


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, embedder_cache: Path) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("house")
    bundle = make_bundle(folder / "bundle-one", ONE)
    with ScriptedServer(chat=streaming_teacher) as teacher:
        raw = house(
            folder,
            teacher,
            router={"student_timeout_s": 3.0},
            collect={"spool_mb": 0.2},
            drift={"share": 1.0},  # of bundles that were measured: of the last one here
        )
        with serving(folder, raw, "--bundle", str(bundle)) as running:
            running.teacher = teacher
            until(lambda: running.status()["num_routers"] == 2)
            until(lambda: by_the_student(running))
            yield running


def by_the_student(service: Service) -> bool:
    """Whether every router has its student: each learns of it by itself."""
    return all(service.ask(REQUESTS[0]).headers["x-distill-route"] == "student" for _ in range(8))


@dataclass
class Load:
    """Clients that ask all the time, about half of it for the student."""

    service: Service
    answers: list[httpx.Response | Exception] = field(default_factory=list)
    stop: bool = False

    def run(self, number: int) -> None:
        n = number
        while not self.stop:
            text = REQUESTS[n % len(REQUESTS)] if n % 2 else f"{UNLIKE} {n}"
            try:
                self.answers.append(self.service.ask(text))
            except httpx.HTTPError as error:
                self.answers.append(error)
            n += 4

    @contextmanager
    def going_on(self, num_clients: int = 4) -> Iterator[Load]:
        threads = [threading.Thread(target=self.run, args=(n,)) for n in range(num_clients)]
        for thread in threads:
            thread.start()
        try:
            yield self
        finally:
            self.stop = True
            for thread in threads:
                thread.join()

    def outcomes(self) -> Counter[str]:
        return Counter(
            f"{answer.status_code} {answer.headers.get('x-distill-route')} {answer.headers.get('x-distill-reason')}"
            if isinstance(answer, httpx.Response)
            else type(answer).__name__
            for answer in self.answers
        )

    def failed(self) -> list[Any]:
        return [a for a in self.answers if not isinstance(a, httpx.Response) or a.status_code != 200]


def says(response: httpx.Response) -> str:
    return response.json()["choices"][0]["message"]["content"]


def test_trained_requests_go_to_the_student_and_the_rest_to_the_teacher_with_the_context(service: Service) -> None:
    student, teacher = service.ask(REQUESTS[0]), service.ask(UNLIKE)
    assert says(student) == f"{ONE} {REQUESTS[0]}"
    assert student.headers["x-distill-route"] == "student"
    assert says(teacher) == f"teacher: {UNLIKE}"
    assert teacher.headers["x-distill-route"] == "teacher"
    assert service.teacher.chats[-1]["messages"][0] == {"role": "system", "content": "You are a home assistant."}
    client = openai.OpenAI(base_url=service.url + "/v1", api_key="x")
    stream = client.chat.completions.create(model="auto", messages=[{"role": "user", "content": UNLIKE}], stream=True)
    assert "".join(p.choices[0].delta.content or "" for p in stream if p.choices).strip() == f"teacher: {UNLIKE}"


def test_teachers_answers_reach_the_store_once_and_can_be_deleted(service: Service) -> None:
    texts = [f"{UNLIKE} to keep {n}" for n in range(5)]
    for text in [*texts, *texts, REQUESTS[1]]:
        assert service.ask(text).status_code == 200

    def stored() -> list[str]:
        listed = service.command("pairs", "list", str(service.config), "--contains", "to keep")
        return [line for line in listed.splitlines() if "anybody" in line]

    until(lambda: len(stored()) == 5)
    service.command("pairs", "delete", str(service.config), "--contains", "to keep 3")
    assert len(stored()) == 4
    no = httpx.post(
        service.url + "/v1/chat/completions",
        json={"messages": [{"role": "user", "content": f"{UNLIKE} not to keep this"}]},
        headers={"x-distill-collect": "no"},
    )
    assert no.status_code == 200
    until(lambda: service.status()["figures"]["pairs"].get("opted_out"))


def test_a_store_that_is_away_and_a_full_spool_cost_nobody_an_answer_and_are_counted(service: Service) -> None:
    store = service.folder / "service" / "pairs"
    store.rename(store.with_name("pairs-away"))
    store.write_text("no store")
    try:
        assert service.ask(f"{UNLIKE} while the store is away").status_code == 200
        until(lambda: service.status()["figures"]["errors"].get("store"))
        with Load(service).going_on() as load:
            until(lambda: service.status()["figures"]["pairs"].get("spool_full"))
        assert not load.failed(), load.outcomes()
        assert 100_000 < service.status()["figures"]["spool_bytes"] <= 2 * 200_000 * 1.05
    finally:
        store.unlink()
        store.with_name("pairs-away").rename(store)

    def stored() -> bool:
        return "anybody" in service.command("pairs", "list", str(service.config), "--contains", "store is away")

    until(stored)
    until(lambda: service.status()["figures"]["spool_bytes"] == 0)


def test_a_student_that_is_killed_costs_nobody_an_answer_and_comes_back(service: Service) -> None:
    with Load(service).going_on() as load:
        time.sleep(1)
        [student] = service.replicas("house-student")
        student.kill()
        until(lambda: service.replicas("house-student") not in ([], [student]))
        time.sleep(1)
        until(lambda: by_the_student(service))
    assert not load.failed(), load.outcomes()
    assert load.outcomes()["200 student good"] > 0
    assert any("student_" in outcome for outcome in load.outcomes()), load.outcomes()


def test_a_student_that_stalls_costs_nobody_an_answer(service: Service) -> None:
    until(lambda: by_the_student(service))
    [student] = service.replicas("house-student")
    student.suspend()
    try:
        slow = [service.ask(REQUESTS[0]) for _ in range(3)]
    finally:
        student.resume()
    assert {(answer.status_code, answer.headers["x-distill-route"]) for answer in slow} == {(200, "teacher")}
    assert {answer.headers["x-distill-reason"] for answer in slow} == {"student_unavailable"}
    assert max(answer.elapsed.total_seconds() for answer in slow) < 15  # not the minute that an answer may take
    until(lambda: by_the_student(service))


def test_a_teacher_that_is_down_is_503_and_the_student_goes_on(service: Service) -> None:
    service.teacher.chat = lambda sent: Reply(close=True)
    try:
        down = service.ask(UNLIKE)
        assert (down.status_code, down.headers["retry-after"]) == (503, "5")
        assert down.json()["error"]["code"] == "teacher_down"
        assert service.ask(REQUESTS[0]).status_code == 200
    finally:
        service.teacher.chat = streaming_teacher


def test_a_router_that_is_killed_leaves_the_others(service: Service) -> None:
    victim = service.replicas("house:router")[0]
    with Load(service).going_on() as load:
        time.sleep(1)
        victim.kill()
        before = len(load.answers)
        until(lambda: len(load.answers) > before + 20)
    failed = load.failed()
    assert len(failed) <= 4, load.outcomes()  # what it was answering itself: one for each client at most
    until(lambda: len(service.replicas("house:router")) == 2)


def test_without_its_keeper_the_service_answers_and_collects(service: Service) -> None:
    [keeper] = service.replicas("house:keeper")
    keeper.kill()
    with Load(service).going_on() as load:
        assert service.ask(f"{UNLIKE} while the keeper is away").status_code == 200
        until(lambda: service.replicas("house:keeper"))
    assert not load.failed(), load.outcomes()

    def stored() -> bool:
        return "anybody" in service.command("pairs", "list", str(service.config), "--contains", "keeper is away")

    until(stored)


def test_a_bundle_is_changed_and_gone_back_from_under_load_without_a_gap_or_a_mixed_answer(
    service: Service, tmp_path: Path
) -> None:
    bundle = make_bundle(tmp_path / "bundle-two", TWO)

    def serves(version: str) -> bool:
        seen = {service.ask(REQUESTS[0]).headers["x-distill-bundle"] for _ in range(6)}
        return seen == {version} and service.ask(REQUESTS[0]).headers["x-distill-route"] == "student"

    with Load(service).going_on() as load:
        service.command("promote", str(service.config), str(bundle))
        until(lambda: serves(TWO))
        assert Bundles(service.folder / "service" / "bundles").current() == TWO
        service.command("rollback", str(service.config))
        until(lambda: serves(ONE))
    assert not load.failed(), load.outcomes()
    versions = Counter[str]()
    for answer in load.answers:
        assert isinstance(answer, httpx.Response)
        if answer.headers["x-distill-route"] != "student":
            continue
        version = answer.headers["x-distill-bundle"]
        assert says(answer).startswith(f"{version} ")  # the index's side of it
        assert answer.json()["system_fingerprint"] == f"house-student-{version}"  # the student's side
        versions[version] += 1
    assert set(versions) == {ONE, TWO}


def test_a_damaged_bundle_stays_out_of_service(service: Service, tmp_path: Path) -> None:
    installed = service.folder / "service" / "bundles" / "aaaaaaaaaaa3"
    shutil.copytree(make_bundle(tmp_path / "bundle-three", "aaaaaaaaaaa3"), installed)
    moves = Moves(str(service.folder / "service" / "bundles"))
    (installed / "entries.arrow").write_bytes(b"damaged")
    before = moves.state().versions
    try:
        moves.change("promote", lambda now: replace(now, versions=(*before, "aaaaaaaaaaa3")))  # as nobody should
        time.sleep(3)
        assert service.ask(REQUESTS[0]).headers["x-distill-bundle"] == ONE
        until(lambda: service.status()["figures"]["errors"].get("bundle"))
    finally:
        moves.change("rollback", lambda now: replace(now, versions=before))
    until(lambda: by_the_student(service))


# -- a bundle that was measured is tried out, promoted, and falls short ------------------------------------------------


def agreeing_teacher(*, except_where: str | None = None) -> Callable[[dict[str, Any]], Reply]:
    """Says what the student of MEASURED says; not where there is this text in the request."""

    def answer(sent: dict[str, Any]) -> Reply:
        text = sent["messages"][-1]["content"]
        said = f"no, {text}" if except_where is not None and except_where in text else f"{MEASURED} {text}"
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": said}}
        usage = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": TOKENS}
        return Reply(body={"id": "x", "object": "chat.completion", "created": 1, "choices": [choice], "usage": usage})

    return answer


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def happened(service: Service) -> list[tuple[str, str]]:
    lines = lines_of(service.folder / "service" / "events.jsonl")
    return [(line["what"], line["version"]) for line in lines if line["version"] == MEASURED]


def test_a_candidate_is_up_and_tried_on_real_requests_before_it_takes_over(service: Service, tmp_path: Path) -> None:
    summary = {"metric": "exact_match", "error_budget": 0.05, "confidence": 0.95}
    folder = service.folder / "service"
    bundles = Bundles(folder / "bundles")
    bundles.install(make_bundle(tmp_path / "bundle", MEASURED, summary=summary, far=-1.0, threshold=0.0001))
    bundles.set_candidate(Candidate(MEASURED, share=1.0, max_tokens=2 * TOKENS))
    service.teacher.chat = agreeing_teacher(except_where="number 3")

    def state() -> str | None:
        found = json.loads((folder / "students.json").read_text())
        assert time.time() - found["time"] < 30
        return found["students"].get(MEASURED, {}).get("state")

    try:
        until(lambda: state() == "up")
        time.sleep(5)  # each router looks every second
        for number in range(6):
            assert says(service.ask(f"{UNLIKE} {number}")).endswith(f"number {number}")
            assert service.ask(REQUESTS[number]).headers["x-distill-bundle"] == ONE
            time.sleep(0.5)  # no more than a few are looked at together

        def looks_so_far() -> list[dict[str, Any]]:
            found = lines_of(folder / f"shadow-{MEASURED}.jsonl")
            return found if len([look for look in found if not look["tokens"]]) == 6 and len(found) >= 8 else []

        looks = until(looks_so_far)
        assert [look["good"] for look in looks].count(False) == 1
        tokens = Counter(look["tokens"] for look in looks)
        assert tokens.keys() == {0, TOKENS}
        assert 2 <= tokens[TOKENS] < 6  # a router hears within a second or two what the other one spent
        assert all(look.keys() == {"time", "good", "tokens"} for look in looks)
        [student] = [p for p in service.replicas("house-student") if MEASURED in " ".join(p.cmdline())]
        with Load(service).going_on() as load:
            bundles.promote(MEASURED)
            bundles.set_candidate(None)
            until(lambda: {service.ask(REQUESTS[0]).headers["x-distill-bundle"] for _ in range(6)} == {MEASURED})
        assert not load.failed(), load.outcomes()
        assert student.is_running()  # it was up already
    finally:
        bundles.set_candidate(None)
        service.teacher.chat = streaming_teacher
    assert happened(service) == [("candidate_up", MEASURED), ("promoted", MEASURED)]


def test_a_student_that_falls_short_gets_less_and_then_nothing(service: Service) -> None:
    folder, please = service.folder / "service", ", if you would be so kind"
    assert Bundles(folder / "bundles").current() == MEASURED
    polite = REQUESTS[0] + please  # one only: of several scores, a bad one may stay within the budget
    requests = [text for plain in REQUESTS for text in (plain, polite)]

    def goes(text: str) -> str:
        return service.ask(text).headers["x-distill-route"]

    def until_told(what: str) -> dict[str, Any]:
        deadline = time.monotonic() + 600
        for n in itertools.takewhile(lambda _: time.monotonic() < deadline, itertools.count()):
            service.ask(requests[n % len(requests)])
            time.sleep(0.05)
            if happened(service)[-1][0] == what:
                return lines_of(folder / "events.jsonl")[-1]
        raise AssertionError(service.status())

    service.teacher.chat = agreeing_teacher()
    try:
        until(lambda: by_the_student(service))
        assert {goes(text) for text in requests} == {"student"}
        until(lambda: service.status()["drift"]["looks"] >= 15)
        service.teacher.chat = agreeing_teacher(except_where=please)
        event = until_told("threshold_raised")
        floor = json.loads((folder / "floors.json").read_text())[MEASURED]
        assert event["threshold"] == floor > 0.5
        until(lambda: [goes(polite) for _ in range(6)] == ["teacher"] * 6)
        assert goes(REQUESTS[0]) == "student"
        until(lambda: service.status()["threshold"] == floor)
        service.teacher.chat = agreeing_teacher(except_where="")
        event = until_told("rolled_back")
        assert (event["current"], event["by"]) == (ONE, "drift")
        until(lambda: {service.ask(REQUESTS[0]).headers["x-distill-bundle"] for _ in range(6)} == {ONE})
    finally:
        service.teacher.chat = streaming_teacher
    assert Bundles(folder / "bundles").versions() == [ONE]
    shown = [event["what"] for event in until(service.status)["events"]][:2]
    assert shown == ["rolled_back", "threshold_raised"]
    metrics = httpx.get(service.url + "/metrics", timeout=30).text
    assert 'distill_drift_actions_total{action="raise"} 1.0' in metrics
    assert 'distill_drift_actions_total{action="rollback"} 1.0' in metrics
    assert 'distill_second_looks_total{kind="drift",result="good"}' in metrics
    assert 'distill_second_looks_total{kind="shadow",result="good"}' in metrics
    assert service.status()["figures"]["errors"].get("second_look") is None
