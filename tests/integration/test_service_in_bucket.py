"""A whole service as real processes whose pairs and bundles live in a bucket, and which is left alone with what it has
while the bucket is away. The bucket is an S3 server on loopback, behind a proxy (`faulty_s3.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from distill_ray.config.serve import StoreConfig
from distill_ray.serving.collecting.store import Selection, make_store
from tests.integration.faulty_s3 import FaultyS3
from tests.integration.running_service import Service, serving, until
from tests.integration.test_service import (
    ONE,
    UNLIKE,
    Load,
    by_the_student,
    house,
    make_bundle,
    says,
    streaming_teacher,
)
from tests.unit.scripted_server import ScriptedServer
from tests.unit.small_bundle import REQUESTS

pytestmark = pytest.mark.slow
PLACE = "s3://bucket/house"


@pytest.fixture
def service(faulty: FaultyS3, embedder_cache: Path, tmp_path: Path) -> Iterator[Service]:
    """Without a bundle. Where the bucket is stands in the environment, which all its processes inherit."""
    with ScriptedServer(chat=streaming_teacher) as teacher:
        raw = house(tmp_path, teacher, bundles=f"{PLACE}/bundles", collect={"store": {"url": f"{PLACE}/pairs"}})
        with serving(tmp_path, raw) as running:
            until(lambda: running.status()["num_routers"] == 2)
            yield running


def by_the_teacher(service: Service) -> bool:
    """Whether every router asks the teacher what the student knows."""
    return all(service.ask(REQUESTS[0]).headers["x-distill-route"] == "teacher" for _ in range(8))


def stored_answers() -> list[str]:
    batches = make_store(StoreConfig(url=f"{PLACE}/pairs"), "").scan(Selection(), ["completion"])
    return [answer for batch in batches for answer in batch["completion"].to_pylist()]


def test_a_service_lives_in_a_bucket_and_goes_on_while_that_is_away(
    service: Service, faulty: FaultyS3, tmp_path: Path
) -> None:
    config = str(service.config)
    assert by_the_teacher(service)
    until(lambda: service.status()["figures"]["stored"].get("new"))
    listed = service.command("pairs", "list", config, "--contains", REQUESTS[0])
    assert listed.count("anybody") == 1
    assert f"in {PLACE}/pairs" in listed

    promoted = service.command("promote", config, str(make_bundle(tmp_path / "bundle", ONE)))
    assert promoted == f"current: {ONE}, in {PLACE}/bundles\n"
    until(lambda: by_the_student(service))
    assert f"bundle in service: {ONE}" in service.command("status", config)

    faulty.plan = lambda method, path, turn: "error"
    with Load(service).going_on(num_clients=2) as load:
        for what in ("store", "watch"):  # pairs that cannot be brought there; what is current, that nobody says
            until(lambda what=what: service.status()["figures"]["errors"].get(what))
        found = service.status()
        faulty.plan = lambda method, path, turn: None
    assert (found["keeper"], found["bundle"], found["student_up"]) == (True, ONE, True)
    assert found["figures"]["spool_bytes"] > 0
    assert not load.failed(), load.outcomes()
    assert load.outcomes()["200 student good"] > 0
    until(lambda: service.status()["figures"]["spool_bytes"] == 0)
    answers = [answer for answer in load.answers if isinstance(answer, httpx.Response)]
    by_teacher = {says(answer) for answer in answers if answer.headers["x-distill-route"] == "teacher"}
    stored = stored_answers()
    assert f"teacher: {UNLIKE} 0" in by_teacher <= set(stored)
    assert len(stored) == len(set(stored))

    gone_back = service.command("rollback", config, "none")
    assert gone_back == f"current: none (the teacher answers everything) (before: {ONE}), in {PLACE}/bundles\n"
    until(lambda: by_the_teacher(service))
    shown = service.command("status", config)
    assert "bundle in service: none" in shown
    assert [word for word in shown.split() if word in ("promote", "rollback")] == ["promote", "rollback"]
    assert not {"bundles", "pairs"} & {path.name for path in (tmp_path / "service").iterdir()}
    assert b"sk-canary" not in (tmp_path / "serve.log").read_bytes()
