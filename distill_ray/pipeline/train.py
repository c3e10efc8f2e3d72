"""TRAIN: examples -> student/, with Ray Train and DeepSpeed. Repeating the command goes on where it stopped.

    examples/*.parquet -> tokens (`tokenise`) -> TorchTrainer running `train_loop` on every worker
        -> checkpoints/<fingerprint>/step-<n>/{state/, model/} -> the best one's model/ -> student/

A fingerprint of everything that decides the result (student, training config, tokens) names the checkpoint folder. The
same command therefore finds its own checkpoints after a kill, and never takes up those of another configuration.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.fs
import ray

from distill_ray.config.run import RunConfig
from distill_ray.config.train import StudentConfig, TrainConfig
from distill_ray.errors import ConfigError, DistillError, TrainingError
from distill_ray.models import DEMO_MODEL, resolve_model
from distill_ray.pipeline.cluster import connected
from distill_ray.pipeline.folder import RunFolder
from distill_ray.pipeline.progress import Progress
from distill_ray.pipeline.tokenise import TokenizedRun, student_tokenizer, tokenise
from distill_ray.records import to_json
from distill_ray.student.export import merge_adapter, save_tokenizer
from distill_ray.student.load import load_model_config, max_positions

POLL_S = 0.5

# Keys that change how a run is executed but not what comes out of it: they may differ between a run and its resume.
_EXECUTION_KEYS = {"max_failures", "tensorboard", "cpus_per_worker"}


def train(config: RunConfig, folder: RunFolder) -> dict[str, Any]:
    """Train the student of a run and write `student/`.

    Returns:
        Figures, also written to the manifest under `train`.

    Raises:
        ConfigError: the student cannot be loaded, or the cluster is too small.
        TrainingError: nothing to train on, a non-finite loss, a worker that keeps dying.
    """
    started = time.monotonic()
    with connected(), Progress("train", unit="steps") as progress:
        tokens = tokenise(config.student, folder, longest=_longest(config))
        _require_examples(config, tokens)
        fingerprint = run_fingerprint(config, tokens)
        figures = _finished(folder, fingerprint)
        if figures is not None:
            progress.total = figures["steps"]
            progress.update(figures["steps"])
            progress.console.print("train: already done with this configuration; student/ is kept", markup=False)
            return figures
        _drop_other_checkpoints(folder, fingerprint, progress)
        result = _fit(config, folder, tokens, fingerprint, progress)
        figures = _figures(result, tokens, fingerprint)
        _export(config.student, folder, result.chosen)
    figures["seconds"] = round(time.monotonic() - started, 1)
    folder.write_json(figures, "train", "done.json")
    folder.update_manifest({"train": figures, "seconds": {"train": figures["seconds"]}})
    return figures


def run_fingerprint(config: RunConfig, tokens: TokenizedRun) -> str:
    """Hash of everything that decides the trained weights."""
    student = config.student.model_dump(exclude={"engine_kwargs"})
    return hashlib.sha256(
        to_json(
            {
                "student": student,
                "weights": model_identity(config.student),
                "train": config.train.model_dump(exclude=_EXECUTION_KEYS),
                "tokens": tokens.name,
            }
        ).encode()
    ).hexdigest()[:16]


def model_identity(student: StudentConfig) -> str:
    """Names the weights that training starts from: of a folder, its files; of a hub model, id and revision."""
    path = Path(resolve_model(student.model, key="student.model"))
    if not path.is_dir():
        return f"{student.model}@{student.revision}"
    digest = hashlib.sha256()
    for file in sorted(path.glob("*")):
        if file.suffix in {".json", ".safetensors"}:
            digest.update(f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}\n".encode())
    return digest.hexdigest()


# -- before ----------------------------------------------------------------------------------------------------------


def _longest(config: RunConfig) -> int:
    positions = max_positions(load_model_config(config.student))
    return min(config.train.longest_example, positions or config.train.longest_example)


def _require_examples(config: RunConfig, tokens: TokenizedRun) -> None:
    if tokens.num_examples["train"]:
        return
    if tokens.num_rejects:
        raise TrainingError(
            f"nothing to train on: all {tokens.num_rejects} examples are longer than {_longest(config)} tokens; "
            "raise train.max_length (see train/rejects.parquet)"
        )
    raise TrainingError(
        "nothing to train on: examples/ holds no example of the split `train`; run `distill-ray generate` first, "
        "and see rejects/ where it has run"
    )


def _finished(folder: RunFolder, fingerprint: str) -> dict[str, Any] | None:
    """Figures of a finished run of this very configuration, if its student is still there."""
    if not folder.exists("train", "done.json") or not folder.exists("student", "tokenizer_config.json"):
        return None
    figures = folder.read_json("train", "done.json")
    return figures if figures.get("fingerprint") == fingerprint else None


def _drop_other_checkpoints(folder: RunFolder, fingerprint: str, progress: Progress) -> None:
    others = [name for name in folder.list("checkpoints") if name != fingerprint]
    if others:
        progress.console.print(
            "train: the configuration, the student or the examples changed: starting anew", markup=False
        )
    for name in others:
        folder.delete("checkpoints", name)
    folder.delete("train", "done.json")


def _use_gpu(config: RunConfig) -> bool:
    if config.train.gpus_per_worker is not None:
        return config.train.gpus_per_worker > 0
    return config.student.model != DEMO_MODEL and ray.cluster_resources().get("GPU", 0) > 0


def _require_resources(config: TrainConfig, use_gpu: bool) -> None:
    """Say at once what a Ray of our own can never give; a cluster in RAY_ADDRESS may grow."""
    if os.environ.get("RAY_ADDRESS"):
        return
    total = ray.cluster_resources()
    for resource, key, each in (
        ("CPU", "cpus_per_worker", config.cpus_per_worker),
        ("GPU", "gpus_per_worker", float(use_gpu)),
    ):
        have, needed = total.get(resource, 0.0), config.workers * each
        if needed > have:
            raise ConfigError(
                f"train.workers: {config.workers} workers with {key} {each:g} need {needed:g} {resource}s and this "
                f"machine has {have:g}; lower train.workers or train.{key}"
            )


# -- the run ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(slots=True)
class Fitted:
    """What Ray Train gave back."""

    chosen: Any  # ray.train.Checkpoint: the best by validation loss, or the last
    chosen_metrics: dict[str, Any]
    figures: dict[str, Any]


def _fit(
    config: RunConfig, folder: RunFolder, tokens: TokenizedRun, fingerprint: str, progress: Progress
) -> Fitted:
    from ray.train import CheckpointConfig, FailureConfig, ScalingConfig
    from ray.train import RunConfig as RayRunConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from distill_ray.pipeline.train_loop import WorkerTask, train_worker  # imports torch

    use_gpu = _use_gpu(config)
    _require_resources(config.train, use_gpu)
    has_validation = tokens.num_examples["validation"] > 0
    if not has_validation:
        progress.console.print("train: no validation examples: the last checkpoint is kept", markup=False)
    tokenizer = student_tokenizer(config.student).tokenizer
    storage: dict[str, Any] = {"storage_path": folder.path("checkpoints")}
    if not folder.is_local:
        storage["storage_filesystem"] = pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(folder.fs))
    # Both are kept: the best by this score, and always the latest one, from which a killed run goes on.
    score = {"checkpoint_score_attribute": "validation_loss", "checkpoint_score_order": "min"}
    with _metrics_to(folder, config.train, progress) as inbox:
        task = WorkerTask(
            student=config.student,
            train=config.train,
            folder=folder,
            tokens=tokens.name,
            pad_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0,
            use_gpu=use_gpu,
            metrics=inbox,
        )
        trainer = TorchTrainer(
            train_worker,
            train_loop_config={"task": task},
            torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
            scaling_config=ScalingConfig(
                num_workers=config.train.workers,
                use_gpu=use_gpu,
                resources_per_worker={"CPU": config.train.cpus_per_worker, **({"GPU": 1} if use_gpu else {})},
            ),
            run_config=RayRunConfig(
                name=fingerprint,
                checkpoint_config=CheckpointConfig(num_to_keep=1, **(score if has_validation else {})),
                failure_config=FailureConfig(max_failures=config.train.max_failures),
                **storage,
            ),
        )
        result = _translated(trainer, config.train)
    if error := (result.return_value or {}).get("error"):
        raise error
    saved = result.best_checkpoints or []
    if has_validation:
        chosen, metrics = min(saved, key=lambda pair: pair[1]["validation_loss"])
    else:
        chosen, metrics = result.checkpoint, result.metrics
    return Fitted(chosen, metrics, result.return_value)


def _translated(trainer: Any, config: TrainConfig) -> Any:
    """Run the trainer; its chain of exceptions becomes one of ours."""
    from ray.train import TrainingFailedError

    try:
        return trainer.fit()
    except TrainingFailedError as failure:
        failures = getattr(failure, "worker_failures", None) or {0: getattr(failure, "controller_failure", failure)}
        rank, cause = next(iter(failures.items()))
        cause = getattr(cause, "_base_exc", cause)
        if isinstance(cause, DistillError):
            raise cause from None
        if "out of memory" in str(cause).lower():
            raise TrainingError(
                f"training worker {rank} ran out of memory; lower train.max_tokens_per_batch (now "
                f"{config.max_tokens_per_batch}), set train.gradient_checkpointing: true, or train.deepspeed.zero_stage: 3"
            ) from failure
        lines = str(cause).strip().splitlines() or [""]
        raise TrainingError(
            f"training worker {rank} failed {config.max_failures + 1} times, last with {type(cause).__name__}: "
            f"{lines[0]}; run the same command again to go on from the last checkpoint"
        ) from failure


class MetricsInbox:
    """Actor: takes figures from worker 0 until the driver fetches them."""

    def __init__(self) -> None:
        self._records: list[dict[str, Any]] = []

    def put(self, record: dict[str, Any]) -> None:
        """Add one record."""
        self._records.append(record)

    def take(self) -> list[dict[str, Any]]:
        """All records since the last call."""
        records, self._records = self._records, []
        return records


@contextlib.contextmanager
def _metrics_to(folder: RunFolder, config: TrainConfig, progress: Progress) -> Iterator[Any]:
    """The inbox for figures; a thread of the driver takes them to metrics.jsonl, TensorBoard and the display."""
    inbox: Any = ray.remote(num_cpus=0)(MetricsInbox).remote()
    stop = threading.Event()
    with _tensorboard(folder, config) as writer:
        shown = _Shown(folder, progress, writer)

        def poll() -> None:
            while not stop.wait(POLL_S):
                with contextlib.suppress(ray.exceptions.RayError):  # shutting down
                    shown.add(ray.get(inbox.take.remote()))

        thread = threading.Thread(target=poll, daemon=True)
        thread.start()
        try:
            yield inbox
        finally:
            stop.set()
            thread.join()
            with contextlib.suppress(ray.exceptions.RayError):
                shown.add(ray.get(inbox.take.remote()))
            ray.kill(inbox)


class _Shown:
    def __init__(self, folder: RunFolder, progress: Progress, writer: Any) -> None:
        self._folder, self._progress, self._writer = folder, progress, writer
        self._figures: dict[str, str] = {}

    def add(self, records: list[dict[str, Any]]) -> None:
        for record in records:
            if "total_steps" in record:
                self._progress.total = record["total_steps"]
                self._progress.update(record["resumed_at"])
                if record["resumed_at"]:
                    self._progress.console.print(
                        f"train: going on after step {record['resumed_at']} of {record['total_steps']}", markup=False
                    )
                continue
            self._folder.append_metrics({"stage": "train", **record})
            for name in ("loss", "validation_loss", "learning_rate", "grad_norm", "tokens_per_second"):
                if self._writer is not None and record.get(name) is not None:
                    self._writer.add_scalar(f"train/{name}", record[name], record["step"])
            self._show(record)

    def _show(self, record: dict[str, Any]) -> None:
        if "loss" in record:
            self._figures["loss"] = f"{record['loss']:.4f}"
            self._figures["tokens/s"] = f"{record['tokens_per_second']:,.0f}"
        if "validation_loss" in record:
            self._figures["validation_loss"] = f"{record['validation_loss']:.4f}"
        self._progress.update(record["step"], **self._figures)


@contextlib.contextmanager
def _tensorboard(folder: RunFolder, config: TrainConfig) -> Iterator[Any]:
    """A TensorBoard writer on `logs/tensorboard`, or None. Events for a store are uploaded at the end."""
    if not config.tensorboard:
        yield None
        return
    from torch.utils.tensorboard import SummaryWriter

    with contextlib.ExitStack() as stack:
        local = folder.local("logs", "tensorboard") if folder.is_local else None
        target = str(local) if local else stack.enter_context(tempfile.TemporaryDirectory())
        with SummaryWriter(target) as writer:
            yield writer
        if local is None:
            folder.fs.put(target, folder.path("logs", "tensorboard"), recursive=True)


# -- after -----------------------------------------------------------------------------------------------------------


def _figures(result: Fitted, tokens: TokenizedRun, fingerprint: str) -> dict[str, Any]:
    return {
        "fingerprint": fingerprint,
        "examples": tokens.num_examples["train"],
        "validation_examples": tokens.num_examples["validation"],
        "rejects": tokens.num_rejects,
        **result.figures,
        "kept_step": result.chosen_metrics["step"],
        "validation_loss": result.chosen_metrics["validation_loss"],
    }


def _export(student: StudentConfig, folder: RunFolder, checkpoint: Any) -> None:
    """Write `student/` from a checkpoint's `model/`: built aside, then put in place in one move."""
    with checkpoint.as_directory() as path, tempfile.TemporaryDirectory() as scratch:
        model, built = Path(path) / "model", Path(scratch) / "student"
        if student.lora is not None and student.lora.merge:
            merge_adapter(student, model, built)
            shutil.copytree(model, built / "adapter")
        else:
            shutil.copytree(model, built)
        save_tokenizer(student_tokenizer(student), built)
        folder.delete("student")
        if not folder.is_local:
            folder.fs.put(str(built), folder.path("student"), recursive=True)
            return
        beside = folder.local(f".tmp-student-{secrets.token_hex(6)}")
        shutil.copytree(built, beside)
        beside.rename(folder.local("student"))
