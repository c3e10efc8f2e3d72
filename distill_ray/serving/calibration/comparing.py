"""Is a student's answer as good as the teacher's? One number per answer, 0..1, and the mark from which it is.

| `metric`      | the student's answer scores                                                    |
|---------------|--------------------------------------------------------------------------------|
| `exact_match` | 1 if it is the same text                                                       |
| `token_f1`    | the overlap of words                                                           |
| `embedding`   | the cosine of both answers                                                     |
| `judge`       | 1 if a judge, asked in both orders, finds it no worse; in between, where it wavers |

Where the run knows what is right (`evaluate.reference`), both answers are held against that, and the student's is as
good if it scores no less than the teacher's: two wrong answers are equally good. A judge compares the answers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import ray

from distill_ray.config import RunConfig, SamplingConfig
from distill_ray.config.engine import BaseEngineConfig, NoEngineConfig
from distill_ray.config.reward import JudgeRewardConfig
from distill_ray.errors import ConfigError, RequestRejected, RowError
from distill_ray.pipeline.cluster import connected
from distill_ray.pipeline.folder import RunFolder
from distill_ray.pipeline.helpers import EngineActor, RemoteEngine
from distill_ray.pipeline.ledger import Flusher, Ledger, LedgeredEngine
from distill_ray.pipeline.metrics import metric_of
from distill_ray.pipeline.progress import Progress
from distill_ray.records import Answered
from distill_ray.rewards.judge import JudgeReward
from distill_ray.serving.calibration.measured import Measured
from distill_ray.serving.routing.embedder import Embedder

Score = Callable[[str, str], float]


def outcomes(config: RunConfig, folder: RunFolder, measured: Sequence[Measured], embedder: Embedder) -> np.ndarray:
    """Whether the student's answer to each request is as good as the teacher's. [P] bool."""
    metric = config.calibrate.metric
    if metric == "judge":
        return judged(config, folder, measured) >= config.calibrate.good_from
    mark = 1.0 if metric == "exact_match" else config.calibrate.good_from
    score = _cosine_of(measured, embedder) if metric == "embedding" else metric_of(metric)
    return np.array([is_as_good(each, score, mark) for each in measured], dtype=bool)


def is_as_good(each: Measured, score: Score, mark: float) -> bool:
    """Whether the student's answer scores the mark, or no less than the teacher's where what is right is known."""
    if not each.student_answer.strip():
        return False
    if each.reference is None:
        return score(each.student_answer, each.teacher_answer) >= mark
    return score(each.student_answer, each.reference) >= min(mark, score(each.teacher_answer, each.reference))


def _cosine_of(measured: Sequence[Measured], embedder: Embedder) -> Score:
    """Cosine of two texts, embedded together beforehand. What is too long to embed is like nothing."""
    texts = {t for each in measured for t in (each.student_answer, each.teacher_answer, each.reference or "") if t}
    known = sorted(text for text in texts if embedder.count_tokens(text) <= embedder.max_tokens)
    vectors = dict(zip(known, embedder.embed(known), strict=True)) if known else {}

    def cosine(answer: str, expected: str) -> float:
        if answer not in vectors or expected not in vectors:
            return 0.0
        return float(vectors[answer] @ vectors[expected])

    return cosine


# -- a judge -----------------------------------------------------------------------------------------------------------


def judged(config: RunConfig, folder: RunFolder, measured: Sequence[Measured]) -> np.ndarray:
    """A judge's scores, through a ledger in `calls/calibrate`: a second calibration pays nothing again. [P] float64."""
    judge = config.calibrate.judge or config.teacher
    if isinstance(judge, NoEngineConfig):
        raise ConfigError("calibrate.judge: this run has no teacher that could judge; name an engine")
    with connected(), Progress("judge", total=len(measured), unit="answers") as progress:
        options = {"num_cpus": judge.cpus, "num_gpus": judge.num_gpus, "max_concurrency": judge.max_concurrency + 8}
        actor: Any = ray.remote(EngineActor).options(**options).remote(judge, folder, "judge")
        try:
            return np.array(asyncio.run(_judge_all(judge, folder, actor, measured, progress)))
        finally:
            ray.kill(actor)


async def _judge_all(
    judge: BaseEngineConfig, folder: RunFolder, actor: Any, measured: Sequence[Measured], progress: Progress
) -> list[float]:
    reward_config = JudgeRewardConfig(mode="comparison")
    reward, engine = JudgeReward(reward_config), RemoteEngine(judge, actor, "judge")  # type: ignore[arg-type]
    ledger, flusher = Ledger(folder, "calibrate"), Flusher(1.0)
    flusher.add(ledger)
    sampling = SamplingConfig(temperature=0.0, max_tokens=reward_config.max_tokens)
    asker = LedgeredEngine(engine.identity, engine, sampling, ledger, engine.start, lambda *_: None, flusher.check)
    at_once = asyncio.Semaphore(judge.max_concurrency)
    done = 0

    async def one(each: Measured) -> float:
        nonlocal done
        async with at_once:
            score = await compared(each, reward, asker)
        done += 1
        progress.update(done)
        return score

    try:
        scores = await asyncio.gather(*(one(each) for each in measured))
        await engine.close()
    finally:
        flusher.remove(ledger)
        await asyncio.to_thread(ledger.flush)
    await asyncio.to_thread(ledger.merge)
    return scores


async def compared(each: Measured, reward: JudgeReward, judge: Any) -> float:
    """1 where the student's answer wins or ties over both orders, less where it loses; 0 without a verdict."""
    if each.student_answer.split() == each.teacher_answer.split():
        return 1.0
    try:
        student, _ = await reward.compare(
            Answered(each.messages, each.student_answer), Answered(each.messages, each.teacher_answer), judge
        )
    except (RowError, RequestRejected):
        return 0.0  # nothing shows that it is good
    return min(1.0, 2.0 * student)
