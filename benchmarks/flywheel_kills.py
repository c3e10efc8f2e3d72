"""Kill -9 of `distill-ray flywheel run`, at every step's end and at random moments. `make flywheel-kills`.

    python benchmarks/flywheel_kills.py --kills 50 --out kills.json

A cycle is run once without a kill. Then the same pairs in another folder: the process is killed as soon as the file of
a step appears, step by step, and then at random moments, again and again; after each kill the same command goes on.
Whenever a cycle comes to its end, more pairs arrive, and the next one begins. After every kill:

    no pair is lost; none is marked that no promoted bundle learnt; the pointer names a whole bundle; pairs that came
    while a cycle was on are not in it

and in the end the first bundle is the very one of the run that nobody disturbed: the same version, which is a hash of
weights, index, threshold and all else.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.clusters import Node, fixed
from benchmarks.two_languages import config_of, pairs
from distill_ray.config import load_config
from distill_ray.flywheel.cycles import STEPS, Cycles
from distill_ray.serving.collecting.marks import learnt_pairs
from distill_ray.serving.collecting.pairs import Pair
from distill_ray.serving.collecting.store import PairStore, Selection, make_store
from distill_ray.serving.routing.bundle import load_bundle
from distill_ray.serving.routing.bundles import Bundles

FIRST, MORE, LATE = 360, 300, 3  # pairs: of the first cycle, of each other one, and after each kill
LONGEST_S = 900.0


@dataclass
class World:
    """A service's folder, and what is in it."""

    config: Path
    ids: set[str] = field(default_factory=set)
    late: dict[int, set[str]] = field(default_factory=dict)
    """By cycle: what came when it had begun."""

    @property
    def service(self) -> Path:
        """Its folder."""
        return self.config.parent / "service"

    @property
    def store(self) -> PairStore:
        """A connection of its own."""
        return make_store(load_config(self.config).serve.collect.store, self.service)

    @property
    def bundles(self) -> Bundles:
        """Of the service."""
        return Bundles(self.service / "bundles")

    def add(self, new: list[Pair], begun: int | None = None) -> None:
        """Pairs arrive."""
        self.store.add(new)
        fresh = {pair.pair_id for pair in new} - self.ids
        self.ids |= fresh
        if begun is not None:
            self.late.setdefault(begun, set()).update(fresh)

    def start(self) -> subprocess.Popen[bytes]:
        """The command under test."""
        command = [sys.executable, "-m", "distill_ray", "flywheel", "run", str(self.config)]
        log = (self.config.parent / "runs.log").open("ab")
        return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)

    def finish(self) -> None:
        """Let it come to its end."""
        if self.killed(lambda: False):
            raise SystemExit(f"not over after {LONGEST_S:.0f} s")

    def killed(self, is_time: Callable[[], bool]) -> bool:
        """Run the command and kill it when it is time. False: it came to its end before.

        Raises:
            SystemExit: it failed by itself.
        """
        process, until = self.start(), time.monotonic() + LONGEST_S
        try:
            while process.poll() is None and not is_time() and time.monotonic() < until:
                time.sleep(0.02)
        finally:
            is_over = process.poll() is not None
            process.kill()
            process.wait()
        if not is_over:
            return True
        if process.returncode != 0:
            raise SystemExit((self.config.parent / "runs.log").read_text()[-3000:])
        return False

    def steps(self) -> tuple[int, int]:
        """Number of the last cycle, and how many of its steps are done."""
        cycles = Cycles(self.service).all()
        if not cycles:
            return 0, 0
        return cycles[-1].number, sum(cycles[-1].files.exists(f"{step}.json") for step in STEPS)

    def forget_too_few(self) -> None:
        """A cycle that ended for lack of pairs begins again, with a new snapshot: what came late is in time then."""
        cycles = Cycles(self.service).all()
        if cycles and cycles[-1].outcome == "too_few":
            self.late.pop(cycles[-1].number, None)

    def after_a_step(self) -> Callable[[], bool]:
        """It is time when the next step's file is there."""
        before = self.steps()
        return lambda: self.steps() not in (before, (0, 0))

    def problems(self) -> list[str]:
        """What is wrong after a kill."""
        found = []
        stored = {i for batch in self.store.scan(columns=["pair_id"]) for i in batch["pair_id"].to_pylist()}
        if stored != self.ids:
            found.append(f"{len(self.ids - stored)} pairs lost, {len(stored - self.ids)} came from nowhere")
        versions = self.bundles.versions()
        for version in versions:
            load_bundle(self.bundles.path(version), None)  # raises where it is not whole
        learnt = {i for version in versions for i in learnt_pairs(self.bundles.path(version))}
        marked = {
            record["pair_id"]: record["indexed_by"]
            for batch in self.store.scan(Selection(indexed=True), ["pair_id", "indexed_by"])
            for record in batch.to_pylist()
        }
        if wrong := [i for i, version in marked.items() if version not in versions or i not in learnt]:
            found.append(f"{len(wrong)} pairs are marked that no promoted bundle learnt")
        for cycle in Cycles(self.service).all():
            if cycle.files.exists("snapshot.parquet") and cycle.result("snapshot") is not None:
                ids = set(cycle.files.read_table("snapshot.parquet")["pair_id"].to_pylist())
                if early := ids & self.late.get(cycle.number, set()):
                    found.append(f"cycle {cycle.number} took {len(early)} pairs that came after its snapshot")
        return found


def after(seconds: float) -> Callable[[], bool]:
    """It is time when so many seconds are over."""
    until = time.monotonic() + seconds
    return lambda: time.monotonic() >= until


def kill_runs(folder: Path, kills: int, seed: int) -> dict[str, Any]:
    """Kill so many runs; see the module docstring.

    Args:
        folder: scratch.
        kills: how many.
        seed: of the moments.

    Raises:
        SystemExit: a run that nobody killed failed.
    """
    first, chosen = pairs(FIRST, seed), random.Random(seed)
    undisturbed, world = (
        World(config_of(folder / name, keep_bundles=100))  # the check looks into all of them
        for name in ("undisturbed", "killed")
    )
    undisturbed.add(first)
    began = time.monotonic()
    undisturbed.finish()
    usual_s = time.monotonic() - began
    world.add(first)
    problems: list[str] = []
    where: Counter[str] = Counter()
    done = batches = 0
    while done < kills:
        world.forget_too_few()
        at_boundary = done < len(STEPS) or chosen.random() < 0.3
        if world.killed(world.after_a_step() if at_boundary else after(chosen.uniform(1.0, 0.6 * usual_s))):
            done += 1
            number, steps = world.steps()
            where["boundary" if at_boundary else f"in {STEPS[min(steps, len(STEPS) - 1)]}"] += 1
            print(f"kill {done}: cycle {number}, {steps} steps done", flush=True)
            problems += (found := world.problems())
            print(*found, sep="\n", end="\n" if found else "", flush=True)
            if number and steps:
                world.add(pairs(LATE, seed + 10_000 + done), begun=number)
            continue
        problems += world.problems()
        batches += 1
        world.add(pairs(MORE, seed + batches))
    world.finish()
    problems += world.problems()
    cycles = [cycle for cycle in Cycles(world.service).all() if cycle.outcome not in (None, "too_few")]
    return {
        "kills": done,
        "where": dict(where),
        "cycles": {str(cycle.number): cycle.outcome for cycle in cycles},
        "problems": problems,
        "undisturbed": undisturbed.bundles.history()[0].version,
        "killed": world.bundles.history()[0].version,
        "pairs": len(world.ids),
        "seconds": round(time.monotonic() - began),
    }


def main() -> None:
    """See the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(prefix="fk", dir="/tmp"))  # Ray's sockets allow no long path
    try:
        with fixed(scratch, Node(cpus=4)):  # outlives the killed drivers, so that each begins at once
            result = kill_runs(scratch / "world", options.kills, options.seed)
            print(json.dumps(result, indent=1), flush=True)
            if options.out is not None:
                options.out.write_text(json.dumps(result, indent=1) + "\n")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if result["problems"] or result["undisturbed"] != result["killed"]:
        raise SystemExit("something was lost, or the bundle is another one")


if __name__ == "__main__":
    main()
