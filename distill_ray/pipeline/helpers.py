"""Who helps the teacher: reward models on actors of their own, and a judge that is another model.

A worker's rows ask one by one; `BatchedScorer` sends what came together as one batch, to the actors in turn. A judge
with an engine of its own lives in one actor for all workers; each worker asks it through its own partition's ledger.
An actor that dies is started again by Ray, wherever there is room, and what it was asked is asked again.
"""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
import ray.exceptions

from distill_ray.config import RunConfig, SamplingConfig, VllmEngineConfig
from distill_ray.config.engine import EngineConfig
from distill_ray.config.reward import BaseRewardConfig, JudgeRewardConfig, ModelRewardConfig, RewardConfig
from distill_ray.engines import make_engine
from distill_ray.engines.base import Engine
from distill_ray.errors import DistillError, EngineUnavailable
from distill_ray.pipeline.capacity import Need, engine_options, of_one_actor, on_nodes, require, teacher_needs
from distill_ray.pipeline.cluster import own_error, raised_by, redirect_output
from distill_ray.pipeline.folder import RunFolder
from distill_ray.pipeline.members import Pool, PooledEngine
from distill_ray.recipes.base import Answerer, Engines, Scorer
from distill_ray.records import Answered, Completion, Message
from distill_ray.rewards import make_reward
from distill_ray.rewards.judge import JudgeReward

SCORE_RETRIES = 5  # of a batch whose actor dies; as many as `EngineConfig.max_retries` by default
COLLECT_S = 0.01  # how long the first answer of a batch waits for others


@dataclass(frozen=True)
class Helpers:
    """Handles of the actors, made by the driver and given to every worker."""

    rewards: list[Any] = field(default_factory=list)
    judge: Any = None
    members: list[list[Any]] = field(default_factory=list)
    """Of each member of a mixture, its engines: `pipeline.teacher`."""


def reward_of(config: RunConfig) -> RewardConfig | None:
    """The reward of the recipe, where it has one."""
    reward = getattr(config.recipe, "reward", None)
    return reward if isinstance(reward, BaseRewardConfig) else None


def helper_needs(config: RunConfig) -> list[Need]:
    """What the reward asks Ray for, beside the teacher."""
    reward = reward_of(config)
    if isinstance(reward, JudgeRewardConfig) and reward.engine is not None:
        engine, key = reward.engine, "recipe.reward.engine"
        is_spread = isinstance(engine, VllmEngineConfig)
        return [Need(key, 1, _each(key, engine.cpus, engine.num_gpus), engine.node_labels, is_spread)]
    if isinstance(reward, ModelRewardConfig):
        key = "recipe.reward"
        return [Need(f"{key}.replicas", reward.replicas, _each(key, reward.cpus, reward.gpus), reward.node_labels)]
    return []


def require_generation(config: RunConfig) -> None:
    """Say at once what Ray can never give to the teacher and the reward: it would wait for it for ever.

    Raises:
        ConfigError, ClusterError: there is too little, for one of them or for both together.
    """
    require(*teacher_needs(config), *helper_needs(config))


def _each(key: str, cpus: float, gpus: int) -> dict[str, tuple[str, float]]:
    return {"CPU": (f"{key}.cpus", cpus), "GPU": (f"{key}.gpus", float(gpus))}


def start_helpers(config: RunConfig, folder: RunFolder) -> Helpers:
    """Start what the recipe's reward needs, and wait until it is loaded.

    Whether there is room for it was asked before, once for the whole stage (`require_generation`, `helper_needs`).

    Raises:
        ConfigError: a model or a label that does not exist.
    """
    reward = reward_of(config)
    if isinstance(reward, JudgeRewardConfig) and reward.engine is not None:
        options = of_one_actor(engine_options(reward.engine, reward.engine.num_gpus))
        actor_class = ray.remote(EngineActor).options(**options, max_concurrency=2048, max_restarts=-1)
        judge: Any = actor_class.remote(reward.engine, folder, "judge")
        _answered(judge.start.remote())
        return Helpers(judge=judge)
    if not isinstance(reward, ModelRewardConfig):
        return Helpers()  # nothing to load: it is scored where the row is
    actor_class = ray.remote(RewardActor).options(
        num_cpus=reward.cpus,
        num_gpus=reward.gpus,
        max_restarts=-1,
        max_task_retries=SCORE_RETRIES,  # a score is a function of its batch
        **on_nodes(reward.node_labels),
    )
    actors: list[Any] = [actor_class.remote(reward, folder) for _ in range(reward.replicas)]
    for handle in actors:
        _answered(handle.ready.remote())
    return Helpers(rewards=actors)


def _answered(reference: Any) -> Any:
    try:
        return ray.get(reference)
    except ray.exceptions.RayError as error:
        raise own_error(error) or DistillError(f"a reward actor failed inside Ray: {raised_by(error)}") from None


class RewardActor:
    """Actor: one reward model."""

    def __init__(self, config: RewardConfig, folder: RunFolder) -> None:
        redirect_output(folder, f"reward-{os.getpid()}")
        self._config, self._reward = config, None

    def ready(self) -> None:
        """Load the model: here, so that its error reaches whoever asks."""
        self._reward = self._reward or make_reward(self._config)

    def score(self, batch: list[Answered]) -> list[float]:
        """One number per answer."""
        self.ready()
        assert self._reward is not None
        return self._reward.score(batch)


class EngineActor:
    """Actor: one engine for all who ask. `role` names its log; a `Tally` is told when the engine is up."""

    def __init__(self, config: EngineConfig, folder: RunFolder, role: str, tally: Any = None) -> None:
        redirect_output(folder, f"{role}-{os.getpid()}")
        self._engine, self._tally = make_engine(config), tally
        self._starting: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Start the engine, once, whoever asks first; again where that failed."""
        if self._starting is None or (self._starting.done() and self._starting.exception() is not None):
            self._starting = asyncio.create_task(self._start())
        await asyncio.shield(self._starting)

    async def _start(self) -> None:
        await self._engine.start()
        if self._tally is not None:
            self._tally.engine_started.remote()

    async def generate(self, messages: list[Message], sampling: SamplingConfig, first_sample: int) -> list[Completion]:
        """See `Engine.generate`."""
        await self.start()
        return await self._engine.generate(messages, sampling, first_sample=first_sample)

    async def score(self, messages: list[Message], answer: str, top_logprobs: int) -> Completion:
        """See `Engine.score`."""
        await self.start()
        return await self._engine.score(messages, answer, top_logprobs)

    async def num_retries(self) -> int:
        """See `Engine.num_retries`."""
        return self._engine.num_retries

    async def close(self) -> None:
        """See `Engine.close`."""
        await self._engine.close()


class RemoteEngine(Engine):
    """An engine in an `EngineActor`, seen from another process. `role` is for messages."""

    def __init__(self, config: EngineConfig, actor: Any, role: str) -> None:
        self._as_here = make_engine(config)  # never started
        self.identity = self._as_here.identity
        self._actor, self._role = actor, role

    async def start(self) -> None:
        """Wait until it is up."""
        await self._ask(self._actor.start.remote())

    async def generate(
        self, messages: Sequence[Message], sampling: SamplingConfig, *, first_sample: int = 0
    ) -> list[Completion]:
        """See `Engine.generate`."""
        return await self._ask(self._actor.generate.remote(list(messages), sampling, first_sample))

    async def score(self, messages: Sequence[Message], answer: str, top_logprobs: int) -> Completion:
        """See `Engine.score`."""
        return await self._ask(self._actor.score.remote(list(messages), answer, top_logprobs))

    def prompt_key(self, messages: Sequence[Message]) -> bytes:
        """The engine's own, which notices a changed chat template."""
        return self._as_here.prompt_key(messages)

    async def close(self) -> None:
        """End the engine for all who ask it."""
        await self._ask(self._actor.close.remote())

    async def _ask(self, reference: Any) -> Any:
        try:
            return await reference
        except ray.exceptions.RayActorError as error:
            raise EngineUnavailable(f"the {self._role}'s process died ({type(error).__name__}); see logs/") from error
        except DistillError as error:  # Ray's copy of it, whose message is a whole traceback
            raise own_error(error) or error from None


class BatchedScorer:
    """A reward function behind `recipes.base.Scorer`: what many rows ask at about the same time is one batch.

    Args:
        score_batch: the reward.
        batch_size: answers per batch at most.
    """

    def __init__(self, score_batch: Callable[[list[Answered]], Awaitable[list[float]]], batch_size: int) -> None:
        self._score_batch, self._batch_size = score_batch, batch_size
        self._waiting: list[tuple[Answered, asyncio.Future[float]]] = []
        self._timer: asyncio.TimerHandle | None = None
        self._running: set[asyncio.Task[None]] = set()

    async def score(self, item: Answered) -> float:
        """The reward of one answer."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[float] = loop.create_future()
        self._waiting.append((item, future))
        if len(self._waiting) >= self._batch_size:
            self._send()
        elif self._timer is None:
            self._timer = loop.call_later(COLLECT_S, self._send)
        return await future

    async def score_pair(self, before: Answered, after: Answered) -> tuple[float, float]:
        """The rewards of two answers, each by itself."""
        return await asyncio.gather(self.score(before), self.score(after))

    def _send(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        batch, self._waiting = self._waiting, []
        if batch:
            task = asyncio.ensure_future(self._run(batch))
            self._running.add(task)
            task.add_done_callback(self._running.discard)

    async def _run(self, batch: list[tuple[Answered, asyncio.Future[float]]]) -> None:
        try:
            scores = await self._score_batch([item for item, _ in batch])
        except Exception as error:  # each row gets it
            ours = own_error(error) or DistillError(f"the reward failed: {raised_by(error)}")
            for _, future in batch:
                if not future.done():
                    future.set_exception(ours)
            return
        for (_, future), score in zip(batch, scores, strict=True):
            if not future.done():
                future.set_result(score)


class JudgeScorer:
    """A judge behind `recipes.base.Scorer`."""

    def __init__(self, config: JudgeRewardConfig, judge: Answerer) -> None:
        self._compares = config.mode == "comparison"
        self._reward, self._judge = JudgeReward(config), judge

    async def score(self, item: Answered) -> float:
        """The judge's rating."""
        return await self._reward.rate(item, self._judge)

    async def score_pair(self, before: Answered, after: Answered) -> tuple[float, float]:
        """Ratings of both, or their shares of a comparison."""
        if self._compares:
            return await self._reward.compare(before, after, self._judge)
        return await self._reward.rate_both(before, after, self._judge)


class Roles:
    """Who a recipe may ask, for any ledger; a reward model is shared by all of them, so that its batches are full."""

    def __init__(self, config: RunConfig, helpers: Helpers) -> None:
        self._config = config
        self._reward = reward_of(config)
        self._scorer: Scorer | None = None
        self._judge: Engine | None = None
        if isinstance(self._reward, JudgeRewardConfig) and self._reward.engine is not None:
            self._judge = PooledEngine(Pool(self._reward.engine, [helpers.judge], "judge"))
        if self._reward is not None and not isinstance(self._reward, JudgeRewardConfig):
            self._scorer = batched_scorer(self._reward, helpers)

    def engines(self, answerer: Callable[[Engine | None, SamplingConfig, bool], Answerer]) -> Engines:
        """The roles. `answerer` puts an engine (None: the teacher's) behind the caller's ledger, as judge or not."""
        teacher = answerer(None, self._config.teacher.sampling, False)
        reward = self._reward
        if not isinstance(reward, JudgeRewardConfig):
            return Engines(teacher, self._scorer)
        judge = answerer(self._judge, SamplingConfig(temperature=0.0, max_tokens=reward.max_tokens), True)
        return Engines(teacher, JudgeScorer(reward, judge))


def batched_scorer(config: RewardConfig, helpers: Helpers) -> BatchedScorer:
    """The scorer of any reward but a judge: on the actors in turn, or here where no model is needed."""
    if helpers.rewards:
        turn = itertools.cycle(helpers.rewards)

        async def on_actor(batch: list[Answered]) -> list[float]:
            return await next(turn).score.remote(batch)

        return BatchedScorer(on_actor, getattr(config, "batch_size", 32))
    reward = make_reward(config)

    async def here(batch: list[Answered]) -> list[float]:
        return await asyncio.to_thread(reward.score, batch)

    return BatchedScorer(here, 256)
