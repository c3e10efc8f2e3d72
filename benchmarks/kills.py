"""A kill a minute under steady load: how many requests fail, and whether memory grows.

    python benchmarks/kills.py --out kills.json                  # six minutes, a kill every 60 s
    python benchmarks/kills.py --minutes 2 --every 20

`distill-ray serve` with two routers and two replicas of a fake student, real embeddings, a scripted teacher over HTTP;
victims in turn: a student replica, a router. Two kinds of clients, half of their requests for the student and half
streamed: plain HTTP ones that never repeat anything, and the official `openai` client as it comes, which repeats what
failed twice. A request that fails after its first words (a stream that breaks off) is counted apart: nobody can repeat
that unseen. What the two kinds of victims cost is told apart by what the client met: a 5xx, or a cut connection.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import yaml
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.clusters import free_port
from benchmarks.serving import NUM_INDEXED, make_bundle
from distill_ray.config.serve import EmbedderConfig
from distill_ray.demo import language_rows

NAME = "kills"
ROLES = {"student": f"ServeReplica:{NAME}-student", "router": f"ServeReplica:{NAME}:router"}
WATCHED = {**ROLES, "keeper": f"ServeReplica:{NAME}:keeper"}
Process = subprocess.Popen[bytes]
WAIT_S = 0.4  # of a client between two requests


def teacher(port: int) -> None:
    """Scripted: a fifth of a second of words for whatever is asked."""
    import uvicorn

    head = {"id": "x", "created": 1, "model": "big"}
    usage = {"prompt_tokens": 100, "completion_tokens": 5, "total_tokens": 105}

    async def chat(request: Request) -> Response:
        body = await request.json()
        if not body.get("stream"):
            await asyncio.sleep(0.2)
            choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "one two three"}}
            return JSONResponse({**head, "object": "chat.completion", "choices": [choice], "usage": usage})

        async def events() -> AsyncGenerator[str, None]:
            for delta, reason in [({"content": "one "}, None), ({"content": "two three"}, None), ({}, "stop")]:
                await asyncio.sleep(0.07)
                choice = {"index": 0, "delta": delta, "finish_reason": reason}
                yield f"data: {json.dumps({**head, 'object': 'chat.completion.chunk', 'choices': [choice]})}\n\n"
            yield f"data: {json.dumps({**head, 'object': 'chat.completion.chunk', 'choices': [], 'usage': usage})}\n\n"
            yield "data: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    app = Starlette(routes=[Route("/v1/chat/completions", chat, methods=["POST"])])
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning")


# -- clients -----------------------------------------------------------------------------------------------------------


@dataclass
class Seen:
    """What the clients of one kind met."""

    until: float = math.inf
    """When the clients end, on the monotonic clock."""
    answered: int = 0
    routes: Counter[str] = field(default_factory=Counter)
    before: Counter[str] = field(default_factory=Counter)
    """Failures before the first words, by kind."""
    after: Counter[str] = field(default_factory=Counter)
    """Failures in the middle of an answer."""

    @property
    def figures(self) -> dict[str, Any]:
        """For the result."""
        return {"answered": self.answered, "routes": self.routes, "before": self.before, "after": self.after}


async def plain_client(url: str, texts: list[str], number: int, seen: Seen) -> None:
    """HTTP without a second try."""
    async with httpx.AsyncClient(timeout=60) as client:
        for n in range(number, 10**9, 7):
            if time.monotonic() > seen.until:
                return
            body = {"messages": [{"role": "user", "content": texts[n % len(texts)]}], "stream": n % 4 < 2}
            has_words = False
            try:
                async with client.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
                    if response.status_code != 200:
                        seen.before[str(response.status_code)] += 1
                        continue
                    seen.routes[response.headers["x-distill-route"]] += 1
                    is_whole = False
                    async for line in response.aiter_lines():
                        has_words = has_words or '"content":"' in line
                        is_whole = is_whole or line == "data: [DONE]" or not body["stream"]
                if is_whole:
                    seen.answered += 1
                else:
                    (seen.after if has_words else seen.before)["ended early"] += 1
            except httpx.HTTPError as error:
                (seen.after if has_words else seen.before)[type(error).__name__] += 1
            await asyncio.sleep(WAIT_S)


async def openai_client(url: str, texts: list[str], number: int, seen: Seen) -> None:
    """The official client with what it does by itself."""
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", timeout=60) as client:
        for n in range(number, 10**9, 7):
            if time.monotonic() > seen.until:
                return
            has_words = False
            try:
                messages: Any = [{"role": "user", "content": texts[n % len(texts)]}]
                if n % 4 < 2:
                    async for piece in await client.chat.completions.create(
                        model="auto", messages=messages, stream=True
                    ):
                        has_words = has_words or bool(piece.choices and piece.choices[0].delta.content)
                else:
                    await client.chat.completions.create(model="auto", messages=messages)
                seen.answered += 1
            except (openai.OpenAIError, httpx.HTTPError) as error:
                (seen.after if has_words else seen.before)[type(error).__name__] += 1
            await asyncio.sleep(WAIT_S)


def load(tasks: asyncio.TaskGroup, url: str, clients: int, plain: Seen, official: Seen) -> None:
    """So many clients of each kind; half of what they ask is for the student."""
    texts = [
        text
        for n, row in enumerate(language_rows(NUM_INDEXED))
        for text in (row["text"], f"Explain the French revolution to a child of {n}")
    ]
    for n in range(clients):
        tasks.create_task(plain_client(url, texts, n, plain))
        tasks.create_task(openai_client(url, texts, 1000 + n, official))


# -- the service -------------------------------------------------------------------------------------------------------


def processes(of: psutil.Process, pattern: str) -> list[psutil.Process]:
    """Those of a deployment."""
    found = []
    for process in of.children(recursive=True):
        try:
            if pattern in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def memory(of: psutil.Process) -> dict[str, float]:
    """MiB of the oldest process of each role: one that was not killed lately."""
    found = {}
    for role, pattern in WATCHED.items():
        own = sorted(processes(of, pattern), key=lambda process: process.create_time())
        if own:
            found[role] = own[0].memory_info().rss / 2**20
    return found


async def killer(service: psutil.Process, every: float, until: float, log: list[dict[str, Any]]) -> None:
    """A victim every so often; the youngest router, so that the oldest one's memory tells of the whole time."""
    turns = 0
    while time.monotonic() + every < until:
        await asyncio.sleep(every / 2)
        log.append({"seconds": round(time.monotonic()), "memory": memory(service)})
        await asyncio.sleep(every / 2)
        role = list(ROLES)[turns % 2]
        victim = max(processes(service, ROLES[role]), key=lambda process: process.create_time())
        victim.kill()
        print(f"killed a {role}, process {victim.pid}", flush=True)
        turns += 1
    log.append({"seconds": round(time.monotonic()), "memory": memory(service)})


async def measure(url: str, service: psutil.Process, minutes: float, every: float, clients: int) -> dict[str, Any]:
    """Load and kills."""
    until = time.monotonic() + 60 * minutes
    plain, official, log = Seen(until), Seen(until), []
    async with asyncio.TaskGroup() as tasks:
        load(tasks, url, clients, plain, official)
        tasks.create_task(killer(service, every, until, log))
    status = httpx.get(f"{url}/status.json", timeout=30).json()
    return {
        "kills": len(log) - 1,
        "plain": plain.figures,
        "official": official.figures,
        "memory_MiB": log,
        "errors": status["figures"].get("errors"),
        "pairs": status["figures"].get("pairs"),
    }


@contextlib.contextmanager
def serving(folder: Path, *, student_cpus: float = 0.1, router_cpus: float = 0.1) -> Iterator[tuple[str, Process]]:
    """A whole service with its scripted teacher: two routers, two students; its address and its process."""
    teacher_port, port = free_port(), free_port()
    scripted = multiprocessing.get_context("spawn").Process(target=teacher, args=(teacher_port,), daemon=True)
    scripted.start()
    trained = [row["text"] for row in language_rows(NUM_INDEXED)]
    bundle = make_bundle(folder / "bundle", trained, EmbedderConfig(), far=0.5)
    answers = f"http://127.0.0.1:{teacher_port}/v1"
    raw = {
        "name": NAME,
        "recipe": {"type": "context", "context": {"text": "You answer in one word."}},
        "data": {"source": "unused.jsonl"},
        "teacher": {"type": "openai", "model": "big", "base_url": answers, "api_key_env": None},
        "serve": {
            "folder": str(folder / "service"),
            "port": port,
            "student": {"type": "fake", "cpus": student_cpus, "replicas": 2},
            "router": {"replicas": 2, "cpus": router_cpus, "student_timeout_s": 5.0},
            "headers": True,
        },
    }
    config, log = folder / "serve.yaml", folder / "serve.log"
    config.write_text(yaml.safe_dump(raw))
    command = [sys.executable, "-m", "distill_ray", "serve", str(config), "--bundle", str(bundle)]
    with log.open("wb") as output:
        service = subprocess.Popen(command, cwd=folder, stdout=output, stderr=output, env=dict(os.environ))
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until_whole(url, service, log)
        yield url, service
    finally:
        service.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            service.wait(60)
        service.kill()
        scripted.terminate()


def wait_until_whole(url: str, service: Process, log: Path, seconds: float = 300.0) -> None:
    """Until student and both routers are there."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and service.poll() is None:
        with contextlib.suppress(httpx.HTTPError, ValueError):
            status = httpx.get(f"{url}/status.json", timeout=10).json()
            if status["student_up"] and status.get("num_routers") == 2:
                return
        time.sleep(0.5)
    raise RuntimeError(f"the service did not come up:\n{log.read_text()}")


def main() -> None:
    """Start it all, measure, end it all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=6.0)
    parser.add_argument("--every", type=float, default=60.0, help="seconds between two kills")
    parser.add_argument("--clients", type=int, default=4, help="of each kind")
    parser.add_argument("--out", type=Path, help="JSON")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch, serving(Path(scratch)) as (url, service):
        process = psutil.Process(service.pid)
        result = asyncio.run(measure(url, process, arguments.minutes, arguments.every, arguments.clients))
    print(json.dumps(result, indent=1))
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
