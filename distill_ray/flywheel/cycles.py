"""The files of cycles: a folder each, a file per finished step.

    SERVICE/cycles/0001/
        snapshot.json  clean.json  split.json  train.json  gate.json  bundle.json  shadow.json  promote.json
        split.parquet    which pair was used how: ids, no text. Stays, so that what was held out is never learnt
        dropped.parquet  which pair was not used, and why
        gate.html        the verdict for people
        run/             a run folder: examples, checkpoints, student, answers; emptied when the cycle is over
        bundle/          until it is installed

A step's file is written when all that the step does is done, and says what it was made from: the same command goes on
behind the last one, and does a step again whose part of the config has changed. Files are dropped from the last step to
the first, and a step's tables are written before its file. So a gap never comes from a kill: somebody or some disk lost
a file, with it may be lost what was held out, and nothing is done with such a cycle.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import pyarrow as pa

from distill_ray.errors import FlywheelError, RunFolderError
from distill_ray.pipeline.folder import RunFolder
from distill_ray.serving.routing.bundle import utc_now

StepName = Literal["snapshot", "clean", "split", "train", "gate", "bundle", "shadow", "promote"]
STEPS: tuple[StepName, ...] = ("snapshot", "clean", "split", "train", "gate", "bundle", "shadow", "promote")

Outcome = Literal["go_on", "too_few", "refused", "unclear", "overtaken", "promoted"]
"""go_on: to the next step. Whatever else ends the cycle; refused: what was learnt is worse, so its pairs are set aside;
unclear: it could not be shown that it is not; overtaken: another bundle was promoted meanwhile."""

# The table that belongs to a step's file for good, and what every step's file has; other steps read the rest.
_TABLES: Mapping[StepName, str] = {"snapshot": "snapshot", "split": "split"}
_KEYS = ("outcome", "made_from", "seconds")
_MORE_KEYS: Mapping[StepName, tuple[str, ...]] = {"snapshot": ("until",), "train": ("current",)}

# And weights, of a run that is over.
_TEXTS = ("examples", "checkpoints", "train", "student", "calls", "rows", "vendor")


class Cycle:
    """One cycle."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.number = int(folder.name)
        self.files = RunFolder(folder)
        self.run = RunFolder(folder / "run")

    def results(self) -> dict[StepName, dict[str, Any]]:
        """What the finished steps wrote, in their order.

        Raises:
            FlywheelError: a file is damaged, or missing though a later one is there.
        """
        try:
            return self._results()
        except FileNotFoundError:  # a runner may have dropped it while somebody looked on; then the next look is whole
            pass
        try:
            return self._results()
        except FileNotFoundError as error:
            raise self.damaged(Path(error.filename).name, "missing") from error

    def _results(self) -> dict[StepName, dict[str, Any]]:
        names = set(self.files.list())  # one look: a runner may be at work
        there: list[StepName] = [step for step in STEPS if f"{step}.json" in names]
        for step, expected in zip(there, STEPS, strict=False):
            if step != expected:
                raise self.damaged(f"{expected}.json", f"missing, and {step}.json is there")
        for step, table in _TABLES.items():
            if step in there and f"{table}.parquet" not in names:
                raise self.damaged(f"{table}.parquet", f"missing, and {step}.json is there")
        return {step: self._read(step) for step in there}

    def _read(self, step: StepName) -> dict[str, Any]:
        try:
            found = json.loads(self.files.read_bytes(f"{step}.json"))
        except (RunFolderError, ValueError) as error:
            why = getattr(error.__cause__, "strerror", None) or str(error)
            raise self.damaged(f"{step}.json", f"damaged ({why})") from error
        wrong = _wrong_form(step, found)
        if wrong is not None:
            raise self.damaged(f"{step}.json", f"not what this version of distill-ray writes ({wrong})")
        return found

    def damaged(self, file: str, why: str) -> FlywheelError:
        """What to tell of a file that says what this cycle did, and cannot be read."""
        return FlywheelError(
            f"{self.files.path(file)}: {why}; a cycle's files say what it held out, so nothing is done without them. "
            f"Put it back from a backup; without one, move the folder {self.folder.name} out of {self.folder.parent}: "
            "then what this cycle held out may be learnt, and what it learnt may be held out"
        )

    def without_end(self) -> FlywheelError:
        """What to tell of a cycle that was over, and does not say so any more."""
        return self.damaged(f"{STEPS[len(self.results())]}.json", "missing, and the cycle was over")

    def result(self, step: StepName) -> dict[str, Any] | None:
        """What a finished step wrote; None: it is not finished. See `results`."""
        return self.results().get(step)

    def needed(self, step: StepName) -> dict[str, Any]:
        """What an earlier step wrote. See `results`."""
        found = self.result(step)
        if found is None:
            raise self.damaged(f"{step}.json", "missing")
        return found

    def table(self, name: str, columns: list[str] | None = None) -> pa.Table:
        """A table that a step wrote, such as `split`. Raises FlywheelError: it is missing or damaged."""
        file = f"{name}.parquet"
        try:
            return self.files.read_table(file, columns=columns)
        except FileNotFoundError as error:
            raise self.damaged(file, "missing") from error
        except RunFolderError as error:
            why = (str(error.__cause__).strip().splitlines() or [""])[0]
            raise self.damaged(file, f"damaged ({why})") from error

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
        results = list(self.results().values())
        return results[-1] if results else None

    @property
    def outcome(self) -> Outcome | None:
        """How it ended; None: it has not."""
        last = self.last
        return last["outcome"] if last is not None and last["outcome"] != "go_on" else None

    @property
    def is_tidied(self) -> bool:
        """Whether what its steps had for each other is gone."""
        results = self.results()
        between = {"clean": "kept", "split": "pairs"}
        return any(step in results and not self.files.exists(f"{table}.parquet") for step, table in between.items())

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
        if not self.folder.exists():
            return []
        paths = sorted(self.folder.iterdir()) if self.folder.is_dir() else []
        found = [path for path in paths if re.fullmatch(r"\d{4,}", path.name)]
        for path in (self.folder, *found):
            if not path.is_dir():
                raise FlywheelError(f"{path}: a file where a folder of the flywheel belongs; move it away")
        return [Cycle(path) for path in found]

    def open(self) -> Cycle:
        """The cycle that is not over yet, or a new one. One that ended for lack of pairs is begun again.

        Raises:
            FlywheelError: files of the last one are damaged or missing.
        """
        cycles = self.all()
        if cycles and cycles[-1].outcome in (None, "too_few"):
            last = cycles[-1]
            results, is_over = last.results(), last.outcome is None and last.is_tidied
            if is_over and "train" in results:
                raise last.without_end()
            if is_over or last.outcome == "too_few":  # is_over: killed when it was begun again
                last.drop_from("snapshot")
            return last
        return Cycle(self.folder / f"{cycles[-1].number + 1 if cycles else 1:04d}")

    def before(self, cycle: Cycle) -> list[Cycle]:
        """The cycles that came to an end before this one.

        Raises:
            FlywheelError: files of one of them are damaged or missing.
        """
        found = [each for each in self.all() if each.number < cycle.number]
        for each in found:
            if each.outcome is None:
                raise each.without_end()
        return [each for each in found if each.outcome != "too_few"]


def _wrong_form(step: StepName, found: Any) -> str | None:
    """What is wrong with the content of a step's file; None: nothing."""
    if not isinstance(found, dict):
        return "no JSON object"
    missing = [key for key in (*_KEYS, *_MORE_KEYS.get(step, ())) if key not in found]
    if missing:
        return f"no `{missing[0]}`"
    if found["outcome"] not in get_args(Outcome) or (step, found["outcome"]) == ("promote", "go_on"):
        return f"outcome {found['outcome']!r}"
    return None if isinstance(found["seconds"], int | float) else f"seconds {found['seconds']!r}"
