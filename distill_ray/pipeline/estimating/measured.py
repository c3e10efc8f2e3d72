"""What an earlier run with the same recipe, teacher and data has measured: a trial of some hundred rows, say."""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow.compute as pc

from distill_ray.config import MixtureConfig, RunConfig
from distill_ray.models import prompts_of
from distill_ray.pipeline.folder import RunFolder
from distill_ray.pipeline.generate import is_generated
from distill_ray.pipeline.run import stored_config


@dataclass(frozen=True, slots=True)
class ExampleTokens:
    """Of the student's examples, by its own tokenizer."""

    prompt: float
    completion: float
    longest: int


@dataclass(frozen=True, slots=True)
class Measured:
    """Nothing, or what a run has measured. None: it does not say."""

    where: str = ""
    completion_tokens: float | None = None
    """Of an answer, teacher's and judge's alike."""

    answers_per_second: float | None = None
    """Of one replica, with all that lies between two answers."""

    engine_start_s: float | None = None
    examples_per_row: float | None = None
    example_tokens: ExampleTokens | None = None
    train_tokens_per_second: float | None = None
    """Of one worker."""

    notes: list[str] = field(default_factory=list)
    """What cannot be taken from it, and why."""


def measure(config: RunConfig, folder: RunFolder | None) -> Measured:
    """Read a run folder; nothing of it is changed.

    Raises:
        RunFolderError: a file of it is damaged.
    """
    if folder is None:
        return Measured()
    if not is_generated(config, folder):
        why = f"{folder.root}: no finished generation with this recipe, teacher and data; nothing is taken from it"
        return Measured(where=folder.root, notes=[why])
    manifest, stored = folder.manifest(), stored_config(folder)
    answers = manifest["teacher_calls"] + manifest["teacher_calls_replayed"]
    notes: list[str] = []
    is_same_teacher = stored.teacher.num_gpus == config.teacher.num_gpus and stored.plan.teacher.gpu == (
        config.plan.teacher.gpu
    )
    speed = _answers_per_second(manifest)
    is_mixture = isinstance(config.teacher, MixtureConfig)
    if is_mixture or not is_same_teacher or speed is None:
        why = "it does not say how many engines answered how long" if is_same_teacher else "it ran on other GPUs"
        why = "it does not say which member of the mixture gave how many answers" if is_mixture else why
        notes.append(f"{folder.root}: the teacher's speed is not taken from it: {why}")
        speed = None
    return Measured(
        where=folder.root,
        completion_tokens=manifest["completion_tokens"] / answers if answers else None,
        answers_per_second=speed,
        engine_start_s=manifest.get("seconds", {}).get("engine_start") if is_same_teacher and not is_mixture else None,
        examples_per_row=manifest["num_examples"] / manifest["rows_in"] if manifest["rows_in"] else None,
        example_tokens=_example_tokens(config, folder),
        train_tokens_per_second=_train_tokens_per_second(config, stored, folder),
        notes=notes,
    )


def _answers_per_second(manifest: dict[str, Any]) -> float | None:
    """Calls of the last command that made some, per second and engine from when the first engine was ready."""
    seconds, engines = manifest.get("seconds", {}).get("generate_work"), manifest.get("engines")
    if not seconds or not engines or not manifest["teacher_calls"]:
        return None
    return manifest["teacher_calls"] / seconds / engines


def _example_tokens(config: RunConfig, folder: RunFolder) -> ExampleTokens | None:
    chat = prompts_of(config.student, key="student.model")
    pairs = [
        (len(chat.prompt_ids(record["messages"])), len(chat.completion_ids(record["completion"])))
        for record in itertools.islice(_examples(folder), config.plan.sample_rows)
    ]
    if not pairs:
        return None
    prompts, completions = zip(*pairs, strict=True)
    return ExampleTokens(statistics.mean(prompts), statistics.mean(completions), max(map(sum, pairs)))


def _examples(folder: RunFolder) -> Iterator[dict[str, Any]]:
    """Those to train on; partitions are cut by a hash, so the first ones are as good as any."""
    for table in folder.read_tables("examples", columns=["split", "messages", "completion"]):
        yield from table.filter(pc.field("split") == "train").to_pylist()


def _train_tokens_per_second(config: RunConfig, stored: RunConfig, folder: RunFolder) -> float | None:
    """Median over the steps, of one worker."""
    is_same = stored.student == config.student and stored.plan.student.gpu == config.plan.student.gpu
    if not is_same or not folder.exists("metrics.jsonl"):
        return None
    lines = [json.loads(line) for line in folder.read_bytes("metrics.jsonl").splitlines()]
    all_of_them = stored.train.workers.max
    steps = [line for line in lines if line.get("tokens_per_second")]
    speeds = [step["tokens_per_second"] / step.get("workers", all_of_them) for step in steps]
    return statistics.median(speeds) if speeds else None
