"""A run whose queries and folder are in a bucket, against an S3 server on loopback: the commands as a user types them.

Not covered here: other stores than S3.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest
import s3fs

from distill_ray.config.serve import StoreConfig
from distill_ray.errors import StoreError
from distill_ray.pipeline.folder import RunFolder
from distill_ray.serving.collecting.store import Lease, Selection, make_store
from tests.unit.lease_runner import swap
from tests.unit.pair_maker import pair, pairs

NUM_ROWS = 60


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """URL of a bucket; where it is and who may write stands in the environment, as on a cluster."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "sk-canary-0123456789",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()  # it would go on asking the server of the test before
    fsspec.filesystem("s3").makedirs("bucket", exist_ok=True)  # moto keeps what it has, per process
    yield "s3://bucket"
    server.stop()


def distill_ray(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "distill_ray", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=900, check=False, env=dict(os.environ))


@pytest.mark.slow
def test_queries_and_run_in_a_bucket_go_through_every_stage(bucket: str, tiny_model: Path, tmp_path: Path) -> None:
    with fsspec.open(f"{bucket}/queries/part-0.jsonl", "w") as file:
        file.writelines(json.dumps({"id": f"r{i}", "text": f"query {i}"}) + "\n" for i in range(NUM_ROWS))
    config = {
        "recipe": {"type": "context", "context": {"text": "Answer."}},
        "data": {"source": f"{bucket}/queries/*.jsonl", "id": "id", "validation_holdout": 0.2},
        "teacher": {"type": "fake"},
        "student": {"model": str(tiny_model)},
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
    student = folder.fetch("student")
    assert (student / "model.safetensors").is_file()
    assert (student / "chat_template.jinja").is_file()

    done = distill_ray("evaluate", str(tmp_path / "config.yaml"), "--run-dir", run)
    assert done.returncode == 0, done.stderr
    assert folder.read_json("eval", "metrics.json")["num_rows"] > 0
    assert folder.exists("report.md")

    done = distill_ray("ask", run, "query 1", "--max-tokens", "4")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    everything = b"".join(folder.fs.cat_file(path) for path in folder.fs.find(folder.path("")))
    assert b"sk-canary" not in everything + (done.stdout + done.stderr).encode()


def contents(url: str) -> list[bytes]:
    fs = fsspec.filesystem("s3")
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


def test_a_bucket_that_is_away_is_an_error_of_ours(monkeypatch: pytest.MonkeyPatch, bucket: str) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(StoreError, match="cannot use the store of pairs"):
        make_store(StoreConfig(url=f"{bucket}/pairs"), "").add(pairs(1))
