"""Evaluate: the student, before and after training and without the context, against the teacher on held-out rows.

The teacher's answers are those of `generate` (the `test` split goes through it like every other), so nothing is asked
twice. The student answers greedily through an engine actor (vLLM or transformers), and a task scores the teacher's
answers under it. What the figures mean is in `scoring.py`; this module only runs models.

    examples (split = test) -> student before, student after -> eval/predictions.parquet, eval/metrics.json, report
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import sys
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pyarrow as pa
import ray
import ray.data
import ray.exceptions

from distill_ray.config import HfEngineConfig, RunConfig, SamplingConfig, VllmEngineConfig
from distill_ray.config.reward import JudgeRewardConfig
from distill_ray.engines import make_engine
from distill_ray.errors import ConfigError, DistillError, RequestRejected
from distill_ray.models import is_encoder_decoder
from distill_ray.pipeline.capacity import Need, engine_options, on_nodes, require, student_gpus
from distill_ray.pipeline.cluster import connected, keep_traceback, own_error, raised_by, redirect_output
from distill_ray.pipeline.folder import RunFolder
from distill_ray.pipeline.generate import generated_with
from distill_ray.pipeline.held_out import held_out_rows
from distill_ray.pipeline.helpers import batched_scorer, helper_needs, reward_of, start_helpers
from distill_ray.pipeline.judging import judge_wins
from distill_ray.pipeline.progress import Progress
from distill_ray.pipeline.scoring import PREDICTION_SCHEMA, score_predictions
from distill_ray.pipeline.spending import spending
from distill_ray.pipeline.training.train import require_current_student, trained_fingerprint
from distill_ray.records import Answered, Message

BATCH_ROWS = 128


def evaluate(config: RunConfig, folder: RunFolder, *, limit: int | None = None) -> dict[str, Any]:
    """Run the stage. Returns what it writes to `eval/metrics.json`.

    Raises:
        DistillError: there is no student or no held-out row.
    """
    started = time.monotonic()
    if not folder.exists("student"):
        raise DistillError(f"{folder.root}: no student here yet; run `distill-ray train CONFIG --run-dir ...` first")
    require_evaluation_engine(config)
    require_these_examples(config, folder)
    require_current_student(config, folder)
    most = config.evaluate.max_rows or sys.maxsize
    rows, unanswered = held_out_rows(config, folder, min(limit or most, most))
    with spending(folder, "evaluate"):
        answering_s = _ask_and_score(config, folder, rows)
    if "win_rate" in config.evaluate.metrics:
        judge_wins(config, folder, rows)
    metrics, predictions = score_predictions(config, rows + unanswered)
    folder.write_table(pa.Table.from_pylist(predictions, schema=PREDICTION_SCHEMA), "eval", "predictions.parquet")
    folder.write_json(metrics, "eval", "metrics.json")
    seconds = {"evaluate": round(time.monotonic() - started, 2)}
    answering = {"answers": len(rows), "seconds": answering_s}
    folder.update_manifest(
        {
            "seconds": seconds,
            "student_answering": answering,
            "answered_with": answered_with(config, folder),
            "evaluated": {"generated_with": generated_with(config), "trained_from": trained_fingerprint(folder)},
        }
    )
    return metrics


def _ask_and_score(config: RunConfig, folder: RunFolder, rows: list[dict[str, Any]]) -> float:
    """Set in each row what the students say and what that is worth. Returns how long the trained one answered, in
    seconds from when it was loaded."""
    with connected(), Progress("evaluate", total=2 * len(rows), unit="answers") as progress:
        gpus = required_gpus(config)
        _answer(student_engine(config, None), gpus, folder, rows, "student_before", progress)
        answering_s = _answer(student_engine(config, folder), gpus, folder, rows, "student_after", progress)
        for name, source in (("loss_before", None), ("loss_after", folder)):
            progress.update(progress.done, now=f"student {name.removeprefix('loss_')}: loss")
            _score(config, folder, source, rows, name, gpus)
        _reward(config, folder, rows)
        progress.update(progress.done)
    return answering_s


def require_evaluation_engine(config: RunConfig) -> None:
    """Refuse an engine that cannot run the student. Raises ConfigError."""
    if config.evaluate.engine == "vllm" and is_encoder_decoder(config.student, key="student.model"):
        raise ConfigError(
            f"evaluate.engine: vLLM runs no encoder-decoder models, and student.model {config.student.model} is one; "
            "set evaluate.engine: hf"
        )


def require_these_examples(config: RunConfig, folder: RunFolder) -> None:
    """Refuse a config that `examples/` were not made with: the report would describe what was not run."""
    made_with = folder.manifest().get("generated_with")
    if made_with is not None and made_with != generated_with(config):
        raise ConfigError(
            f"{folder.root}: examples/ were generated with another recipe, teacher or data than this config's; run "
            "`distill-ray generate` with this config first (what did not change is not paid again), or take back the "
            "change"
        )


# -- answers ---------------------------------------------------------------------------------------------------------


def _adapter(config: RunConfig, student: RunFolder | None) -> str | None:
    """Folder of the trained adapters, where they are not merged into the weights."""
    if student is None:
        return config.student.adapter
    if config.student.lora is None or config.student.lora.merge:
        return None
    return student.url("student")


def _weights(config: RunConfig, student: RunFolder | None) -> dict[str, Any]:
    """Model and revision of the student: as it was (None), or as the run folder holds it."""
    if student is None or _adapter(config, student) is not None:
        return {"model": config.student.model, "revision": config.student.revision}
    return {"model": student.url("student"), "revision": None}


def ask_student(config: RunConfig, folder: RunFolder, conversations: Sequence[list[Message]]) -> list[str]:
    """The trained student's answers to conversations as it sees them. "" where one is too long for it."""
    rows: list[dict[str, Any]] = [{"messages": messages} for messages in conversations]
    with connected(), Progress("ask the student", total=len(rows), unit="answers") as progress:
        engine = student_engine(config, folder)
        _answer(engine, required_gpus(config), folder, rows, "student_after", progress)
    return [row["student_after"] for row in rows]


def answered_with(config: RunConfig, folder: RunFolder) -> str:
    """Hash of what decides the trained student's answers, to tell later whether they are of this very student."""
    engine = student_engine(config, folder)
    parts = [trained_fingerprint(folder), engine.type, engine.sampling.model_dump(mode="json")]
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).hexdigest()


def required_gpus(config: RunConfig) -> int:
    """GPUs of what answers for the student, or scores under it.

    Raises:
        ConfigError, ClusterError: no node that may hold it has them, and none will be added.
    """
    gpus = student_gpus(config)
    each = {"CPU": ("evaluate.engine", 1.0), "GPU": ("train.gpus_per_worker", float(gpus))}
    require(Need("evaluate.engine", 1, each, config.train.node_labels))
    return gpus


def greedy(config: RunConfig) -> SamplingConfig:
    """How a student answers."""
    return SamplingConfig(temperature=0.0, max_tokens=config.evaluate.max_tokens or config.teacher.sampling.max_tokens)


def student_engine(config: RunConfig, student: RunFolder | None) -> VllmEngineConfig | HfEngineConfig:
    """The engine that answers for the student: as it was (None), or as the run folder holds it. Without GPUs."""
    common: dict[str, Any] = {
        **_weights(config, student),
        "adapter": _adapter(config, student),
        "gpus": 0,
        "sampling": greedy(config),
        "chat_template": config.student.chat_template,
        "chat_template_kwargs": config.student.chat_template_kwargs,
        "trust_remote_code": config.student.trust_remote_code,
        "node_labels": config.train.node_labels,  # a node that trains a student has room for one that answers
    }
    if config.evaluate.engine == "hf":
        return HfEngineConfig(**common)
    return VllmEngineConfig(**common, engine_kwargs=config.student.engine_kwargs)


def _answer(
    engine: VllmEngineConfig | HfEngineConfig,
    gpus: int,
    folder: RunFolder,
    rows: list[dict[str, Any]],
    name: str,
    progress: Progress,
) -> float:
    """Set `row[name]` to the engine's answer, for all rows. Returns the seconds from its start to the last answer."""
    engine = engine.model_copy(update={"gpus": gpus})
    before = progress.done
    items = [{"number": n, "messages": row["messages"]} for n, row in enumerate(rows)]
    num_blocks = max(1, -(-len(items) // BATCH_ROWS))
    dataset = ray.data.from_items(items, override_num_blocks=num_blocks).map_batches(
        AnswerWorker,
        fn_constructor_args=(engine, folder, name),
        batch_size=BATCH_ROWS,
        compute=ray.data.ActorPoolStrategy(size=1, max_tasks_in_flight_per_actor=2, max_concurrent_calls_per_actor=2),
        **engine_options(engine, gpus),
    )
    now, seconds = f"{name.replace('_', ' ')}: answers", 0.0
    progress.update(before, now=now)
    try:
        for count, answer in enumerate(dataset.iter_rows(), start=1):
            rows[answer["number"]][name] = answer["text"]
            seconds = max(seconds, answer["seconds"])
            progress.update(before + count, now=now)
    except Exception as error:
        # Ray raises one of several wrappers, by where it failed; what we raised in the actor is inside.
        ours = own_error(error)
        if ours is None:
            where = keep_traceback(error, folder)
            raise DistillError(f"evaluation failed inside Ray: {raised_by(error)}; {where}") from error
        raise ours from None
    return round(seconds, 2)


class AnswerWorker:
    """Callable class for `ray.data`: batches of messages in, answers out, one engine."""

    def __init__(self, config: VllmEngineConfig | HfEngineConfig, folder: RunFolder, name: str) -> None:
        redirect_output(folder, f"evaluate-{name}-{os.getpid()}")
        self._config = config
        self._engine = make_engine(config)
        self._starting: asyncio.Task[float] | None = None

    async def __call__(self, batch: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """Answer one batch of {number, messages}: `text`, and `seconds` since the engine was ready."""
        if self._starting is None:
            self._starting = asyncio.create_task(self._start())
        ready_at = await asyncio.shield(self._starting)
        texts = await asyncio.gather(*(self._text(messages) for messages in batch["messages"]))
        seconds = time.monotonic() - ready_at
        yield {"number": batch["number"], "text": list(texts), "seconds": [seconds] * len(texts)}

    async def _start(self) -> float:
        await self._engine.start()
        return time.monotonic()

    async def _text(self, messages: Any) -> str:
        try:
            completions = await self._engine.generate(list(messages), self._config.sampling)
        except RequestRejected:
            return ""  # too long for the student: a wrong answer, not a crash
        return completions[0].text.strip()


# -- loss on the teacher's answers -----------------------------------------------------------------------------------


def _score(
    config: RunConfig, folder: RunFolder, student: RunFolder | None, rows: list[dict[str, Any]], name: str, gpus: int
) -> None:
    """Set `row[name]` to the mean nats per token of the teacher's answer under the student, for all rows."""
    if "loss" not in config.evaluate.metrics:
        for row in rows:
            row[name] = None
        return
    weights = config.student.model_copy(update=_weights(config, student))
    prompts = [row["prompt_ids"] for row in rows]
    completions = [row["completion_ids"] for row in rows]
    nodes = on_nodes(config.train.node_labels)
    task = ray.remote(_losses).options(num_cpus=1, num_gpus=gpus, **nodes)
    try:
        losses = ray.get(
            task.remote(
                folder, weights, _adapter(config, student), prompts, completions, config.train.max_tokens_per_batch
            )
        )
    except ray.exceptions.RayError as error:
        raise own_error(error) or DistillError(f"scoring failed inside Ray: {raised_by(error)}") from None
    for row, loss in zip(rows, losses, strict=True):
        row[name] = float(loss)


def _losses(
    folder: RunFolder, weights: Any, adapter: str | None, prompts: Any, completions: Any, max_tokens: int
) -> Any:
    from distill_ray.student.score import answer_losses

    redirect_output(folder, f"evaluate-loss-{os.getpid()}")
    return answer_losses(weights, adapter, prompts, completions, max_tokens_per_batch=max_tokens)


# -- reward ----------------------------------------------------------------------------------------------------------


def _reward(config: RunConfig, folder: RunFolder, rows: list[dict[str, Any]]) -> None:
    """Set the rewards of all answers, where the recipe has a reward that costs nothing to ask."""
    reward = reward_of(config)
    if reward is None or isinstance(reward, JudgeRewardConfig) or "reward" not in config.evaluate.metrics:
        return
    require(*helper_needs(config))
    scorer = batched_scorer(reward, start_helpers(config, folder))
    answers = {"draft": "draft", "teacher": "teacher_answer"} | {
        name: name for name in ("student_before", "student_after")
    }

    async def score_all() -> None:
        async def one(row: dict[str, Any], who: str, column: str) -> None:
            if row[column] is not None:
                row[f"reward_{who}"] = await scorer.score(Answered(tuple(row["messages"]), row[column]))

        await asyncio.gather(*(one(row, who, column) for row in rows for who, column in answers.items()))

    asyncio.run(score_all())
