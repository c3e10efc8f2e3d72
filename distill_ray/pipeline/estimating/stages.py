"""The stages of a run with their hours and money.

What is rented counts from when its replicas start until the stage ends. Rewards stand beside the generation, as long as
that takes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

from distill_ray.config import MixtureConfig, ModelRewardConfig, RunConfig
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
    is_beside: bool = False
    """It takes no time of its own: it stands beside the stage before it."""


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
    hours = replicas * wall_s / HOUR
    rent = hours * max(1, gpus) * price  # without a GPU there is a price only where one is given
    return Cost(replicas, wall_s, hours * gpus, None if paid is None else rent + paid)


def _wall(teachers: list[Planned], judge: Planned | None, *, most: bool) -> float | None:
    """Of the generation: the slowest of all engines says how long all are rented. `most`: with all their replicas."""
    walls: list[float] = []
    for engine in [*teachers, *([judge] if judge is not None else [])]:
        if engine.seconds is None:
            return None
        many = 1 if engine is judge else _many(engine, most=most)
        walls.append(engine.start_s + engine.seconds / many)
    return max(walls, default=0.0)


def _many(engine: Planned, *, most: bool) -> int:
    return engine.replicas.max if most else engine.replicas.min


def generation_stages(config: RunConfig, work: Workload, teachers: list[Planned], judge: Planned | None) -> list[Stage]:
    """The teacher's calls: one stage, or one for each member of a mixture, which work beside each other."""
    if not teachers:
        low, high = (
            _cost(many, 0, _wall([], judge, most=False), 0.0, 0.0)
            for many in (config.teacher.replicas.min, config.teacher.replicas.max)
        )
        return [Stage("generate", work.usable, 0.0, 0.0, 0.0, 0, "", low, high)]
    shares = config.teacher.shares if isinstance(config.teacher, MixtureConfig) else [1.0]
    stages: list[Stage] = []
    for number, (teacher, share) in enumerate(zip(teachers, shares, strict=True)):
        costs = [
            _cost(
                _many(teacher, most=most),
                teacher.num_gpus,
                _wall(teachers, judge, most=most),
                teacher.price_per_gpu_hour,
                teacher.money,
            )
            for most in (False, True)
        ]
        load = teacher.load
        at_min, at_max = map(_beside, costs) if number else costs
        stages.append(
            Stage(
                name=f"generate {number}" if teachers[1:] else "generate",
                rows=work.usable * share,
                calls=load.answers,
                prompt_tokens=load.prompt,
                completion_tokens=load.completion,
                gpus_per_replica=teacher.num_gpus,
                gpu=teacher.gpu,
                at_min=at_min,
                at_max=at_max,
                is_beside=bool(number),
            )
        )
    return stages


def _beside(cost: Cost) -> Cost:
    """What is rented as long as another stage takes, which counts the time."""
    return dataclasses.replace(cost, wall_s=None if cost.wall_s is None else 0.0)


def rewards_stage(config: RunConfig, work: Workload, teachers: list[Planned], judge: Planned | None) -> list[Stage]:
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
    at_min, at_max = (
        _beside(_cost(many, gpus, _wall(teachers, judge, most=most), price, paid)) for most in (False, True)
    )
    return [Stage("rewards", work.usable, calls, prompt, completion, gpus, name, at_min, at_max, is_beside=True)]


def training_stage(config: RunConfig, rows: int, training: PlannedTraining) -> Stage:
    """All epochs, with the fewest workers that may start and with all of them."""

    def cost(workers: int) -> Cost:
        wall = None if training.seconds is None else training.start_s + training.seconds / workers
        return _cost(workers, training.gpus_per_worker, wall, training.price_per_gpu_hour, 0.0)

    return Stage(
        name="train",
        rows=rows,
        calls=0.0,
        prompt_tokens=training.prompt_tokens,
        completion_tokens=training.completion_tokens,
        gpus_per_replica=training.gpus_per_worker,
        gpu=training.gpu,
        at_min=cost(config.train.workers.fewest),
        at_max=cost(config.train.workers.max),
    )


def engine_stage(name: str, engine: Planned | None, rows: float, *, starts: int = 1) -> list[Stage]:
    """One replica after the other stages: the students' answers, for which it is loaded twice, or who judges them."""
    if engine is None:
        return []
    load, gpus = engine.load, engine.num_gpus
    wall = None if engine.seconds is None else engine.seconds + starts * engine.start_s
    cost = _cost(1, gpus, wall, engine.price_per_gpu_hour, engine.money)
    return [Stage(name, rows, load.answers, load.prompt, load.completion, gpus, engine.gpu, cost, cost)]
