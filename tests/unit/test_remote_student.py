"""A bundle whose student is a server somewhere else: whole without weights, without a key in it, and in service."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from distill_ray.config import OpenAIEngineConfig, RunConfig, SamplingConfig, parse_config
from distill_ray.errors import ApiError, BundleError, ConfigError
from distill_ray.flywheel.students import engine_of_bundle, student_to_train
from distill_ray.pipeline.folder import RunFolder
from distill_ray.serving import replica
from distill_ray.serving.backends import RemoteBackend, student_server
from distill_ray.serving.models.answerers import student_of
from distill_ray.serving.models.applications import require_runnable, student_application
from distill_ray.serving.models.student import student_engine
from distill_ray.serving.names import AppNames
from distill_ray.serving.request import Live
from distill_ray.serving.routing.bundle import load_bundle, read_manifest
from distill_ray.serving.routing.bundles import Bundles
from distill_ray.serving.routing.manifest import StudentSpec, seal_of
from distill_ray.serving.routing.router import Reason
from tests.unit.scripted_backend import Rig, make_rig, text_of
from tests.unit.scripted_server import Reply, ScriptedServer, error
from tests.unit.small_bundle import REQUESTS, WordEmbedder, remote_spec, write_small_bundle

TRAINED = REQUESTS[0]
KEY = "sk-canary-0123456789"
URL = "http://127.0.0.1:9/v1"


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VENDOR_KEY", KEY)


def config(**sections: Any) -> RunConfig:
    recipe = {"context": {"text": "Be brief."}}
    raw = {"name": "small", "recipe": recipe, "data": {"source": "unused"}, "teacher": {"type": "fake"}}
    return parse_config({**raw, **sections})


# -- the bundle --------------------------------------------------------------------------------------------------------


def test_a_bundle_without_weights_is_written_read_installed_and_promoted(tmp_path: Path) -> None:
    spec = remote_spec(URL, "VENDOR_KEY")
    folder = write_small_bundle(tmp_path / "bundle", student=spec)
    assert not (folder / "student").exists()
    assert load_bundle(folder, WordEmbedder.identity).manifest.student == spec
    bundles = Bundles(tmp_path / "installed")
    bundles.promote(bundles.install(folder))
    installed = bundles.load(str(bundles.current()), WordEmbedder.identity)
    assert installed.manifest.student.base_url == URL
    for file in folder.rglob("*"):
        assert file.is_dir() or KEY.encode() not in file.read_bytes()


def test_files_where_none_belong_are_refused(tmp_path: Path) -> None:
    folder = write_small_bundle(tmp_path / "bundle", student=remote_spec(URL))
    (folder / "student").mkdir()
    (folder / "student" / "model.safetensors").write_bytes(b"x")
    with pytest.raises(BundleError, match=r"student/model\.safetensors: not a part of this bundle"):
        load_bundle(folder, WordEmbedder.identity)


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": "remote", "base": "m"},
        {"kind": "remote", "base_url": URL},
        {"kind": "remote", "base": "", "base_url": URL},
        {"kind": "full", "base_url": URL},
        {"kind": "adapter", "base": "m", "base_url": URL},
        {"kind": "remote", "base": "m", "base_url": "ftp://x/v1"},
        {"kind": "remote", "base": "m", "base_url": f"https://me:{KEY}@vendor.example/v1"},
        {"kind": "remote", "base": "m", "base_url": f"https://vendor.example/v1?key={KEY}"},
        {"kind": "remote", "base": "m", "base_url": URL, "api_key": KEY},
    ],
    ids=str,
)
def test_a_student_is_here_or_there_and_its_key_is_nowhere(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as caught:
        StudentSpec.model_validate({"sampling": SamplingConfig(), **wrong})
    assert KEY not in str(caught.value)


def test_a_bundle_of_a_time_that_knew_no_such_students_is_whole(tmp_path: Path) -> None:
    folder = write_small_bundle(tmp_path / "bundle")
    record = json.loads((folder / "bundle.json").read_text())
    for name in ("base_url", "api_key_env"):
        del record["student"][name]
    record["seal"] = seal_of(record)
    (folder / "bundle.json").write_text(json.dumps(record))
    assert load_bundle(folder, WordEmbedder.identity).manifest.student.kind == "full"
    record["threshold"] = 0.0
    (folder / "bundle.json").write_text(json.dumps(record))
    with pytest.raises(BundleError, match="not what was written"):
        load_bundle(folder, WordEmbedder.identity)


# -- who is asked ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("own", [None, {"type": "vllm"}, {"type": "hf"}, {"type": "fake"}])
def test_the_bundle_says_where_its_student_is_whatever_runs_students_here(
    tmp_path: Path, own: dict[str, Any] | None
) -> None:
    folder = write_small_bundle(tmp_path / "bundle", student=remote_spec(URL, "VENDOR_KEY"))
    loaded = config(serve={"student": own})
    engine = student_engine(loaded, folder)
    assert isinstance(engine, OpenAIEngineConfig)
    assert (engine.model, engine.base_url, engine.api_key_env) == ("ft:small:1", URL, "VENDOR_KEY")
    bundles = Bundles(tmp_path / "installed")
    version = bundles.install(folder)
    assert student_application(loaded, bundles, version, AppNames("small"), RunFolder(tmp_path)) is None
    backend = student_of(loaded, read_manifest(folder), AppNames("small"))
    assert isinstance(backend, RemoteBackend)
    assert backend.name == "openai:ft:small:1"


def test_limits_are_those_of_a_server_in_the_config(tmp_path: Path) -> None:
    own = {"type": "openai", "model": "another", "base_url": "http://other/v1", "max_concurrency": 7, "timeout_s": 3.0}
    loaded = config(serve={"student": own})
    there = student_server(loaded, remote_spec(URL, "VENDOR_KEY"))
    assert there is not None
    assert (there.model, there.base_url, there.api_key_env) == ("ft:small:1", URL, "VENDOR_KEY")
    assert (there.max_concurrency, there.timeout_s) == (7, 3.0)
    here = student_server(loaded, StudentSpec(kind="full", sampling=SamplingConfig()))
    assert here == loaded.serve.student
    assert student_server(config(), StudentSpec(kind="full", sampling=SamplingConfig())) is None


def test_a_missing_key_is_said_before_such_a_bundle_goes_into_service(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_small_bundle(tmp_path / "bundle", student=remote_spec(URL, "VENDOR_KEY"))
    require_runnable(config(serve={"cascade": {"min_mean_logprob": -1.0}}), folder)
    require_runnable(config(), write_small_bundle(tmp_path / "open", student=remote_spec(URL)))
    monkeypatch.delenv("VENDOR_KEY")
    with pytest.raises(ConfigError, match=r"ft:small:1 at .*, and the environment variable VENDOR_KEY.* is not set"):
        require_runnable(config(), folder)


def test_a_cycle_asks_such_a_student_where_it_is_and_cannot_go_on_from_it_here(tmp_path: Path) -> None:
    folder = write_small_bundle(tmp_path / "bundle", student=remote_spec(URL, "VENDOR_KEY"))
    engine = engine_of_bundle(config(), folder)
    assert isinstance(engine, OpenAIEngineConfig)
    assert (engine.model, engine.base_url, engine.api_key_env) == ("ft:small:1", URL, "VENDOR_KEY")
    with pytest.raises(ConfigError, match=r"flywheel\.start_from: current: the student in service is ft:small:1 at"):
        student_to_train(config(), folder)
    assert student_to_train(config(flywheel={"start_from": "base"}), folder).model == config().student.model


# -- in service --------------------------------------------------------------------------------------------------------


def rig_with(server: ScriptedServer, folder: Path) -> Rig:
    """A dispatcher whose student is the server."""
    rig = make_rig(folder, bundle={"student": remote_spec(server.base_url, "VENDOR_KEY")})
    student = student_of(config(), rig.bundle.manifest, AppNames("small"))
    rig.dispatcher.swap(dataclasses.replace(rig.dispatcher.live, student=student))
    return rig


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(test)


@pytest.mark.parametrize("stream", [False, True])
def test_requests_that_it_is_good_at_go_to_the_server(tmp_path: Path, stream: bool) -> None:
    async def ask() -> None:
        rig = rig_with(server, tmp_path)
        decision, pieces = await rig.ask(TRAINED)
        assert (decision.route, text_of(pieces)) == ("student", f"echo: {TRAINED}")
        decision, pieces = await rig.ask("Explain the French revolution to a child")
        assert (decision.route, text_of(pieces)) == ("teacher", "the teacher says")
        assert rig.student.bodies == []

    with ScriptedServer() as server:
        run(ask())
    [request] = [each for each in server.requests if each.path.endswith("/chat/completions")]
    assert request.headers["authorization"] == f"Bearer {KEY}"
    assert request.body["messages"] == [{"role": "user", "content": TRAINED}], "never the context"
    assert (request.body["model"], request.body["temperature"]) == ("ft:small:1", 0.0)


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_server_that_does_not_let_us_in_is_left_alone_after_a_few_tries(tmp_path: Path, status: int) -> None:
    said = f"Incorrect API key provided by the account of Ada: {KEY}"

    async def ask() -> None:
        rig = rig_with(server, tmp_path)
        with pytest.raises(ApiError, match="its operator has to look") as caught:
            await rig.ask(TRAINED, wants="student")
        assert (caught.value.status, KEY in str(caught.value)) == (503, False)
        for _ in range(5):
            decision, pieces = await rig.ask(TRAINED)
            assert (decision.route, decision.reason) == ("teacher", Reason.STUDENT_UNAVAILABLE)
            assert text_of(pieces) == "the teacher says"
        assert len(server.chats) == 3

    with ScriptedServer(chat=lambda body: error(status, said)) as server:
        run(ask())


def test_a_request_that_it_refuses_goes_to_the_teacher_and_the_next_one_to_it(tmp_path: Path) -> None:
    async def ask() -> None:
        rig = rig_with(server, tmp_path)
        reasons = [(await rig.ask(TRAINED))[0].reason for _ in range(5)]
        assert reasons == [Reason.STUDENT_REFUSED] * 4 + [Reason.GOOD]

    with ScriptedServer([error(400, "no"), error(429, "slow"), error(400, "no"), error(429, "slow")]) as server:
        run(ask())


@pytest.mark.parametrize(("status", "is_up"), [(200, True), (404, True), (401, False), (503, False)])
def test_a_server_that_refuses_the_key_is_not_up(status: int, is_up: bool) -> None:
    with ScriptedServer(models=Reply(status, {})) as server:
        backend = RemoteBackend(OpenAIEngineConfig(model="m", base_url=server.base_url, api_key_env="VENDOR_KEY"))
        assert asyncio.run(backend.is_up()) is is_up


def test_a_router_without_the_key_has_no_student_and_the_teacher_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And with it, one: no application of Serve is asked for."""
    monkeypatch.setattr(replica, "load_embedder", lambda _: WordEmbedder())
    bundles = Bundles(tmp_path / "bundles")

    async def watch() -> None:
        plain: Any = replica.Router.__mro__[1]  # without Serve's wrapper
        router = plain(config(serve={"collect": {"enabled": False}}), str(tmp_path), AppNames("small"), None)
        monkeypatch.delenv("VENDOR_KEY")
        for _ in range(3):
            await router._watch()
        assert router.dispatcher.live.student is None
        assert server.requests == []
        monkeypatch.setenv("VENDOR_KEY", KEY)
        await router._watch()
        live: Live = router.dispatcher.live
        assert (live.version, live.student.name if live.student else None) == ("0123456789ab", "openai:ft:small:1")
        [request] = server.requests
        assert request.headers["authorization"] == f"Bearer {KEY}"

    with ScriptedServer() as server:
        spec = remote_spec(server.base_url, "VENDOR_KEY")
        bundles.promote(bundles.install(write_small_bundle(tmp_path / "made", student=spec)))
        run(watch())
