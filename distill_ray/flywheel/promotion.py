"""The steps that touch the service: a trial in the shadow, and the promotion.

    installed -> its student is brought up beside the current one (as the candidate) -> it is up (`students.json`)
        -> one move of the pointer -> what it learnt is marked in the store

Routers go over when both student and index are there; whoever is in the middle of an answer stays where he is. Where no
service runs here only the pointer moves: the next one begins with it.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from distill_ray.config.flywheel import ShadowConfig
from distill_ray.errors import FlywheelError
from distill_ray.flywheel.work import Work
from distill_ray.pipeline.lock import Taken, take
from distill_ray.serving.calibration.anytime import lower_bound, upper_bound
from distill_ray.serving.collecting.marks import settle
from distill_ray.serving.routing.bundles import Candidate

LOOK_S = 1.0
START_S = 1800.0  # a student that is not up by then does not come up


def shadow(work: Work) -> dict[str, Any]:
    """Try the candidate on real requests, where the config says so."""
    config = work.config.flywheel.shadow
    if config is None:
        return {"outcome": "go_on", "skipped": True}
    require_served(work.service)
    version = work.bundles.install(work.cycle.folder / "bundle")
    work.bundles.set_candidate(Candidate(version, config.share, config.max_tokens))
    until = time.monotonic() + config.timeout_s
    budget = work.config.calibrate.error_budget
    alpha = 1.0 - work.config.calibrate.confidence
    while True:
        work.lease.require()
        found = _shadowed(work.service, version, config, budget, alpha)
        if found["outcome"] != "unclear" or found["pairs"] >= config.pairs or time.monotonic() > until:
            break
        problem = student_problem(work.service, version)
        if problem is not None:
            found = {**found, "outcome": "unclear", "why": [problem]}
            break
        time.sleep(LOOK_S)
    if found["outcome"] != "go_on":
        work.bundles.set_candidate(None)
    return found


def _shadowed(service: Path, version: str, config: ShadowConfig, budget: float, alpha: float) -> dict[str, Any]:
    """What the trial has shown so far."""
    looks = _looks(service / f"shadow-{version}.jsonl")[: config.pairs]
    bad = np.array([not look["good"] for look in looks], dtype=np.float64)
    low, high = lower_bound(bad, alpha, config.pairs), upper_bound(bad, alpha, config.pairs)
    figures = {
        "version": version,
        "pairs": len(bad),
        "error": float(bad.mean()) if len(bad) else None,
        "error_low": low,
        "error_high": high,
        "tokens": sum(look.get("tokens", 0) for look in looks),
    }
    if high <= budget:
        return {**figures, "outcome": "go_on"}
    if low > budget:
        why = f"on real requests at least {low:.1%} of its answers are worse, and the budget is {budget:.1%}"
        return {**figures, "outcome": "refused", "why": [why]}
    why = f"{len(bad)} real requests put its error between {low:.1%} and {high:.1%}, and the budget is {budget:.1%}"
    return {**figures, "outcome": "unclear", "why": [why]}


def _looks(path: Path) -> list[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines if line.endswith("}")]


def promote(work: Work) -> dict[str, Any]:
    """Put the bundle in service."""
    version, began_with = work.cycle.needed("bundle")["version"], work.cycle.needed("train")["current"]
    moved = _moved_before(work, version)
    if not moved:
        version = work.bundles.install(work.cycle.folder / "bundle")
        problem = _bring_up(work, version)
        if problem is not None:
            work.bundles.set_candidate(None)
            return {"outcome": "unclear", "version": version, "why": [problem]}
    if not moved and work.bundles.current() not in (began_with, version):
        work.bundles.set_candidate(None)
        now, then = work.bundles.current() or "none", began_with or "none"
        why = f"bundle {now} is in service, and this one was held against {then}; the next cycle begins with {now}"
        return {"outcome": "overtaken", "version": version, "why": [why]}
    work.lease.require()
    if not moved:
        work.bundles.promote(version, work.lease.token)
    work.bundles.set_candidate(None)
    num_marked, _ = settle(work.bundles, work.store)
    pruned = work.bundles.prune(work.config.flywheel.keep_bundles)
    is_current = work.bundles.current() == version
    why = [] if is_current else [f"it was promoted, and somebody went back to {work.bundles.current() or 'none'} since"]
    return {"outcome": "promoted", "version": version, "marked": num_marked, "removed": pruned, "why": why}


def _moved_before(work: Work, version: str) -> bool:
    """Whether a killed run of this very step moved the pointer: what was gone back from since is not promoted again."""
    since = work.bundles.history(after=work.cycle.needed("bundle")["moves"])
    return any(move.action == "promote" and move.version == version for move in since)


def _bring_up(work: Work, version: str) -> str | None:
    """Have the student up before the pointer moves. Returns what is wrong with it; None: nothing."""
    if not is_served(work.service) or work.bundles.current() == version:
        return None
    candidate = work.bundles.candidate()
    if candidate is None or candidate.version != version or candidate.share:
        work.bundles.set_candidate(Candidate(version))
    until, told = time.monotonic() + START_S, None
    while is_served(work.service):
        found = _students(work.service).get(version, {})
        if found.get("state") == "up":
            return None
        if found.get("why", told) != told:
            told = found["why"]
            work.say(f"the candidate's student is {found['state']}: {told}")
        if (problem := _problem(found)) is not None:
            return problem
        if time.monotonic() > until:
            return f"its student is not up after {START_S:.0f} s ({told or f'see {work.service}/logs'})"
        work.lease.require()
        time.sleep(LOOK_S)
    return None


def student_problem(service: Path, version: str) -> str | None:
    """Why the student of a bundle does not come up; None: it may."""
    return _problem(_students(service).get(version, {}))


def _problem(found: dict[str, Any]) -> str | None:
    return f"its student does not start: {found.get('why', '')}" if found.get("state") == "failed" else None


def _students(service: Path) -> dict[str, dict[str, Any]]:
    try:
        return json.loads((service / "students.json").read_text(encoding="utf-8"))["students"]
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError) as error:
        raise FlywheelError(
            f"{service}/students.json: damaged ({error}); delete it: the service writes it anew"
        ) from error


def require_served(service: Path) -> None:
    """Raises FlywheelError: there is no service whose requests a candidate could be tried on."""
    if not is_served(service):
        raise FlywheelError(
            f"{service}: no service runs here, and flywheel.shadow tries candidates on its requests; start it by "
            "`distill-ray serve`, then run the same command again; or leave flywheel.shadow out"
        )


def is_served(service: Path) -> bool:
    """Whether a service is at work in its folder: its keeper holds it locked."""
    try:
        take(str(service / ".lock")).close()
    except Taken:
        return True
    except OSError as error:
        raise FlywheelError(f"{service}: cannot be used ({error.strerror}); check the folder's permissions") from error
    return False
