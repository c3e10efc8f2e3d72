"""The teacher writes the queries, on a real Ray: with a real model, and through a kill."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from aiohttp import web

from benchmarks.waste import CountingServer
from distill_ray.config import parse_config
from distill_ray.pipeline.folder import RunFolder
from distill_ray.pipeline.generate import generate


def written(folder: Path) -> list[str]:
    return [json.loads(line)["text"] for line in (folder / "queries" / "queries.jsonl").read_text().splitlines()]


@pytest.mark.usefixtures("local_ray")
def test_a_real_model_writes_queries_and_answers_them_and_a_larger_count_goes_on(tmp_path: Path) -> None:
    def run(count: int) -> RunFolder:
        raw: dict[str, Any] = {
            "recipe": {"type": "context", "context": {"text": "Name the language."}},
            "data": {
                "type": "synthesize",
                "count": count,
                "topics": ["short sentences in German", "short sentences in Dutch"],
                "seeds": ["Der Zug ist da.", "Het regent."],
                "per_call": 2,
            },
            "teacher": {"type": "hf", "model": "demo", "sampling": {"temperature": 1.0, "max_tokens": 32}},
            "generate": {"max_reject_frac": 1.0},
        }
        folder = RunFolder(tmp_path / "run")
        generate(parse_config(raw), folder)
        return folder

    first = run(4).manifest()
    four = written(tmp_path / "run")
    assert len(four) == len(set(four)) == first["queries"]["written"] == first["rows_in"] == 4
    assert first["queries"]["calls"] > 0
    assert first["queries"]["completion_tokens"] > 0

    again = run(4).manifest()
    assert again["queries"] == first["queries"]  # nothing was asked, nothing counted anew

    more = run(8).manifest()
    assert written(tmp_path / "run")[:4] == four
    assert more["rows_in"] == 8
    assert more["queries"]["replayed"] == first["queries"]["calls"]


class WritingServer(CountingServer):
    """Answers with two lines that depend on what was asked and nothing else."""

    async def _answer(self, request: web.Request) -> web.Response:
        body = await request.json()
        asked = json.dumps([body["messages"], body.get("seed")])
        marks = [hashlib.blake2b(f"{asked}{i}".encode(), digest_size=24).hexdigest() for i in range(2)]
        return self.completion("\n".join(f"{i}. What is {mark}?" for i, mark in enumerate(marks, start=1)))


@pytest.mark.slow
def test_a_kill_costs_what_was_in_flight_and_the_queries_are_the_same_as_without_it(tmp_path: Path) -> None:
    server = WritingServer(latency_s=0.1)
    config = {
        "recipe": {"type": "context", "context": {"text": "x"}},
        "data": {"type": "synthesize", "count": 120, "topics": ["marks"], "per_call": 2},
        "teacher": {
            "type": "openai",
            "model": "scripted",
            "base_url": f"http://127.0.0.1:{server.port}/v1",
            "api_key_env": None,
            "max_concurrency": 4,
        },
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))

    def command(run: str) -> list[str]:
        arguments = ["generate", str(tmp_path / "config.yaml"), "--run-dir", str(tmp_path / run)]
        return [sys.executable, "-m", "distill_ray", *arguments]

    whole = subprocess.run(command("whole"), capture_output=True, text=True, timeout=900, check=False)
    assert whole.returncode == 0, whole.stderr
    num_calls = len(server.began)

    process = subprocess.Popen(command("killed"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 900
    while len(server.ended) < num_calls + 20 and time.monotonic() < deadline:
        time.sleep(0.02)
    at_risk = server.at_risk(time.monotonic())
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "queries").exists()
    done = subprocess.run(command("killed"), capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    assert written(tmp_path / "killed") == written(tmp_path / "whole")
    assert len(written(tmp_path / "whole")) == 120
    assert 0 < len(server.began) - 2 * num_calls <= at_risk + 4  # and what began between the look and the kill
