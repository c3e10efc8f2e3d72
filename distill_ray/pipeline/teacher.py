"""Who answers as the teacher: one engine, or the members of a mixture.

A single engine lives in the worker that asks it (`worker.py`). The members of a mixture live in actors of their own,
each with its GPUs and replicas, and all workers ask them: so a URL has one place that knows its limits, and a worker
needs no hardware. A row meets the same engine in all its turns, so that its prefix cache is warm.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import ray
import ray.exceptions

from distill_ray.config import MixtureConfig, RunConfig
from distill_ray.engines import make_engine
from distill_ray.engines.base import Engine, hash_messages
from distill_ray.engines.mixture import Mixture
from distill_ray.errors import RowError
from distill_ray.pipeline.capacity import Need, engine_options, of_one_actor, room, teacher_gpus, teacher_needs
from distill_ray.pipeline.folder import RunFolder
from distill_ray.pipeline.helpers import EngineActor, RemoteEngine
from distill_ray.pipeline.members import Pool, PooledEngine
from distill_ray.recipes import Recipe
from distill_ray.records import Message, Row

CLOSE_S = 10.0  # for engines to end by themselves; one that was never up says nothing


class Teacher:
    """The engines that answer, and which of them answers what.

    Args:
        config: the whole YAML.
        pools: actors of each engine of `config.teachers`; none of them: the engines live in this process.
    """

    def __init__(self, config: RunConfig, pools: Sequence[Sequence[Any]] = ()) -> None:
        configs = list(config.teachers.values())
        self._mixture = mixture_of(config)
        self._pools: list[list[Engine]] = []
        for own, actors, role in zip(configs, pools or [[] for _ in configs], _roles(config), strict=True):
            if not pools:
                self._pools.append([make_engine(own)])
            elif self._mixture is None:
                self._pools.append([RemoteEngine(own, actor, role) for actor in actors])
            else:
                pool = Pool(own, actors, role)
                self._pools.append([PooledEngine(pool, number) for number in range(len(actors))])
        self.engines = {engine: own for own, pool in zip(configs, self._pools, strict=True) for engine in pool}
        """All of them, each with its section of the config."""

    def of_row(self, recipe: Recipe, row: Row) -> Engine:
        """Who answers a row: decided by all of what it asks first, since examples may stand in front of every query."""
        if self._mixture is None:
            return self._pools[0][0]
        try:
            messages = recipe.teacher_messages(row)
        except RowError:  # will be a reject, whoever is asked
            messages = [Message(role="user", content=row.query)]
        return self.of_key(hash_messages(messages))

    def of_key(self, key: bytes) -> Engine:
        """Who answers what has this key, a hash of 8 bytes or more."""
        pool = self._pools[0 if self._mixture is None else self._mixture.choose(key)]
        return pool[int.from_bytes(key[:8]) % len(pool)]


def mixture_of(config: RunConfig) -> Mixture | None:
    """The members by weight; None: the teacher is a single engine."""
    teacher = config.teacher
    if not isinstance(teacher, MixtureConfig):
        return None
    return Mixture([make_engine(engine).identity for engine in teacher.engines], teacher.shares)


def _roles(config: RunConfig) -> list[str]:
    """For logs and messages."""
    if not isinstance(config.teacher, MixtureConfig):
        return ["teacher"]
    return [f"member-{number}" for number in range(len(config.teacher.members))]


# -- on Ray ----------------------------------------------------------------------------------------------------------


def worker_resources(config: RunConfig) -> dict[str, Any]:
    """What asks Ray for the teacher's hardware: the engine's own, or nothing where its members have actors."""
    if isinstance(config.teacher, MixtureConfig):
        return {"num_cpus": 0}
    return engine_options(config.teacher, teacher_gpus(config, config.teacher))


def engine_counts(config: RunConfig, most: int, beside: Sequence[Need]) -> list[int]:
    """How many engines each of `config.teachers` gets: all that there is room for, from its `min` to its `max`.

    Args:
        config: the whole YAML.
        most: of each, as many as there is work for.
        beside: what else needs room.
    """
    counts: list[int] = []
    needs = teacher_needs(config)
    for number, (need, engine) in enumerate(zip(needs, config.teachers.values(), strict=True)):
        placed = [dataclasses.replace(other, count=count) for other, count in zip(needs, counts, strict=False)]
        wanted = min(engine.replicas.max, most)
        found = room(need, wanted, [*placed, *needs[number + 1 :], *beside])
        counts.append(max(found, min(engine.replicas.min, wanted)))
    return counts


@contextlib.contextmanager
def member_actors(
    config: RunConfig, folder: RunFolder, counts: Sequence[int] | None = None, tally: Any = None
) -> Iterator[list[list[Any]]]:
    """`engine_actors` of a mixture; of a single engine none."""
    if isinstance(config.teacher, MixtureConfig):
        with engine_actors(config, folder, counts, tally) as pools:
            yield pools
    else:
        yield []


@contextlib.contextmanager
def engine_actors(
    config: RunConfig, folder: RunFolder, counts: Sequence[int] | None = None, tally: Any = None
) -> Iterator[list[list[Any]]]:
    """Actors of each engine of `config.teachers`, for `Teacher`; ended afterwards. Connected to Ray.

    An engine loads when it is first asked. An actor that dies is started again.

    Args:
        config: the whole YAML.
        folder: for logs.
        counts: of each; None: one.
        tally: told when an engine is up.
    """
    engines = list(config.teachers.values())
    pools: list[list[Any]] = []
    try:
        for engine, role, count in zip(engines, _roles(config), counts or [1] * len(engines), strict=True):
            pool: list[Any] = []
            pools.append(pool)
            for _ in range(count):
                options = of_one_actor(engine_options(engine, teacher_gpus(config, engine)))
                actor_class = ray.remote(EngineActor).options(
                    **options,
                    max_concurrency=engine.max_concurrency + 8,  # beside what answers, who asks whether it is up
                    max_restarts=-1,
                )
                pool.append(actor_class.remote(engine, folder, role, tally))
        yield pools
        closing = [actor.close.remote() for pool in pools for actor in pool]
        ray.wait(closing, num_returns=len(closing), timeout=CLOSE_S)
    finally:
        for actor in (actor for pool in pools for actor in pool):
            ray.kill(actor)


def total_retries(pools: Sequence[Sequence[Any]]) -> int:
    """`Engine.num_retries` of all of them; of one that is not there to say it, none."""
    asked = [actor.num_retries.remote() for pool in pools for actor in pool]
    said, _ = ray.wait(asked, num_returns=len(asked), timeout=CLOSE_S) if asked else ([], [])
    total = 0
    for reference in said:
        with contextlib.suppress(ray.exceptions.RayActorError):
            total += ray.get(reference)
    return total
