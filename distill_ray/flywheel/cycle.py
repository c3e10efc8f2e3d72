"""One cycle: a step after the other, each of them a file. Killed anywhere, the same command goes on.

    snapshot -> clean -> split -> train -> gate -> bundle -> shadow -> promote

A step says in its file what it was made from: a hash of the part of the config that decides it, and of the step before.
So what changed is done again, with all that follows, and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill_ray.config import RunConfig
from distill_ray.flywheel import bundling, gathering, promotion
from distill_ray.flywheel.cycles import STEPS, Cycles, Outcome, StepName
from distill_ray.flywheel.forgetting import forget
from distill_ray.flywheel.gate import gate
from distill_ray.flywheel.lease import hold
from distill_ray.flywheel.page import PAGED, write_gate_page
from distill_ray.flywheel.preflight import require_ready
from distill_ray.flywheel.training import train
from distill_ray.flywheel.work import Work
from distill_ray.pipeline.cluster import connected
from distill_ray.pipeline.progress import say
from distill_ray.pipeline.run import noted
from distill_ray.serving.collecting.marks import settle
from distill_ray.serving.collecting.store import existing_store
from distill_ray.serving.routing.bundles import bundles_of

_DO: dict[StepName, Callable[[Work], dict[str, Any]]] = {
    "snapshot": gathering.snapshot,
    "clean": gathering.cleaned,
    "split": gathering.split,
    "train": train,
    "gate": gate,
    "bundle": bundling.bundle,
    "shadow": promotion.shadow,
    "promote": promotion.promote,
}
# Before a cycle begins, and before anything is paid for: files may have gone meanwhile.
_CHECKED: tuple[StepName, ...] = ("snapshot", "train")


@dataclass(frozen=True)
class Ended:
    """How a cycle ended."""

    number: int
    outcome: Outcome
    step: StepName
    """The last one."""

    why: list[str]
    folder: Path
    version: str | None
    """Of the bundle, where it came to one."""


def run_cycle(config: RunConfig, service: str, *, again: bool = False) -> Ended:
    """Go on with the cycle that is not over, or run a new one, to its end.

    Args:
        config: the whole YAML.
        service: the service's folder.
        again: learn also from what refused cycles set aside, and begin with whatever is there.

    Raises:
        InputError: the config, or a file that it names, is wrong. Said before anything is trained, where it can be.
        FlywheelError: another runner is at work.
        DistillError: a step cannot be done now. The service stays as it is, and the same command goes on.
    """
    bundles, cycles = bundles_of(config, service), Cycles(service)
    store = existing_store(config.serve.collect.store, service)
    with hold(store, service, bundles, say) as lease:
        settle(bundles, store)
        forget(service, store)
        for cycle in cycles.all():
            if cycle.outcome not in (None, "too_few"):
                cycle.tidy()  # again, where somebody was killed at it
        cycle = cycles.open()
        work = Work(config, Path(service), cycle, cycles.before(cycle), store, bundles, lease, say, again)
        with noted(cycle.run):
            ended = _run(work)
        forget(service, store)  # what was deleted meanwhile
        return ended


def _run(work: Work) -> Ended:
    cycle, decides, found, made_from = work.cycle, _decides(work.config), None, ""
    for step in STEPS:
        made_from = _hash(made_from, decides[step], found)
        result = cycle.result(step)
        if result is None or result["made_from"] != made_from:
            cycle.drop_from(step)
            work.lease.require()
            if step in _CHECKED:
                require_ready(work.config, work.service)
            result = _done(work, step, made_from)
        if result["outcome"] != "go_on":
            cycle.tidy()
            version = result.get("version")
            return Ended(cycle.number, result["outcome"], step, result.get("why", []), cycle.folder, version)
        found = cycle.content(step)
    raise AssertionError("the last step ends a cycle")


def _done(work: Work, step: StepName, made_from: str) -> dict[str, Any]:
    started = time.monotonic()
    needs_ray = step in ("gate", "bundle") or (step == "train" and work.config.flywheel.trainer.type == "ray")
    if needs_ray:
        with connected():
            result = _DO[step](work)
    else:
        result = _DO[step](work)
    work.lease.require()
    result |= {"made_from": made_from, "seconds": round(time.monotonic() - started, 2)}
    if step in PAGED:
        write_gate_page(work.cycle, step, result)
    work.cycle.write(step, result)
    # Why a cycle is over is said at its end.
    came_to = line_of(step, result) if result["outcome"] == "go_on" or not result.get("why") else result["outcome"]
    work.say(f"cycle {work.cycle.number}: {step}: {came_to}")
    return result


def _decides(config: RunConfig) -> Mapping[StepName, Any]:
    """The part of the config that decides each step, beside those before it."""
    flywheel = config.flywheel
    student = config.student.model_dump(mode="json", exclude={"engine_kwargs"})
    evaluate = config.evaluate.model_dump(mode="json", include={"engine", "max_tokens"})
    return {
        "snapshot": None,  # what is in the store decides it, and that is what it notes
        "clean": [flywheel.clean.model_dump(mode="json"), config.serve.fingerprint.model_dump(mode="json")],
        "split": flywheel.model_dump(mode="json", include={"holdout", "evaluation", "evaluation_column", "replay"}),
        "train": [
            student,
            config.train.deciding,
            config.recipe.model_dump(mode="json"),
            flywheel.model_dump(mode="json", include={"start_from", "lora", "trainer"}),
        ],
        "gate": [
            flywheel.gate.model_dump(mode="json"),
            config.calibrate.model_dump(mode="json"),
            config.serve.embedder.model_dump(mode="json"),
            evaluate,
        ],
        "bundle": [config.serve.guard, config.serve.prices.model_dump(mode="json"), config.name],
        "shadow": flywheel.shadow.model_dump(mode="json") if flywheel.shadow is not None else None,
        "promote": None,
    }


def _hash(*parts: Any) -> str:
    content = json.dumps(parts, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.blake2b(content.encode(), digest_size=8).hexdigest()


def line_of(step: StepName, result: Mapping[str, Any]) -> str:
    """What a step came to, in a line."""
    if result.get("why"):
        return ("" if result["outcome"] == "go_on" else f"{result['outcome']}: ") + "; ".join(result["why"])
    shown = {
        "snapshot": ("pairs", "new_pairs"),
        "clean": ("kept", "dropped"),
        "split": ("train", "validation", "replay", "held_out", "earlier", "near_evaluation", "near_both"),
        "train": ("examples", "steps", "validation_loss"),
        "gate": (),
        "bundle": ("version", "share", "error", "threshold"),
        "shadow": ("skipped", "pairs", "error", "error_high"),
        "promote": ("version", "marked"),
    }[step]
    parts = [f"{name.replace('_', ' ')} {_shown(result[name])}" for name in shown if result.get(name) is not None]
    return ", ".join(parts) or result["outcome"]


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return " ".join(f"{name} {number:,}" for name, number in value.items()) or "0"
    return f"{value:,}" if isinstance(value, int) else str(value)
