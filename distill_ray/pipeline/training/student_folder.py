"""The trained student from its checkpoint: checkpoints/.../model/ -> student/.

Adapters that are merged need a model's worth of memory and libraries that print, so that is done in a process of its
own. It runs on any node where a training worker has had room: it fetches, merges and puts in place by itself, as the
driver's disk is not there.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pyarrow.fs
import ray
import ray.exceptions
import ray.train

from distill_ray.config.run import RunConfig
from distill_ray.config.train import StudentConfig
from distill_ray.errors import TrainingError
from distill_ray.models import prompts_of
from distill_ray.pipeline.capacity import on_nodes
from distill_ray.pipeline.cluster import own_error, raised_by, redirect_output
from distill_ray.pipeline.folder import RunFolder
from distill_ray.pipeline.training.tokenise import scratch_parent
from distill_ray.student.export import merge_adapter, save_tokenizer


def write_student(config: RunConfig, folder: RunFolder, checkpoint: ray.train.Checkpoint) -> None:
    """Write `student/` from a checkpoint's `model/`.

    Raises:
        TrainingError: the adapters cannot be merged.
    """
    student, train = config.student, config.train
    if student.lora is None or not student.lora.merge:
        _write(student, folder, checkpoint)
        return
    task = ray.remote(_write_apart).options(num_cpus=train.cpus_per_worker, **on_nodes(train.node_labels))
    try:
        ray.get(task.remote(student, folder, checkpoint))
    except ray.exceptions.RayError as error:
        raise own_error(error) or TrainingError(
            f"student.lora.merge: merging failed inside Ray: {raised_by(error)}; run the same command again: it goes "
            "on from the last checkpoint"
        ) from None


def _write_apart(student: StudentConfig, folder: RunFolder, checkpoint: ray.train.Checkpoint) -> None:
    redirect_output(folder, f"merge-{os.getpid()}")
    _write(student, folder, checkpoint)


def _write(student: StudentConfig, folder: RunFolder, checkpoint: ray.train.Checkpoint) -> None:
    """Build the folder aside, then put it in place in one move."""
    with tempfile.TemporaryDirectory(dir=scratch_parent(folder)) as scratch:
        model, built = Path(scratch) / "model", Path(scratch) / "student"
        _fetch_model(checkpoint, model)
        if student.lora is not None and student.lora.merge:
            merge_adapter(student, model, built)
            model.rename(built / "adapter")
        else:
            model.rename(built)
        save_tokenizer(prompts_of(student, key="student.model"), built)
        folder.delete("student")
        if folder.is_local:
            built.rename(folder.local("student"))
        else:
            folder.put(built, "student")


def _fetch_model(checkpoint: ray.train.Checkpoint, target: Path) -> None:
    """Copy `model/` only: the optimizer's state beside it is many times as much."""
    target.mkdir()
    pyarrow.fs.copy_files(f"{checkpoint.path}/model", str(target), source_filesystem=checkpoint.filesystem)
