"""One per service: takes pairs into the store, adds up what the routers count, and brings up the students.

    routers -> add(pairs)      -> store (one writer)
    routers -> exchange(...)   -> usage of all owners; metrics and last requests of all routers
    routers -> looks           -> what drift leads to (`watching.overseer`)
    what is current, candidate -> their students are up; the one before stays for a while (`students`)

It may die and come back at any time: pairs wait in the routers' spools, usage is on disk, and so are the moves of the
pointer. It holds the service's folder locked, so that no second service writes there; the kernel lets go when it dies.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from distill_ray.config import RunConfig
from distill_ray.errors import DistillError, StoreError
from distill_ray.pipeline.folder import RunFolder
from distill_ray.serving.collecting.marks import settle
from distill_ray.serving.collecting.pairs import Pair
from distill_ray.serving.collecting.store import PairStore, make_store
from distill_ray.serving.collecting.writer import Writer
from distill_ray.serving.events import Events
from distill_ray.serving.front.limits import Entry, Usage
from distill_ray.serving.metrics import Family, Metrics, add_up, exposition, figures
from distill_ray.serving.names import AppNames, occupy
from distill_ray.serving.routing.bundles import bundles_of
from distill_ray.serving.students import Students
from distill_ray.serving.watching.overseer import Overseer
from distill_ray.serving.watching.second_look import Look

STUDENTS_S, OVERSEE_S, SAVE_S, COUNT_S = 1.0, 1.0, 5.0, 60.0
GONE_S = 10.0  # a router that has not reported for so long is gone; what it counted still counts
NUM_RECENT = 50
NUM_EVENTS = 20
_LOG = logging.getLogger("distill_ray.serving")


class Keeper:
    """Replica; see the module docstring.

    Args:
        config: the whole YAML.
        folder: the service's.
        names: of the applications.

    Raises:
        ServingError: the keeper of another service is at work in that folder.
    """

    def __init__(self, config: RunConfig, folder: str, names: AppNames) -> None:
        # Here: nothing else of a service is there exactly once, however it was started.
        self._occupied = occupy(folder)
        self._run, self._folder, self._names = config, RunFolder(folder), names
        self._bundles = bundles_of(config, folder)
        self._usage = Usage(self._saved_usage())
        self._families: dict[str, tuple[Family, ...]] = {}
        self._seen: dict[str, float] = {}
        self._recent: deque[dict[str, Any]] = deque(maxlen=NUM_RECENT)
        self._history: deque[dict[str, Any]] = deque(maxlen=720)  # a point every five seconds: an hour
        self._writer = Writer(self._open_store, config.serve.collect.compact_s)
        self._writing = asyncio.Lock()
        self._store_failed: tuple[float, str] | None = None  # when last, and how
        self._metrics = Metrics()  # of its own: what came to the store
        self._num_pairs: int | None = None
        self._num_deleted: int | None = None
        self._events = Events(Path(folder) / "events.jsonl")
        self._overseer = Overseer(config.serve.drift, folder, self._bundles, self._settle, self._events, self._metrics)
        self._students = Students(config, folder, names, self._bundles, self._events)
        loops = [(self._look_after_students, STUDENTS_S), (self._oversee, OVERSEE_S), (self._save, SAVE_S)]
        if config.serve.collect.enabled:
            loops.append((self._count, COUNT_S))
        self._loops = [asyncio.get_running_loop().create_task(self._repeat(*loop)) for loop in loops]

    async def _repeat(self, what: Callable[[], Awaitable[None]], seconds: float) -> None:
        while True:
            try:
                await what()
            except Exception as error:  # the next round may go better
                _LOG.warning("%s: %s: %s", what.__name__, type(error).__name__, error)
            await asyncio.sleep(seconds)

    # -- pairs -----------------------------------------------------------------------------------------------------

    async def add(self, pairs: list[Pair]) -> int:
        """Put pairs into the store; returns how many are new. Raises StoreError: they stay in the router's spool."""
        asked_at = time.monotonic()
        async with self._writing:  # who waits takes no thread from the others
            if self._store_failed is not None and self._store_failed[0] > asked_at:
                raise StoreError(self._store_failed[1])  # its patience, of half a minute, is not for each router anew
            try:
                num_new = await asyncio.to_thread(self._writer.write, pairs)
            except StoreError as error:
                self._store_failed = (time.monotonic(), str(error))
                raise
        self._metrics.stored.labels("new").inc(num_new)
        self._metrics.stored.labels("already_there").inc(len(pairs) - num_new)
        self._num_pairs = (self._num_pairs or 0) + num_new
        return num_new

    async def _count(self) -> None:
        """What others do to the store (delete) shows up here."""
        self._num_pairs, self._num_deleted = await asyncio.to_thread(self._look_at_store)

    def _look_at_store(self) -> tuple[int, int]:
        store = self._open_store()
        return store.count(), sum(deletion.num for deletion in store.deletions())

    def _open_store(self) -> PairStore:
        return make_store(self._run.serve.collect.store, self._folder.root)

    # -- figures -----------------------------------------------------------------------------------------------------

    async def exchange(
        self,
        router: str,
        used: dict[Entry, int],
        families: tuple[Family, ...],
        recent: list[dict[str, Any]],
        looks: list[Look],
    ) -> dict[Entry, int]:
        """A router's report; returns what all have used."""
        self._families[router], self._seen[router] = families, time.monotonic()
        self._recent.extend(recent)
        self._overseer.hear(router, looks)
        return self._usage.exchange(used)

    async def exposition(self) -> bytes:
        """For Prometheus."""
        return exposition(self._all())

    async def status(self) -> dict[str, Any]:
        """What the status page shows of the whole service. Nothing is asked of store or bundles: they may be away."""
        return {
            "figures": figures(self._all()),
            "recent": sorted(self._recent, key=lambda request: request["time"], reverse=True),
            "history": list(self._history),
            "events": await asyncio.to_thread(self._events.last, NUM_EVENTS),
            "drift": self._drift(),
            "stored_pairs": self._num_pairs,
            "deleted_pairs": self._num_deleted,
            "num_routers": sum(time.monotonic() - seen < GONE_S for seen in self._seen.values()),
        }

    def _drift(self) -> dict[str, Any] | None:
        found = self._overseer.status()
        spent = sum(used for entry, used in self._usage.exchange({}).items() if entry[0] == "drift")
        return None if found is None else {**found, "tokens_today": spent}

    def _all(self) -> tuple[Family, ...]:
        """Of a router that is gone its counts stay, its gauges go."""
        now = time.monotonic()
        of_routers = (
            families
            if now - self._seen[router] < GONE_S
            else tuple(family for family in families if family[2] != "gauge")
            for router, families in self._families.items()
        )
        return add_up([self._metrics.families(), *of_routers])

    async def _save(self) -> None:
        found = figures(self._all())
        point = {"time": time.time(), "pairs": self._num_pairs, **found["requests"]}
        self._history.append(point)
        totals = [[*entry, used] for entry, used in self._usage.exchange({}).items()]
        await asyncio.to_thread(self._folder.write_json, {"used": totals}, "usage.json")

    def _saved_usage(self) -> list[tuple[Entry, int]]:
        try:
            used = self._folder.read_json("usage.json")["used"]
            return [((what, owner, start), number) for what, owner, start, number in used]
        except FileNotFoundError:
            return []
        except (DistillError, ValueError, KeyError, TypeError) as error:
            _LOG.error("usage.json cannot be read; the day's tokens are counted anew: %s", error)
            return []

    # -- students, and what is found of them -------------------------------------------------------------------------

    async def _look_after_students(self) -> None:
        await self._students.round()

    async def _oversee(self) -> None:
        await asyncio.to_thread(self._overseer.round)

    def _settle(self) -> None:
        """Called in the overseer's thread."""
        settle(self._bundles, self._open_store())
