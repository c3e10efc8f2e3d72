"""What a run has cost and what it saves per request, from its files and the prices that `plan:` gives.

Nothing is guessed: where a price or a figure is missing, so is what would be made of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from distill_ray.config import EngineConfig, RunConfig
from distill_ray.config.plan import HardwareConfig
from distill_ray.config.reward import JudgeRewardConfig
from distill_ray.pipeline.reporting.facts import Facts
from distill_ray.records import RejectReason

HOUR = 3600.0
# Rows that nobody was asked about.
_UNREAD = (
    RejectReason.UNREADABLE_ROW,
    RejectReason.MISSING_COLUMN,
    RejectReason.NOT_TEXT,
    RejectReason.EMPTY_QUERY,
    RejectReason.EMPTY_CONTEXT,
    RejectReason.DUPLICATE,
    RejectReason.DUPLICATE_ID,
)


@dataclass(frozen=True, slots=True)
class Costs:
    """Money is in the currency of the prices. None: nobody says."""

    teacher: float | None
    judge: float | None
    """Of the recipe, where it is another model than the teacher; else nothing."""

    training: float | None
    evaluation: float | None
    """The students' answers, and who judges them."""

    teacher_per_request: float | None
    """What the teacher takes for one request: all its turns, one sample, nobody judges."""

    student_per_request: float | None

    @property
    def total(self) -> float | None:
        """Of the run."""
        return _sum(self.teacher, self.judge, self.training, self.evaluation)

    @property
    def saved_per_request(self) -> float | None:
        """What a request costs less when the student answers it. Below 0: it costs more."""
        if self.teacher_per_request is None or self.student_per_request is None:
            return None
        return self.teacher_per_request - self.student_per_request

    @property
    def break_even(self) -> int | None:
        """Requests to the student after which the run has paid for itself; None: never, or nobody says."""
        total, saved = self.total, self.saved_per_request
        if total is None or saved is None or saved <= 0:
            return None
        return math.ceil(total / saved)


def costs(facts: Facts) -> Costs:
    """Of a run."""
    config, manifest = facts.config, facts.manifest
    spent: Mapping[str, Mapping[str, float]] = manifest.get("spent", {})
    teacher, student = config.plan.teacher, config.plan.student

    def rented(stage: str, prices: HardwareConfig, gpus: int) -> float | None:
        return _rent(spent.get(stage, {}).get("replica_seconds"), prices, gpus)

    return Costs(
        teacher=_teachers_bill(config, manifest, rented("generate", teacher, config.teacher.num_gpus)),
        judge=_judges_bill(config, manifest, spent.get("generate", {}).get("seconds")),
        training=rented("train", student, 1),
        evaluation=_sum(rented("evaluate", student, 1), _verdicts_bill(config, spent.get("judge"))),
        teacher_per_request=_teacher_per_request(config, manifest),
        student_per_request=_rent(_student_seconds(manifest), student, 1),
    )


def has_prices(config: RunConfig) -> bool:
    """Whether `plan:` gives any that costs are made of."""
    sections = config.plan.teacher, config.plan.judge, config.plan.student
    return any(value is not None for part in sections for name, value in part if name.startswith("price"))


def thousand(amount: float | None) -> float | None:
    """Of so many requests: one costs too little to read."""
    return None if amount is None else 1000 * amount


def requests_asked(config: RunConfig, manifest: Mapping[str, Any]) -> int:
    """How many requests the teacher's tokens were for: rows that it was asked about, each so many samples."""
    rejects = manifest.get("rejects") or {}
    rows = manifest.get("rows_in", 0) - sum(rejects.get(reason.value, 0) for reason in _UNREAD)
    return rows * config.teacher.sampling.n


def _teachers_bill(config: RunConfig, manifest: Mapping[str, Any], rent: float | None) -> float | None:
    if not config.asks_teacher:
        return 0.0
    if "prompt_tokens" not in manifest:
        return rent
    bill = config.plan.teacher.bill(*_tokens(manifest, without_judge=own_judge(config) is not None))
    return rent if bill is None else bill


def own_judge(config: RunConfig) -> EngineConfig | None:
    """Who judges for the recipe, where that is not the teacher."""
    reward = getattr(config.recipe, "reward", None)
    return reward.engine if isinstance(reward, JudgeRewardConfig) else None


def _judges_bill(config: RunConfig, manifest: Mapping[str, Any], seconds: float | None) -> float | None:
    """By its tokens where they have a price, else for standing beside the generation."""
    judge = own_judge(config)
    if judge is None:
        return 0.0
    bill = config.plan.judge.bill(manifest.get("judge_prompt_tokens", 0), manifest.get("judge_completion_tokens", 0))
    if bill is None:
        return _rent(seconds, config.plan.judge, judge.num_gpus)
    return bill if "judge_prompt_tokens" in manifest else None


def _verdicts_bill(config: RunConfig, spent: Mapping[str, float] | None) -> float | None:
    """Of who judged the evaluation: by the tokens where they have a price, else by the hour."""
    if spent is None:
        return 0.0
    own = config.evaluate.judge
    prices, engine = (config.plan.teacher, config.teacher) if own is None else (config.plan.judge, own)
    bill = prices.bill(spent["prompt_tokens"], spent["completion_tokens"])
    return _rent(spent["replica_seconds"], prices, engine.num_gpus) if bill is None else bill


def _tokens(manifest: Mapping[str, Any], *, without_judge: bool) -> tuple[float, float]:
    """Prompt and completion tokens of a generation's answers."""
    prompt, completion = manifest["prompt_tokens"], manifest["completion_tokens"]
    if not without_judge:
        return prompt, completion
    return prompt - manifest.get("judge_prompt_tokens", 0), completion - manifest.get("judge_completion_tokens", 0)


def _teacher_per_request(config: RunConfig, manifest: Mapping[str, Any]) -> float | None:
    """By its tokens where they have a price, else by the time that its replicas take for an answer at full load: with
    a judge of the same engine its answers count in that too."""
    requests = requests_asked(config, manifest)
    if not requests or not config.asks_teacher or "prompt_tokens" not in manifest:
        return None
    if (bill := config.plan.teacher.bill(*_tokens(manifest, without_judge=True))) is not None:
        return bill / requests
    spent = manifest.get("spent", {}).get("generate", {})
    if not spent.get("calls") or "working_seconds" not in spent:
        return None
    calls = (manifest["teacher_calls"] + manifest["teacher_calls_replayed"]) / requests
    seconds = calls * spent["working_seconds"] / spent["calls"]
    return _rent(seconds, config.plan.teacher, config.teacher.num_gpus)


def _student_seconds(manifest: Mapping[str, Any]) -> float | None:
    """For one answer, when it has many to give at once."""
    answering = manifest.get("student_answering") or {}
    return answering["seconds"] / answering["answers"] if answering.get("answers") else None


def _sum(*parts: float | None) -> float | None:
    """None where one is missing."""
    known = [part for part in parts if part is not None]
    return sum(known) if len(known) == len(parts) else None


def _rent(replica_seconds: float | None, prices: HardwareConfig, gpus: int) -> float | None:
    if replica_seconds is None or prices.price_per_hour is None:
        return None
    return replica_seconds / HOUR * max(1, gpus) * prices.price_per_hour
