"""A router process: the HTTP face, the dispatcher, and what goes on beside them.

    watch    what is current -> load its bundle, wait for its student, swap both at once; what is tried beside it
    report   what this router counted, and found at second looks -> keeper -> what all routers counted
    drain    spool -> keeper -> store

None of it is on a request's way: with the keeper gone, requests are answered as before.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import time
import uuid
from collections import Counter, deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

from ray import serve
from ray.serve.handle import DeploymentHandle

from distill_ray.config import ContextRecipeConfig, RunConfig
from distill_ray.errors import BundleError, RunFolderError, ServingError, SpoolError, SpoolFull
from distill_ray.models import short_name
from distill_ray.recipes.context import ContextRecipe
from distill_ray.records import Message
from distill_ray.serving.backends import Backend
from distill_ray.serving.collecting.answer import Answer
from distill_ray.serving.collecting.pairs import Pair, make_pair, why_not_kept
from distill_ray.serving.collecting.spool import Spool
from distill_ray.serving.collecting.writer import Drain
from distill_ray.serving.dispatch import Dispatcher
from distill_ray.serving.front.ingress import build
from distill_ray.serving.front.keys import load_keys
from distill_ray.serving.front.limits import Entry, Limits
from distill_ray.serving.metrics import Metrics, exposition, figures
from distill_ray.serving.models.answerers import judge_of, sampling_of, student_of, teacher_of
from distill_ray.serving.names import AppNames
from distill_ray.serving.request import Asked, Live
from distill_ray.serving.routing.bundle import Bundle
from distill_ray.serving.routing.bundles import bundles_of
from distill_ray.serving.routing.embedder import BatchedEmbedder, load_embedder
from distill_ray.serving.routing.moves import Candidate, State
from distill_ray.serving.watching.overseer import read_floors
from distill_ray.serving.watching.second_look import Look, SecondLooks, Trial

WATCH_S, REPORT_S = 1.0, 1.0
REFUSED_S = 10.0  # until a bundle that is not whole is read again: from a bucket that is a copy each time
KEEPER_TIMEOUT_S = 30.0
NUM_RECENT = 50
NUM_LOOKS = 1000  # that wait for the keeper
_LOG = logging.getLogger("distill_ray.serving")


@serve.ingress()
class Router:
    """Replica; see the module docstring.

    Args:
        config: the whole YAML.
        folder: the service's.
        names: of the applications.
        keeper: the service's keeper.
    """

    def __init__(self, config: RunConfig, folder: str, names: AppNames, keeper: DeploymentHandle) -> None:
        self.config = config.serve
        self._run, self._folder, self._names, self._keeper = config, Path(folder), names, keeper
        self._id = uuid.uuid4().hex
        self.metrics = Metrics()
        self.limits = Limits(config.serve.limits)
        self.keys = load_keys(config.serve.keys, str(self._folder / "keys.jsonl"), config.serve.host)
        self._spool = self._open_spool()
        self._bundles = bundles_of(config, folder)
        self._embedder, self._embedder_identity = self._load_embedder(config)
        self._read_bundles: dict[str, Bundle] = {}
        self._floors: dict[str, float] = {}
        self._refused: dict[str, float] = {}  # version -> when it is read again, on the monotonic clock
        self._recent: deque[dict[str, Any]] = deque(maxlen=NUM_RECENT)
        self._unreported: Counter[Entry] = Counter()
        self._found: deque[Look] = deque(maxlen=NUM_LOOKS)
        teacher = teacher_of(config, names)
        self._looks = SecondLooks(
            config.serve,
            teacher,
            judge_of(config, teacher),
            keep=self._keep,
            report=self._found.append,
            limits=self.limits,
            metrics=self.metrics,
        )
        self.dispatcher = Dispatcher(
            config.serve,
            teacher,
            self._without_bundle(),
            keep=self._keep,
            done=self._looks.answered,
            note=self._recent.append,
            limits=self.limits,
            metrics=self.metrics,
        )
        self._loops: list[asyncio.Task[None]] = []

    async def __serve_build_asgi_app__(self) -> Any:
        """Called by Serve when the replica's event loop is there."""
        await self._attempt(self._watch)  # the first request meets the current bundle
        every = [(self.dispatcher.look, WATCH_S), (self._watch, WATCH_S), (self._report, REPORT_S)]
        self._loops = [asyncio.create_task(self._repeat(what, seconds)) for what, seconds in every]
        if self._spool is not None:
            collect = self.config.collect
            Drain(self._spool, self._deliver, collect.batch, collect.flush_s, self._not_delivered).start()
        return build(self)

    async def _repeat(self, what: Callable[[], Awaitable[None]], seconds: float) -> None:
        while True:
            await asyncio.sleep(seconds)
            await self._attempt(what)

    async def _attempt(self, what: Callable[[], Awaitable[None]]) -> None:
        try:
            await what()
        except Exception as error:  # the next round may go better; the service goes on meanwhile
            _LOG.warning("%s: %s: %s", what.__name__, type(error).__name__, error)
            self.metrics.errors.labels(what.__name__.strip("_")).inc()

    # -- watch: which bundle ---------------------------------------------------------------------------------------

    def _load_embedder(self, config: RunConfig) -> tuple[BatchedEmbedder | None, str | None]:
        """Without one the teacher answers everything."""
        section = config.serve.embedder
        try:
            embedder = load_embedder(section)
        except ServingError as error:
            _LOG.error("the embedder does not load, so the teacher answers everything: %s", error)
            self.metrics.errors.labels("embedder").inc()
            return None, None
        return BatchedEmbedder(embedder, batch_size=section.batch_size), embedder.identity

    def _without_bundle(self) -> Live:
        recipe = self._run.recipe
        context: tuple[Message, ...] = ()
        parse = None
        if isinstance(recipe, ContextRecipeConfig) and recipe.context.column is None:
            context, parse = tuple(ContextRecipe(recipe).context_messages), recipe.parse
        return Live(
            embedder=self._embedder,
            ignore=tuple(self.config.fingerprint.ignore),
            context=context,
            parse=parse,
            teacher_sampling=sampling_of(self._run) or self._run.teacher.sampling,
        )

    async def _watch(self) -> None:
        now = await asyncio.to_thread(self._bundles.state)
        await self._follow(now)
        tried = now.candidate if now.candidate is not None and now.candidate.share > 0 else None
        self._try_out(await self._trial(tried) if tried is not None and tried.version != now.current else None)
        needed = {now.current, tried.version if tried is not None else None}
        self._read_bundles = {version: self._read_bundles[version] for version in self._read_bundles.keys() & needed}

    async def _follow(self, now: State) -> None:
        """Serve with the current bundle as soon as that can be."""
        wanted, live = now.current, self.dispatcher.live
        self._floors = await asyncio.to_thread(self._read_floors)
        if live.floor != self._floors.get(live.version, 0.0):
            self.dispatcher.set_floor(self._floors.get(live.version, 0.0))
        if (wanted or "") == live.version and (wanted is None or live.student is not None):
            return
        if wanted is None:
            self._swap(self._without_bundle())
            return
        bundle = await self._read(wanted)
        if bundle is None:
            return
        student, floor = student_of(self._run, bundle.manifest, self._names), self._floors.get(wanted, 0.0)
        follows = live.version in now.versions[:-1]
        if await student.is_up():
            self._swap(self._with(bundle, student, floor))
            return
        await student.close()
        if not follows and live.version != wanted:  # gone back from: it leaves now, and the teacher answers meanwhile
            self._swap(self._with(bundle, None, floor))

    def _read_floors(self) -> dict[str, float]:
        try:
            return read_floors(self._folder)
        except RunFolderError as error:
            _LOG.error("the thresholds stay what they are: %s", error)
            self.metrics.errors.labels("drift").inc()
            return self._floors

    async def _read(self, version: str) -> Bundle | None:
        """A bundle, read once however long its student takes; None: it is not whole, and stays out of service."""
        if version in self._read_bundles:
            return self._read_bundles[version]
        if time.monotonic() < self._refused.get(version, 0.0):
            return None
        try:
            bundle = await asyncio.to_thread(self._bundles.load, version, self._embedder_identity, with_student=False)
        except BundleError as error:
            if version not in self._refused:  # said once
                _LOG.error("bundle %s stays out of service: %s", version, error)
            self._refused[version] = time.monotonic() + REFUSED_S
            self.metrics.errors.labels("bundle").inc()
            return None
        self._read_bundles[version] = bundle
        return bundle

    def _with(self, bundle: Bundle, student: Backend | None, floor: float = 0.0) -> Live:
        manifest = bundle.manifest
        return Live(
            bundle=bundle,
            student=student,
            embedder=self._embedder,
            ignore=tuple(manifest.ignore),
            context=cast("tuple[Message, ...]", tuple(manifest.context)),
            parse=manifest.parse,
            teacher_sampling=sampling_of(self._run) or manifest.teacher_sampling,
            floor=floor,
        )

    async def _trial(self, candidate: Candidate) -> Trial | None:
        """A candidate that can be tried; None: its bundle is not whole, or its student not up."""
        bundle, trial = await self._read(candidate.version), self._looks.trial
        if bundle is None:
            return None
        if trial is not None and trial.live.bundle is bundle:
            return dataclasses.replace(trial, share=candidate.share, max_tokens=candidate.max_tokens)
        student = student_of(self._run, bundle.manifest, self._names)
        if not await student.is_up():
            await student.close()
            return None
        return Trial(self._with(bundle, student), candidate.share, candidate.max_tokens)

    def _try_out(self, trial: Trial | None) -> None:
        if (trial and trial.live.version) != (self._looks.trial and self._looks.trial.live.version):
            _LOG.info("trying out %s", trial.live.version if trial is not None else "nothing")
        self._looks.trial = trial

    def _swap(self, live: Live) -> None:
        self.dispatcher.swap(live)
        self.metrics.bundle.clear()
        self.metrics.bundle.labels(live.version or "none").set(1)
        _LOG.info("serving bundle %s, student %s", live.version or "none", "up" if live.student else "not up")

    # -- keep and ship: what is collected ------------------------------------------------------------------------------

    def _open_spool(self) -> Spool | None:
        collect = self.config.collect
        if not collect.enabled:
            return None
        try:
            return Spool(self._folder / "spool", int(collect.spool_mb * 2**20))
        except SpoolError as error:
            _LOG.error("nothing is collected: %s", error)
            self.metrics.errors.labels("spool").inc()
            return None

    async def _keep(self, asked: Asked, answer: Answer) -> None:
        outcome = "off" if self._spool is None else await asyncio.to_thread(self._keep_now, self._spool, asked, answer)
        self.metrics.pairs.labels(outcome).inc()

    def _keep_now(self, spool: Spool, asked: Asked, answer: Answer) -> str:
        """In a thread: the operator's patterns and the disk may both be slow."""
        call = asked.call
        refused = why_not_kept(
            call.body,
            answer,
            route="teacher",
            collect_header=call.collect_header,
            refusals=self.config.collect.refusals,
        )
        if refused is not None:
            return refused
        pair = make_pair(
            call.body,
            answer,
            messages=asked.messages,
            teacher=self.dispatcher.teacher.name,
            owner=call.owner,
            fingerprint=asked.key.fingerprint,
            bundle=asked.live.version or None,
            idempotency_key=call.idempotency_key,
            embedder=self._embedder_identity if asked.vector is not None else None,
            embedding=asked.vector,
        )
        try:
            spool.append(pair)
        except SpoolFull:
            return "spool_full"
        except SpoolError as error:
            _LOG.error("%s", error)
            return "spool_failed"
        return "kept"

    def _deliver(self, pairs: list[Pair]) -> None:
        """Called in the drain's thread."""
        self._keeper.add.remote(pairs).result(timeout_s=KEEPER_TIMEOUT_S)

    def _not_delivered(self, error: Exception) -> None:
        """Called in the drain's thread."""
        self.metrics.errors.labels("store").inc()
        last = (str(error).strip().splitlines() or [""])[-1]  # of another process, its traceback comes before it
        _LOG.warning("pairs wait in the spool: %s: %s", type(error).__name__, last[:300])

    # -- report -----------------------------------------------------------------------------------------------------

    async def _report(self) -> None:
        if self._spool is not None:
            self.metrics.spool_bytes.set(self._spool.num_bytes)
        self._unreported.update(self.limits.report())
        recent = [self._recent.popleft() for _ in range(len(self._recent))]
        looks = [self._found.popleft() for _ in range(len(self._found))]
        sent = dict(self._unreported)
        try:
            totals = await asyncio.wait_for(
                self._keeper.exchange.remote(self._id, sent, self.metrics.families(), recent, looks), KEEPER_TIMEOUT_S
            )
        except Exception:
            self._recent.extendleft(reversed(recent))
            self._found.extendleft(reversed(looks))
            raise
        self._unreported.clear()
        self.limits.learn(totals)

    async def status(self) -> dict[str, Any]:
        """See `ingress.Service`. Without the keeper: what this router knows."""
        bundle = self.dispatcher.live.bundle
        own: dict[str, Any] = {
            "name": self._run.name,
            "bundle": bundle.version if bundle is not None else None,
            "student_up": self.dispatcher.live.student is not None,
            "threshold": self.dispatcher.live.threshold,
            "summary": bundle.manifest.summary if bundle is not None else None,
            "made": {"when": bundle.manifest.created, "of": bundle.manifest.name} if bundle is not None else None,
            "teacher": short_name(self.dispatcher.teacher.name),
            "keeper": True,
            "looks_again": self.config.drift is not None,
            "shows_requests": self.config.show_requests,
        }
        if bundle is not None:
            with suppress(OSError, ValueError):
                own["curve"] = json.loads((bundle.folder / "curve.json").read_text(encoding="utf-8"))
        try:
            return own | await asyncio.wait_for(self._keeper.status.remote(), 5.0)
        except Exception as error:
            _LOG.warning("the keeper does not answer: %s", type(error).__name__)
            return own | {"keeper": False, "figures": figures(self.metrics.families()), "recent": list(self._recent)}

    async def exposition(self) -> bytes:
        """See `ingress.Service`."""
        try:
            return await asyncio.wait_for(self._keeper.exposition.remote(), 5.0)
        except Exception as error:
            _LOG.warning("the keeper does not answer: %s", type(error).__name__)
            return exposition(self.metrics.families())
