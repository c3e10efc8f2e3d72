"""Ask one engine many things, through a ledger of their own: killed and run again, nothing is asked twice."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, TypeVar

import ray

from distill_ray.config import SamplingConfig
from distill_ray.config.engine import BaseEngineConfig
from distill_ray.errors import RequestRejected
from distill_ray.pipeline.capacity import engine_options, of_one_actor
from distill_ray.pipeline.cluster import connected
from distill_ray.pipeline.folder import RunFolder
from distill_ray.pipeline.helpers import EngineActor, RemoteEngine
from distill_ray.pipeline.ledger import Flusher, Ledger, LedgeredEngine, OnCall
from distill_ray.pipeline.progress import Progress
from distill_ray.records import Message

T = TypeVar("T")
R = TypeVar("R")
FLUSH_S = 1.0


def ask_all(
    engine: BaseEngineConfig, folder: RunFolder, ledger: str, conversations: Sequence[Sequence[Message]], role: str
) -> list[str]:
    """The answers of an engine to conversations, sampled as it says. "" where one is too long for it.

    Args:
        engine: who answers.
        folder: a run's; its `calls/LEDGER` keeps what was answered.
        ledger: name; another one for other weights under the same name.
        conversations: what it is asked.
        role: for progress, logs and messages.

    Raises:
        EngineUnavailable: it does not start, or dies.
        ConfigError: it cannot be started as configured.
    """

    async def one(messages: Sequence[Message], asker: LedgeredEngine) -> str:
        try:
            return (await asker.generate(messages))[0].text.strip()
        except RequestRejected:
            return ""  # a wrong answer, not a crash

    return through_ledger(engine, engine.sampling, folder, ledger, role, conversations, one)


def through_ledger(
    engine: BaseEngineConfig,
    sampling: SamplingConfig,
    folder: RunFolder,
    ledger: str,
    role: str,
    items: Sequence[T],
    work: Callable[[T, LedgeredEngine], Awaitable[R]],
    on_call: OnCall = lambda *_: None,
) -> list[R]:
    """What `work` makes of each item with the engine; as many at once as the engine takes. See `ask_all`."""

    def start() -> Any:
        options = of_one_actor(engine_options(engine, engine.num_gpus))
        actor_class = ray.remote(EngineActor).options(**options, max_concurrency=engine.max_concurrency + 8)
        return actor_class.remote(engine, folder, role)

    with connected(), Progress(role, total=len(items), unit="answers") as progress:
        actor = _OnDemand(start)
        try:
            asked = _work_through(engine, sampling, folder, ledger, role, actor, items, work, on_call, progress)
            return asyncio.run(asked)
        finally:
            actor.kill()


class _OnDemand:
    """An actor that is started when something is asked of it: where all is in the ledger, none is."""

    def __init__(self, start: Callable[[], Any]) -> None:
        self._start = start
        self.started: Any = None

    def __getattr__(self, method: str) -> Any:
        self.started = self.started or self._start()
        return getattr(self.started, method)

    def kill(self) -> None:
        """End it, if it was started."""
        if self.started is not None:
            ray.kill(self.started)


async def _work_through(
    engine: BaseEngineConfig,
    sampling: SamplingConfig,
    folder: RunFolder,
    ledger: str,
    role: str,
    actor: _OnDemand,
    items: Sequence[T],
    work: Callable[[T, LedgeredEngine], Awaitable[R]],
    on_call: OnCall,
    progress: Progress,
) -> list[R]:
    at_once = asyncio.Semaphore(engine.max_concurrency)
    remote = RemoteEngine(engine, actor, role)  # type: ignore[arg-type]
    done = 0

    async def one(item: T, asker: LedgeredEngine) -> R:
        nonlocal done
        async with at_once:
            found = await work(item, asker)
        done += 1
        progress.update(done)
        return found

    async with _opened(folder, ledger) as (calls, check):
        asker = LedgeredEngine(remote.identity, remote, sampling, calls, remote.start, on_call, check)
        found = await asyncio.gather(*(one(item, asker) for item in items))
    if actor.started is not None:
        await remote.close()
    return list(found)


@contextlib.asynccontextmanager
async def _opened(folder: RunFolder, name: str) -> AsyncIterator[tuple[Ledger, Callable[[], None]]]:
    """A ledger that is flushed meanwhile, and afterwards; merged where all went well."""
    ledger, flusher = Ledger(folder, name), Flusher(FLUSH_S)
    flusher.add(ledger)
    try:
        yield ledger, flusher.check
    finally:
        flusher.remove(ledger)
        await asyncio.to_thread(ledger.flush)
    await asyncio.to_thread(ledger.merge)
