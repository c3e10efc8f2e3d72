"""Which students are brought up, when they count as up, and what others can read of it. Serve is a stand-in."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from distill_ray.config import parse_config
from distill_ray.errors import ApiError, ConfigError
from distill_ray.serving import students as module
from distill_ray.serving.app import cpus_needed
from distill_ray.serving.events import Events
from distill_ray.serving.names import AppNames
from distill_ray.serving.routing.bundles import NOTHING, Bundles, Candidate
from distill_ray.serving.students import Students
from tests.unit.scripted_backend import DOWN, Scripted, whole
from tests.unit.small_bundle import remote_spec, write_small_bundle

A, B, C, D, E = (letter * 12 for letter in "abcde")
NAMES = AppNames("house")


@dataclass
class Serve:
    """Applications by name, with their status."""

    applications: dict[str, Any] = field(default_factory=dict)
    started: list[str] = field(default_factory=list)
    first: str = "DEPLOYING"

    def status(self) -> Any:
        return SimpleNamespace(applications=dict(self.applications))

    def run_many(self, targets: list[Any], **options: Any) -> None:
        assert not any(options.values())  # waiting would stop the heartbeat
        for target in targets:
            self.started.append(target.name.removeprefix("house-student-"))
            self.set(self.started[-1], self.first)

    def delete(self, name: str, _blocking: bool) -> None:
        self.applications.pop(name)

    def set(self, version: str, status: str, message: str = "") -> None:
        deployments = {"student": SimpleNamespace(status=status, message=message)}
        found = SimpleNamespace(status=status, message=message, deployments=deployments)
        self.applications[NAMES.student(version)] = found

    @property
    def versions(self) -> set[str]:
        return {name.removeprefix("house-student-") for name in self.applications}


@dataclass
class Rig:
    students: Students
    serve: Serve
    bundles: Bundles
    backend: Scripted
    folder: Path

    async def round(self, num: int = 1) -> dict[str, Any]:
        for _ in range(num):
            await self.students.round()
            await asyncio.sleep(0.01)
        return self.read()["students"]

    def read(self) -> dict[str, Any]:
        return json.loads((self.folder / "students.json").read_text())

    def events(self) -> list[tuple[str, str]]:
        return [(e["what"], e["version"]) for e in reversed(Events(self.folder / "events.jsonl").last(100))]


@pytest.fixture
def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Rig:
    return make(tmp_path, monkeypatch)


def make(folder: Path, monkeypatch: pytest.MonkeyPatch, **config: Any) -> Rig:
    raw = {"recipe": {"context": {"text": "x"}}, "data": {"source": "a"}, "teacher": {"type": "fake"}}
    loaded = parse_config({"name": "house", **raw, "serve": {"student": {"type": "fake"}, **config}})
    bundles = Bundles(folder / "bundles")
    for version in (A, B, C):
        bundles.install(write_small_bundle(folder / "made" / version, version=version))
    serve, backend = Serve(), Scripted("student")
    monkeypatch.setattr(module, "serve", serve)
    monkeypatch.setattr(module, "student_of", lambda *_: backend)
    students = Students(loaded, str(folder), NAMES, bundles, Events(folder / "events.jsonl"))
    return Rig(students, serve, bundles, backend, folder)


def run(story: Callable[[], Awaitable[None]]) -> None:
    async def told() -> None:
        await story()

    asyncio.run(asyncio.wait_for(told(), 20))


LOADING, UP = {"state": "loading"}, {"state": "up"}


def test_a_student_is_up_when_it_has_answered(rig: Rig) -> None:
    rig.bundles.promote(A)

    async def story() -> None:
        assert await rig.round() == {A: LOADING}
        assert await rig.round(2) == {A: LOADING}
        assert (rig.serve.started, rig.backend.bodies) == ([A], [])
        rig.backend.script = lambda body: [0.1, whole("hello")]
        rig.serve.set(A, "RUNNING")
        assert await rig.round(2) == {A: LOADING}  # it is being asked
        await asyncio.sleep(0.15)
        assert await rig.round(3) == {A: UP}

    run(story)
    [body] = rig.backend.bodies
    assert (body["max_tokens"], body["temperature"]) == (1, 0.0)
    assert rig.events() == []


def test_one_that_ray_cannot_place_says_what_it_waits_for(rig: Rig) -> None:
    said = (
        "Deployment 'student' in application 'house' has 1 replicas that have taken more than 30s to be scheduled. "
        "This may be due to waiting for the cluster to auto-scale or for a runtime environment to be installed. "
        'Resources required for each replica: {"CPU": 1.0, "GPU": 1}, total resources available: {"CPU": 1.5}. '
        "Use `ray status` for more details."
    )
    rig.bundles.set_candidate(Candidate(B))

    async def story() -> None:
        assert await rig.round() == {B: LOADING}
        rig.serve.set(B, "DEPLOYING", said)
        why = 'student waits for a place: a replica needs {"CPU": 1.0, "GPU": 1}, and the cluster has {"CPU": 1.5} free'
        assert await rig.round() == {B: {"state": "loading", "why": why}}
        rig.serve.set(B, "RUNNING")
        assert await rig.round(3) == {B: UP}

    run(story)


def test_a_candidate_comes_up_beside_the_current_one_and_its_promotion_starts_nothing(rig: Rig) -> None:
    rig.bundles.promote(A)
    rig.serve.first = "RUNNING"

    async def story() -> None:
        await rig.round(3)
        rig.bundles.set_candidate(Candidate(B))
        assert await rig.round(3) == {A: UP, B: UP}
        assert rig.events() == [("candidate_up", B)]
        rig.bundles.promote(B)
        rig.bundles.set_candidate(None)
        assert await rig.round(2) == {B: UP, A: UP}  # the one before stays: going back is one move
        rig.bundles.rollback()
        assert await rig.round(2) == {A: UP}
        assert rig.serve.versions == {A, B}

    run(story)
    assert rig.serve.started == [A, B]
    assert rig.events() == [("candidate_up", B)]


def test_a_candidate_that_is_let_go_ends_soon_and_one_that_served_later(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TRIAL_GRACE_S", 0.02)
    rig.bundles.promote(A)
    rig.bundles.promote(B)
    rig.serve.first = "RUNNING"

    async def story() -> None:
        rig.bundles.set_candidate(Candidate(C))
        await rig.round(2)
        rig.bundles.rollback(NOTHING)
        rig.bundles.set_candidate(None)
        assert await rig.round(6) == {}
        assert rig.serve.versions == {B}
        monkeypatch.setattr(module, "GRACE_S", 0.02)
        await rig.round(6)
        assert rig.serve.versions == set()

    run(story)


def test_a_student_that_does_not_start_says_why_and_is_tried_again(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RETRY_S", 0.05)
    rig.bundles.set_candidate(Candidate(B))
    failed = {"state": "failed", "why": "student: RuntimeError: no room on the GPU"}

    async def story() -> None:
        await rig.round()
        rig.serve.set(B, "DEPLOY_FAILED", "Traceback\n  RuntimeError: no room on the GPU\n")
        assert await rig.round() == {B: failed}
        assert rig.serve.started == [B]  # not at once
        await asyncio.sleep(0.06)
        assert await rig.round(2) == {B: failed}  # until it is up
        assert rig.serve.started == [B, B]
        rig.serve.set(B, "RUNNING")
        assert await rig.round(3) == {B: UP}

    run(story)
    assert rig.events() == [("student_failed", B), ("candidate_up", B)]


def test_a_student_that_cannot_be_run_here_at_all_says_why(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: object) -> None:
        raise ConfigError("serve.student: vLLM runs no encoder-decoder models\nand more")

    monkeypatch.setattr(module, "student_application", refuses)
    rig.bundles.promote(A)

    async def story() -> None:
        found = await rig.round(3)
        assert found == {A: {"state": "failed", "why": "serve.student: vLLM runs no encoder-decoder models"}}

    run(story)
    assert rig.events() == [("student_failed", A)]  # said once


def test_a_student_that_runs_and_does_not_answer_is_not_up(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RETRY_S", 0.05)
    rig.bundles.promote(A)
    rig.serve.first = "RUNNING"
    rig.backend.script = lambda body: [DOWN]

    async def story() -> None:
        assert await rig.round(4) == {A: {"state": "failed", "why": "it does not answer (gone)"}}
        assert len(rig.backend.bodies) == 1
        await asyncio.sleep(0.06)
        rig.backend.script = lambda body: [ApiError(400, "Hello is not for me")]
        assert await rig.round(3) == {A: UP}  # what it refuses, it has read

    run(story)


def test_one_that_was_killed_is_asked_again_before_it_counts_as_up(rig: Rig) -> None:
    rig.bundles.promote(A)
    rig.serve.first = "RUNNING"

    async def story() -> None:
        assert await rig.round(3) == {A: UP}
        rig.serve.set(A, "UNHEALTHY")
        assert await rig.round() == {A: LOADING}
        rig.serve.set(A, "RUNNING")
        assert await rig.round(3) == {A: UP}

    run(story)
    assert len(rig.backend.bodies) == 2
    assert rig.serve.started == [A]  # Serve itself brings it back


def test_the_file_has_a_heartbeat(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.bundles.promote(A)

    async def story() -> None:
        await rig.round(2)
        first = rig.read()["time"]
        assert abs(time.time() - first) < 5
        await rig.round(2)
        assert rig.read()["time"] == first
        monkeypatch.setattr(module, "HEARTBEAT_S", 0.0)
        await rig.round()
        assert rig.read()["time"] > first

    run(story)


def test_students_that_a_server_runs_are_up_when_it_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = {"type": "openai", "base_url": "http://127.0.0.1:1/v1", "model": "m"}
    rig = make(tmp_path, monkeypatch, student=url)
    rig.bundles.promote(A)
    rig.bundles.set_candidate(Candidate(B))

    async def story() -> None:
        assert await rig.round(4) == {A: UP, B: UP}

    run(story)
    assert rig.serve.started == []


def test_a_student_somewhere_else_is_not_started_and_those_before_it_end(
    rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "GRACE_S", 0.02)
    monkeypatch.setattr(module, "RETRY_S", 0.02)
    elsewhere = {"student": remote_spec("http://127.0.0.1:9/v1", "NO_SUCH_KEY")}
    for version in (D, E):
        rig.bundles.install(write_small_bundle(tmp_path / "made" / version, version=version, **elsewhere))
    rig.serve.first = "RUNNING"
    rig.backend.script = lambda body: [ApiError(401, "no such key")]

    async def story() -> None:
        rig.bundles.promote(A)
        await rig.round(3)
        rig.bundles.promote(D)
        assert (await rig.round(4))[D]["state"] == "failed"  # it does not let us in
        rig.backend.script = None
        await rig.round(4)
        assert (await rig.round(4))[D] == UP
        assert rig.serve.versions == {A}  # going back is one move
        rig.bundles.promote(E)
        assert await rig.round(6) == {E: UP}
        assert rig.serve.versions == set()
        rig.bundles.rollback(A)
        await rig.round()
        assert rig.serve.versions == {A}

    run(story)
    assert rig.serve.started == [A, A]


def test_there_is_room_for_the_current_student_the_one_before_it_and_a_candidate() -> None:
    raw = {"recipe": {"context": {"text": "x"}}, "data": {"source": "a"}, "teacher": {"type": "fake", "cpus": 0.5}}

    def needed(cpus: float) -> float:
        return cpus_needed(parse_config({**raw, "serve": {"student": {"type": "fake", "cpus": cpus}}}))

    assert needed(2.0) - needed(1.0) == pytest.approx(3.0)
