"""What the router adds to a request, against the same student behind a plain Serve ingress; and where it saturates.

    python benchmarks/serving.py --out serving.json

Overhead: the built-in demo model on vLLM as the student of a bundle with 1,000 indexed requests and the real embedder.
Its deployment is asked two ways over HTTP: through the router (`auto`, which goes to the student), and through an
ingress that hands the same body to it and its pieces back. Short answers (8 tokens), streamed, the two ways in turn, at
1, 8 and 32 clients: time to the first words and to the last.

Saturation: requests per second of one router replica with a fake student (no model), 32 clients, against the plain
ingress with the same fake behind it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import tempfile
import time
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
from ray import serve
from ray.serve.api import RunTarget
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import Route

from distill_ray.config import RunConfig, SamplingConfig, parse_config
from distill_ray.config.serve import EmbedderConfig
from distill_ray.demo import language_rows
from distill_ray.models import DEMO_MODEL_PATH
from distill_ray.pipeline.cluster import connected
from distill_ray.serving.app import cpus_needed, start, stop
from distill_ray.serving.front.wire import DONE, event
from distill_ray.serving.models.deployed import DeployedBackend
from distill_ray.serving.names import AppNames
from distill_ray.serving.routing.bundle import ENTRIES_SCHEMA, utc_now, version_of, write_bundle
from distill_ray.serving.routing.bundles import Bundles
from distill_ray.serving.routing.conversation import request_key
from distill_ray.serving.routing.decision import DecisionModel
from distill_ray.serving.routing.embedder import load_embedder
from distill_ray.serving.routing.index import NearestIndex
from distill_ray.serving.routing.manifest import Manifest, StudentSpec

NUM_INDEXED = 1000
PORT = 8317
CLIENTS = (1, 8, 32)
MAX_TOKENS = 8


class Plain:
    """The peer: an ingress that decides nothing."""

    def __init__(self, app: str) -> None:
        self._backend = DeployedBackend(app, app)

    async def __serve_build_asgi_app__(self) -> Starlette:
        async def chat(request: Request) -> StreamingResponse:
            body = await request.json()

            async def events() -> AsyncGenerator[bytes, None]:
                async for piece in self._backend.answer("chat", body):
                    yield event(piece)
                yield DONE

            return StreamingResponse(events(), media_type="text/event-stream")

        return Starlette(routes=[Route("/v1/chat/completions", chat, methods=["POST"])])


def make_bundle(folder: Path, texts: list[str], section: EmbedderConfig, far: float = 0.0) -> Path:
    """What is as similar as `far` to one of the texts goes to the student."""
    embedder = load_embedder(section)
    keys = [request_key({"messages": [{"role": "user", "content": text}]}, []) for text in texts]
    vectors = np.concatenate([embedder.embed(texts[i : i + 64]) for i in range(0, len(texts), 64)])
    entries = pa.table(
        {
            "example_id": [str(n) for n in range(len(texts))],
            "text": texts,
            "fingerprint": [key.fingerprint for key in keys],
            "outcome": pa.array([1.0] * len(texts), pa.float32()),
        }
    ).cast(ENTRIES_SCHEMA)
    manifest = Manifest(
        version=version_of("benchmark"),
        name="benchmark",
        created=utc_now(),
        made_with="",
        context=[],
        student=StudentSpec(kind="full", sampling=SamplingConfig(temperature=0.0, max_tokens=MAX_TOKENS)),
        teacher="",
        teacher_sampling=SamplingConfig(),
        embedder=section,
        embedder_identity=embedder.identity,
        neighbours=8,
        model=DecisionModel(kind="similarity", intercept=10.0, weights=[0.0]),
        threshold=0.0,
        far=far,
        guard="off",
        summary={},
        data="",
    )
    index = NearestIndex.build(vectors, [key.fingerprint for key in keys])
    return write_bundle(folder, manifest, student=DEMO_MODEL_PATH, index=index, entries=entries, reports={})


def config_of(folder: Path, student: dict[str, Any], embedder: EmbedderConfig) -> RunConfig:
    """A service with one router and a student; its teacher is never asked."""
    raw = {
        "name": "bench",
        "recipe": {"context": {"text": "unused"}},
        "data": {"source": "unused"},
        "teacher": {"type": "fake", "cpus": 0.1},
        "serve": {
            "folder": str(folder),
            "port": PORT,
            "student": student,
            "embedder": embedder.model_dump(),
            "headers": True,
            "router": {"cpus": 0.1, "max_ongoing": 1024, "student_timeout_s": 60.0},
        },
    }
    return parse_config(raw)


async def one(client: httpx.AsyncClient, path: str, text: str) -> tuple[float, float]:
    """Seconds to the first piece with words, and to the last."""
    body = {"messages": [{"role": "user", "content": text}], "stream": True, "max_tokens": MAX_TOKENS, "temperature": 0}
    started, first = time.perf_counter(), 0.0
    async with client.stream("POST", path, json=body) as response:
        if response.status_code != 200:
            raise RuntimeError((await response.aread()).decode())
        if response.headers.get("x-distill-route", "student") != "student":
            raise RuntimeError(f"not the student: {response.headers['x-distill-reason']}")
        async for line in response.aiter_lines():
            if not first and line.startswith("data:") and '"content":""' not in line:
                first = time.perf_counter() - started
    return first, time.perf_counter() - started


async def load(path: str, texts: list[str], num_clients: int, num_requests: int) -> tuple[np.ndarray, float]:
    """Times of all requests [N, 2], and seconds of it all."""
    times: list[tuple[float, float]] = []
    waiting = iter(range(num_requests))

    async def ask(client: httpx.AsyncClient) -> None:
        for n in waiting:
            times.append(await one(client, path, texts[n % len(texts)]))

    async with httpx.AsyncClient(timeout=120, limits=httpx.Limits(max_connections=None)) as client:
        started = time.perf_counter()
        await asyncio.gather(*(ask(client) for _ in range(num_clients)))
        return np.array(times), time.perf_counter() - started


def up(config: RunConfig, folder: Path) -> None:
    """Start service and peer, and wait for the student."""
    start(config, str(folder))
    student_app = AppNames("bench").student(version_of("benchmark"))
    deadline = time.monotonic() + 180
    while httpx.get(f"http://127.0.0.1:{PORT}/status.json").json()["student_up"] is not True:
        if time.monotonic() > deadline:
            raise RuntimeError(f"the student did not come up; see {folder}/logs")
        time.sleep(0.5)
    peer: Any = serve.deployment(
        serve.ingress()(Plain), name="plain", max_ongoing_requests=2048, ray_actor_options={"num_cpus": 0.1}
    )
    serve.run_many([RunTarget(peer.bind(student_app), name="plain", route_prefix="/plain")])


def overhead(texts: list[str], rounds: int, num_requests: int) -> list[dict[str, Any]]:
    """Both ways in turn."""
    ways = {"router": f"http://127.0.0.1:{PORT}", "plain": f"http://127.0.0.1:{PORT}/plain"}
    rows = []
    for num_clients in CLIENTS:
        found: dict[str, list[np.ndarray]] = {way: [] for way in ways}
        for url in ways.values():
            asyncio.run(load(url + "/v1/chat/completions", texts, num_clients, 3 * num_clients))  # warm
        for turn in range(rounds):
            for way in sorted(ways, reverse=bool(turn % 2)):
                number = max(num_requests, 8 * num_clients)
                times, _ = asyncio.run(load(ways[way] + "/v1/chat/completions", texts, num_clients, number))
                found[way].append(times)
        row: dict[str, Any] = {"clients": num_clients}
        for way in ways:
            times = np.concatenate(found[way]) * 1000
            for column, name in enumerate(("first", "whole")):
                row[f"{way}_{name}_p50"] = float(np.percentile(times[:, column], 50))
                row[f"{way}_{name}_p95"] = float(np.percentile(times[:, column], 95))
        for name in ("first", "whole"):
            row[f"added_{name}_p50"] = row[f"router_{name}_p50"] - row[f"plain_{name}_p50"]
        rows.append(row)
        print(
            f"{num_clients:3} clients  first words {row['router_first_p50']:.1f} ms, "
            f"plain {row['plain_first_p50']:.1f} (+{row['added_first_p50']:.1f})   "
            f"whole {row['router_whole_p50']:.1f} ms, "
            f"plain {row['plain_whole_p50']:.1f} (+{row['added_whole_p50']:.1f})",
            flush=True,
        )
    return rows


def saturation(texts: list[str], rounds: int, num_requests: int) -> dict[str, float]:
    """Requests per second, both ways in turn; medians."""
    ways = {"router": f"http://127.0.0.1:{PORT}", "plain": f"http://127.0.0.1:{PORT}/plain"}
    rates: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(rounds):
        for way in sorted(ways, reverse=bool(turn % 2)):
            _, seconds = asyncio.run(load(ways[way] + "/v1/chat/completions", texts, 32, num_requests))
            rates[way].append(num_requests / seconds)
    found = {way: float(np.median(rate)) for way, rate in rates.items()}
    print(f"one replica, fake student, 32 clients: router {found['router']:.0f}/s, plain {found['plain']:.0f}/s")
    return found


def main() -> None:
    """Run both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=60, help="per round and way, at one client")
    parser.add_argument("--out", type=Path, help="JSON")
    parser.add_argument("--precision", choices=["float32", "int8"], default="float32", help="of the embedder")
    parser.add_argument("--threads", type=int, default=EmbedderConfig().threads, help="of the embedder")
    parser.add_argument("--only", choices=["overhead", "saturation"])
    arguments = parser.parse_args()
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    embedder = EmbedderConfig(precision=arguments.precision, threads=arguments.threads)
    texts = [row["text"] for row in language_rows(NUM_INDEXED)]
    asked = [row["text"] for row in language_rows(200, held_out=True)]
    result: dict[str, Any] = {"precision": arguments.precision, "threads": arguments.threads}
    students: dict[str, dict[str, Any]] = {
        "overhead": {"type": "vllm", "gpus": 0, "cpus": 0.5, "engine_kwargs": {"max_model_len": 512}},
        "saturation": {"type": "fake", "cpus": 0.1},
    }
    with tempfile.TemporaryDirectory() as scratch:
        bundle = make_bundle(Path(scratch) / "bundle", texts, embedder)
        for name in [arguments.only] if arguments.only else students:
            folder = Path(scratch) / name
            bundles = Bundles(folder / "bundles")
            bundles.promote(bundles.install(bundle))
            config = config_of(folder, students[name], embedder)
            with connected(num_cpus=cpus_needed(config) + 1):
                try:
                    up(config, folder)
                    if name == "overhead":
                        result[name] = overhead(asked, arguments.rounds, arguments.requests)
                    else:
                        result[name] = saturation(asked, arguments.rounds, 10 * arguments.requests)
                finally:
                    stop(config)
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
