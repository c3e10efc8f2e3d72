"""Which students are up: the current bundle's, the one before it, and a candidate's. In the keeper.

    what is current, the candidate -> applications of Ray Serve -> students.json

`students.json` tells other processes: {"time", "students": {VERSION: {"state": "loading" | "up" | "failed", "why"}}}:
why it failed, or what it waits for. `time` (seconds since the epoch) is of the last look, so an old one means that
nobody looks. A student is up when it has answered a short question: whatever a model does at its first one is done
then. A promoted student that was up as the candidate takes over at once.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from ray import serve
from ray.serve.api import RunTarget

from distill_ray.config import RunConfig
from distill_ray.errors import ApiError, DistillError, first_line
from distill_ray.pipeline.folder import RunFolder
from distill_ray.serving.backends import SHUT, Backend
from distill_ray.serving.bodies import with_defaults
from distill_ray.serving.chunks import whole
from distill_ray.serving.events import Events
from distill_ray.serving.models.answerers import student_of
from distill_ray.serving.models.applications import student_application, why_failed, why_waiting
from distill_ray.serving.names import AppNames
from distill_ray.serving.routing.bundles import Bundles

GRACE_S = 600.0  # a student stays up so long after another has followed it
TRIAL_GRACE_S = 30.0  # one that never served
RETRY_S = 30.0
WARM_S = 300.0  # for the first answer
HEARTBEAT_S = 2.0
_WARM = "Hello"
_LOG = logging.getLogger("distill_ray.serving")


@dataclass(frozen=True, slots=True)
class State:
    """Of one student."""

    state: Literal["loading", "up", "failed"]
    why: str | None = None


class Students:
    """See the module docstring.

    Args:
        config: the whole YAML.
        folder: the service's.
        names: of the applications.
        bundles: of the service.
        events: for people.
    """

    def __init__(self, config: RunConfig, folder: str, names: AppNames, bundles: Bundles, events: Events) -> None:
        self._run, self._folder, self._names = config, RunFolder(folder), names
        self._bundles, self._events = bundles, events
        self._states: dict[str, State] = {}
        self._backends: dict[str, Backend] = {}
        self._warming: dict[str, asyncio.Task[None]] = {}
        self._retry_at: dict[str, float] = {}
        self._unwanted_since: dict[str, float] = {}
        self._served: set[str] = set()
        self._elsewhere: set[str] = set()  # versions whose student is a server that is not ours
        self._told: set[str] = set()
        self._written: tuple[dict[str, State], float] = ({}, 0.0)

    async def round(self) -> None:
        """Start what is wanted, look whether it is up, end what has not been wanted for a while. Every second or so."""
        now = await asyncio.to_thread(self._bundles.state)
        versions, candidate = now.versions, now.candidate.version if now.candidate is not None else None
        self._served.update(versions)
        wanted = list(dict.fromkeys([*versions[-1:], *([candidate] if candidate else [])]))
        apps = (await asyncio.to_thread(serve.status)).applications
        before = [v for v in versions[-2:-1] if v not in wanted and self._names.student(v) in apps]
        kept = [*wanted, *before]
        states = {version: await self._look(version, apps, start=version in wanted) for version in kept}
        for version in (self._warming.keys() | self._retry_at.keys()) - set(kept):
            await self._cool(version)
            self._retry_at.pop(version, None)
        self._told &= set(kept)
        self._tell(states, candidate)
        await asyncio.to_thread(self._write, states)
        await self._end(apps, kept)

    # -- one student ---------------------------------------------------------------------------------------------------

    async def _look(self, version: str, apps: dict[str, Any], *, start: bool) -> State:
        before = self._states.get(version, State("loading"))
        app = apps.get(self._names.student(version))
        loading = State("loading", why_waiting(app) if app is not None else None)
        unless_failed = before if before.state == "failed" else loading  # until it is up
        if version in self._elsewhere or (app is not None and app.status == "RUNNING"):
            return await self._warmed(version, unless_failed)
        await self._cool(version)
        if app is not None and app.status != "DEPLOY_FAILED":
            return unless_failed
        if app is not None and before.state != "failed":
            return self._failed(version, why_failed(app) or app.message)
        if not start or time.monotonic() < self._retry_at.get(version, 0.0):
            return unless_failed
        why = await asyncio.to_thread(self._start, version)
        return unless_failed if why is None else self._failed(version, why)

    def _failed(self, version: str, why: str) -> State:
        self._retry_at[version] = time.monotonic() + RETRY_S
        return State("failed", why)

    def _start(self, version: str) -> str | None:
        """Bring one up; returns why that cannot be, and does not wait for it."""
        try:
            application = student_application(self._run, self._bundles, version, self._names, self._folder)
            if application is None:
                self._elsewhere.add(version)
                return None
            target = RunTarget(application, name=self._names.student(version), route_prefix=None)
            serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)
        except (DistillError, RuntimeError) as error:
            return first_line(error)
        return None

    async def _warmed(self, version: str, unless_failed: State) -> State:
        """It runs: whether it has answered."""
        task = self._warming.get(version)
        if task is None and time.monotonic() >= self._retry_at.get(version, 0.0):
            task = self._warming[version] = asyncio.create_task(self._warm(version))
        if task is None or not task.done():
            return unless_failed
        problem = task.exception()
        if problem is None:
            return State("up")
        await self._cool(version)
        return self._failed(version, f"it does not answer ({str(problem) or type(problem).__name__})")

    async def _warm(self, version: str) -> None:
        """Raises ApiError, TimeoutError: it does not answer."""
        manifest = await asyncio.to_thread(self._bundles.manifest, version)
        spec = manifest.student
        body = with_defaults({"messages": spec.form.messages([{"role": "user", "content": _WARM}])}, spec.sampling)
        if version not in self._backends:
            self._backends[version] = student_of(self._run, manifest, self._names)
        try:
            await whole(self._backends[version].answer("chat", body | {"max_tokens": 1}), WARM_S)
        except ApiError as error:
            if error.status >= 500 or error.status in SHUT:
                raise
            # What it refuses, it has read.

    async def _cool(self, version: str) -> None:
        """It is not there: what is up next has to be asked again."""
        task, backend = self._warming.pop(version, None), self._backends.pop(version, None)
        if task is not None:
            task.cancel()
        if backend is not None:
            await backend.close()

    # -- all of them -------------------------------------------------------------------------------------------------

    def _tell(self, states: dict[str, State], candidate: str | None) -> None:
        """Events: once for each time that something is so."""
        for version, state in states.items():
            if state.state == "failed" and version not in self._told:
                self._told.add(version)
                self._events.add("student_failed", version, f"the student of {version} does not start: {state.why}")
            elif state.state == "up":
                if version == candidate and self._states.get(version) != state:
                    self._events.add("candidate_up", version, f"the student of the candidate {version} is up")
                self._told.discard(version)

    def _write(self, states: dict[str, State]) -> None:
        self._states = states
        written, at = self._written
        if states == written and time.monotonic() - at < HEARTBEAT_S:
            return
        students = {v: {"state": s.state, **({"why": s.why} if s.why else {})} for v, s in states.items()}
        self._folder.write_json({"time": time.time(), "students": students}, "students.json")
        self._written = (states, time.monotonic())

    async def _end(self, apps: Iterable[str], kept: list[str]) -> None:
        now, prefix = time.monotonic(), self._names.student("")
        for name in [name for name in apps if name.startswith(prefix)]:
            version = name.removeprefix(prefix)
            if version in kept:  # the one before stays: going back is one move
                self._unwanted_since.pop(name, None)
                continue
            grace_s = GRACE_S if version in self._served else TRIAL_GRACE_S
            if now - self._unwanted_since.setdefault(name, now) > grace_s:
                await asyncio.to_thread(serve.delete, name, _blocking=False)
                self._unwanted_since.pop(name, None)
