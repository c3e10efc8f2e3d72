"""The stages of a run with their hours and money.

What is rented counts from when its replicas start until the stage ends. Rewards stand beside the generation, as long as
that takes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

from distill_ray.config import ModelRewardConfig, RunConfig
from distill_ray.pipeline.estimating.engines import Planned
from distill_ray.pipeline.estimating.hardware import gpu_of
from distill_ray.pipeline.estimating.training import PlannedTraining
from distill_ray.pipeline.estimating.workload import Workload

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


def total(costs: Iterable[Cost]) -> Cost:
    """Of stages one after the other."""
    costs = list(costs)
    return Cost(
        0,
        _added(cost.wall_s for cost in costs),
        _added(cost.gpu_hours for cost in costs),
        _added(cost.money for cost in costs),
    )


def _added(values: Iterable[float | None]) -> float | None:
    known = list(values)
    return None if None in known else sum(value for value in known if value is not None)


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


def generation_stage(config: RunConfig, work: Workload, engines: list[Planned]) -> Stage:
    """The teacher's calls. `engines`: teacher and judge, those of them that there are."""
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


def rewards_stage(config: RunConfig, work: Workload, engines: list[Planned], judge: Planned | None) -> list[Stage]:
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


def training_stage(config: RunConfig, rows: int, training: PlannedTraining) -> Stage:
    """All epochs."""
    workers, gpus = config.train.workers, training.gpus_per_worker
    cost = _cost(workers, gpus, training.seconds, training.price_per_gpu_hour, 0.0)
    return Stage("train", rows, 0.0, training.prompt_tokens, training.completion_tokens, gpus, training.gpu, cost, cost)


def evaluation_stage(evaluation: Planned | None, work: Workload) -> list[Stage]:
    """The student is loaded twice, before and after."""
    if evaluation is None:
        return []
    load, gpus = evaluation.load, evaluation.num_gpus
    wall = None if evaluation.seconds is None else evaluation.seconds + 2 * evaluation.start_s
    cost = _cost(1, gpus, wall, evaluation.price_per_gpu_hour, evaluation.money)
    rows = work.splits["test"]
    return [Stage("evaluate", rows, load.answers, load.prompt, load.completion, gpus, evaluation.gpu, cost, cost)]
