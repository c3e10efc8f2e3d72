"""A service that grows with its load, whose student is a T5; and the same service through Ray's own `serve deploy`."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pyarrow as pa
import pytest
import yaml

from distill_ray.config import SamplingConfig
from distill_ray.config.serve import EmbedderConfig
from distill_ray.serving.routing.bundle import ENTRIES_SCHEMA, write_bundle
from distill_ray.serving.routing.bundles import Bundles
from distill_ray.serving.routing.conversation import request_key
from distill_ray.serving.routing.embedder import load_embedder
from distill_ray.serving.routing.index import NearestIndex
from distill_ray.serving.routing.manifest import StudentSpec
from tests.integration.running_service import Service, free_port, serving, until
from tests.unit.small_bundle import REQUESTS, body, manifest

pytestmark = pytest.mark.slow
T5_PIECES = 24  # tokens of an answer


@pytest.fixture(scope="module")
def t5_bundle(tmp_path_factory: pytest.TempPathFactory, embedder_cache: Path, tiny_t5: Path) -> Path:
    embedder = load_embedder(EmbedderConfig())
    fingerprints = [request_key(body(text), []).fingerprint for text in REQUESTS]
    columns = {
        "example_id": [f"r{n}" for n in range(len(REQUESTS))],
        "text": REQUESTS,
        "fingerprint": fingerprints,
        "outcome": pa.array([1.0] * len(REQUESTS), pa.float32()),
    }
    sampling = SamplingConfig(temperature=0.0, max_tokens=T5_PIECES)
    spec = StudentSpec(kind="full", sampling=sampling, is_encoder_decoder=True)
    return write_bundle(
        tmp_path_factory.mktemp("t5") / "bundle",
        manifest(embedder_identity=embedder.identity, student=spec, far=0.3),
        student=tiny_t5,
        index=NearestIndex.build(embedder.embed(REQUESTS), fingerprints),
        entries=pa.table(columns).cast(ENTRIES_SCHEMA),
        reports={"curve.json": b"{}"},
    )


def config(folder: Path, **serve: Any) -> dict[str, Any]:
    return {
        "name": "growing",
        "recipe": {"type": "context", "context": {"text": "You are a home assistant."}},
        "data": {"source": "unused.jsonl"},
        "teacher": {"type": "fake", "answer": "teacher", "cpus": 0.1},
        "serve": {"folder": str(folder / "service"), "router": {"cpus": 0.1}, "headers": True, **serve},
    }


@pytest.fixture
def service(tmp_path: Path, t5_bundle: Path) -> Iterator[Service]:
    student = {"type": "hf", "gpus": 0, "cpus": 0.2, "replicas": {"min": 1, "max": 2}}
    scaling = {"target_ongoing": 2, "upscale_delay_s": 1, "downscale_delay_s": 5}
    with serving(tmp_path, config(tmp_path, student=student, scaling=scaling), "--bundle", str(t5_bundle)) as running:
        until(lambda: running.status()["student_up"])
        said = rb"Ctrl-C ends it\n(.*\n)*student of bundle \w+: loading; .*\n(.*\n)*student .* up after \d+ s"
        until(lambda: re.search(said, (tmp_path / "serve.log").read_bytes()))
        yield running


def test_a_t5_student_answers_and_a_second_replica_comes_with_the_load_and_goes_with_it(service: Service) -> None:
    def asked(**kwargs: Any) -> httpx.Response:
        answer = service.ask(REQUESTS[0], **kwargs)
        assert (answer.status_code, answer.headers["x-distill-route"]) == (200, "student"), answer.text
        return answer

    assert asked().json()["usage"]["completion_tokens"] > 0
    refused = service.ask(REQUESTS[0], model="student", logprobs=True)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "logprobs")
    assert len(service.replicas("growing-student")) == 1
    is_over = threading.Event()

    def load() -> None:
        while not is_over.is_set():
            asked()

    clients = [threading.Thread(target=load) for _ in range(12)]
    for client in clients:
        client.start()
    try:
        until(lambda: len(service.replicas("growing-student")) == 2)
    finally:
        is_over.set()
        for client in clients:
            client.join()
    until(lambda: len(service.replicas("growing-student")) == 1)
    asked()


def test_the_written_config_comes_up_with_serve_deploy_on_a_cluster(tmp_path: Path, t5_bundle: Path) -> None:
    """A head of its own with its dashboard, which `serve deploy` talks to."""
    port, ray_port, dashboard = free_port(), free_port(), free_port()
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config(tmp_path, student={"type": "hf", "gpus": 0, "cpus": 0.2}, port=port)))
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    environment |= {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
    }  # what `ray start` asks for anyway
    bin_folder = Path(sys.executable).parent

    def command(*arguments: str, **more: str) -> str:
        done = subprocess.run(
            arguments, env=environment | more, cwd=tmp_path, capture_output=True, text=True, timeout=900
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    written = tmp_path / "serve.yaml"
    distill = (sys.executable, "-m", "distill_ray", "serve", str(path), "--bundle", str(t5_bundle))
    assert f"next:  serve deploy {written}" in command(*distill, "--write", str(written))
    assert Bundles(tmp_path / "service" / "bundles").current() is not None
    before = {process.pid for process in psutil.process_iter()}
    head = [str(bin_folder / "ray"), "start", "--head", f"--port={ray_port}", "--num-cpus=4", "--disable-usage-stats"]
    try:
        command(*head, "--include-dashboard=true", f"--dashboard-port={dashboard}", f"--temp-dir={short_folder()}")
        command(str(bin_folder / "serve"), "deploy", str(written), "-a", f"http://127.0.0.1:{dashboard}")
        url = f"http://127.0.0.1:{port}"
        until(lambda: (found := httpx.get(f"{url}/status.json")).is_success and found.json()["student_up"])
        answer = httpx.post(f"{url}/v1/chat/completions", json=body(REQUESTS[0]), timeout=60)
        assert (answer.status_code, answer.headers["x-distill-route"]) == (200, "student")
        answer = httpx.post(f"{url}/v1/chat/completions", json=body("Explain the French revolution"), timeout=60)
        assert answer.json()["choices"][0]["message"]["content"] == "teacher"
    finally:
        end_ray(before, ray_port)


def short_folder() -> str:
    """Ray's sockets allow no long path."""
    folder = Path(f"/tmp/dr{os.getpid()}")
    shutil.rmtree(folder, ignore_errors=True)
    return str(folder)


def end_ray(before: set[int], ray_port: int) -> None:
    """End the processes of that head, and no other's."""
    mine = []
    for process in psutil.process_iter():
        try:
            text = " ".join(process.cmdline())
            if process.pid not in before and re.search(rf":{ray_port}\b|={ray_port}\b", text):
                mine += [*process.children(recursive=True), process]
        except psutil.Error:
            continue
    for process in mine:
        with contextlib.suppress(psutil.NoSuchProcess):  # ended with another one
            process.terminate()
    for process in psutil.wait_procs(mine, 15)[1]:
        process.kill()
    time.sleep(0.5)
    shutil.rmtree(short_folder(), ignore_errors=True)
