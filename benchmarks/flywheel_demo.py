"""The whole flywheel on the demo world, from a cold service to a rollback, as real processes. `make flywheel-demo`.

    python benchmarks/flywheel_demo.py --folder runs/flywheel     # under 12 minutes on two cores

    cold     everything goes to the teacher (the demo model with its long instruction, on vLLM) and is collected
    cycle 1  a first student, from `student.model`
    fresh    requests of the same kind: most go to the student; and of a new kind: other scripts, to the teacher
    cycle 2  that student goes on, with what was new
    both     fresh requests of both kinds
    poison   what a router on a broken machine might spool: wrong names on right sentences
    cycle 3  the gate refuses
    back     `distill-ray rollback`, while clients go on asking

Agreement is measured on the student's share: the teacher is asked the same in another request, which is not collected.
Writes flywheel.json, requests.json and flywheel.svg into the folder.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import datetime
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import yaml

from distill_ray.config import load_config
from distill_ray.demo import language_rows
from distill_ray.demo.prepare import prepare_demo
from distill_ray.serving.collecting.answer import Answer
from distill_ray.serving.collecting.pairs import make_pair
from distill_ray.serving.collecting.spool import Spool
from distill_ray.serving.collecting.store import make_store
from distill_ray.serving.routing.bundles import Bundles
from distill_ray.serving.routing.conversation import request_key
from distill_ray.serving.routing.moves import Move

SAME = ("en", "es", "fr", "de", "tr", "vi")  # Latin script
NEW = ("ru", "el", "zh", "hi", "ar")  # other scripts
CLIENTS = 16
WINDOW = 50  # requests over which the plot's share is taken
COLLECT_S = 60.0


@dataclass
class Asked:
    """One request of the stream."""

    at: float
    """Seconds since the first one."""

    phase: str
    kind: str
    text: str
    route: str
    bundle: str
    answer: str
    teacher_answer: str | None = None
    """What the teacher says to it, where the student answered."""

    teacher_tokens: int = 0
    """What that costs: prompt and completion."""

    @property
    def agrees(self) -> bool:
        """Whether the student said what the teacher says."""
        return self.answer == self.teacher_answer


@dataclass
class Demo:
    """The service, and what was asked of it."""

    folder: Path
    config: Path
    port: int
    started: float = field(default_factory=time.monotonic)
    asked: list[Asked] = field(default_factory=list)
    phases: dict[str, tuple[float, float]] = field(default_factory=dict)
    cycles: list[dict[str, Any]] = field(default_factory=list)

    @property
    def url(self) -> str:
        """Of the service."""
        return f"http://127.0.0.1:{self.port}"

    def now(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started

    # -- requests ------------------------------------------------------------------------------------------------

    def replay(self, phase: str, requests: Sequence[tuple[str, str]]) -> list[Asked]:
        """Send (kind, text) from several clients at once; returns what came of them."""
        began = self.now()
        found = asyncio.run(self._replay(phase, requests))
        self.phases[phase] = (began, self.now())
        self.asked += found
        on_student = sum(each.route == "student" for each in found)
        print(f"{phase}: {len(found)} requests, {on_student} to the student, {self.now() - began:.0f} s", flush=True)
        return found

    async def _replay(self, phase: str, requests: Sequence[tuple[str, str]]) -> list[Asked]:
        left = list(reversed(requests))
        found: list[Asked] = []
        async with httpx.AsyncClient(timeout=120) as client:

            async def one() -> None:
                while left:
                    kind, text = left.pop()
                    response = await self._ask(client, text, "auto")
                    headers = response.headers
                    found.append(
                        Asked(
                            self.now(),
                            phase,
                            kind,
                            text,
                            headers["x-distill-route"],
                            headers.get("x-distill-bundle", ""),
                            response.json()["choices"][0]["message"]["content"],
                        )
                    )

            await asyncio.gather(*(one() for _ in range(CLIENTS)))
        return found

    async def _ask(self, client: httpx.AsyncClient, text: str, model: str) -> httpx.Response:
        body = {"model": model, "messages": [{"role": "user", "content": text}], "temperature": 0}
        headers = {"x-distill-collect": "no"} if model == "teacher" else {}
        response = await client.post(self.url + "/v1/chat/completions", json=body, headers=headers)
        return response.raise_for_status()

    def compare(self, asked: Sequence[Asked]) -> tuple[int, int]:
        """Ask the teacher what the student answered: how often they agree, and of how many."""
        students = [each for each in asked if each.route == "student"]

        async def ask_teacher() -> None:
            at_once = asyncio.Semaphore(CLIENTS)
            async with httpx.AsyncClient(timeout=120) as client:

                async def one(each: Asked) -> None:
                    async with at_once:
                        said = (await self._ask(client, each.text, "teacher")).json()
                    each.teacher_answer = said["choices"][0]["message"]["content"]
                    each.teacher_tokens = said["usage"]["total_tokens"]

                await asyncio.gather(*(one(each) for each in students))

        asyncio.run(ask_teacher())
        return sum(each.agrees for each in students), len(students)

    # -- commands ------------------------------------------------------------------------------------------------

    def command(self, *arguments: str) -> str:
        """Run `distill-ray`; its progress goes to this terminal."""
        command = [sys.executable, "-m", "distill_ray", *arguments]
        done = subprocess.run(command, env=environment(), stdout=subprocess.PIPE, text=True, check=False)
        print(done.stdout, end="", flush=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(arguments)}: exit {done.returncode}")
        return done.stdout

    def cycle(self, name: str) -> dict[str, Any]:
        """Run a cycle; returns what its steps wrote."""
        began = self.now()
        self.collected()
        self.command("flywheel", "run", str(self.config))
        folder = sorted((self.folder / "service" / "cycles").iterdir())[-1]
        steps = {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}
        self.phases[name] = (began, self.now())
        self.cycles.append(steps)
        return steps

    def collected(self) -> None:
        """Wait until all that was kept is in the store."""
        deadline = time.monotonic() + COLLECT_S
        while time.monotonic() < deadline:
            status = httpx.get(self.url + "/status.json", timeout=30).json()
            if status["figures"]["spool_bytes"] == 0:
                return
            time.sleep(0.5)

    def poison(self, rows: Sequence[dict[str, str]]) -> None:
        """Spool wrong answers to right sentences, as a router with a broken teacher would have."""
        store = make_store(load_config(self.config).serve.collect.store, self.folder / "service")
        before = store.count()
        spool = Spool(self.folder / "service" / "spool", 2**28)
        wrong: dict[str, str] = dict(zip(SAME, (*SAME[1:], SAME[0]), strict=True))
        teacher = next(iter(store.scan(columns=["teacher"], batch_rows=1)))["teacher"][0].as_py()
        for row in rows:
            body = {"messages": [{"role": "user", "content": row["text"]}]}
            answer = Answer(wrong[row["label"]], "stop", model="demo", prompt_tokens=480, completion_tokens=20)
            fingerprint = request_key(body, []).fingerprint
            spool.append(
                make_pair(
                    body, answer, messages=body["messages"], teacher=teacher, owner="anybody", fingerprint=fingerprint
                )
            )
        spool.close()
        deadline = time.monotonic() + COLLECT_S
        while store.count() < before + len(rows) and time.monotonic() < deadline:
            time.sleep(0.5)
        print(f"poison: {store.count() - before} pairs came into the store", flush=True)

    def go_back(self, texts: Sequence[str]) -> dict[str, Any]:
        """Roll back while a client asks; returns how long the bundle answered still."""
        began, before = self.now(), self.current()
        with Trickle(self.url, texts, pause_s=0.0) as asked:
            time.sleep(2)
            self.command("rollback", str(self.config))
            time.sleep(8)
        after, move = self.current(), self.moves()[-1]
        self.phases["back"] = (began, self.now())
        return {
            "from": before,
            "to": after,
            "moved": move.action == "rollback" and after != before,
            **asked.around(before, after, move.time),
        }

    def current(self) -> str:
        """What serves."""
        return str(Bundles(self.folder / "service" / "bundles").current())

    def moves(self) -> list[Move]:
        """All there were."""
        return Bundles(self.folder / "service" / "bundles").history()


class Trickle:
    """One client that goes on asking while something happens: which bundle answered when, and what failed."""

    def __init__(self, url: str, texts: Sequence[str], pause_s: float) -> None:
        self._url, self._texts, self._pause_s = url, texts, pause_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.answered: list[tuple[float, str]] = []  # seconds since 1970, bundle
        self.failed = 0

    def __enter__(self) -> Trickle:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(120)

    def _run(self) -> None:
        headers = {"x-distill-collect": "no"}
        with httpx.Client(timeout=120, headers=headers) as client:
            for text in itertools.cycle(self._texts):
                if self._stop.wait(self._pause_s):
                    return
                body = {"messages": [{"role": "user", "content": text}], "temperature": 0}
                response = client.post(self._url + "/v1/chat/completions", json=body)
                self.failed += not response.is_success
                self.answered.append((time.time(), response.headers.get("x-distill-bundle", "")))

    def around(self, before: str | None, after: str | None, moved_at: str) -> dict[str, Any]:
        """How long the one bundle answered after the move of the pointer, and when the other one began."""
        moved = datetime.datetime.fromisoformat(moved_at).timestamp()  # whole seconds, so these are up to one too long
        last = max((at for at, version in self.answered if version == (before or "")), default=None)
        first = min((at for at, version in self.answered if version == (after or "")), default=None)
        return {
            "requests": len(self.answered),
            "failed": self.failed,
            "seconds_to_last_response": round(max(0.0, last - moved), 1) if last is not None else None,
            "seconds_to_first_response": round(max(0.0, first - moved), 1) if first is not None else None,
        }


def environment() -> dict[str, str]:
    """Without another cluster's variables."""
    return {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}


def stream(kinds: Sequence[str], count: int, seed: int) -> list[dict[str, str]]:
    """Sentences of these languages."""
    rows = [row for row in language_rows(6 * count, seed=seed) if row["label"] in kinds]
    return rows[:count]


def requests(*parts: tuple[str, Sequence[dict[str, str]]]) -> list[tuple[str, str]]:
    """(kind, text) of several streams, mixed evenly."""
    mixed = [(number / len(rows), kind, row["text"]) for kind, rows in parts for number, row in enumerate(rows)]
    return [(kind, text) for _, kind, text in sorted(mixed)]


def write_config(folder: Path, port: int, scale: float) -> Path:
    """The demo's config, with a service and a flywheel."""
    prepare_demo(folder / "input", num_rows=60)
    raw = yaml.safe_load((folder / "input" / "config.yaml").read_text())
    raw["name"] = "flywheel-demo"
    raw["serve"] = {
        "folder": str(folder / "service"),
        "port": port,
        "headers": True,
        "student": {"type": "hf", "model": "bundle", "gpus": 0},
    }
    raw["calibrate"] = {"error_budget": 0.1, "confidence": 0.9}
    raw["flywheel"] = {
        "min_pairs": max(60, round(150 * scale)),
        "lora": None,  # all weights: the model is tiny
        "gate": {"min_pairs": max(20, round(60 * scale)), "margin": 0.1, "cluster_pairs": 3},
    }
    path = folder / "input" / "flywheel.yaml"
    path.write_text(yaml.safe_dump(raw, sort_keys=False, allow_unicode=True))
    return path


@contextlib.contextmanager
def served(demo: Demo) -> Iterator[None]:
    """The service as a process."""
    log = (demo.folder / "serve.log").open("wb")
    command = [sys.executable, "-m", "distill_ray", "serve", str(demo.config)]
    process = subprocess.Popen(command, env=environment(), stdout=log, stderr=log)
    try:
        while b"Ctrl-C ends it" not in (demo.folder / "serve.log").read_bytes():
            if process.poll() is not None:
                raise SystemExit((demo.folder / "serve.log").read_text())
            time.sleep(0.5)
        print(f"service: up after {demo.now():.0f} s, everything goes to the teacher", flush=True)
        yield
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)


def main() -> None:
    """See the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/flywheel"))
    parser.add_argument("--scale", type=float, default=1.0, help="of the numbers of requests")
    arguments = parser.parse_args()
    folder: Path = arguments.folder.resolve()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    demo = Demo(folder, write_config(folder, port, arguments.scale), port)
    with served(demo):
        result = tell(demo, arguments.scale)
    (folder / "flywheel.json").write_text(json.dumps(result, indent=1) + "\n")
    (folder / "requests.json").write_text(json.dumps([dataclasses.asdict(each) for each in demo.asked]) + "\n")
    draw(demo.asked, folder / "flywheel.svg")
    for name in ("share_on_student", "agreement", "gate_refused", "rolled_back", "teacher_tokens_saved"):
        print(f"{name}: {result[name]}")
    print(f"wrote: {folder}/flywheel.json, flywheel.svg ({demo.now():.0f} s)")


def tell(demo: Demo, scale: float) -> dict[str, Any]:
    """The story, and its figures."""

    def num(count: int) -> int:
        return max(20, round(count * scale))

    demo.replay("cold", requests(("same", stream(SAME, num(1200), 1))))
    first = demo.cycle("cycle 1")
    fresh = demo.replay("fresh", requests(("same", stream(SAME, num(300), 2)), ("new", stream(NEW, num(220), 3))))
    fresh_agreed = demo.compare(fresh)
    old = demo.current()
    with Trickle(demo.url, [row["text"] for row in stream(SAME, 50, 8)], pause_s=0.5) as asked:
        second = demo.cycle("cycle 2")
        time.sleep(3)
    promoted = [move for move in demo.moves() if move.action == "promote"][-1]
    promotion = asked.around(old, str(promoted.version), promoted.time)
    both = demo.replay("both", requests(("same", stream(SAME, num(150), 4)), ("new", stream(NEW, num(150), 5))))
    both_agreed = demo.compare(both)
    demo.poison(stream(SAME, num(300), 6))
    third = demo.cycle("cycle 3")
    back = demo.go_back([row["text"] for row in stream(SAME, 200, 7)])
    served_by_students = [each for each in fresh + both if each.route == "student"]
    agreed, compared = (a + b for a, b in zip(fresh_agreed, both_agreed, strict=True))
    status = httpx.get(demo.url + "/status.json", timeout=30).json()
    return {
        "share_on_student": round(len(served_by_students) / len(fresh + both), 4),
        "agreement": round(agreed / compared, 4) if compared else None,
        "gate_refused": last(third)["outcome"] == "refused",
        "rolled_back": back["moved"],
        "teacher_tokens_saved": round(status["figures"]["saved_teacher_tokens"]),
        "share": {f"{phase} {kind}": share for (phase, kind), share in sorted(shares(demo.asked).items())},
        "agreement_fresh": fresh_agreed,
        "agreement_both": both_agreed,
        "outcomes": [last(steps)["outcome"] for steps in (first, second, third)],
        "why": [last(steps).get("why", []) for steps in (first, second, third)],
        "seconds_by_step": [
            {name: step["seconds"] for name, step in steps.items() if "seconds" in step}
            for steps in (first, second, third)
        ],
        "promotion_under_load": promotion,
        "rollback": back,
        "seconds": {name: round(end - begin, 1) for name, (begin, end) in demo.phases.items()},
        "total_seconds": round(demo.now(), 1),
        "requests": len(demo.asked),
    }


def last(steps: dict[str, Any]) -> dict[str, Any]:
    """The result of the last step of a cycle."""
    order = ("snapshot", "clean", "split", "train", "gate", "bundle", "shadow", "promote")
    return next(steps[name] for name in reversed(order) if name in steps)


def shares(asked: Sequence[Asked]) -> dict[tuple[str, str], float]:
    """Share on the student by phase and kind."""
    groups: dict[tuple[str, str], list[bool]] = defaultdict(list)
    for each in asked:
        groups[each.phase, each.kind].append(each.route == "student")
    return {key: round(sum(routes) / len(routes), 4) for key, routes in groups.items()}


def draw(asked: Sequence[Asked], path: Path) -> None:
    """Over the stream: share on the student by kind, its agreement with the teacher, the teacher's tokens it saved."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    asked = sorted(asked, key=lambda each: each.at)
    figure, (share, agreement, saved) = plt.subplots(
        3, 1, figsize=(8, 5.6), layout="constrained", sharex=True, height_ratios=[2, 1.2, 1.2]
    )
    for kind, color, label in (("same", "#2f6fde", "the kind it began with"), ("new", "#d9822b", "a new kind")):
        for phase in ("cold", "fresh", "both"):
            of_phase = [(n, each) for n, each in enumerate(asked) if (each.phase, each.kind) == (phase, kind)]
            routed = [(n, each.route == "student") for n, each in of_phase]
            agreed = [(n, each.agrees) for n, each in of_phase if each.route == "student"]
            share.plot(*_rolling(routed), color=color, label=label if phase == "fresh" else None)
            agreement.plot(*_rolling(agreed), color=color)
    saved.plot([0, *itertools.accumulate(each.teacher_tokens / 1000 for each in asked)], color="#2f6fde")
    edges = [next(n for n, each in enumerate(asked) if each.phase == phase) for phase in ("fresh", "both")]
    for axes in (share, agreement, saved):
        for edge in edges:
            axes.axvline(edge, color="#888888", linewidth=1, linestyle="--")
        axes.spines[["top", "right"]].set_visible(False)
    ends = [0, *edges, len(asked)]
    told = ("all to the teacher", "first student", "second student, until\nthe rollback")
    for begin, end, text in zip(ends, ends[1:], told, strict=False):
        share.annotate(text, ((begin + end) / 2, 1.05), ha="center", va="bottom", fontsize=8, annotation_clip=False)
    share.set(ylabel="share on the student", ylim=(-0.03, 1.03), xlim=(0, len(asked)))
    agreement.set(ylabel="agreement", ylim=(-0.05, 1.05))
    saved.set(ylabel="tokens saved (k)", xlabel="requests", ylim=(0, None))
    share.legend(loc="center left", frameon=False)
    figure.savefig(path, metadata={"Date": None})


def _rolling(points: Sequence[tuple[int, bool]]) -> tuple[list[int], list[float]]:
    """Where, and the share among the last WINDOW there."""
    values = [value for _, value in points]
    parts = [values[max(0, end - WINDOW) : end] for end in range(1, len(values) + 1)]
    return [number for number, _ in points], [sum(part) / len(part) for part in parts]


if __name__ == "__main__":
    main()
