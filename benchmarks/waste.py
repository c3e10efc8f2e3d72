"""What kill -9 costs: calls paid for twice, against what was in flight or not yet flushed at each kill.

    python benchmarks/waste.py --out waste.json              # kill -9 of the driver, ten times in one job
    python benchmarks/waste.py --victim engine --out ...     # kill -9 of vLLM's own process, ten times in one job

driver: `distill-ray generate` asks an OpenAI-compatible server on loopback, which outlives it and notes when every call
began and ended. The driver is killed at random moments, started again, and at last left to finish. Ray's actors outlive
their driver by a second or two and keep their ledger while they do, so what counts is the moment the last call came in:
there the server knows how many calls were in flight, and how many it had answered in the 0.2 s before (which may not be
flushed).

engine: one job over the demo model; the process of vLLM's engine core is found among its descendants and killed. The
ledger lives on, so only what was in flight can be lost; in flight is at most `max_concurrency`.

Claim: calls made - rows <= in flight + unflushed, summed over the kills; and no row lost or doubled.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from aiohttp import web

UNFLUSHED_S = 0.2


class CountingServer:
    """An OpenAI-compatible chat server that remembers when each call began and ended. Loopback, a thread of its own."""

    def __init__(self, latency_s: float) -> None:
        self._latency_s = latency_s
        self.began: list[float] = []
        self.ended: list[float] = []
        self.port = 0
        self._ready = threading.Event()
        threading.Thread(target=self._run, daemon=True).start()
        self._ready.wait(30)

    def _run(self) -> None:
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        app = web.Application()
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/chat/completions", self._counted)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.port = site._server.sockets[0].getsockname()[1]  # type: ignore[union-attr]
        self._ready.set()
        await asyncio.Event().wait()

    async def _models(self, _: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "scripted"}]})

    def answer(self, question: str) -> str:
        """What it says."""
        return f"answer to {question}"

    async def _counted(self, request: web.Request) -> web.Response:
        self.began.append(time.monotonic())
        try:
            question = (await request.json())["messages"][-1]["content"]
            await asyncio.sleep(self._latency_s)
            return self.completion(self.answer(question))
        finally:
            self.ended.append(time.monotonic())

    @staticmethod
    def completion(text: str) -> web.Response:
        """One chat completion as the protocol has it."""
        return web.json_response(
            {
                "id": "x",
                "object": "chat.completion",
                "created": 0,
                "model": "scripted",
                "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
                "usage": {"prompt_tokens": 5, "completion_tokens": 5, "total_tokens": 10},
            }
        )

    def at_risk(self, moment: float) -> int:
        """Calls in flight at this moment, and those answered in the last 0.2 s before it."""
        in_flight = sum(t <= moment for t in self.began) - sum(t <= moment for t in self.ended)
        return in_flight + sum(moment - UNFLUSHED_S <= t <= moment for t in self.ended)


def write_config(base: Path, rows: int, teacher: dict[str, Any]) -> Path:
    """Queries and a config (JSON is YAML)."""
    queries = "".join(json.dumps({"id": str(i), "text": f"query {i}"}) + "\n" for i in range(rows))
    (base / "queries.jsonl").write_text(queries)
    config = {
        "recipe": {"type": "context", "context": {"text": "Answer."}},
        "data": {"source": "queries.jsonl", "id": "id"},
        "teacher": teacher,
        "generate": {"rows_per_partition": 500, "max_reject_frac": 1.0},
    }
    (base / "config.yaml").write_text(json.dumps(config))
    return base / "config.yaml"


def start(config: Path, run_dir: Path) -> subprocess.Popen[bytes]:
    """`distill-ray generate` as a user starts it."""
    command = [sys.executable, "-m", "distill_ray", "generate", str(config), "--run-dir", str(run_dir)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)


def outcome(run_dir: Path, rows: int) -> dict[str, int]:
    """Rows lost and doubled in the files of a finished run."""
    from distill_ray.pipeline.folder import RunFolder

    folder = RunFolder(run_dir)
    ids = [i for t in folder.read_tables("examples", columns=["row_id"]) for i in t["row_id"].to_pylist()]
    rejected = [i for t in folder.read_tables("rejects", columns=["row_id"]) for i in t["row_id"].to_pylist()]
    seen = [*ids, *rejected]
    return {"lost": rows - len(set(seen)), "doubled": len(seen) - len(set(seen)), "rejected": len(rejected)}


def kill_driver(rows: int, kills: int, seed: int) -> dict[str, Any]:
    """See the module docstring."""
    rng = random.Random(seed)
    server = CountingServer(latency_s=0.25)
    at_risk: list[int] = []
    with tempfile.TemporaryDirectory() as base:
        teacher = {"type": "openai", "model": "scripted", "base_url": f"http://127.0.0.1:{server.port}/v1",
                   "api_key_env": None, "max_concurrency": 16}  # fmt: skip
        config = write_config(Path(base), rows, teacher)
        run_dir = Path(base, "run")
        while len(at_risk) < kills:
            before = len(server.began)
            process = start(config, run_dir)
            while process.poll() is None and len(server.began) == before:
                time.sleep(0.02)
            time.sleep(rng.uniform(0.0, 1.5))
            if process.poll() is not None:
                break  # it finished first: fewer kills, and the result says how many
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            while time.monotonic() - server.began[-1] < 3.0:
                time.sleep(0.1)  # until the actors are gone too
            at_risk.append(server.at_risk(server.began[-1]))
            print(f"kill {len(at_risk)}: {len(server.began)} calls so far, {at_risk[-1]} at risk", flush=True)
        process = start(config, run_dir)
        assert process.wait(600) == 0, "the last run failed"
        figures = outcome(run_dir, rows)
    return {"victim": "driver", "rows": rows, "kills": len(at_risk), "calls": len(server.began),
            "wasted": len(server.began) - rows, "at_risk": sum(at_risk), **figures}  # fmt: skip


def engine_cores(pid: int) -> list[int]:
    """Processes of vLLM's engine core below a process."""
    import psutil

    found = []
    for child in psutil.Process(pid).children(recursive=True):
        try:
            if "EngineCore" in child.name() or "EngineCore" in " ".join(child.cmdline()):
                found.append(child.pid)
        except psutil.Error:
            continue  # it ended while we looked
    return found


def kill_engine(rows: int, kills: int, seed: int) -> dict[str, Any]:
    """See the module docstring."""
    rng = random.Random(seed)
    concurrency = 16
    with tempfile.TemporaryDirectory() as base:
        teacher = {"type": "vllm", "model": "demo", "max_concurrency": concurrency, "max_retries": kills + 2,
                   "engine_kwargs": {"max_model_len": 512},
                   "sampling": {"temperature": 1.0, "max_tokens": 200, "stop": []}}  # fmt: skip
        config = write_config(Path(base), rows, teacher)
        run_dir = Path(base, "run")
        process = start(config, run_dir)
        done = 0
        segments = Path(run_dir, "calls")
        while done < kills and process.poll() is None:
            before = {p.name for p in segments.glob("*/*.arrow")}
            while process.poll() is None and not ({p.name for p in segments.glob("*/*.arrow")} - before):
                time.sleep(0.1)  # wait until the (new) engine answers
            time.sleep(rng.uniform(0.0, 1.0))
            for pid in engine_cores(process.pid):
                os.kill(pid, signal.SIGKILL)
                done += 1
                print(f"kill {done}", flush=True)
        code = process.wait(900)
        assert code == 0, f"the run failed with {code}"
        from distill_ray.pipeline.folder import RunFolder

        manifest = RunFolder(run_dir).manifest()
        figures = outcome(run_dir, rows)
    repeated = manifest["engine_retries"]
    return {"victim": "engine", "rows": rows, "kills": done, "calls": manifest["teacher_calls"] + repeated,
            "wasted": repeated, "at_risk": done * concurrency, **figures}  # fmt: skip


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--victim", choices=["driver", "engine"], default="driver")
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    options = parser.parse_args()
    kill = {"driver": kill_driver, "engine": kill_engine}[options.victim]
    result = kill(options.rows, options.kills, options.seed)
    print(json.dumps(result))
    holds = result["wasted"] <= result["at_risk"] and not result["lost"] and not result["doubled"]
    verdict = "holds" if holds else "DOES NOT HOLD"
    print(
        f"wasted {result['wasted']} <= at risk {result['at_risk']}, "
        f"lost {result['lost']}, doubled {result['doubled']}: {verdict}"
    )
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n")
    sys.exit(0 if holds else 1)


if __name__ == "__main__":
    main()
