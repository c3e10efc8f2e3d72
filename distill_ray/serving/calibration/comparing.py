"""Which of a run's measured requests the student answers as well as the teacher: `as_good`, over all of them.

A judge is asked through a ledger in the run folder.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from distill_ray.config import RunConfig, SamplingConfig
from distill_ray.config.reward import JudgeRewardConfig
from distill_ray.pipeline.asking import through_ledger
from distill_ray.pipeline.folder import RunFolder
from distill_ray.pipeline.ledger import LedgeredEngine
from distill_ray.pipeline.metrics import metric_of
from distill_ray.rewards.judge import JudgeReward
from distill_ray.serving.calibration.as_good import Score, compared, is_as_good, mark_of
from distill_ray.serving.calibration.measured import Measured
from distill_ray.serving.routing.embedder import Embedder


def outcomes(config: RunConfig, folder: RunFolder, measured: Sequence[Measured], embedder: Embedder) -> np.ndarray:
    """Whether the student's answer to each request is as good as the teacher's. [P] bool."""
    if config.calibrate.metric == "judge":
        return judged(config, folder, measured) >= mark_of(config.calibrate)
    return _scored(config, measured, embedder)


def agreements(config: RunConfig, measured: Sequence[Measured], good_P: np.ndarray, embedder: Embedder) -> np.ndarray:
    """The same where nobody knows what is right, as in a running service; `good_P` are the outcomes. [P] bool."""
    if config.calibrate.metric == "judge" or all(each.reference is None for each in measured):
        return good_P
    return _scored(config, [dataclasses.replace(each, reference=None) for each in measured], embedder)


def _scored(config: RunConfig, measured: Sequence[Measured], embedder: Embedder) -> np.ndarray:
    metric, mark = config.calibrate.metric, mark_of(config.calibrate)
    score = _cosine_of(measured, embedder) if metric == "embedding" else metric_of(metric)
    return np.array([is_as_good(each, score, mark) for each in measured], dtype=bool)


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
    _, judge = config.calibration_judge
    reward_config = JudgeRewardConfig(mode="comparison")
    reward = JudgeReward(reward_config)
    sampling = SamplingConfig(temperature=0.0, max_tokens=reward_config.max_tokens)

    async def one(each: Measured, asker: LedgeredEngine) -> float:
        return await compared(each, reward, asker)

    return np.array(through_ledger(judge, sampling, folder, "calibrate", "judge", measured, one))
