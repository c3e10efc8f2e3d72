"""Engines in actors of their own, as a worker sees them: a member of a mixture, and a judge.

An actor that dies is started again by Ray, wherever there is room. Until then, and before it is up for the first time,
its rows are answered by another replica: a cluster may be slow to find room for one, or never find it. One that cannot
start is tried again, after a while or when no other is up.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial
from typing import Any

import ray.exceptions

from distill_ray.config import SamplingConfig
from distill_ray.config.engine import EngineConfig
from distill_ray.engines import make_engine
from distill_ray.engines.base import Engine
from distill_ray.errors import DistillError, EngineUnavailable, TransientEngineError
from distill_ray.pipeline.cluster import own_error
from distill_ray.records import Completion, Message

AGAIN_S = 60.0  # after which one that could not start is tried again
RESTART_S = 1.0  # between two looks at whether Ray has started a process again
_RESTARTING = "The actor is restarting"  # what Ray answers at once until it has


class Pool:
    """The actors of one engine: which of them are up.

    Args:
        config: the engine.
        actors: `EngineActor`s.
        role: for messages.
    """

    def __init__(self, config: EngineConfig, actors: Sequence[Any], role: str) -> None:
        self.config, self.actors, self._role = config, actors, role
        self._up: dict[int, Any] = {}
        self._starting: dict[int, asyncio.Task[None]] = {}

    async def start(self) -> None:
        """Start all that are not, and wait until one is up.

        Raises:
            ConfigError, EngineUnavailable: none of them can start.
        """
        while True:
            self._start_missing()
            tasks = dict(self._starting)
            while not self._up and (waiting := [task for task in tasks.values() if not task.done()]):
                await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            if self._up:
                return
            for number, task in tasks.items():
                self._forget(number, task)  # whoever asks next tries all of them again
            for task in tasks.values():
                task.result()

    def _start_missing(self) -> None:
        for number in range(len(self.actors)):
            if number not in self._starting:
                self._starting[number] = asyncio.create_task(self._start(number))
                self._starting[number].add_done_callback(partial(self._ended, number))

    async def _start(self, number: int) -> None:
        for left in reversed(range(self.config.max_retries + 1)):
            try:
                await self._started(self.actors[number])
                break
            except ray.exceptions.RayActorError as error:
                if not left:
                    raise EngineUnavailable(self.died(error)) from error
            except DistillError as error:  # Ray's copy of it, whose message is a whole traceback
                raise own_error(error) or error from None
        self._up[number] = self.actors[number]

    async def _started(self, actor: Any) -> None:
        while True:
            try:
                return await actor.start.remote()
            except ray.exceptions.ActorUnavailableError as error:
                if _RESTARTING not in str(error):
                    raise  # it died while it started
            await asyncio.sleep(RESTART_S)

    def nearest(self, number: int) -> int:
        """The actor of this number, or another one where that one is not up. `start` first."""
        return number if number in self._up else list(self._up)[number % len(self._up)]

    def is_down(self, number: int) -> None:
        """It has died: the next `start` waits for it, where no other is up."""
        self._up.pop(number, None)
        task = self._starting.get(number)
        if task is not None and task.done():
            del self._starting[number]

    def _ended(self, number: int, task: asyncio.Task[None]) -> None:
        """That one of several replicas cannot start concerns nobody while another is up."""
        if not task.cancelled() and task.exception() is not None:
            asyncio.get_running_loop().call_later(AGAIN_S, self._forget, number, task)

    def _forget(self, number: int, task: asyncio.Task[None]) -> None:
        if self._starting.get(number) is task:
            del self._starting[number]

    def died(self, error: Exception) -> str:
        """For people."""
        return f"the {self._role}'s process died ({type(error).__name__}); see logs/"


class PooledEngine(Engine):
    """One place in a pool. Rows that share it meet the same engine, as long as that one is up."""

    def __init__(self, pool: Pool, number: int = 0) -> None:
        self._pool, self._number = pool, number
        self._as_here = make_engine(pool.config)  # never started
        self.identity = self._as_here.identity

    async def start(self) -> None:
        """Wait until somebody in the pool can answer."""
        await self._pool.start()

    async def generate(
        self, messages: Sequence[Message], sampling: SamplingConfig, *, first_sample: int = 0
    ) -> list[Completion]:
        """See `Engine.generate`. What was asked of an actor that died is asked again."""
        return await self._ask("generate", list(messages), sampling, first_sample)

    async def score(self, messages: Sequence[Message], answer: str, top_logprobs: int) -> Completion:
        """See `Engine.score`."""
        return await self._ask("score", list(messages), answer, top_logprobs)

    def prompt_key(self, messages: Sequence[Message]) -> bytes:
        """The engine's own: the ledger knows its answers wherever it runs, and a changed chat template is noticed."""
        return self._as_here.prompt_key(messages)

    async def close(self) -> None:
        """Nothing: others ask the actors too, and who started them ends them."""

    async def _ask(self, method: str, *args: Any) -> Any:
        for left in reversed(range(self._pool.config.max_retries + 1)):
            await self._pool.start()
            number = self._pool.nearest(self._number)
            try:
                return await getattr(self._pool.actors[number], method).remote(*args)
            except ray.exceptions.RayActorError as error:
                self._pool.is_down(number)
                if not left:
                    raise TransientEngineError(self._pool.died(error)) from error
                self.num_retries += 1
            except DistillError as error:  # Ray's copy of it, whose message is a whole traceback
                raise own_error(error) or error from None
        raise AssertionError("the last try returns or raises")
