"""A store on a bad day, and one that cannot be used: what lives in a bucket, through `faulty_s3.py`.

Not covered here: what Ray Train writes itself (checkpoints), and other stores than S3.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from distill_ray.config import RunConfig, parse_config
from distill_ray.config.serve import StoreConfig
from distill_ray.errors import BundleError, ConfigError, RunFolderError, SeveralErrors, StoreError
from distill_ray.object_store import s3
from distill_ray.object_store.s3 import PatientS3
from distill_ray.pipeline.check import check_places
from distill_ray.pipeline.folder import RunFolder
from distill_ray.pipeline.run import write_origin
from distill_ray.serving.collecting.store import Selection, make_store
from distill_ray.serving.numbered import NumberedFiles
from distill_ray.serving.routing.bundles import Bundles
from tests.integration.faulty_s3 import Fault, FaultyS3, seeded
from tests.unit.lease_runner import swap
from tests.unit.pair_maker import pairs
from tests.unit.small_bundle import write_small_bundle

NUM_ROWS = 120
QUICK: tuple[Fault, ...] = ("error", "slow_down", "cut", "lost", "half")  # a stall takes its time


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many tries as ever, one right after the other."""
    monkeypatch.setattr(s3, "PAUSES_S", (0.01,) * len(s3.PAUSES_S))


# -- on a bad day ------------------------------------------------------------------------------------------------------


def rows_of(folder: RunFolder) -> list[tuple[str, str]]:
    tables = folder.read_tables("examples", columns=["row_id", "completion"])
    return [(row["row_id"], row["completion"]) for table in tables for row in table.to_pylist()]


def test_a_generation_loses_and_doubles_no_row(faulty: FaultyS3, tmp_path: Path) -> None:
    (tmp_path / "queries.jsonl").write_text(
        "".join(f'{{"id": "r{i}", "text": "query {i}"}}\n' for i in range(NUM_ROWS))
    )
    config = {
        "recipe": {"type": "context", "context": {"text": "Answer."}},
        "data": {"source": str(tmp_path / "queries.jsonl"), "id": "id"},
        "teacher": {"type": "fake", "answer": "{{ system }}: {{ query }}"},
        "generate": {"rows_per_partition": 40, "flush_s": 1.0},
    }
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    bad_day = seeded(7, 0.1)

    def plan(method: str, path: str, turn: int) -> Fault | None:
        is_first_of_examples = method == "PUT" and "/examples/" in path and turn == 0
        return "lost" if is_first_of_examples else bad_day(method, path, turn)

    faulty.plan = plan
    faulty.stall_s = 4.0
    patience = json.dumps({"config_kwargs": {"read_timeout": 2.0}})
    command = [sys.executable, "-m", "distill_ray", "generate", str(tmp_path / "config.yaml")]
    run = "s3://bucket/runs/faulty"
    done = subprocess.run(
        [*command, "--run-dir", run],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "FSSPEC_S3": patience},
    )
    assert done.returncode == 0, done.stderr
    assert (faulty.faults()["lost"] >= 3, len(faulty.faults()) >= 3, faulty.faults().total() >= 8) == (True,) * 3
    folder = RunFolder(run)
    assert sorted(rows_of(folder)) == sorted((f"r{i}", f"Answer.: query {i}") for i in range(NUM_ROWS))
    manifest = folder.manifest()
    assert [manifest[key] for key in ("rows_in", "rows_with_examples", "teacher_calls")] == [NUM_ROWS] * 3


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("fault", QUICK)
def test_files_of_a_run_are_whole_whatever_breaks_off(faulty: FaultyS3, fault: Fault, tmp_path: Path) -> None:
    folder = RunFolder(f"s3://bucket/runs/files-{fault}")
    faulty.plan = lambda method, path, turn: fault if turn == 0 else None  # every request, the first time
    for name in ("a", "b"):
        folder.write_json({"name": name}, "done", f"{name}.json")
    assert folder.list("done") == ["a.json", "b.json"]
    assert [folder.read_json("done", f"{name}.json") for name in ("a", "b")] == [{"name": "a"}, {"name": "b"}]
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_bytes(b"w" * 1000)
    folder.put(tmp_path / "model", "student")
    assert folder.read_bytes("student", "weights") == b"w" * 1000
    folder.delete("done")
    assert not folder.exists("done", "a.json")
    assert faulty.faults()[fault] > 8


def test_a_file_of_several_parts_is_whole_though_its_last_answer_is_lost(faulty: FaultyS3) -> None:
    part, content = 5 << 20, os.urandom(11 << 20)
    broken: dict[tuple[str, str], Fault] = {("POST", "?uploadId"): "lost", ("GET", ""): "half"}

    def plan(method: str, path: str, turn: int) -> Fault | None:
        question = "?uploadId" if "?uploadId" in path else path.partition("?")[2]
        return broken.pop((method, question), None)

    faulty.plan = plan
    fs = PatientS3()
    fs.pipe_file("bucket/large", content, chunksize=part)
    assert fs.cat_file("bucket/large", chunksize=part) == content
    assert faulty.faults() == {"lost": 1, "half": 1}


@pytest.mark.usefixtures("impatient")
def test_who_writes_on_a_condition_knows_his_own_file_though_the_answer_was_lost(faulty: FaultyS3) -> None:
    files = NumberedFiles("s3://bucket/numbered")
    faulty.plan = lambda method, path, turn: "lost" if method == "PUT" and turn == 0 else None
    assert files.make(1, b"mine")
    assert not files.make(1, b"another's")
    assert files.read(1) == b"mine"
    assert [(method, fault) for method, _, fault in faulty.asked[:2]] == [("PUT", "lost"), ("PUT", None)]


@pytest.mark.usefixtures("impatient")
def test_a_lease_is_one_holders_on_a_bad_day(faulty: FaultyS3) -> None:
    url = "s3://bucket/leased"
    faulty.plan = seeded(1, 0.2, QUICK)
    with ThreadPoolExecutor(4) as pool:
        won = list(pool.map(lambda _: swap(make_store(StoreConfig(url=url), ""), 6), range(4)))
    swapped = [each for one in won for each in one]
    assert len(set(swapped)) == len(swapped)
    last = make_store(StoreConfig(url=url), "").lease()
    assert max(swapped) == (last.token, last.beat)
    assert faulty.faults()["lost"]


@pytest.mark.usefixtures("impatient")
def test_moves_of_bundles_are_neither_lost_nor_doubled_on_a_bad_day(
    faulty: FaultyS3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISTILL_RAY_CACHE", str(tmp_path / "cache"))
    versions = ("a" * 12, "b" * 12)
    url = "s3://bucket/faulty-service/bundles"
    faulty.plan = seeded(2, 0.2, QUICK)
    for version in versions:
        Bundles(url).install(write_small_bundle(tmp_path / version, version=version))

    def promote(number: int) -> int:
        own = Bundles(url)
        for turn in range(4):
            own.promote(versions[(number + turn) % 2])
        return len(own.history())

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(promote, range(3)))
    moves = Bundles(url).history()
    assert [move.number for move in moves] == list(range(1, len(moves) + 1))
    assert [move.before for move in moves] == [None, *(move.version for move in moves[:-1])]
    assert len({move.id for move in moves}) == len(moves) >= 4
    assert Bundles(url).load(versions[0], None).version == versions[0]
    assert faulty.faults()["lost"]


@pytest.mark.usefixtures("impatient")
def test_pairs_are_neither_lost_nor_doubled_on_a_bad_day(faulty: FaultyS3) -> None:
    faulty.plan = seeded(3, 0.1, QUICK)
    writer, reader = (make_store(StoreConfig(url="s3://bucket/faulty/pairs"), "") for _ in range(2))
    assert [writer.add(pairs(count)) for count in (5, 10, 15)] == [5, 5, 5]
    ids = [pair_id for batch in reader.scan(Selection(), ["pair_id"]) for pair_id in batch["pair_id"].to_pylist()]
    assert (len(ids), len(set(ids)), reader.count()) == (15, 15, 15)
    assert reader.delete(Selection(contains="question 3")) == 1
    assert writer.count() == 14
    assert len(faulty.faults()) >= 4


# -- a store that is down ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["error", "slow_down"])
@pytest.mark.usefixtures("impatient")
def test_a_store_that_only_fails_is_one_message_after_so_many_tries(faulty: FaultyS3, fault: Fault) -> None:
    faulty.plan = lambda method, path, turn: fault
    with pytest.raises(
        RunFolderError, match=r"^s3://bucket/run: .* failed 9 times, last with: .*What was finished there is kept"
    ):
        RunFolder("s3://bucket/run").write_bytes(b"x", "file")
    assert len(faulty.asked) == s3.TRIES


@pytest.mark.usefixtures("impatient")
def test_a_store_that_stalls_is_given_up_after_a_few_times(faulty: FaultyS3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PatientS3, "read_timeout", 0.2)
    PatientS3.clear_instance_cache()
    faulty.plan = lambda method, path, turn: "stall"
    with pytest.raises(RunFolderError, match=r"failed 4 times, last with: Read timeout"):
        RunFolder("s3://bucket/run").read_bytes("file")
    assert len(faulty.asked) == s3.TRIES_STALLED


def test_tries_of_a_store_take_seconds_together_and_not_minutes() -> None:
    assert 10 < sum(s3.PAUSES_S) < 30
    assert sum(s3.PAUSES_S[: s3.TRIES_UNREACHED - 1]) < 10


# -- a store that cannot be used ---------------------------------------------------------------------------------------


def config_in(place: str) -> RunConfig:
    """A service whose pairs and bundles lie in a place."""
    raw = {"recipe": {"context": {"text": "x"}}, "data": {"source": "a"}, "teacher": {"type": "fake"}}
    serve = {"bundles": f"{place}/bundles", "collect": {"store": {"url": f"{place}/pairs"}}}
    return parse_config({**raw, "serve": serve})


def everything_said(place: str) -> list[str]:
    """What is said of a run, pairs and bundles there: by the check before anything, and by each use."""
    config = config_in(place)
    uses: list[Callable[[], object]] = [
        lambda: list(check_places(config, f"{place}/run")),
        lambda: write_origin(config, RunFolder(f"{place}/run")),
        lambda: make_store(config.serve.collect.store, "").add(pairs(1)),
        lambda: swap(make_store(config.serve.collect.store, ""), 1),
        lambda: Bundles(f"{place}/bundles").fence(1),
    ]
    said = []
    for use in uses:
        with pytest.raises((ConfigError, RunFolderError, StoreError, BundleError)) as caught:
            use()
        error = caught.value
        said += [str(each) for each in (error.errors if isinstance(error, SeveralErrors) else [error])]
    assert [text.split(": ", 1)[0] for text in said] == [
        *("--run-dir", "serve.bundles", "serve.collect.store.url"),
        *(f"{place}/run", "serve.collect.store", "serve.collect.store", "serve.bundles"),
    ]
    return said


@pytest.mark.usefixtures("bucket")
def test_a_bucket_that_is_not_there_is_named() -> None:
    for said in everything_said("s3://no-such-bucket"):
        assert "there is no bucket 'no-such-bucket'; create it, or correct the address" in said
    with pytest.raises(BundleError, match="there is no bucket"):
        Bundles("s3://no-such-bucket/bundles").current()
    with pytest.raises(StoreError, match="there is no bucket"):
        make_store(StoreConfig(url="s3://no-such-bucket/pairs"), "").count()


def test_a_bucket_that_may_only_be_read_is_named(faulty: FaultyS3) -> None:
    faulty.plan = lambda method, path, turn: "denied" if method not in ("GET", "HEAD") else None
    for said in everything_said("s3://bucket/read-only"):
        assert "is refused; these credentials need the rights to list, read, write and delete" in said
    assert not [fault for method, _, fault in faulty.asked if method == "PUT" and fault is None]


@pytest.mark.usefixtures("bucket")
def test_no_credentials_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    PatientS3.clear_instance_cache()
    for said in everything_said("s3://bucket/nobody"):
        assert "no credentials for it in the environment; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in said


@pytest.mark.usefixtures("bucket")
def test_a_bucket_that_can_be_used_passes_the_check_and_keeps_nothing_of_it() -> None:
    said = list(check_places(config_in("s3://bucket/checked"), "s3://bucket/checked/run"))
    assert [line.split(": ", 1)[0] for line in said] == ["--run-dir", "serve.bundles", "serve.collect.store.url"]
    assert PatientS3().find("bucket/checked") == []
