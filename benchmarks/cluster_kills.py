"""What kill -9 costs on a cluster: a node, an engine, a training worker, the driver, at random moments.

    python benchmarks/cluster_kills.py --out cluster_kills.json         # the three below, 20 + 10 + 6 kills
    python benchmarks/cluster_kills.py generation --kills 50
    python benchmarks/cluster_kills.py training
    python benchmarks/cluster_kills.py service

A head that does no work and two nodes (a killed one is followed by a new one), as real raylets on loopback.

generation: `distill-ray generate` with three engines that ask an OpenAI-compatible server, which outlives all and notes
when each call began and ended. Victims: a node with what runs on it, an engine's process, the driver (then the same
command again). Claim: no row lost or doubled; calls made - rows <= what was in flight or answered in the 0.2 s before,
on the whole cluster, summed over the kills.

training: `distill-ray train` with a worker on each node. Victims: a worker's process, a node, the driver. Claim: the
student and every figure of the curve are, bit for bit, those of a training that nobody disturbed. (Figures of the last
half second before the driver's death may be missing.)

service: `distill-ray serve` with a router and a student on each node, under load. Victim: a node. Claim: it goes on
answering; what fails is counted by kind of client (see kills.py).

The process of vLLM's own engine is killed by waste.py --victim engine.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import kills as one_machine
from benchmarks.clusters import Cluster, Node, fixed
from benchmarks.waste import CountingServer, outcome, write_config
from distill_ray.demo import language_rows

WORKER = Node(cpus=2)
ENGINE, TRAINER = "PartitionWorker", "RayTrainWorker"
STARTS_S = 300.0


@dataclass
class World:
    """A cluster with a command at work on it."""

    cluster: Cluster
    rng: random.Random
    command: list[str]
    log: Path
    driver: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """The command, for the first time or again."""
        with self.log.open("ab") as output:
            self.driver = subprocess.Popen(
                [sys.executable, "-m", "distill_ray", *self.command], stdout=output, stderr=output
            )

    @property
    def is_over(self) -> bool:
        """Whether the command has ended."""
        assert self.driver is not None
        return self.driver.poll() is not None

    def finish(self) -> None:
        """Wait for its end, which has to be a good one."""
        assert self.driver is not None
        if self.driver.wait(1800) != 0:
            raise SystemExit(self.log.read_text())

    def kill(self, victim: str) -> bool:
        """Returns whether there was one; a driver is started again, a node followed by another."""
        if victim == "driver":
            assert self.driver is not None
            self.driver.kill()
            self.driver.wait()
            self.start()
            return True
        if victim == "node":
            node = self.rng.choice(self.cluster.workers)
            os.killpg(node.pid, signal.SIGKILL)
            node.wait()
            self.cluster.workers.remove(node)
            self.cluster.add(WORKER)
            return True
        found = self.processes(victim)
        if not found:
            return False
        self.rng.choice(found).kill()
        return True

    def processes(self, name: str) -> list[psutil.Process]:
        """Of the cluster, that have this in their name."""
        found = []
        for node in self.cluster.workers:
            with contextlib.suppress(psutil.Error):
                for process in psutil.Process(node.pid).children(recursive=True):
                    with contextlib.suppress(psutil.Error):
                        if name in " ".join(process.cmdline()):
                            found.append(process)
        return found

    def until(self, so: Callable[[], bool]) -> bool:
        """Wait; False: the command ended first."""
        deadline = time.monotonic() + STARTS_S
        while not so():
            if self.is_over or time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        return True


# -- generation --------------------------------------------------------------------------------------------------------


def kill_generation(cluster: Cluster, base: Path, kills: int, rng: random.Random) -> dict[str, Any]:
    """See the module docstring."""
    server, rows = CountingServer(latency_s=0.25), 600 * kills
    teacher = {"type": "openai", "model": "scripted", "base_url": f"http://127.0.0.1:{server.port}/v1",
               "api_key_env": None, "max_concurrency": 16, "replicas": 3}  # fmt: skip
    config = write_config(base, rows, teacher)
    world = World(cluster, rng, ["generate", str(config), "--run-dir", str(base / "run")], base / "said.log")
    world.start()
    killed, at_risk = Counter[str](), 0
    while killed.total() < kills:
        before = len(server.began)
        if not world.until(lambda before=before: len(server.began) > before):
            break
        time.sleep(rng.uniform(0.0, 2.0))
        if world.is_over:
            break
        victim = ("node", ENGINE, "driver")[killed.total() % 3]
        risk = server.at_risk(time.monotonic())
        if world.kill(victim):
            killed[victim] += 1
            at_risk += risk
            print(f"generation, kill {killed.total()}: {victim}, {len(server.began)} calls so far", flush=True)
    world.finish()
    figures = outcome(base / "run", rows)
    wasted = len(server.began) - rows
    holds = wasted <= at_risk and not figures["lost"] and not figures["doubled"] and not figures["rejected"]
    return {"rows": rows, "killed": killed, "wasted": wasted, "at_risk": at_risk, **figures, "holds": holds}


# -- training ----------------------------------------------------------------------------------------------------------


def kill_training(cluster: Cluster, base: Path, kills: int, rng: random.Random) -> dict[str, Any]:
    """See the module docstring."""
    rows = [{"text": row["text"], "split": "train" if n % 5 else "validation"}
            for n, row in enumerate(language_rows(400))]  # fmt: skip
    (base / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    raw = {
        "recipe": {"type": "context", "context": {"text": "Repeat."}, "query": "{{ text }}"},
        "data": {"source": str(base / "rows.jsonl")},
        "teacher": {"type": "fake"},
        "train": {"epochs": 3, "workers": 2, "cpus_per_worker": 2, "max_tokens_per_batch": 512, "validate_every": 5,
                  "max_failures": 4 * kills},
    }  # fmt: skip
    (base / "config.json").write_text(json.dumps(raw))
    worlds = {}
    for name in ("undisturbed", "killed"):
        run = ["--run-dir", str(base / name)]
        generate = World(cluster, rng, ["generate", str(base / "config.json"), *run], base / f"{name}.log")
        generate.start()
        generate.finish()
        worlds[name] = World(cluster, rng, ["train", str(base / "config.json"), *run], base / f"{name}.log")
        worlds[name].start()
        if name == "undisturbed":
            worlds[name].finish()
    world, killed = worlds["killed"], Counter[str]()
    while killed.total() < kills:
        seen = _steps(base / "killed")
        if not world.until(lambda seen=seen: _steps(base / "killed") > seen):
            break
        time.sleep(rng.uniform(0.0, 3.0))
        victim = (TRAINER, "node", "driver")[killed.total() % 3]
        if not world.is_over and world.kill(victim):
            killed[victim] += 1
            print(f"training, kill {killed.total()}: {victim}, {_steps(base / 'killed')} steps so far", flush=True)
    world.finish()
    (before, student), (after, same) = (_learned(base / name) for name in ("undisturbed", "killed"))
    steps = {"steps": len(before), "figures_missing": len(before) - len(after)}
    holds = student == same and all(before[step] == figures for step, figures in after.items())
    return {"killed": killed, **steps, "holds": holds}


def _steps(run: Path) -> int:
    file = run / "metrics.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0


def _learned(run: Path) -> tuple[dict[int, tuple[float, float]], str]:
    """Loss and gradient norm by step, and a hash of the weights."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    curve = {line["step"]: (line["loss"], line["grad_norm"]) for line in lines if "loss" in line}
    weights = sorted((run / "student").glob("*.safetensors"))
    return curve, hashlib.sha256(b"".join(file.read_bytes() for file in weights)).hexdigest()


# -- service -----------------------------------------------------------------------------------------------------------


def kill_service(cluster: Cluster, base: Path, kills: int, rng: random.Random) -> dict[str, Any]:
    """See the module docstring."""
    with one_machine.serving(base, student_cpus=0.8, router_cpus=1.1) as (url, service):
        world = World(cluster, rng, [], base / "serve.log", service)
        return asyncio.run(_under_load(world, url, kills))


async def _under_load(world: World, url: str, kills: int) -> dict[str, Any]:
    plain, official = one_machine.Seen(), one_machine.Seen()
    whole_again: list[int] = []
    async with asyncio.TaskGroup() as tasks:
        one_machine.load(tasks, url, 4, plain, official)
        for number in range(kills):
            await asyncio.sleep(10)
            began = time.monotonic()
            await asyncio.to_thread(world.kill, "node")
            assert world.driver is not None
            await asyncio.to_thread(one_machine.wait_until_whole, url, world.driver, world.log)
            whole_again.append(round(time.monotonic() - began))
            print(f"service, kill {number + 1}: whole again after {whole_again[-1]} s", flush=True)
        await asyncio.sleep(5)
        plain.until = official.until = 0.0
    figures = {"plain": plain.figures, "official": official.figures}
    return {"killed": {"node": kills}, **figures, "whole_again_s": whole_again}


# -- all of them -------------------------------------------------------------------------------------------------------

PARTS = {"generation": (kill_generation, 20), "training": (kill_training, 10), "service": (kill_service, 6)}


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """Ray's sockets allow no long path."""
    folder = Path(tempfile.mkdtemp(prefix="ck", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    """See the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="all, if none is named")
    parser.add_argument("--kills", type=int, help="in each part")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    options = parser.parse_args()
    results: dict[str, Any] = {}
    for part in options.parts or PARTS:
        run, kills = PARTS[part]
        with scratch_folder() as folder, fixed(folder / "c", Node(), [WORKER, WORKER]) as cluster:
            (folder / part).mkdir()
            started = time.monotonic()
            results[part] = run(cluster, folder / part, options.kills or kills, random.Random(options.seed))
            results[part]["seconds"] = round(time.monotonic() - started)
        print(json.dumps({part: results[part]}), flush=True)
    if options.out:
        options.out.write_text(json.dumps(results, indent=2) + "\n")
    sys.exit(0 if all(result.get("holds", True) for result in results.values()) else 1)


if __name__ == "__main__":
    main()
