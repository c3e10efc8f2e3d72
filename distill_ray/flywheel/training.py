"""The step that trains: cleaned pairs become the examples of a run folder, and `pipeline.training` does the rest.

Or conversations for a vendor (`vendor`), who does.
"""

from __future__ import annotations

import hashlib
from typing import Any

import pyarrow.compute as pc

from distill_ray.config import RunConfig
from distill_ray.config.flywheel import OpenAITrainerConfig
from distill_ray.config.train import CrossEntropyConfig
from distill_ray.errors import ConfigError
from distill_ray.flywheel.pool import turns_of
from distill_ray.flywheel.students import student_to_train
from distill_ray.flywheel.vendor import fine_tune
from distill_ray.flywheel.work import Work
from distill_ray.pipeline.folder import partition_name
from distill_ray.pipeline.run import write_origin
from distill_ray.pipeline.training.train import train as run_training
from distill_ray.records import Example, Message, examples_table
from distill_ray.serving.calibration.calibrate import served_form
from distill_ray.serving.routing.manifest import PromptForm

ROWS_PER_FILE = 5_000
SPLITS = {"train": "train", "replay": "train", "validation": "validation"}


def train(work: Work) -> dict[str, Any]:
    """Train the candidate."""
    current = work.bundles.current()
    form, _ = served_form(work.config)
    if isinstance(work.config.flywheel.trainer, OpenAITrainerConfig):
        return {"outcome": "go_on", "current": current, **_at_vendor(work, form, work.config.flywheel.trainer, current)}
    num_examples = _write_examples(work, form)
    config = training_config(work.config, work, current)
    write_origin(config, work.cycle.run)
    work.cycle.run.update_manifest({"num_examples": num_examples})
    figures = run_training(config, work.cycle.run)
    kept = ("fingerprint", "examples", "validation_examples", "rejects", "steps", "kept_step", "validation_loss")
    return {
        "outcome": "go_on",
        "current": current,
        "student": config.student.model_dump(mode="json"),
        **{name: figures[name] for name in kept if name in figures},
    }


def training_config(config: RunConfig, work: Work, current: str | None) -> RunConfig:
    """The config of the cycle's own run: the student to go on from, and text to learn, whatever the recipe took."""
    if current is None:
        student = student_to_train(config, None)
    else:  # trained on whatever nodes, so not from a copy on this one
        student = student_to_train(config, work.bundles.path(current, with_student=False), work.bundles.place(current))
    return config.model_copy(
        update={"student": student, "train": config.train.model_copy(update={"loss": CrossEntropyConfig()})}
    )


def _at_vendor(work: Work, form: PromptForm, trainer: OpenAITrainerConfig, current: str | None) -> dict[str, Any]:
    """Have a vendor train; what is in service there goes on."""
    if current is not None and work.config.flywheel.start_from == "current":
        spec = work.bundles.manifest(current).student
        if (spec.kind, spec.base_url) != ("remote", trainer.base_url):
            raise ConfigError(
                f"flywheel.start_from: current: the student in service is none that {trainer.base_url} has, so nothing "
                "can go on there; begin anew with flywheel.start_from: base"
            )
        trainer = trainer.model_copy(update={"model": spec.base})
    write_origin(work.config, work.cycle.run)
    conversations: dict[str, list[list[Message]]] = {"train": [], "validation": []}
    for record in _records(work):
        asked: list[Any] = form.messages(turns_of(record["messages"]))
        said: Message = {"role": "assistant", "content": record["completion"]}
        conversations[SPLITS[record["split"]]].append([*asked, said])
    train, validation = conversations["train"], conversations["validation"]
    found = fine_tune(trainer, train, validation, work.cycle.run, "vendor", work.say)
    return {
        "fingerprint": hashlib.blake2b(f"{found.model} {found.job}".encode(), digest_size=8).hexdigest(),
        "examples": len(train),
        "validation_examples": len(validation),
        "trained_tokens": found.trained_tokens,
        "remote": {"base": found.model, "base_url": trainer.base_url, "api_key_env": trainer.api_key_env},
    }


def _records(work: Work) -> list[dict[str, Any]]:
    """What is learnt, or chooses the checkpoint, by id."""
    table = work.cycle.table("pairs").filter(pc.field("split").isin(list(SPLITS)))
    return table.sort_by("pair_id").to_pylist()


def _write_examples(work: Work, form: PromptForm) -> int:
    """Examples as the student will be asked in service; returns how many."""
    records = _records(work)
    work.cycle.run.delete("examples")
    for number, start in enumerate(range(0, len(records), ROWS_PER_FILE)):
        examples = [
            Example(
                row_id=record["pair_id"],
                split=SPLITS[record["split"]],  # type: ignore[arg-type]
                messages=form.messages(turns_of(record["messages"])),  # type: ignore[arg-type]
                completion=record["completion"],
                teacher=record["teacher"],
            )
            for record in records[start : start + ROWS_PER_FILE]
        ]
        work.cycle.run.write_table(examples_table(examples), "examples", f"{partition_name(number)}.parquet")
    return len(records)
