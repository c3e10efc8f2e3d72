"""`distill-ray serve`, `promote`, `rollback` and `keys`, up to where Ray would start."""

from __future__ import annotations

import json
import multiprocessing
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from distill_ray.config import SamplingConfig, parse_config
from distill_ray.errors import ClusterError, ConfigError
from distill_ray.pipeline.check import check_service
from distill_ray.serving import app, names, news, preflight
from distill_ray.serving.names import occupy
from distill_ray.serving.news import StudentNews, where
from distill_ray.serving.routing.bundles import Bundles
from distill_ray.serving.routing.manifest import StudentSpec
from tests.unit.scripted_server import Reply, ScriptedServer
from tests.unit.small_bundle import WordEmbedder, remote_spec, write_small_bundle

A, B, C = "a" * 12, "b" * 12, "c" * 12
RAW = {
    "name": "mine",
    "recipe": {"type": "context", "context": {"text": "Answer."}, "query": "{{ text }}"},
    "data": {"source": "q.jsonl"},
    "teacher": {"type": "fake"},
}


STARTS = "everything is in order, and Ray would start now"


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(*_: object, **__: object) -> None:
        raise ClusterError(STARTS)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(names, "PATIENCE_S", 0.0)
    monkeypatch.setattr(preflight, "load_embedder", lambda _: WordEmbedder())
    monkeypatch.setattr("distill_ray.pipeline.cluster.connected", start)
    monkeypatch.delenv("DISTILL_RAY_KEYS", raising=False)
    Path("config.yaml").write_text(json.dumps(RAW))


@pytest.fixture
def port() -> Iterator[int]:
    """Somebody listens there."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        yield taken.getsockname()[1]


def made(version: str, **changes: Any) -> str:
    return str(write_small_bundle(Path("bundles") / version, version=version, **changes))


def current() -> str | None:
    return Bundles("services/mine/bundles").current()


# -- the pointer moves last ------------------------------------------------------------------------------------------


def test_a_bundle_goes_into_service_when_everything_is_in_order(run) -> None:
    _, out = run("serve", "config.yaml", "--bundle", made(A), "--port", str(free()))
    assert (STARTS in out, current()) == (True, A)


def free() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize(
    ("changes", "arguments", "says"),
    [
        ({"embedder_identity": "other@1"}, [], "made with the embedder other@1, and this service embeds with words@1"),
        ({}, ["--set", "serve.host=0.0.0.0"], "needs API keys and there are none"),
        ({}, ["--port", "TAKEN"], "serve.port: cannot listen on"),
        (
            {"student": StudentSpec(kind="full", sampling=SamplingConfig(temperature=0.0), is_encoder_decoder=True)},
            ["--set", "serve.student={type: vllm}"],
            "vLLM runs no encoder-decoder models",
        ),
        ({}, ["--set", "serve.teacher={type: openai, model: m, api_key_env: TKEY}"], "serve.teacher.api_key_env: "),
        (
            {"student": remote_spec("http://127.0.0.1:9/v1", "TKEY")},
            ["--set", "serve.guard=off"],
            "ft:small:1 at http://127.0.0.1:9/v1, and the environment variable TKEY, with the key, is not set",
        ),
    ],
)
def test_a_service_that_cannot_start_leaves_the_pointer_where_it_is(
    run, port: int, changes: dict[str, Any], arguments: list[str], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TKEY", raising=False)
    assert run("promote", "config.yaml", made(A))[0] == 0
    arguments = [str(port) if argument == "TAKEN" else argument for argument in arguments]
    if "--port" not in arguments:
        arguments += ["--port", str(free())]
    status, out = run("serve", "config.yaml", "--bundle", made(B, **changes), *arguments)
    assert status != 0
    assert says in out
    assert "bug" not in out
    assert current() == A
    if "--set" in arguments and "teacher" not in says:
        status, out = run("serve", "config.yaml", "--bundle", made(B, **changes), "--write", "out.yaml", *arguments)
        assert (says in out, current(), Path("out.yaml").exists()) == (True, A, False)


def test_a_bundle_of_another_embedder_is_not_promoted(run) -> None:
    assert run("promote", "config.yaml", made(A)) == (0, f"current: {A}, in services/mine")
    status, out = run("promote", "config.yaml", made(B, embedder_identity="other@1"))
    assert status == 1
    assert "made with the embedder other@1" in out
    assert current() == A
    assert run("promote", "config.yaml", made(C)) == (0, f"current: {C} (before: {A}), in services/mine")
    assert run("promote", "config.yaml", A)[0] == 0
    assert run("rollback", "config.yaml") == (0, f"current: {C} (before: {A}), in services/mine")


def test_a_bundle_whose_student_is_elsewhere_goes_into_service_when_its_key_is_there(
    run, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = made(A, student=remote_spec("http://127.0.0.1:9/v1", "TKEY"))
    monkeypatch.delenv("TKEY", raising=False)
    status, out = run("promote", "config.yaml", bundle)
    assert (status, current()) == (2, None)
    assert "the environment variable TKEY, with the key, is not set; run `export TKEY=...` first" in out
    monkeypatch.setenv("TKEY", "a key")
    assert run("promote", "config.yaml", bundle)[0] == 0
    assert current() == A


def test_a_rollback_in_the_wrong_folder_says_so(run) -> None:
    status, out = run("rollback", "config.yaml")
    assert status == 2
    assert "services/mine: no such folder, so no service has been here" in out
    assert not Path("services").exists()


def test_bundles_that_have_a_place_of_their_own_are_moved_from_anywhere_and_named_by_it(run) -> None:
    place = Path("elsewhere").resolve()
    there = ("--set", f"serve.bundles={place}")
    assert run("promote", "config.yaml", made(A), *there) == (0, f"current: {A}, in {place}")
    gone = f"current: none (the teacher answers everything) (before: {A}), in {place}"
    assert run("rollback", "config.yaml", "none", *there) == (0, gone)
    nothing = f"{place}: no bundle is in service; the teacher answers everything already"
    assert run("rollback", "config.yaml", *there) == (1, f"error: {nothing}")
    assert not Path("services").exists()


def test_without_a_bundle_there_is_nothing_to_go_back_from(run) -> None:
    Path("services/mine").mkdir(parents=True)
    nothing = "services/mine: no bundle is in service; the teacher answers everything already"
    assert run("rollback", "config.yaml") == (1, f"error: {nothing}")
    assert run("rollback", "config.yaml", "none") == (0, nothing)
    run("promote", "config.yaml", made(A))
    assert run("rollback", "config.yaml", "none")[0] == 0
    assert run("rollback", "config.yaml", "none") == (0, nothing)


# -- one service per folder ------------------------------------------------------------------------------------------


def _occupy(folder: str, ready: Any, stop: Any) -> None:
    with occupy(folder):
        ready.set()
        stop.wait(600)


def test_a_second_service_in_a_folder_is_refused_with_the_first_ones_process(run) -> None:
    context = multiprocessing.get_context("spawn")
    ready, stop = context.Event(), context.Event()
    process = context.Process(target=_occupy, args=("services/mine", ready, stop))
    process.start()
    try:
        assert ready.wait(600)
        status, out = run("serve", "config.yaml", "--bundle", made(A), "--port", str(free()))
        assert status == 1
        assert (
            f"another service is at work here (its keeper: pid {process.pid} on {socket.gethostname()}, started" in out
        )
        assert current() is None
    finally:
        stop.set()
        process.join()


@pytest.mark.parametrize("arguments", [["serve"], ["promote", "x"], ["rollback"], ["keys", "add", "x"]])
def test_a_folder_that_is_a_file_is_said(run, arguments: list[str]) -> None:
    Path("file").write_text("mine")
    names_ = arguments[:2] if arguments[0] == "keys" else arguments[:1]
    rest = arguments[len(names_) :]
    status, out = run(*names_, "config.yaml", *rest, "--set", f"serve.folder={Path('file').resolve()}")
    assert status == 2
    assert "serve.folder: " in out
    assert "/file is not a folder" in out


def test_a_name_that_is_no_address_of_this_machine_is_said_of_the_host(run) -> None:
    status, out = run("serve", "config.yaml", "--set", "serve.host=no-such-host.invalid")
    assert status == 2
    assert "serve.host: no-such-host.invalid is no address of this machine" in out


# -- --write ---------------------------------------------------------------------------------------------------------


def test_a_written_config_carries_the_overrides(run) -> None:
    settings = ["--set", "serve.guard=strict", "--set", "serve.router.replicas=2", "--port", "8123"]
    assert run("serve", "config.yaml", "--write", "out.yaml", *settings)[0] == 0
    written = yaml.safe_load(Path("out.yaml").read_text())
    assert written["http_options"]["port"] == 8123
    for application, make in zip(written["applications"], (app.front, app.teacher), strict=True):
        deployment: Any = make(application["args"])._bound_deployment
        loaded = deployment.init_args[0]
        if make is app.front:
            assert (loaded.serve.guard, loaded.serve.port, deployment.num_replicas) == ("strict", 8123, 2)


def test_a_written_config_promotes_when_it_is_written(run) -> None:
    status, out = run("serve", "config.yaml", "--bundle", made(A), "--write", "nowhere/out.yaml")
    assert status == 2
    assert "--write nowhere/out.yaml: cannot write (No such file or directory)" in out
    assert current() is None
    assert run("serve", "config.yaml", "--bundle", made(A), "--write", "out.yaml")[0] == 0
    assert current() == A


# -- teacher and student ---------------------------------------------------------------------------------------------


def config(**serve: Any) -> Any:
    return parse_config({**RAW, "serve": serve})


def test_those_who_answer_for_the_service_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TKEY", raising=False)
    remote = {"type": "openai", "model": "m", "base_url": "http://127.0.0.1:9/v1", "api_key_env": "TKEY"}
    for part in ("teacher", "student"):
        with pytest.raises(ConfigError, match=rf"serve\.{part}\.api_key_env: the environment variable TKEY is not set"):
            list(check_service(config(**{part: remote})))
    with pytest.raises(ConfigError, match=r"serve\.teacher\.type: none answers nothing"):
        list(check_service(config(teacher={"type": "none"})))
    monkeypatch.setenv("TKEY", "a key")
    lines = list(check_service(config(teacher=remote, student=remote)))
    warnings = [line for line in lines if line.startswith("warning: ")]
    assert [line.split()[1] for line in warnings] == ["serve.teacher.base_url:", "serve.student.base_url:"]
    assert "http://127.0.0.1:9/v1 does not answer (ConnectError)" in warnings[0]


@pytest.mark.parametrize(("status", "warns"), [(200, False), (401, False), (404, False), (502, True)])
def test_a_server_that_refuses_is_there(status: int, warns: bool) -> None:
    with ScriptedServer(models=Reply(status, "{}")) as server:
        remote = {"type": "openai", "model": "m", "base_url": server.base_url, "api_key_env": None}
        lines = list(check_service(config(teacher=remote)))
    assert any("does not answer (HTTP 502)" in line for line in lines) is warns


# -- what is said when it is up --------------------------------------------------------------------------------------


def test_the_command_to_try_has_a_key_where_one_is_needed() -> None:
    assert "-H 'Authorization: Bearer KEY'" in where(config(), "/x", 3.0, needs_key=True)
    said = where(config(host="::1"), "services/mine", 3.4, needs_key=False)
    assert "Authorization" not in said
    assert said.startswith("up after 3 s: http://[::1]:8000/v1 (OpenAI API)")
    assert "\nfiles: services/mine\n" in said
    assert max(map(len, said.splitlines())) <= 80


def test_the_student_is_said_to_be_up_when_it_is(run, monkeypatch: pytest.MonkeyPatch) -> None:
    health: dict[str, Any] = {"bundle": "", "student_up": False}

    class Response:
        def raise_for_status(self) -> Response:
            return self

        def json(self) -> dict[str, Any]:
            return health

    monkeypatch.setattr(news.httpx, "get", lambda url, **_: Response())
    bundles = Bundles("services/mine/bundles")
    found = StudentNews(config(), bundles, 0.0)
    assert found.line() == "no bundle is in service yet: the teacher answers everything"
    assert found.line() is None
    run("promote", "config.yaml", made(A))
    loading = f"student of bundle {A}: loading; the teacher answers meanwhile"
    assert [found.line(), found.line()] == [loading, None]
    health |= {"bundle": A}
    assert found.line() is None, "gone back to, and not up yet"
    health |= {"student_up": True}
    assert found.line() == f"student of bundle {A}: up after 0 s"
    assert found.line() is None
    monkeypatch.undo()  # nobody answers there
    assert found.line() is None


# -- keys ------------------------------------------------------------------------------------------------------------


def test_keys_are_added_listed_and_removed_where_the_settings_say(run) -> None:
    place = ["--set", f"serve.folder={Path('elsewhere').resolve()}"]
    _, first = run("keys", "add", "config.yaml", "alice", *place)
    assert "its hash is in elsewhere/keys.jsonl" in first
    run("keys", "add", "config.yaml", "alice", *place)
    run("keys", "add", "config.yaml", "bob", *place)
    assert not Path("services").exists()
    _, listed = run("keys", "list", "config.yaml", *place)
    assert "3 keys in elsewhere/keys.jsonl" in listed
    prefix = listed.split()[1]
    status, out = run("keys", "remove", "config.yaml", "alice", "--prefix", prefix, *place)
    assert (status, out.startswith("removed 1 from elsewhere/keys.jsonl")) == (0, True)
    assert prefix not in run("keys", "list", "config.yaml", *place)[1]
    assert Path("elsewhere/keys.jsonl").stat().st_mode & 0o077 == 0
    status, out = run("keys", "remove", "config.yaml", "carol", *place)
    assert (status, "no key of 'carol'; there are: alice" in out) == (2, True)
    assert run("keys", "remove", "config.yaml", "alice", *place)[0] == 0
    listed = run("keys", "list", "config.yaml", *place)[1]
    assert ("bob" in listed, "alice" in listed, "1 key in" in listed) == (True, False, True)


def test_keys_of_a_service_that_is_not_here_are_not_none(run) -> None:
    status, out = run("keys", "list", "config.yaml")
    assert (status, "services/mine: no such folder" in out) == (2, True)
    Path("services/mine").mkdir(parents=True)
    status, out = run("keys", "list", "config.yaml")
    assert (status, "services/mine/keys.jsonl: no such file, so there are no keys" in out) == (2, True)


@pytest.mark.parametrize(
    ("section", "named"),
    [
        (
            {"serve": {"student": {"type": "hf", "model": "bundle"}}},
            r"serve\.student\.replicas: 1 with serve\.student\.gpus 1",
        ),
        ({"teacher": {"type": "vllm", "model": "demo", "gpus": 2}}, r"teacher\.replicas: 1 with teacher\.gpus 2"),
        (
            {"serve": {"teacher": {"type": "hf", "model": "org/large"}}},
            r"serve\.teacher\.replicas: 1 with serve\.teacher\.gpus 1",
        ),
    ],
)
def test_gpus_that_this_machine_has_not_are_said_before_anybody_waits_for_them(
    section: dict[str, Any], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("ray.nodes", lambda: [{"Alive": True, "Resources": {"CPU": 2.0}}])
    with pytest.raises(ConfigError, match=named):
        app.require_gpus(parse_config({**RAW, **section}))
    app.require_gpus(parse_config({**RAW, "serve": {"student": {"type": "hf", "model": "bundle", "gpus": 0}}}))
