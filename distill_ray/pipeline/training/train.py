"""TRAIN: examples -> student/, with Ray Train and DeepSpeed. Repeating the command goes on where it stopped.

    examples/*.parquet -> tokens (`tokenise`) -> TorchTrainer running `train_loop` on every worker
        -> checkpoints/<fingerprint>/step-<n>/{state/, model/} -> the best one's model/ -> student/

A fingerprint of everything that decides the result (student, training config, tokens) names the checkpoint
folder. The same command therefore finds its own checkpoints after a kill, and never takes up those of another
configuration. How many workers there was room for (`gang`) decides nothing but how long it takes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import pyarrow.fs
import ray
import ray.train
from ray.train.torch import TorchConfig, TorchTrainer

from distill_ray.config.run import RunConfig
from distill_ray.config.train import TopkKlConfig, TrainConfig
from distill_ray.errors import DistillError, TrainingError
from distill_ray.models import model_identity, prompts_of
from distill_ray.pipeline.cluster import connected
from distill_ray.pipeline.folder import RunFolder
from distill_ray.pipeline.progress import Progress, say
from distill_ray.pipeline.spending import spending
from distill_ray.pipeline.training.gang import Gang, available_gang
from distill_ray.pipeline.training.student_folder import write_student
from distill_ray.pipeline.training.tokenise import Limits, TokenizedRun, tokenise
from distill_ray.pipeline.training.train_loop import WorkerTask, train_worker
from distill_ray.pipeline.training.train_metrics import metrics_inbox
from distill_ray.records import RejectReason, to_json
from distill_ray.student.load import load_model_config, max_positions


def train(config: RunConfig, folder: RunFolder) -> dict[str, Any]:
    """Train the student of a run and write `student/`.

    Returns:
        Figures, also written to the manifest under `train`.

    Raises:
        ConfigError: the student cannot be loaded, or the cluster is too small.
        TrainingError: nothing to train on, a non-finite loss, a worker that keeps dying.
    """
    started = time.monotonic()
    _require_all_examples(folder)
    with connected(), Progress("train", unit="steps") as progress:
        if not folder.manifest().get("generation_complete", True):
            say("train: generation was stopped before its end; training on the examples there are")
        progress.update(0, now="examples to tokens")
        tokens = tokenise(config.student, folder, _limits(config))
        _require_examples(config, folder, tokens)
        fingerprint = run_fingerprint(config, tokens)
        figures = _finished(folder, fingerprint)
        if figures is not None:
            progress.total = figures["steps"]
            progress.update(figures["steps"])
            progress.console.print("train: already done with this configuration; student/ is kept", markup=False)
            folder.update_manifest({"train": {"generated_with": folder.manifest().get("generated_with")}})
            return figures
        _drop_other_checkpoints(folder, fingerprint, progress)
        gang = available_gang(config)
        with spending(folder, "train", gang.num_workers):
            trained = _fit(config, folder, tokens, gang, fingerprint, progress)
            write_student(config, folder, trained.checkpoint)
        loss = trained.metrics["validation_loss"]
        shown = "" if loss is None else f" (validation loss {loss:.4f})"
        say(f"train: student/ has the weights of step {trained.metrics['step']}{shown}")
    figures = {
        "fingerprint": fingerprint,
        "examples": tokens.num_examples["train"],
        "validation_examples": tokens.num_examples["validation"],
        "rejects": tokens.num_rejects,
        **trained.figures,
        "kept_step": trained.metrics["step"],
        "validation_loss": trained.metrics["validation_loss"],
        "seconds": round(time.monotonic() - started, 2),
        "generated_with": folder.manifest().get("generated_with"),
    }
    folder.write_json(figures, "train", "done.json")
    folder.update_manifest({"train": figures, "seconds": {"train": figures["seconds"]}})
    return figures


def run_fingerprint(config: RunConfig, tokens: TokenizedRun) -> str:
    """Hash of everything that decides the trained weights."""
    adapter = config.student.adapter
    student = config.student.model_dump(exclude={"engine_kwargs", "adapter"})
    if adapter is not None:
        student["adapter"] = model_identity(adapter)
    return hashlib.sha256(
        to_json(
            {
                "student": student,
                "weights": model_identity(config.student.model, config.student.revision),
                "train": config.train.deciding,
                "tokens": tokens.name,
            }
        ).encode()
    ).hexdigest()[:16]


# -- before --------------------------------------------------------------------------------------------------


def require_current_student(config: RunConfig, folder: RunFolder) -> None:
    """Refuse a student that was trained on other examples: what is held out now may have been trained on.

    Raises:
        TrainingError: `student/` is not what this config and these examples give.
    """
    tokens = tokenise(config.student, folder, _limits(config))
    if _finished(folder, run_fingerprint(config, tokens)) is None:
        raise TrainingError(
            f"{folder.root}: student/ was not trained with this config on these examples, so its held-out rows may not "
            "be held out; run `distill-ray train` with this config first"
        )


def trained_fingerprint(folder: RunFolder) -> str | None:
    """What `student/` was trained from, as a hash; None if no training has come to its end here."""
    return folder.read_json("train", "done.json").get("fingerprint") if folder.exists("train", "done.json") else None


def _limits(config: RunConfig) -> Limits:
    positions = max_positions(load_model_config(config.student))
    return Limits(
        longest=min(config.train.longest_example, positions or config.train.longest_example),
        topk=config.teacher.sampling.top_logprobs if isinstance(config.train.loss, TopkKlConfig) else 0,
    )


def _require_all_examples(folder: RunFolder) -> None:
    """Refuse to train where there are no examples, or not as many as were generated."""
    if not folder.list("examples", suffix=".parquet"):
        raise TrainingError("nothing to train on: examples/ is empty; run `distill-ray generate` first")
    expected = folder.manifest().get("num_examples")
    there = folder.num_rows("examples")
    if expected is not None and there != expected:
        raise TrainingError(
            f"{folder.path('examples')}: {there} examples where {expected} were generated; run `distill-ray generate` "
            "again, which makes what is missing from the ledger"
        )


def _require_examples(config: RunConfig, folder: RunFolder, tokens: TokenizedRun) -> None:
    if tokens.num_examples["train"]:
        return
    if tokens.num_rejects:
        reject = folder.read_table("train", "rejects.parquet", columns=["reason", "detail"]).slice(0, 1).to_pylist()[0]
        if reject["reason"] != RejectReason.TOO_LONG_TO_TRAIN.value:
            raise TrainingError(
                f"nothing to train on: all {tokens.num_rejects} examples are rejected, the first one as "
                f"{reject['reason']}: {reject['detail']} (see train/rejects.parquet)"
            )
        raise TrainingError(
            f"nothing to train on: all {tokens.num_rejects} examples are longer than {_limits(config).longest} tokens; "
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
    if fingerprint not in folder.list("checkpoints"):  # the curve and the events of another training
        folder.delete("metrics.jsonl")
        folder.delete("logs", "tensorboard")
    for name in others:
        folder.delete("checkpoints", name)
    folder.delete("train", "done.json")


# -- the run ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(slots=True)
class Trained:
    """What Ray Train gave back."""

    checkpoint: ray.train.Checkpoint  # the best by validation loss; without validation examples the last
    metrics: dict[str, Any]  # of that checkpoint
    figures: dict[str, Any]  # of the run


def _fit(
    config: RunConfig, folder: RunFolder, tokens: TokenizedRun, gang: Gang, fingerprint: str, progress: Progress
) -> Trained:
    has_validation = tokens.num_examples["validation"] > 0
    if not has_validation:
        progress.console.print("train: no validation examples, so the last checkpoint is kept", markup=False)
    tokenizer = prompts_of(config.student, key="student.model").tokenizer
    with metrics_inbox(folder, progress, tensorboard=config.train.tensorboard) as inbox:
        task = WorkerTask(
            student=config.student,
            train=config.train,
            folder=folder,
            tokens=tokens.name,
            pad_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0,
            use_gpu=gang.use_gpu,
            metrics=inbox,
        )
        progress.update(0, now="starting workers")
        result = _translated(_trainer(task, gang, fingerprint, has_validation=has_validation), config.train)
    if error := (result.return_value or {}).get("error"):
        raise error
    checkpoint, metrics = result.checkpoint, result.metrics
    if has_validation:
        checkpoint, metrics = min(result.best_checkpoints, key=lambda pair: pair[1]["validation_loss"])
    return Trained(checkpoint, metrics, result.return_value)


def _trainer(task: WorkerTask, gang: Gang, name: str, *, has_validation: bool) -> TorchTrainer:
    config, folder = task.train, task.folder
    storage: dict[str, Any] = {"storage_path": folder.path("checkpoints")}
    if not folder.is_local:
        storage["storage_filesystem"] = pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(folder.fs))
    # One by score, plus, always, the latest: from there a killed run goes on.
    score: dict[str, Any] = {"checkpoint_score_attribute": "validation_loss", "checkpoint_score_order": "min"}
    return TorchTrainer(
        train_worker,
        train_loop_config={"task": task},
        torch_config=TorchConfig(backend="nccl" if gang.use_gpu else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=gang.num_workers,
            use_gpu=gang.use_gpu,
            resources_per_worker={"CPU": config.cpus_per_worker, **({"GPU": 1} if gang.use_gpu else {})},
            label_selector=config.node_labels or None,
        ),
        run_config=ray.train.RunConfig(
            name=name,
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=1, **(score if has_validation else {})),
            failure_config=ray.train.FailureConfig(max_failures=config.max_failures),
            **storage,
        ),
    )


def _translated(trainer: TorchTrainer, config: TrainConfig) -> Any:
    """Run the trainer; Ray's chain of exceptions becomes one of ours."""
    try:
        with _own_interrupt():
            return trainer.fit()
    except ray.train.TrainingFailedError as failure:
        failures = getattr(failure, "worker_failures", None)
        rank, cause = next(iter(failures.items())) if failures else (0, getattr(failure, "controller_failure", failure))
        cause = getattr(cause, "_base_exc", cause)  # Ray wraps what a worker raised together with its traceback
        if isinstance(cause, DistillError):
            raise cause from None
        text = str(cause).strip() or "no message"
        if "out of memory" in text.lower():
            raise TrainingError(
                f"training worker {rank} ran out of memory; lower train.max_tokens_per_batch (now "
                f"{config.max_tokens_per_batch}), or set train.gradient_checkpointing: true or "
                "train.deepspeed.zero_stage: 3"
            ) from failure
        raise TrainingError(
            f"training worker {rank} failed {config.max_failures + 1} times, last with {type(cause).__name__}: "
            f"{text.splitlines()[0]}; run the same command again to go on from the last checkpoint"
        ) from failure


@contextlib.contextmanager
def _own_interrupt() -> Iterator[None]:
    """Undo what Ray Train 2.60 does to Ctrl-C: it exits with status 0, and its handler stays after `fit`."""
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit:
        raise KeyboardInterrupt from None
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, before)
