"""The plan of a run: its stages with hours and money, what fits, and what all of it rests on."""

from __future__ import annotations

import dataclasses
import tempfile
from dataclasses import dataclass
from typing import Any

from distill_ray.config import MixtureConfig, ModelRewardConfig, RunConfig, SynthesizeDataConfig
from distill_ray.config.reward import JudgeRewardConfig
from distill_ray.pipeline.estimating.calls import Ask, Learnt, Lengths, asks, learnt
from distill_ray.pipeline.estimating.engines import Planned, planned_engine
from distill_ray.pipeline.estimating.figures import Figure, best, price
from distill_ray.pipeline.estimating.fits import Fit
from distill_ray.pipeline.estimating.hardware import gpu_of
from distill_ray.pipeline.estimating.measured import Measured, measure
from distill_ray.pipeline.estimating.stages import (
    Cost,
    Stage,
    engine_stage,
    generation_stages,
    rewards_stage,
    total,
    training_stage,
)
from distill_ray.pipeline.estimating.training import planned_gpus, planned_training
from distill_ray.pipeline.estimating.workload import Workload, workload
from distill_ray.pipeline.evaluate import student_engine
from distill_ray.pipeline.folder import RunFolder


@dataclass(frozen=True, slots=True)
class Estimate:
    """All of it."""

    name: str
    rows_in: int
    unusable: int
    splits: dict[str, int]
    sampled: int
    stages: list[Stage]
    fits: list[Fit]
    figures: list[Figure]
    notes: list[str]

    @property
    def all_fits(self) -> bool:
        """Whether every model has room."""
        return all(fit.fits for fit in self.fits)

    @property
    def totals(self) -> tuple[Cost, Cost]:
        """With as few and with as many replicas as the config allows. Rewards run beside the generation."""
        return total(s.at_min for s in self.stages), total(s.at_max for s in self.stages)

    def as_json(self) -> dict[str, Any]:
        """All of it, with the totals."""
        at_min, at_max = map(dataclasses.asdict, self.totals)
        fits = [{**dataclasses.asdict(fit), "needed": fit.needed, "fits": fit.fits} for fit in self.fits]
        return {**dataclasses.asdict(self), "fits": fits, "total": {"at_min": at_min, "at_max": at_max}}


def estimate(config: RunConfig, *, limit: int | None = None, run: RunFolder | None = None) -> Estimate:
    """Plan a run. Nothing is generated, no Ray is started, no GPU is needed.

    Args:
        config: the whole YAML.
        limit: only the first so many rows of each source.
        run: folder of a trial, whose figures are taken before given and estimated ones.

    Raises:
        InputError: the input, a model or a GPU cannot be used.
    """
    measured = measure(config, run)
    with tempfile.TemporaryDirectory(prefix="distill-ray-plan-") as scratch:
        work = workload(config, RunFolder(scratch), limit)
    lengths, figures = _lengths(config, work, measured)
    each = _learnt(config, work, lengths, measured)
    asked = asks(config, lengths)
    teachers = _teachers(config, work, lengths, asked, measured)
    judge = _judge(config, work, lengths, asked, measured)
    longest = max(
        work.longest_student_prompt + round(each.completion),
        measured.example_tokens.longest if measured.example_tokens else 0,
    )
    train_rows = work.splits.get("train", 0)
    training = planned_training(config, each, train_rows, work.splits.get("validation", 0), longest, measured)
    evaluated = float(min(work.splits.get("test", 0), config.evaluate.max_rows or work.usable))
    evaluation = _evaluation(config, work, each, evaluated)
    verdicts = _verdicts(config, work, lengths, each, evaluated)
    engines = [*teachers, *([judge] if judge is not None else [])]
    stages = [*generation_stages(config, work, teachers, judge), *rewards_stage(config, work, teachers, judge)]
    stages += [training_stage(config, train_rows, training)]
    stages += engine_stage("evaluate", evaluation, work.splits.get("test", 0), starts=2)
    stages += engine_stage("judge", verdicts, evaluated)
    own = verdicts if config.evaluate.judge is not None else None  # the teacher's figures are there already
    planned = [*engines, *(engine for engine in (evaluation, own) if engine is not None)]
    return Estimate(
        name=config.name,
        rows_in=work.rows_in,
        unusable=work.unusable,
        splits=work.splits,
        sampled=work.sampled,
        stages=stages,
        fits=[*(engine.fit for engine in planned if engine.fit is not None), training.fit],
        figures=[
            *figures,
            *_reward_price(config),
            *(figure for engine in planned for figure in engine.figures),
            *training.figures,
        ],
        notes=[*work.notes, *measured.notes, *_warnings(config, teachers, (judge, verdicts), longest, measured)],
    )


# -- tokens ----------------------------------------------------------------------------------------------------------


def _lengths(config: RunConfig, work: Workload, measured: Measured) -> tuple[Lengths, list[Figure]]:
    """Means per request, and the figure that they hang on: how long an answer is."""
    plan, sampling = config.plan, config.teacher.sampling
    answer = best(
        "tokens of an answer",
        estimated=plan.completion_share * sampling.max_tokens,
        how=f"{plan.completion_share:g} (plan.completion_share) of sampling.max_tokens {sampling.max_tokens}",
        key="plan.completion_tokens",
        given=plan.completion_tokens,
        measured=measured.completion_tokens,
        measured_in=measured.where,
    )
    reward = getattr(config.recipe, "reward", None)
    judge_completion = 0.0
    if isinstance(reward, JudgeRewardConfig):
        judge_completion = measured.completion_tokens or plan.completion_share * reward.max_tokens
    lengths = Lengths(
        prompt=work.prompt,
        shared=float(work.shared),
        completion=answer.value,
        critique_request=work.critique_request,
        revision_request=work.revision_request,
        judge_prompt=work.judge_prompt,
        judge_completion=judge_completion,
    )
    return lengths, [answer] if config.asks_teacher else []


def _learnt(config: RunConfig, work: Workload, lengths: Lengths, measured: Measured) -> Learnt:
    each = learnt(config, work.student_prompt, work.answer or lengths.completion, work.label)
    seen, examples = measured.example_tokens, measured.examples_per_row
    if seen is None or examples is None:
        return each
    return Learnt(examples, seen.prompt, seen.completion)


# -- engines ---------------------------------------------------------------------------------------------------------


def _teachers(
    config: RunConfig, work: Workload, lengths: Lengths, asked: list[Ask], measured: Measured
) -> list[Planned]:
    """The teacher, or the members of a mixture, each with its share of the prompts; nobody where nobody is asked."""
    if not config.asks_teacher:
        return []
    grown = round(max((a.prompt for a in asked if a.role == "teacher"), default=0) - work.prompt)  # by later turns
    prompts = float(work.prompts)
    if isinstance(config.data, SynthesizeDataConfig):  # writing a query is a call like an answer, of several queries
        calls = config.data.calls_needed * work.rows_in / config.data.count / max(1, work.prompts)
        asked = [*asked, Ask("query", "teacher", calls, 1, lengths.prompt, lengths.prompt, lengths.completion)]
    shares = config.teacher.shares if isinstance(config.teacher, MixtureConfig) else [1.0]
    return [
        planned_engine(
            engine,
            config.plan.teacher,
            asked,
            role="teacher",
            prompts=prompts * share,
            longest=work.longest_prompt + max(0, grown) + config.teacher.sampling.max_tokens,
            shared=work.shared,
            key=key,
            plan_key="plan.teacher",
            measured=measured,
        )
        for (key, engine), share in zip(config.teachers.items(), shares, strict=True)
    ]


def _judge(config: RunConfig, work: Workload, lengths: Lengths, asked: list[Ask], measured: Measured) -> Planned | None:
    """A judge with an engine of its own. Its share of a measured speed is in the teacher's."""
    reward = getattr(config.recipe, "reward", None)
    if not isinstance(reward, JudgeRewardConfig) or reward.engine is None:
        return None
    prompt = max((ask.prompt for ask in asked if ask.role == "judge"), default=0.0)
    return planned_engine(
        reward.engine,
        config.plan.judge,
        asked,
        role="judge",
        prompts=float(work.prompts),
        longest=round(prompt) + reward.max_tokens,
        shared=0,
        key="recipe.reward.engine",
        plan_key="plan.judge",
        measured=dataclasses.replace(measured, answers_per_second=None),
    )


def _evaluation(config: RunConfig, work: Workload, each: Learnt, rows: float) -> Planned | None:
    """What answers for the student, before and after the training; it reads the teacher's answers too (the loss)."""
    if not rows:
        return None
    engine = student_engine(config, None).model_copy(update={"gpus": planned_gpus(config)})
    scored = each.prompt + each.completion
    asked = [
        Ask("answer", "student", 2, 1, each.prompt, each.prompt, each.completion),
        Ask("loss", "student", 2, 1, scored, scored, 0.0),
    ]
    return planned_engine(
        engine,
        config.plan.student,
        asked,
        role="student",
        prompts=rows,
        longest=work.longest_student_prompt + engine.sampling.max_tokens,
        shared=0,
        key="student",
        plan_key="plan.student",
        measured=Measured(),
    )


def _verdicts(config: RunConfig, work: Workload, lengths: Lengths, each: Learnt, rows: float) -> Planned | None:
    """Who says whether the student's answer is better than the teacher's: each pair in both orders."""
    if not rows or "win_rate" not in config.evaluate.metrics:
        return None
    key, engine = config.evaluation_judge
    own, how = config.evaluate.judge is not None, config.evaluate.comparison
    prompt = work.verdict_prompt + lengths.completion + each.completion
    completion = config.plan.completion_share * how.max_tokens
    return planned_engine(
        engine,
        config.plan.judge if own else config.plan.teacher,
        [Ask("verdict", "judge", 2, 1, prompt, prompt, completion)],
        role="judge",
        prompts=rows,
        longest=round(prompt) + how.max_tokens,
        shared=0,
        key=key,
        plan_key="plan.judge" if own else "plan.teacher",
        measured=Measured(),
    )


def _reward_price(config: RunConfig) -> list[Figure]:
    reward = getattr(config.recipe, "reward", None)
    if not isinstance(reward, ModelRewardConfig) or not reward.gpus:
        return []
    return [price("recipe.reward", gpu_of(config.plan.judge, key="plan.judge"), "plan.judge")]


# -- what to look at -------------------------------------------------------------------------------------------------


def _warnings(
    config: RunConfig,
    teachers: list[Planned],
    judges: tuple[Planned | None, Planned | None],
    longest: int,
    measured: Measured,
) -> list[str]:
    """What the figures mean for keys of the config, and which prices are missing."""
    found: list[str] = []
    if getattr(config.recipe, "parse", None) is not None and measured.example_tokens is None:
        found.append("recipe.parse: the student is taken to learn whole answers; it learns a part, in less time")
    if isinstance(config.teacher, MixtureConfig) and config.asks_teacher:
        found.append("teacher: each member has its share of the calls, and the GPU, speeds and prices of plan.teacher")
    tokens = sum(teacher.load.prompt + teacher.load.completion for teacher in teachers)
    budget = config.generate.max_teacher_tokens
    if budget is not None and tokens > budget:
        found.append(f"generate.max_teacher_tokens: {budget:,} is less than the {tokens:,.0f} that the teacher needs")
    if longest > config.train.longest_example:
        found.append(
            f"train.max_length: the longest sampled example has about {longest:,} tokens, and more than "
            f"{config.train.longest_example:,} are not trained on (too_long_to_train)"
        )
    if isinstance(getattr(config.recipe, "reward", None), ModelRewardConfig):
        found.append("recipe.reward: its model is taken to fit, and to keep up with the teacher")
    if _judge_is_slower(teachers, judges[0]):
        found.append("recipe.reward.engine: the judge is slower than the teacher, whose replicas wait for it")
    if any(engine is not None and engine.money is None for engine in (*teachers, *judges)):
        found.append(
            "an API's price is not given: set price_per_million_prompt_tokens and price_per_million_completion_tokens "
            "in plan.teacher (or plan.judge)"
        )
    return found


def _judge_is_slower(teachers: list[Planned], judge: Planned | None) -> bool:
    if judge is None or judge.seconds is None or not teachers:
        return False
    alone = [None if t.seconds is None else t.seconds / t.replicas.max for t in teachers]
    return all(seconds is not None and judge.seconds > seconds for seconds in alone)
