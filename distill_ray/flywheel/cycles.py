"""The files of cycles: a folder each, a file per finished step.

    SERVICE/cycles/0001/
        snapshot.json  clean.json  split.json  train.json  gate.json  bundle.json  shadow.json  promote.json
        split.parquet    which pair was used how: ids, no text. Stays, so that what was held out is never learnt
        dropped.parquet  which pair was not used, and why
        gate.html        the verdict for people
        run/             a run folder: examples, checkpoints, student, answers; emptied when the cycle is over
        bundle/          until it is installed

A step's file is written when all that the step does is done, and says what it was made from: the same command goes on
behind the last one, and does a step again whose part of the config has changed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from distill_ray.pipeline.folder import RunFolder
from distill_ray.serving.routing.bundle import utc_now

StepName = Literal["snapshot", "clean", "split", "train", "gate", "bundle", "shadow", "promote"]
STEPS: tuple[StepName, ...] = ("snapshot", "clean", "split", "train", "gate", "bundle", "shadow", "promote")

Outcome = Literal["go_on", "too_few", "refused", "unclear", "overtaken", "promoted"]
"""go_on: to the next step. Whatever else ends the cycle; refused: what was learnt is worse, so its pairs are set aside;
unclear: it could not be shown that it is not; overtaken: another bundle was promoted meanwhile."""

# And weights, of a run that is over.
_TEXTS = ("examples", "checkpoints", "train", "student", "calls", "rows", "vendor")


class Cycle:
    """One cycle."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.number = int(folder.name)
        self.files = RunFolder(folder)
        self.run = RunFolder(folder / "run")

    def result(self, step: StepName) -> dict[str, Any] | None:
        """What a finished step wrote; None: it is not finished."""
        return self.files.read_json(f"{step}.json") if self.files.exists(f"{step}.json") else None

    def needed(self, step: StepName) -> dict[str, Any]:
        """What an earlier step wrote."""
        return self.files.read_json(f"{step}.json")

    def content(self, step: StepName) -> dict[str, Any]:
        """What an earlier step found, without when it did: the same is the same."""
        timed = ("finished", "seconds")
        return {name: value for name, value in self.needed(step).items() if name not in timed}

    def write(self, step: StepName, result: Mapping[str, Any]) -> None:
        """Finish a step."""
        self.files.write_json({"step": step, "finished": utc_now(), **result}, f"{step}.json")

    def drop_from(self, step: StepName) -> None:
        """Forget a step and all behind it."""
        for name in reversed(STEPS[STEPS.index(step) :]):
            self.files.delete(f"{name}.json")

    @property
    def last(self) -> dict[str, Any] | None:
        """The result of the last finished step."""
        found = None
        for step in STEPS:
            result = self.result(step)
            if result is None:
                break
            found = result
        return found

    @property
    def outcome(self) -> Outcome | None:
        """How it ended; None: it has not."""
        last = self.last
        return last["outcome"] if last is not None and last["outcome"] != "go_on" else None

    def tidy(self) -> None:
        """Remove texts and weights of a cycle that is over. What people read stays: results, pages, logs, curves."""
        for name in _TEXTS:
            self.run.delete(name)
        self.files.delete("pairs.parquet")
        self.files.delete("kept.parquet")
        self.files.delete("bundle")


class Cycles:
    """Those of a service."""

    def __init__(self, service_folder: str | Path) -> None:
        self.folder = Path(service_folder) / "cycles"

    def all(self) -> list[Cycle]:
        """Oldest first."""
        if not self.folder.is_dir():
            return []
        return [Cycle(path) for path in sorted(self.folder.iterdir()) if re.fullmatch(r"\d{4,}", path.name)]

    def open(self) -> Cycle:
        """The cycle that is not over yet, or a new one. One that ended for lack of pairs is begun again."""
        cycles = self.all()
        if cycles and cycles[-1].outcome in (None, "too_few"):
            if cycles[-1].outcome == "too_few":
                cycles[-1].drop_from("snapshot")
            return cycles[-1]
        return Cycle(self.folder / f"{cycles[-1].number + 1 if cycles else 1:04d}")

    def before(self, cycle: Cycle) -> list[Cycle]:
        """The cycles that came to an end before this one."""
        return [each for each in self.all() if each.number < cycle.number and each.outcome not in (None, "too_few")]
