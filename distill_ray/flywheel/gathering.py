"""The steps from the store to what is learnt and held out: snapshot, clean, split."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pyarrow as pa

from distill_ray.config import RunConfig
from distill_ray.flywheel.cleaning import Dropped, clean, masked_pair
from distill_ray.flywheel.enough import what_is_missing
from distill_ray.flywheel.pool import (
    HELD_OUT,
    KEPT_SCHEMA,
    SPLIT_FIELDS,
    SPLIT_SCHEMA,
    Pool,
    kept_records,
    pool,
    read_pairs,
    share_of,
    trained_for,
    used_as,
)
from distill_ray.flywheel.splitting import evaluation_texts, measured_on, split_pairs
from distill_ray.flywheel.work import Work
from distill_ray.serving.collecting.store import Selection
from distill_ray.serving.routing.bundle import learnt_entries

_DROPPED = pa.schema([("pair_id", pa.string()), ("reason", pa.string())])
_USED = pa.schema([("pair_id", pa.string()), *SPLIT_FIELDS])


def snapshot(work: Work) -> dict[str, Any]:
    """Which pairs this cycle is about, by id."""
    found = pool(work.store, work.before, again=work.again)
    work.cycle.files.write_table(pa.table({"pair_id": pa.array(found.ids, pa.string())}), "snapshot.parquet")
    figures = {
        "until": found.until,
        "pairs": len(found.ids),
        "new_pairs": found.num_new,
        "set_aside": found.num_set_aside,
        "stored": work.store.count(),
    }
    if found.num_new < work.config.flywheel.min_pairs and not work.again:
        return {**figures, "outcome": "too_few", "why": [what_waits(found, work.config)]}
    return {**figures, "outcome": "go_on"}


def what_waits(found: Pool, config: RunConfig) -> str:
    """Where a cycle does not begin: how many pairs are there, and which of them are not new."""
    waits = [f"{found.num_new:,} new pairs, and a cycle takes {config.flywheel.min_pairs:,} (flywheel.min_pairs)"]
    if found.num_older:
        waits += [f"{found.num_older:,} older ones wait with them"]
    if found.num_set_aside:
        waits += [f"{found.num_set_aside:,} are set aside"]
    if waits[1:]:
        waits += ["`distill-ray flywheel run --again` begins now, with all of these"]
    if not config.serve.collect.enabled:
        waits += ["serve.collect.enabled is false, so no more will come"]
    return "; ".join(waits)


def cleaned(work: Work) -> dict[str, Any]:
    """What of them may be learnt from."""
    rules, ignore = work.config.flywheel.clean, work.config.serve.fingerprint.ignore
    ids = work.cycle.table("snapshot")["pair_id"].to_pylist()
    pairs = read_pairs(work.store, ids, ignore)
    found = clean(pairs, rules)
    kept = pa.Table.from_pylist(kept_records(found.kept, ignore), schema=KEPT_SCHEMA)
    work.cycle.files.write_table(kept, "kept.parquet")
    dropped = [{"pair_id": pair_id, "reason": reason.value} for pair_id, reason in sorted(found.dropped)]
    work.cycle.files.write_table(pa.Table.from_pylist(dropped, schema=_DROPPED), "dropped.parquet")
    owners = Counter(pair.owner for pair in found.kept)
    figures = {
        "pairs": len(pairs),
        "deleted_since": len(ids) - len(pairs),
        "kept": len(found.kept),
        "dropped": found.counts,
        "masked": found.masked,
        "owners": dict(owners.most_common(20)),
        "teachers": dict(Counter(pair.teacher for pair in found.kept).most_common(20)),
    }
    if len(found.kept) * 2 < work.config.flywheel.min_pairs and not work.again:
        reasons = ", ".join(f"{reason} {number}" for reason, number in found.counts.items())
        why = (
            f"{len(found.kept)} of {len(pairs)} pairs are left after cleaning ({reasons}), less than half of "
            f"flywheel.min_pairs ({work.config.flywheel.min_pairs}); see dropped.parquet"
        )
        return {**figures, "outcome": "too_few", "why": [why]}
    if len(owners) < rules.min_owners:
        why = (
            f"the pairs come from {len(owners)} owners, and flywheel.clean.min_owners is {rules.min_owners}: so few "
            "shall not say what everybody's student learns"
        )
        return {**figures, "outcome": "too_few", "why": [why]}
    return {**figures, "outcome": "go_on"}


def split(work: Work) -> dict[str, Any]:
    """What is learnt, and what is held out for good."""
    config, flywheel = work.config, work.config.flywheel
    new = work.cycle.table("kept").to_pylist()
    held_out = sorted(used_as(work.before, HELD_OUT))[: config.calibrate.max_pairs]
    found = split_pairs(
        new,
        _again(work, held_out),
        _again(work, _to_replay(work, len(new))),
        _learnt_texts(work),
        evaluation_texts(flywheel.evaluation, flywheel.evaluation_column),
        holdout=flywheel.holdout,
        validation=config.data.validation_holdout,
        seed=work.seed,
        cycle=work.cycle.number,
    )
    table = pa.Table.from_pylist(found.records, schema=SPLIT_SCHEMA)
    work.cycle.files.write_table(table, "pairs.parquet")
    dropped = work.cycle.table("dropped").to_pylist()
    dropped = [record for record in dropped if record["reason"] not in (Dropped.NEAR_EVALUATION, Dropped.NEAR_BOTH)]
    dropped += [{"pair_id": pair_id, "reason": Dropped.NEAR_EVALUATION} for pair_id in found.near_evaluation]
    dropped += [{"pair_id": pair_id, "reason": Dropped.NEAR_BOTH} for pair_id in found.near_both]
    work.cycle.files.write_table(pa.Table.from_pylist(dropped, schema=_DROPPED), "dropped.parquet")
    work.cycle.files.write_table(table.select(_USED.names).cast(_USED), "split.parquet")
    counts = Counter(record["split"] for record in found.records)
    figures = {**counts, "near_evaluation": len(found.near_evaluation), "near_both": len(found.near_both)}
    if not counts["train"]:
        return {**figures, "outcome": "too_few", "why": ["no pair is left to learn from"]}
    if not counts["held_out"] and not counts["earlier"]:
        why = "no pair is held out, so nothing would show how good a candidate is; raise flywheel.holdout"
        return {**figures, "outcome": "too_few", "why": [why]}
    measured = measured_on(found.records, config.calibrate.max_pairs)
    if (missing := what_is_missing(config, measured, work.cycle.needed("snapshot")["pairs"])) is not None:
        return {**figures, "outcome": "too_few", "why": [missing]}
    return {**figures, "outcome": "go_on"}


def _learnt_texts(work: Work) -> list[str]:
    """The requests that the student in service, and those one may go back to, were trained on.

    The index has most of them, but not those that stay with the teacher: they come again as new pairs, or are near new
    ones, and a student that was trained on them would be flattered by them.
    """
    ignore, current = work.config.serve.fingerprint.ignore, work.bundles.current()
    entries = learnt_entries(work.bundles.path(current, with_student=False)) if current is not None else []
    others = trained_for(work.before, work.bundles.versions()) - {entry["example_id"] for entry in entries}
    mask = work.config.flywheel.clean.mask
    pairs = [masked_pair(pair, mask, Counter()) for pair in read_pairs(work.store, sorted(others), ignore)]
    return [each["text"] for each in (*entries, *kept_records(pairs, ignore))]


def _to_replay(work: Work, num_new: int) -> list[str]:
    """Ids of pairs that were learnt before, drawn for this cycle."""
    wanted = round(work.config.flywheel.replay * num_new)
    learnt = [
        pair_id
        for batch in work.store.scan(Selection(indexed=True), ["pair_id"])
        for pair_id in batch["pair_id"].to_pylist()
    ]
    return sorted(sorted(learnt, key=lambda pair_id: share_of(work.seed, work.cycle.number, pair_id))[:wanted])


def _again(work: Work, ids: list[str]) -> list[dict[str, Any]]:
    """Records of older pairs, under the rules of today but for the quotas: they passed those when they were new."""
    rules = work.config.flywheel.clean
    rules = rules.model_copy(update={"per_cluster": len(ids) + 1, "owner_share": 1.0, "same_teacher": False})
    ignore = work.config.serve.fingerprint.ignore
    return kept_records(clean(read_pairs(work.store, ids, ignore), rules).kept, ignore)
