"""How a service starts, as a process: one per folder, and what it says. Real Serve, a fake teacher, no models."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.integration.running_service import Service, free_port, serving, until

pytestmark = pytest.mark.slow


def config(folder: Path) -> dict[str, Any]:
    return {
        "name": "alone",
        "recipe": {"type": "context", "context": {"text": "Be brief."}},
        "data": {"source": "unused.jsonl"},
        "teacher": {"type": "fake", "answer": "teacher", "cpus": 0.1},
        "serve": {"folder": str(folder / "service"), "router": {"cpus": 0.1}},
    }


def start_beside(service: Service) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "distill_ray", "serve", str(service.config), "--port", str(free_port())]
    return subprocess.run(
        command, env=service.environment, cwd=service.folder, capture_output=True, text=True, timeout=600
    )


def test_a_folder_has_one_service_and_is_free_again_when_that_is_killed(tmp_path: Path, embedder_cache: Path) -> None:
    with serving(tmp_path, config(tmp_path)) as service:
        until(lambda: b"no bundle is in service yet" in (tmp_path / "serve.log").read_bytes())
        [keeper] = service.replicas("alone:keeper")
        second = start_beside(service)
        assert (second.returncode, second.stdout) == (1, "")
        assert f"another service is at work here (its keeper: pid {keeper.pid} on" in " ".join(second.stderr.split())
        keeper.kill()  # Serve starts another one, which finds the folder free
        until(lambda: [k.pid for k in service.replicas("alone:keeper")] not in ([], [keeper.pid]))
        until(lambda: service.status()["keeper"])
        children = psutil.Process(service.process.pid).children(recursive=True)
        service.process.kill()
        service.process.wait()
        with serving(tmp_path, config(tmp_path)) as again:  # at once, as a supervisor does it
            assert again.ask("Hello").json()["choices"][0]["message"]["content"] == "teacher"
        for child in psutil.wait_procs(children, 30)[1]:
            child.kill()
