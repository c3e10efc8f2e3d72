"""What lives in a bucket, against an S3 server on loopback: pairs, bundles, and a run by the commands as a user types.

Not covered here: other stores than S3.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import secrets
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from distill_ray.config import parse_config
from distill_ray.config.serve import StoreConfig
from distill_ray.errors import BundleError, LeaseLost, StoreError
from distill_ray.flywheel.training import training_config
from distill_ray.models import resolve_model
from distill_ray.object_store import s3
from distill_ray.object_store.s3 import PatientS3
from distill_ray.pipeline.folder import RunFolder
from distill_ray.serving.collecting.store import Lease, Selection, make_store
from distill_ray.serving.models.student import InstalledStudent, engine_here
from distill_ray.serving.numbered import NumberedFiles
from distill_ray.serving.routing.bundles import Bundles, bundles_of
from distill_ray.serving.routing.moves import Candidate, Moves, State
from tests.unit.lease_runner import swap
from tests.unit.pair_maker import pair, pairs
from tests.unit.small_bundle import write_small_bundle

NUM_ROWS = 60


def distill_ray(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "distill_ray", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=900, check=False, env=dict(os.environ))


@pytest.mark.slow
def test_queries_model_and_run_in_a_bucket_go_through_every_stage(
    bucket: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISTILL_RAY_CACHE", str(tmp_path / "cache"))
    PatientS3().put(f"{tiny_model}/", f"{bucket}/models/tiny/", recursive=True)
    with PatientS3().open(f"{bucket}/queries/part-0.jsonl", "w") as file:
        file.writelines(json.dumps({"id": f"r{i}", "text": f"query {i}"}) + "\n" for i in range(NUM_ROWS))
    config = {
        "recipe": {"type": "context", "context": {"text": "Answer."}},
        "data": {"source": f"{bucket}/queries/*.jsonl", "id": "id", "validation_holdout": 0.2},
        "teacher": {"type": "fake"},
        "student": {"model": f"{bucket}/models/tiny"},
        "train": {"epochs": 1, "max_tokens_per_batch": 512, "threads_per_worker": 1},
        "evaluate": {"engine": "hf", "max_tokens": 4},
    }
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    run = f"{bucket}/runs/first"

    done = distill_ray("generate", str(tmp_path / "config.yaml"), "--run-dir", run)
    assert done.returncode == 0, done.stderr
    folder = RunFolder(run)
    ids = [row_id for table in folder.read_tables("examples") for row_id in table["row_id"].to_pylist()]
    assert sorted(ids) == sorted(f"r{i}" for i in range(NUM_ROWS))
    assert folder.list("calls", suffix=".arrow") == []  # merged

    done = distill_ray("train", str(tmp_path / "config.yaml"), "--run-dir", run)
    assert done.returncode == 0, done.stderr
    student = Path(resolve_model(folder.url("student")))
    assert (student / "model.safetensors").is_file()
    assert (student / "chat_template.jinja").is_file()

    done = distill_ray("evaluate", str(tmp_path / "config.yaml"), "--run-dir", run)
    assert done.returncode == 0, done.stderr
    assert folder.read_json("eval", "metrics.json")["num_rows"] > 0
    assert folder.exists("report.md")

    fetched = [path.name.rsplit("-", 1)[0] for path in (tmp_path / "cache" / "fetched").iterdir() if path.is_dir()]
    assert fetched.count("student") == 2  # with and without weights, whoever asked for it

    done = distill_ray("ask", run, "query 1", "--max-tokens", "4")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    everything = b"".join(folder.fs.cat_file(path) for path in folder.fs.find(folder.path("")))
    assert b"sk-canary" not in everything + (done.stdout + done.stderr).encode()


def contents(url: str) -> list[bytes]:
    fs = PatientS3()
    fs.invalidate_cache()
    return [fs.cat_file(file) for file in fs.find(url)]


def test_collected_pairs_live_in_a_bucket(bucket: str) -> None:
    """As in `tests/unit/test_stores.py`, in short: the writer's handle, and one of somebody who deletes."""
    url = f"{bucket}/service/pairs"
    writer, person = (make_store(StoreConfig(url=url), "") for _ in range(2))
    assert person.count() == 0
    assert writer.add(pairs(5)) == 5
    snapshot = person.snapshot()
    assert writer.add(pairs(7)) == 2
    gone = pair("question 3").pair_id
    assert any(b"answer 3" in data for data in contents(url))
    assert person.delete(Selection(contains="question 3")) == 1
    assert writer.add(pairs(7)) == 0
    assert writer.mark_indexed([gone, pair("question 1").pair_id], "v1") == 1
    writer.compact()
    assert (person.count(), person.count(Selection(until=snapshot)), person.count(Selection(indexed=True))) == (6, 4, 1)
    assert not any(b"answer 3" in data for data in contents(url))


def test_a_lease_in_a_bucket_is_one_holders(bucket: str) -> None:
    """Eight threads swap one file after the other, as in `tests/unit/test_lease.py`."""
    url = f"{bucket}/leased/pairs"
    assert make_store(StoreConfig(url=url), "").lease() == Lease()
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda _: swap(make_store(StoreConfig(url=url), ""), 10), range(8)))
    swapped = [each for one in won for each in one]
    assert len(set(swapped)) == len(swapped)
    last = make_store(StoreConfig(url=url), "").lease()
    assert max(swapped) == (last.token, last.beat)


def be_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is where the bucket was, and its clients have little patience."""
    monkeypatch.setattr(s3, "PAUSES_S", (0.01,) * len(s3.PAUSES_S))
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    PatientS3.clear_instance_cache()


def test_a_bucket_that_is_away_is_an_error_of_ours(monkeypatch: pytest.MonkeyPatch, bucket: str) -> None:
    be_away(monkeypatch)
    with pytest.raises(StoreError, match=r"cannot use the store of pairs.* failed 6 times"):
        make_store(StoreConfig(url=f"{bucket}/pairs"), "").add(pairs(1))


# -- the bundles of a service ------------------------------------------------------------------------------------------

A, B, C = "aaaaaaaaaaaa", "bbbbbbbbbbbb", "cccccccccccc"


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Bundles that are not installed yet."""
    monkeypatch.setenv("DISTILL_RAY_CACHE", str(tmp_path / "cache"))
    created = {A: "2026-01-01", B: "2026-01-02", C: "2026-01-03"}
    return {v: write_small_bundle(tmp_path / "made" / v, version=v, created=created[v]) for v in (A, B, C)}


@pytest.fixture
def bundles(bucket: str, made: dict[str, Path]) -> Bundles:
    found = Bundles(f"{bucket}/service-{secrets.token_hex(4)}/bundles")
    for version, folder in made.items():
        assert found.install(folder) == version
    return found


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the bucket is asked, from now on."""
    asked: list[str] = []
    call = PatientS3._call_s3

    async def noted(self: PatientS3, method: str, *arguments: Any, **named: Any) -> Any:
        asked.append(method)
        return await call(self, method, *arguments, **named)

    monkeypatch.setattr(PatientS3, "_call_s3", noted)
    return asked


def keys(url: str) -> list[str]:
    fs = PatientS3()
    fs.invalidate_cache()
    return [path.removeprefix(url.removeprefix("s3://") + "/") for path in fs.find(url)]


def test_bundles_live_in_a_bucket(bundles: Bundles) -> None:
    other = Bundles(bundles.url)
    assert (other.current(), [manifest.version for manifest in other.list()]) == (None, [A, B, C])
    bundles.promote(A)
    bundles.promote(B)
    assert other.versions() == [A, B]
    other.set_candidate(Candidate(C, share=0.5, max_tokens=100))
    assert bundles.candidate() == Candidate(C, 0.5, 100)
    other.fence(2)
    with pytest.raises(LeaseLost, match="lease 2, this one has 1"):
        bundles.promote(C, token=1)
    assert bundles.rollback(only_from=B) == A
    bundles.set_candidate(None)
    assert [(move.action, move.version, move.before) for move in other.history()] == [
        ("promote", A, None),
        ("promote", B, A),
        ("rollback", A, B),
    ]
    assert (other.state(), other.num_moves()) == (bundles.state(), 6)
    with pytest.raises(BundleError, match=rf"no bundle 'd+' is installed; there are: {A}, {B}, {C}"):
        other.promote("d" * 12)


def test_who_asks_a_bucket_every_second_what_is_current_makes_one_request(
    bundles: Bundles, requests: list[str]
) -> None:
    bundles.promote(A)
    router = Bundles(bundles.url)
    assert router.current() == A
    requests.clear()
    assert [router.state().current for _ in range(3)] == [A] * 3
    assert requests == ["get_object"] * 3
    bundles.promote(B)
    requests.clear()
    assert router.state().current == B
    assert requests == ["get_object"] * 2


def test_several_that_move_at_once_in_a_bucket_lose_no_move(bundles: Bundles) -> None:
    def race(number: int) -> int:
        own = Bundles(bundles.url)
        for turn in range(6):
            own.promote((A, B, C)[(number + turn) % 3])
        return number

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(race, range(4))) == [0, 1, 2, 3]
    moves = Bundles(bundles.url).history()
    assert [move.number for move in moves] == list(range(1, len(moves) + 1))
    versions: tuple[str, ...] = ()
    for move in moves:
        assert (move.action, move.before, move.state.versions) == (
            "promote",
            versions[-1] if versions else None,
            (*versions, move.version),
        )
        versions = move.state.versions
    assert len(moves) >= 6


def test_two_that_promote_at_the_same_moment_make_a_move_each(
    bundles: Bundles, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, both = NumberedFiles.make, threading.Barrier(2)
    tries: list[int] = []

    def make_together(self: NumberedFiles, number: int, content: bytes) -> bool:
        tries.append(number)
        if number == 1:
            both.wait(30)  # both have seen that nothing is current
        return make(self, number, content)

    monkeypatch.setattr(NumberedFiles, "make", make_together)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda version: Bundles(bundles.url).promote(version), (A, B)))
    assert sorted(tries) == [1, 1, 2]
    first, second = bundles.history()
    assert {first.version, second.version} == {A, B}
    assert (second.before, bundles.versions()) == (first.version, [first.version, second.version])


def test_a_node_copies_a_bundle_once_and_without_weights_where_nobody_runs_the_student(
    bundles: Bundles, made: dict[str, Path], requests: list[str], tmp_path: Path
) -> None:
    with ThreadPoolExecutor(4) as pool:
        [folder] = set(pool.map(lambda _: Bundles(bundles.url).path(A), range(4)))
    num_files = len([path for path in made[A].rglob("*") if path.is_file()])
    assert requests.count("get_object") <= num_files + 4  # each asks for bundle.json, one for the files
    assert folder.is_relative_to(tmp_path / "cache")
    assert {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()} == {
        path.relative_to(made[A]): path.read_bytes() for path in made[A].rglob("*") if path.is_file()
    }
    requests.clear()
    assert bundles.path(A) == folder
    assert requests.count("get_object") == 1
    light = bundles.load(B, None, with_student=False)
    assert (light.version, light.student_folder.exists()) == (B, False)
    assert bundles.load(B, None).student_folder.exists()


def test_a_damaged_object_reaches_no_node_and_installing_again_replaces_it(
    bundles: Bundles, made: dict[str, Path], tmp_path: Path
) -> None:
    PatientS3().pipe_file(f"{bundles.url}/{A}/curve.json", b"x")
    with pytest.raises(BundleError, match=rf"^{bundles.url}/{A}/curve\.json: damaged .*install the bundle again"):
        bundles.path(A)
    assert not list((tmp_path / "cache").rglob("curve.json"))
    bundles.install(made[A])
    assert bundles.load(A, None).version == A
    (bundles.path(A) / "curve.json").write_text("x")
    with pytest.raises(BundleError, match="sha256"):
        bundles.load(A, None)
    bundles.install(made[A])
    assert bundles.load(A, None).version == A


def test_half_of_a_bundle_in_a_bucket_is_none(bundles: Bundles, made: dict[str, Path]) -> None:
    fs = PatientS3()
    fs.rm_file(f"{bundles.url}/{A}/bundle.json")
    fs.pipe_file(f"{bundles.url}/{A}/left-over.json", b"{}")
    fs.rm_file(f"{bundles.url}/{B}/entries.arrow")
    assert [manifest.version for manifest in bundles.list()] == [B, C]
    with pytest.raises(BundleError, match=f"no bundle '{A}' is installed"):
        bundles.promote(A)
    with pytest.raises(BundleError, match=r"entries\.arrow: missing; install the bundle again"):
        bundles.promote(B)
    for version in (A, B):
        bundles.install(made[version])
        bundles.promote(version)
    assert not [key for key in keys(bundles.url) if "left-over" in key]


def test_old_bundles_leave_a_bucket_and_one_that_is_promoted_meanwhile_stays(
    bundles: Bundles, made: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundles.promote(C)
    copy = bundles.path(B)
    before, state, asked = keys(bundles.url), Bundles.state, list[None]()

    def promoted_meanwhile(self: Bundles) -> State:
        asked.append(None)
        if len(asked) == 2:  # it is about to go, and nobody finds it any more
            assert set(before) - set(keys(bundles.url)) == {f"{A}/bundle.json"}
            Moves(bundles.url).change("promote", lambda now: dataclasses.replace(now, versions=(*now.versions, A)))
        return state(self)

    with monkeypatch.context() as patch:
        patch.setattr(Bundles, "state", promoted_meanwhile)
        assert bundles.prune(2) == []
    assert set(before) < set(keys(bundles.url))
    assert bundles.prune(2) == [B]
    assert not copy.exists()
    assert not [key for key in keys(bundles.url) if key.startswith(B)]
    assert [manifest.version for manifest in bundles.list()] == [A, C]


def test_a_node_that_copies_a_bundle_drops_its_copies_of_those_that_somebody_removed(
    bundles: Bundles, made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    another = Bundles(f"{bundles.url}-of-another-service")
    another.install(made[A])
    gone = [bundles.path(A), bundles.path(A, with_student=False)]
    kept = [another.path(A), bundles.path(B)]
    with monkeypatch.context() as elsewhere:
        elsewhere.setenv("DISTILL_RAY_CACHE", str(tmp_path / "another-node"))
        assert bundles.prune(2) == [A]
    assert all(folder.exists() for folder in (*gone, *kept))
    bundles.path(B)  # is here, so nobody looks
    assert all(folder.exists() for folder in gone)
    kept.append(bundles.path(C))
    assert [folder.exists() for folder in (*gone, *kept)] == [False, False, True, True, True]


def test_a_student_in_a_bucket_is_run_from_files_of_the_node(bundles: Bundles) -> None:
    raw = {"recipe": {"context": {"text": "x"}}, "data": {"source": "a"}, "teacher": {"type": "fake"}}
    config = parse_config({**raw, "serve": {"student": {"type": "hf", "gpus": 0}, "bundles": bundles.url}})
    assert bundles_of(config, "/not/used").url == bundles.url
    engine = asyncio.run(engine_here(InstalledStudent(config, bundles.url, A)))
    assert engine.model == str(bundles.path(A) / "student")
    assert (Path(engine.model) / "model.safetensors").read_bytes() == b"weights"


def test_a_cycle_hands_its_workers_the_url_of_the_student_and_copies_no_weights_itself(
    bundles: Bundles, tmp_path: Path
) -> None:
    raw = {"recipe": {"context": {"text": "x"}}, "data": {"source": "a"}, "teacher": {"type": "fake"}}
    config = parse_config({**raw, "flywheel": {"start_from": "current"}, "serve": {"bundles": bundles.url}})
    work: Any = SimpleNamespace(bundles=bundles)
    student = training_config(config, work, A).student
    assert student.model == f"{bundles.url}/{A}/student"
    assert set(keys(student.model)) >= {"model.safetensors"}
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_bundles_of_a_bucket_that_is_away_are_an_error_of_ours(
    bundles: Bundles, made: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundles.promote(A)
    be_away(monkeypatch)
    away = Bundles(bundles.url)
    for use in (away.current, away.list, lambda: away.promote(B), lambda: away.install(made[A]), lambda: away.path(A)):
        with pytest.raises(
            BundleError, match=r"^serve\.bundles: .*cannot use the bundles .* failed 6 times.*AWS_ENDPOINT_URL"
        ):
            use()
