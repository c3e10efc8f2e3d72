"""What the looks of all routers lead to, in the keeper. Files only, no Ray.

    looks -> drift.json                 what is known of each bundle in service, or on the way back from it
          -> floors.json                thresholds that drift has raised, by version; routers read it
          -> Bundles.rollback, settle   where that is not enough
          -> shadow-VERSION.jsonl       what looks at a candidate found: {time, good, tokens} a line

Each of it is an event and a metric. The keeper may be killed at any point: an action that was not taken to its end is
due again, and `floors.json` and the pointer say what was done. What is known of a bundle goes when it is no longer on
the way to the current one, so whoever promotes it again begins anew.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from distill_ray.config.serve import DriftConfig
from distill_ray.errors import BundleError, RunFolderError, StoreError
from distill_ray.pipeline.folder import RunFolder
from distill_ray.serving.events import Events
from distill_ray.serving.metrics import Metrics
from distill_ray.serving.routing.bundles import NOTHING, Bundles
from distill_ray.serving.watching.drift import Action, DriftWatch
from distill_ray.serving.watching.second_look import Look
from distill_ray.serving.watching.verdict import budget_of

SAVE_S = 5.0
MOST_WAITING = 10_000  # looks, should the disk not take them
_LOG = logging.getLogger("distill_ray.serving")


def read_floors(folder: str | Path) -> dict[str, float]:
    """Thresholds that drift has raised, by version. Raises RunFolderError: the file is damaged."""
    try:
        saved = RunFolder(folder).read_json("floors.json")
        return {version: float(floor) for version, floor in saved.items()}
    except FileNotFoundError:
        return {}
    except (TypeError, ValueError) as error:
        raise RunFolderError(f"{folder}/floors.json: damaged ({error}); delete it") from error


class Overseer:
    """See the module docstring. `hear` may be called while `round` is at work in a thread.

    Args:
        config: `serve.drift`; None: only candidates are looked at.
        folder: the service's.
        bundles: its bundles.
        settle: sets right which pairs count as learnt, once the pointer has moved.
        events: for people.
        metrics: the keeper's.
    """

    def __init__(
        self,
        config: DriftConfig | None,
        folder: str | Path,
        bundles: Bundles,
        settle: Callable[[], object],
        events: Events,
        metrics: Metrics,
    ) -> None:
        self._config, self._folder, self._bundles = config, RunFolder(folder), bundles
        self._settle, self._events, self._metrics = settle, events, metrics
        self._at_work = threading.Lock()
        self._heard: deque[Look] = deque(maxlen=MOST_WAITING)
        self._last: dict[str, int] = {}  # number of the last look of each router
        self._watches: dict[str, DriftWatch | None] = {}  # None: it was never measured
        self._saved = self._read_saved()
        self._has_news, self._saved_at = False, 0.0
        # What was current when this was last written about: a keeper that was away tells of it when it is back.
        self._current: str | None = next((e["current"] for e in events.last(1000) if "current" in e), None)

    def hear(self, router: str, looks: Iterable[Look]) -> None:
        """What a router found. Looks that it reports again, as it was not told of their arrival, count once."""
        for look in looks:
            if look.number > self._last.get(router, 0):
                self._last[router] = look.number
                self._heard.append(look)

    def round(self) -> None:
        """Take in what was heard, and act. Called every second or so, in a thread; one at a time goes through it."""
        with self._at_work:
            self._round()

    def _round(self) -> None:
        versions = self._bundles.versions()
        self._tell_moves(versions)
        self._forget_all_but(versions)
        heard = [self._heard.popleft() for _ in range(len(self._heard))]
        self._write_shadow([look for look in heard if look.kind == "shadow"])
        for look in heard:
            if look.kind == "drift" and versions[-1:] == [look.version]:
                versions = self._take_in(look, versions)
        if versions:  # one that a round before could not end
            versions = self._act(versions)
        self._show(versions)
        self._save(versions)

    def status(self) -> dict[str, Any] | None:
        """Of the current bundle, for the status page; None: nobody looks."""
        watch = self._watches.get(self._current or "")
        if watch is None or self._config is None:
            return None
        return {
            "looks": watch.num_looks,
            "agreement": watch.agreement,
            "agreement_bound": watch.agreement_bound,
            "budget": watch.budget,
            "confidence": watch.confidence,
            "floor": watch.floor,
            "max_tokens_per_day": self._config.max_tokens_per_day,
        }

    # -- drift -------------------------------------------------------------------------------------------------------

    def _take_in(self, look: Look, versions: list[str]) -> list[str]:
        watch = self._watch(look.version)
        if watch is None or look.score is None:
            return versions
        watch.add(look.score, good=look.good)
        self._has_news = True
        return self._act(versions)

    def _watch(self, version: str) -> DriftWatch | None:
        if version not in self._watches and self._config is not None:
            try:
                budget = budget_of(self._bundles.manifest(version).summary)
            except BundleError:  # the routers say it, and keep it out
                return None
            self._watches[version] = None if budget is None else self._restored(version, budget, self._config)
        return self._watches.get(version)

    def _restored(self, version: str, budget: float, config: DriftConfig) -> DriftWatch:
        watch = DriftWatch(budget, config.confidence, read_floors(self._folder.root).get(version))
        try:
            if version in self._saved:
                watch.restore(self._saved[version])
        except (KeyError, TypeError, ValueError) as error:
            _LOG.error("drift.json: what is known of %s cannot be read, so it begins anew: %s", version, error)
            return DriftWatch(budget, config.confidence, watch.floor)
        return watch

    def _act(self, versions: list[str]) -> list[str]:
        """Do what is due about the current bundle. Returns the versions afterwards.

        Raises:
            RunFolderError, BundleError: it cannot be done now; it stays due.
        """
        version = versions[-1]
        watch = self._watch(version)
        action = watch.due() if watch is not None else None
        if watch is None or action is None:
            return versions
        if action.threshold is not None:
            self._raise(version, watch, action, action.threshold)
        else:
            self._go_back(version, watch, action)
        self._metrics.drift_actions.labels(action.what).inc()
        self._saved_at = 0.0
        return self._bundles.versions()

    def _raise(self, version: str, watch: DriftWatch, action: Action, threshold: float) -> None:
        before = watch.floor or self._bundles.manifest(version).threshold
        self._folder.write_json({**read_floors(self._folder.root), version: threshold}, "floors.json")
        watch.raised(threshold)
        text = f"{_found(action, watch)}: the threshold of {version} rises from {before:.3f} to {threshold:.3f}"
        self._events.add("threshold_raised", version, text, **_figures(action, watch), threshold=threshold)

    def _go_back(self, version: str, watch: DriftWatch, action: Action) -> None:
        now = self._move_back(version)
        self._current = now
        to = now or "the teacher, which answers everything"
        text = f"{_found(action, watch)}: from {version} back to {to}"
        self._events.add("rolled_back", version, text, current=now, by="drift", **_figures(action, watch))
        try:
            self._settle()
        except (StoreError, BundleError) as error:  # `flywheel run` sets it right
            _LOG.warning("which pairs count as learnt is set right later: %s", error)

    def _move_back(self, version: str) -> str | None:
        """Raises BundleError: it is not current any more."""
        if len(self._bundles.versions()) > 1:
            try:
                return self._bundles.rollback(only_from=version)
            except BundleError as error:  # the one before is damaged, and this one is bad
                _LOG.error("the teacher answers everything, as %s", error)
        return self._bundles.rollback(NOTHING, only_from=version)

    # -- what is written -----------------------------------------------------------------------------------------------

    def _tell_moves(self, versions: list[str]) -> None:
        """An event for a move that somebody else made."""
        current = versions[-1] if versions else None
        if current == self._current:
            return
        before, self._current = self._current, current
        last = self._bundles.last_in_history()
        if last is not None and last.action == "rollback":
            to = current or "the teacher, which answers everything"
            self._events.add("rolled_back", before, f"from {before} back to {to}, by hand", current=current, by="hand")
        else:
            after = f", after {before}" if before else ""
            self._events.add("promoted", current, f"{current} is current{after}", current=current, before=before)

    def _forget_all_but(self, versions: list[str]) -> None:
        gone = (self._watches.keys() | self._saved.keys()) - set(versions)
        for version in gone:
            self._watches.pop(version, None)
            self._saved.pop(version, None)
            self._has_news = True
        floors = read_floors(self._folder.root)
        if floors.keys() - set(versions):
            kept = {version: floor for version, floor in floors.items() if version in versions}
            self._folder.write_json(kept, "floors.json")

    def _write_shadow(self, looks: list[Look]) -> None:
        for version in dict.fromkeys(look.version for look in looks):
            lines = [
                json.dumps({"time": look.time, "good": look.good, "tokens": look.tokens}) + "\n"
                for look in looks
                if look.version == version
            ]
            try:
                with open(self._folder.path(f"shadow-{version}.jsonl"), "a", encoding="utf-8") as file:
                    file.write("".join(lines))
            except OSError as error:
                _LOG.error("%d looks at the candidate %s are lost: %s", len(lines), version, error.strerror)

    def _show(self, versions: list[str]) -> None:
        watch = self._watch(versions[-1]) if versions else None
        if watch is None or watch.agreement is None:
            for gauge in (self._metrics.agreement, self._metrics.agreement_bound):
                gauge.clear()
        elif self._has_news:
            for gauge, value in (
                (self._metrics.agreement, watch.agreement),
                (self._metrics.agreement_bound, watch.agreement_bound),
            ):
                gauge.clear()
                gauge.labels(versions[-1]).set(value)

    def _read_saved(self) -> dict[str, Any]:
        try:
            return self._folder.read_json("drift.json")
        except FileNotFoundError:
            return {}
        except RunFolderError as error:
            _LOG.error("what was known of drift is counted anew: %s", error)
            return {}

    def _save(self, versions: list[str]) -> None:
        if not self._has_news or time.monotonic() - self._saved_at < SAVE_S:
            return
        known = {**self._saved, **{version: watch.to_json() for version, watch in self._watches.items() if watch}}
        self._folder.write_json({v: content for v, content in known.items() if v in versions}, "drift.json")
        self._has_news, self._saved_at = False, time.monotonic()


def _found(action: Action, watch: DriftWatch) -> str:
    """In words."""
    return (
        f"{action.bad} of {action.looks} answers looked at again were worse than the teacher's, at least "
        f"{action.bound:.1%} with {watch.confidence:.0%} confidence where {watch.budget:.1%} may be"
    )


def _figures(action: Action, watch: DriftWatch) -> dict[str, Any]:
    return {"looks": action.looks, "bad": action.bad, "bound": action.bound, "budget": watch.budget}
