"""`distill-ray serve` as a process, for tests."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml


@dataclass
class Service:
    """A running service."""

    folder: Path
    port: int
    process: subprocess.Popen[bytes]
    config: Path
    environment: dict[str, str]
    teacher: Any = None  # a scripted server, where the teacher is one

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ask(self, text: str, **kwargs: Any) -> httpx.Response:
        sent = {"messages": [{"role": "user", "content": text}], **kwargs}
        return httpx.post(self.url + "/v1/chat/completions", json=sent, timeout=300)

    def status(self) -> dict[str, Any]:
        return httpx.get(self.url + "/status.json", timeout=300).json()

    def command(self, *arguments: str) -> str:
        command = [sys.executable, "-m", "distill_ray", *arguments]
        done = subprocess.run(
            command, env=self.environment, cwd=self.folder, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def replicas(self, name: str) -> list[psutil.Process]:
        """Processes of a deployment, of this service only."""
        own = psutil.Process(self.process.pid).children(recursive=True)
        found = []
        for process in own:
            try:
                if f"ServeReplica:{name}" in " ".join(process.cmdline()):
                    found.append(process)
            except psutil.Error:
                continue
        return found


def until(found: Callable[[], Any], seconds: float = 600.0) -> Any:
    """Wait for something to be so."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if result := found():
                return result
        except httpx.HTTPError:
            pass
        time.sleep(0.25)
    raise AssertionError("it did not come to be so")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def serving(folder: Path, raw: dict[str, Any], *arguments: str) -> Iterator[Service]:
    """Start `distill-ray serve` with a config (its port is chosen here), and end it."""
    port = free_port()
    config = folder / "serve.yaml"
    config.write_text(yaml.safe_dump(raw))
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    log = folder / "serve.log"
    command = [sys.executable, "-m", "distill_ray", "serve", str(config), "--port", str(port), *arguments]
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=environment, cwd=folder, stdout=output, stderr=output)
    service = Service(folder, port, process, config, environment)
    try:
        until(lambda: process.poll() is not None or b"Ctrl-C ends it" in log.read_bytes())
        assert process.poll() is None, log.read_text()
        yield service
    finally:
        children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.send_signal(signal.SIGINT)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
        for child in psutil.wait_procs(children, 10)[1]:
            child.kill()
