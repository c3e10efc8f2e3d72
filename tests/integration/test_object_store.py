"""A run whose queries and folder are in a bucket, against an S3 server on loopback: the commands as a user types them.

Not covered here: other stores than S3.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from distill_ray.pipeline.folder import RunFolder

NUM_ROWS = 60


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """URL of an empty bucket; where it is and who may write stands in the environment, as on a cluster."""
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
    fsspec.filesystem("s3").mkdir("bucket")
    yield "s3://bucket"
    server.stop()


def distill_ray(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "distill_ray", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=dict(os.environ))


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
