"""The step that decides: candidate, student in service and teacher on held-out pairs; regression prompts; clusters."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from distill_ray.config.engine import BaseEngineConfig
from distill_ray.flywheel.clusters import cluster
from distill_ray.flywheel.pool import turns_of
from distill_ray.flywheel.regressions import read_regressions
from distill_ray.flywheel.splitting import measured_on
from distill_ray.flywheel.students import candidate_engine, engine_of_bundle
from distill_ray.flywheel.verdict import compare, judge
from distill_ray.flywheel.work import Work
from distill_ray.pipeline.asking import ask_all
from distill_ray.records import Message
from distill_ray.serving.calibration.calibrate import served_form
from distill_ray.serving.calibration.comparing import outcomes
from distill_ray.serving.calibration.measured import Measured, Trained
from distill_ray.serving.calibration.vectors import is_short, vectors_of
from distill_ray.serving.routing.bundle import learnt_entries, read_manifest
from distill_ray.serving.routing.conversation import RequestKey
from distill_ray.serving.routing.manifest import PromptForm

HELD_OUT = {"held_out": "new", "earlier": "earlier"}
NUM_WORST = 20


@dataclasses.dataclass(frozen=True)
class Measurements:
    """Held-out pairs in the order of their ids, with the answers of a student."""

    measured: list[Measured]
    good_P: np.ndarray
    groups_P: np.ndarray
    sets: list[str]


def gate(work: Work) -> dict[str, Any]:
    """Decide whether the candidate may be served, and where not."""
    config = work.config
    regressions = read_regressions(config.flywheel.gate.regressions)
    form, _ = served_form(config)
    candidate, answers = measurements(work, form, also=[list(regression.turns) for regression in regressions])
    failed = [
        {"text": regression.shown, "expected": broken, "answer": answer}
        for regression, answer in zip(regressions, answers, strict=True)
        if (broken := regression.broken(answer)) is not None
    ]
    current_good, current_answers = _current(work, form, candidate)
    masks = {
        "all": np.ones(len(candidate.sets), dtype=bool),
        **{name: np.array([each == name for each in candidate.sets], dtype=bool) for name in HELD_OUT.values()},
    }
    sets = {
        name: compare(
            candidate.good_P[mask],
            None if current_good is None else current_good[mask],
            candidate.groups_P[mask],
            config.flywheel.gate.confidence,
            work.seed,
        )
        for name, mask in masks.items()
    }
    verdict = judge(config.flywheel.gate, sets, [f"{each['text']!r}: {each['expected']}" for each in failed])
    clusters = _clusters(work, candidate)
    result = {
        "outcome": verdict.outcome,
        "why": verdict.why,
        "candidate": work.cycle.needed("train")["fingerprint"],
        "current": work.cycle.needed("train")["current"],
        "metric": config.calibrate.metric,
        "margin": config.flywheel.gate.margin,
        "confidence": config.flywheel.gate.confidence,
        "min_pairs": config.flywheel.gate.min_pairs,
        "sets": {name: dataclasses.asdict(each) for name, each in sets.items()},
        "regressions": {"num": len(regressions), "failed": failed},
        "clusters": clusters,
        "worst": _worst(candidate, current_good, current_answers),
    }
    if verdict.outcome == "go_on" and clusters and all(each["stays"] for each in clusters):
        result |= {"outcome": "unclear", "why": ["no cluster of requests is good enough to leave the teacher"]}
    return result


# -- what was held out -------------------------------------------------------------------------------------------------


def measurements(work: Work, form: PromptForm, also: Sequence[list[Message]] = ()) -> tuple[Measurements, list[str]]:
    """The held-out pairs with the candidate's answers, from the ledger where it gave them before.

    Args:
        work: of the cycle.
        form: how a student is asked.
        also: other conversations for the candidate, asked along with them.

    Returns:
        And what it says to the others.
    """
    records = _held_out(work)
    conversations = [turns_of(record["messages"]) for record in records]
    trained = work.cycle.needed("train")
    engine = candidate_engine(work.config, trained, work.cycle.run)
    ledger = f"candidate-{trained['fingerprint']}"
    said = _ask(work, engine, ledger, form, [*conversations, *also], "ask the candidate")
    answers, others = said[: len(records)], said[len(records) :]
    measured = [
        Measured(
            row_id=record["pair_id"],
            key=RequestKey(record["fingerprint"], record["text"]),
            messages=tuple(turns),
            student_answer=answer,
            teacher_answer=record["completion"],
            reference=None,
        )
        for record, turns, answer in zip(records, conversations, answers, strict=True)
    ]
    held_out = Measurements(
        measured,
        outcomes(work.config, work.cycle.run, measured, work.embedder),
        np.array([record["group"] for record in records], dtype=np.int64),
        [HELD_OUT[record["split"]] for record in records],
    )
    return held_out, others


def _current(work: Work, form: PromptForm, candidate: Measurements) -> tuple[np.ndarray | None, list[str] | None]:
    """The student in service on the same requests."""
    bundle = work.current
    if bundle is None:
        return None, None
    version = read_manifest(bundle).version
    engine = engine_of_bundle(work.config, bundle, work.bundles.place(version))
    asked = [list(each.messages) for each in candidate.measured]
    answers = _ask(work, engine, f"current-{version}", form, asked, "ask the student in service")
    measured = [
        dataclasses.replace(each, student_answer=answer)
        for each, answer in zip(candidate.measured, answers, strict=True)
    ]
    return outcomes(work.config, work.cycle.run, measured, work.embedder), answers


def _ask(
    work: Work,
    engine: BaseEngineConfig,
    ledger: str,
    form: PromptForm,
    conversations: Sequence[list[Message]],
    role: str,
) -> list[str]:
    asked: list[Any] = [form.messages(turns) for turns in conversations]
    return ask_all(engine, work.cycle.run, ledger, asked, role) if asked else []


def _held_out(work: Work) -> list[dict[str, Any]]:
    return measured_on(work.cycle.table("pairs").to_pylist(), work.config.calibrate.max_pairs)


# -- what was learnt ---------------------------------------------------------------------------------------------------


def learnt(work: Work) -> list[Trained]:
    """The requests that the candidate has learnt, by id: in this cycle, and before it where it went on.

    What was deleted from the store since leaves the index too.
    """
    run, gone = work.cycle.run, set[str]()
    if run.exists("train", "rejects.parquet"):
        gone = set(run.read_table("train", "rejects.parquet")["row_id"].to_pylist())
    found = {
        record["pair_id"]: RequestKey(record["fingerprint"], record["text"])
        for record in work.cycle.table("pairs").to_pylist()
        if record["split"] in ("train", "replay") and record["pair_id"] not in gone
    }
    if work.current is not None and work.config.flywheel.start_from == "current":
        for entry in learnt_entries(work.current):
            found.setdefault(entry["example_id"], RequestKey(entry["fingerprint"], entry["text"]))
    deleted = {pair_id for deletion in work.store.deletions() for pair_id in deletion.pair_ids}
    return [Trained(name, found[name]) for name in sorted(found) if name not in deleted]


def _clusters(work: Work, candidate: Measurements) -> list[dict[str, Any]]:
    """The clusters of what was learnt; which of the learnt requests passed goes to `passed.json`."""
    trained = [each for each in learnt(work) if is_short(each.key, work.embedder)]
    short_P = np.array([is_short(each.key, work.embedder) for each in candidate.measured], dtype=bool)
    measured = [each.key for each, short in zip(candidate.measured, short_P, strict=True) if short]
    found = cluster(
        vectors_of([each.key for each in trained], work.embedder),
        vectors_of(measured, work.embedder),
        candidate.good_P[short_P],
        work.config.flywheel.gate,
        confidence=work.config.flywheel.gate.confidence,
        seed=work.seed,
    )
    passed = [each.example_id for each, passes in zip(trained, found.passes_N, strict=True) if passes]
    work.cycle.run.write_bytes(json.dumps(passed).encode(), "train", "passed.json")
    return [
        {"pair_id": trained[middle].example_id, **dataclasses.asdict(each)}
        for each, middle in zip(found.clusters, found.middles, strict=True)
    ]


def _worst(
    candidate: Measurements, current_good: np.ndarray | None, current_answers: list[str] | None
) -> list[dict[str, Any]]:
    """Where the candidate is not as good as the teacher: regressions against the student in service first."""
    rows = [number for number, good in enumerate(candidate.good_P) if not good]
    if current_good is not None:
        rows.sort(key=lambda number: not current_good[number])
    return [
        {
            "pair_id": candidate.measured[number].row_id,
            "text": candidate.measured[number].key.text,
            "set": candidate.sets[number],
            "teacher": candidate.measured[number].teacher_answer,
            "candidate": candidate.measured[number].student_answer,
            "current": current_answers[number] if current_answers is not None else None,
            "is_regression": bool(current_good[number]) if current_good is not None else False,
        }
        for number in rows[:NUM_WORST]
    ]
