"""The plan of a run: its stages with hours and money, what fits, and what all of it rests on."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from distill_ray.config import ModelRewardConfig, RunConfig, SynthesizeDataConfig
from distill_ray.config.reward import JudgeRewardConfig
from distill_ray.pipeline.estimating.calls import Ask, Learnt, Lengths, asks, learnt
from distill_ray.pipeline.estimating.engines import Planned, planned_engine
from distill_ray.pipeline.estimating.figures import Figure, best
from distill_ray.pipeline.estimating.fits import Fit
from distill_ray.pipeline.estimating.hardware import gpu_of
from distill_ray.pipeline.estimating.measured import Measured, measure
from distill_ray.pipeline.estimating.training import PlannedTraining, planned_training, student_gpus
from distill_ray.pipeline.estimating.workload import Workload, workload
from distill_ray.pipeline.evaluate import student_engine
from distill_ray.pipeline.folder import RunFolder

HOUR = 3600.0


@dataclass(frozen=True, slots=True)
class Cost:
    """Of a stage with so many replicas. None: it does not fit, or nobody says."""

    replicas: int
    wall_s: float | None
    gpu_hours: float | None
    money: float | None


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage, all epochs of it. What is rented counts from when its replicas start until the stage ends."""

    name: str
    rows: float
    calls: float
    prompt_tokens: float
    completion_tokens: float
    gpus_per_replica: int
    gpu: str
    at_min: Cost
    at_max: Cost


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
    def total(self) -> tuple[Cost, Cost]:
        """With as few and with as many replicas as the config allows. Rewards run beside the generation."""
        return _sum(s.at_min for s in self.stages), _sum(s.at_max for s in self.stages)

    def as_json(self) -> dict[str, Any]:
        """All of it, with the totals."""
        at_min, at_max = map(dataclasses.asdict, self.total)
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
    if getattr(config.recipe, "parse", None) is not None and measured.example_tokens is None:
        work.notes.append("recipe.parse: the student is taken to learn whole answers; it learns a part, in less time")
    asked = asks(config, lengths)
    teacher = _teacher(config, work, lengths, asked, measured)
    judge = _judge(config, work, lengths, asked, measured)
    longest = max(
        work.longest_student_prompt + round(each.completion),
        measured.example_tokens.longest if measured.example_tokens else 0,
    )
    train_rows = work.splits.get("train", 0)
    training = planned_training(config, each, train_rows, work.splits.get("validation", 0), longest, measured)
    evaluation = _evaluation(config, work, each)
    engines = [engine for engine in (teacher, judge) if engine is not None]
    stages = [_generation(config, work, engines), *_rewards(config, work, engines, judge)]
    stages += [_training(config, train_rows, training), *_evaluated(evaluation, work)]
    planned = [*engines, *([evaluation] if evaluation is not None else [])]
    return Estimate(
        name=config.name,
        rows_in=work.rows_in,
        unusable=work.unusable,
        splits=work.splits,
        sampled=work.sampled,
        stages=stages,
        fits=[*(engine.fit for engine in planned if engine.fit is not None), training.fit],
        figures=[*figures, *(figure for engine in planned for figure in engine.figures), *training.figures],
        notes=[*work.notes, *measured.notes, *_warnings(config, stages, engines, longest)],
    )


def _sum(costs: Iterable[Cost]) -> Cost:
    costs = list(costs)
    return Cost(
        0,
        _total(cost.wall_s for cost in costs),
        _total(cost.gpu_hours for cost in costs),
        _total(cost.money for cost in costs),
    )


def _total(values: Iterable[float | None]) -> float | None:
    known = list(values)
    return None if None in known else sum(value for value in known if value is not None)


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


def _teacher(
    config: RunConfig, work: Workload, lengths: Lengths, asked: list[Ask], measured: Measured
) -> Planned | None:
    if not config.asks_teacher:
        return None
    grown = round(max((a.prompt for a in asked if a.role == "teacher"), default=0) - work.prompt)  # by later turns
    prompts = float(work.prompts)
    if isinstance(config.data, SynthesizeDataConfig):  # writing a query is a call like an answer, of several queries
        calls = config.data.calls_needed / max(1, work.prompts)
        asked = [*asked, Ask("query", "teacher", calls, 1, lengths.prompt, lengths.prompt, lengths.completion)]
    return planned_engine(
        config.teacher,
        config.plan.teacher,
        asked,
        role="teacher",
        prompts=prompts,
        longest=work.longest_prompt + max(0, grown) + config.teacher.sampling.max_tokens,
        shared=work.shared,
        key="teacher",
        plan_key="plan.teacher",
        measured=measured,
    )


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


def _evaluation(config: RunConfig, work: Workload, each: Learnt) -> Planned | None:
    """What answers for the student, before and after the training; it reads the teacher's answers too (the loss)."""
    if not work.splits.get("test"):
        return None
    rows = float(min(work.splits["test"], config.evaluate.max_rows or work.splits["test"]))
    engine = student_engine(config, None).model_copy(update={"gpus": student_gpus(config)})
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


# -- stages ----------------------------------------------------------------------------------------------------------


def _cost(replicas: int, gpus: int, wall_s: float | None, price: float, paid: float | None) -> Cost:
    if wall_s is None:
        return Cost(replicas, None, None, None)
    hours = replicas * gpus * wall_s / HOUR
    return Cost(replicas, wall_s, hours, None if paid is None else hours * price + paid)


def _wall(config: RunConfig, engines: list[Planned], replicas: int) -> float | None:
    """Of the generation: the slower one of teacher and judge says how long both are rented."""
    walls: list[float] = []
    for number, engine in enumerate(engines):
        if engine.seconds is None:
            return None
        many = replicas if number == 0 and config.asks_teacher else 1
        walls.append(engine.start_s + engine.seconds / many)
    return max(walls, default=0.0)


def _generation(config: RunConfig, work: Workload, engines: list[Planned]) -> Stage:
    teacher = engines[0] if config.asks_teacher else None
    replicas = config.teacher.replicas
    gpus, price = (teacher.num_gpus, teacher.price_per_gpu_hour) if teacher else (0, 0.0)

    def cost(many: int) -> Cost:
        return _cost(many, gpus, _wall(config, engines, many), price, teacher.money if teacher else 0.0)

    load = teacher.load if teacher else None
    return Stage(
        name="generate",
        rows=work.usable,
        calls=load.answers if load else 0.0,
        prompt_tokens=load.prompt if load else 0.0,
        completion_tokens=load.completion if load else 0.0,
        gpus_per_replica=gpus,
        gpu=teacher.gpu if teacher else "",
        at_min=cost(replicas.min),
        at_max=cost(replicas.max),
    )


def _rewards(config: RunConfig, work: Workload, engines: list[Planned], judge: Planned | None) -> list[Stage]:
    """What stands beside the teacher as long as the generation takes: a judge or reward models of their own."""
    reward = getattr(config.recipe, "reward", None)
    if isinstance(reward, ModelRewardConfig):
        gpu = gpu_of(config.plan.judge, key="plan.judge") if reward.gpus else None
        many, gpus, name = reward.replicas, reward.gpus, gpu.name if gpu else "CPU"
        price, paid = gpu.price_per_hour if gpu else 0.0, 0.0
        calls, prompt, completion = 2.0 * work.prompts * config.teacher.sampling.n, 0.0, 0.0
    elif judge is not None:
        many, gpus, name = 1, judge.num_gpus, judge.gpu
        price, paid = judge.price_per_gpu_hour, judge.money
        calls, prompt, completion = judge.load.answers, judge.load.prompt, judge.load.completion
    else:
        return []

    def cost(replicas: int) -> Cost:
        beside = _cost(many, gpus, _wall(config, engines, replicas), price, paid)
        return dataclasses.replace(beside, wall_s=None if beside.wall_s is None else 0.0)

    at_min, at_max = cost(config.teacher.replicas.min), cost(config.teacher.replicas.max)
    return [Stage("rewards", work.usable, calls, prompt, completion, gpus, name, at_min, at_max)]


def _training(config: RunConfig, rows: int, training: PlannedTraining) -> Stage:
    workers, gpus = config.train.workers, training.gpus_per_worker
    cost = _cost(workers, gpus, training.seconds, training.price_per_gpu_hour, 0.0)
    return Stage("train", rows, 0.0, training.prompt_tokens, training.completion_tokens, gpus, training.gpu, cost, cost)


def _evaluated(evaluation: Planned | None, work: Workload) -> list[Stage]:
    """The student is loaded twice, before and after."""
    if evaluation is None:
        return []
    load, gpus = evaluation.load, evaluation.num_gpus
    wall = None if evaluation.seconds is None else evaluation.seconds + 2 * evaluation.start_s
    cost = _cost(1, gpus, wall, evaluation.price_per_gpu_hour, evaluation.money)
    rows = work.splits["test"]
    return [Stage("evaluate", rows, load.answers, load.prompt, load.completion, gpus, evaluation.gpu, cost, cost)]


def _warnings(config: RunConfig, stages: list[Stage], engines: list[Planned], longest: int) -> list[str]:
    """What the figures mean for keys of the config, and which prices are missing."""
    found: list[str] = []
    tokens, budget = sum(s.prompt_tokens + s.completion_tokens for s in stages[:1]), config.generate.max_teacher_tokens
    if budget is not None and tokens > budget:
        found.append(f"generate.max_teacher_tokens: {budget:,} is less than the {tokens:,.0f} that the teacher needs")
    if longest > config.train.longest_example:
        found.append(
            f"train.max_length: the longest sampled example has about {longest:,} tokens, and more than "
            f"{config.train.longest_example:,} are not trained on (too_long_to_train)"
        )
    if any(engine.money is None for engine in engines):
        found.append(
            "an API's price is not given: set price_per_million_prompt_tokens and price_per_million_completion_tokens "
            "in plan.teacher (or plan.judge)"
        )
    return found
