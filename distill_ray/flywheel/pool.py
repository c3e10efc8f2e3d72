"""Which pairs a cycle starts with, and pairs as records: the snapshot.

all pairs up to now - learnt already - held out before - set aside by a refused cycle = this cycle's
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from distill_ray.flywheel.cycles import Cycle
from distill_ray.records import Message
from distill_ray.serving.collecting.pairs import Pair
from distill_ray.serving.collecting.pairs_export import text_turns
from distill_ray.serving.collecting.store import PairStore, Selection
from distill_ray.serving.routing.conversation import RequestKey, request_key

IDS_AT_ONCE = 5_000
HELD_OUT = ("held_out",)
TRAINED = ("train", "validation", "replay")  # validation chose the checkpoint
_COLUMNS = [f.name for f in dataclasses.fields(Pair) if f.name != "embedding"]

KEPT_SCHEMA = pa.schema(
    [
        ("pair_id", pa.string()),
        ("messages", pa.string()),  # JSON, masked
        ("completion", pa.string()),
        ("fingerprint", pa.string()),
        ("text", pa.string()),  # what the router would embed
        ("owner", pa.string()),
        ("teacher", pa.string()),
        ("prompt_tokens", pa.int32()),
        ("completion_tokens", pa.int32()),
    ]
)
SPLIT_FIELDS = [("split", pa.string()), ("group", pa.int64())]
SPLIT_SCHEMA = pa.schema([*KEPT_SCHEMA, *SPLIT_FIELDS])


@dataclasses.dataclass(frozen=True)
class Pool:
    """Ids of a cycle's pairs."""

    until: int
    """The snapshot of the store."""

    ids: list[str]
    num_new: int
    """Of them, those that no earlier cycle looked at."""

    num_set_aside: int

    @property
    def num_older(self) -> int:
        """Of `ids`, those that wait since an earlier cycle."""
        return max(0, len(self.ids) - self.num_new)


def pool(store: PairStore, before: Sequence[Cycle], *, again: bool) -> Pool:
    """The pairs that a new cycle starts with.

    Which of them are new goes by their ids: batch numbers belong to a store, and another one, one that was made anew or
    one from a backup numbers its pairs in its own way.

    Args:
        store: of the service.
        before: the cycles that came to an end.
        again: also what a refused cycle set aside.
    """
    until = store.snapshot()
    seen, held_out = ids_of(before), used_as(before, HELD_OUT)
    set_aside = set() if again else ids_of(cycle for cycle in before if cycle.outcome == "refused")
    ids: list[str] = []
    num_new = num_set_aside = 0
    for batch in store.scan(Selection(until=until, indexed=False), ["pair_id"]):
        for pair_id in batch["pair_id"].to_pylist():
            num_new += pair_id not in seen
            num_set_aside += pair_id in set_aside
            if pair_id not in held_out and pair_id not in set_aside:
                ids.append(pair_id)
    return Pool(until, sorted(ids), num_new, num_set_aside)


def ids_of(cycles: Iterable[Cycle]) -> set[str]:
    """All pairs that cycles started with."""
    return {i for cycle in cycles for i in cycle.table("snapshot", ["pair_id"])["pair_id"].to_pylist()}


def used_as(cycles: Iterable[Cycle], splits: Sequence[str]) -> set[str]:
    """Ids of the pairs that cycles used so. What a refused cycle held out is as doubtful as what it learnt."""
    return {i for cycle in cycles if cycle.outcome != "refused" for i in _used_as(cycle, splits)}


def trained_for(cycles: Iterable[Cycle], versions: Collection[str]) -> set[str]:
    """Ids of the pairs that the students of these bundles were trained on in cycles, those that no index has too."""
    of_bundles = [cycle for cycle in cycles if (cycle.result("bundle") or {}).get("version") in versions]
    return {i for cycle in of_bundles for i in _used_as(cycle, TRAINED)}


def _used_as(cycle: Cycle, splits: Sequence[str]) -> list[str]:
    if cycle.result("split") is None:
        return []
    table = cycle.table("split", ["pair_id", "split"])
    return table.filter(pc.field("split").isin(list(splits)))["pair_id"].to_pylist()


def read_pairs(store: PairStore, ids: Sequence[str], ignore: Sequence[str]) -> list[Pair]:
    """Pairs by id, those that are still there, in the order of the ids; fingerprints as the config has them now."""
    found: dict[str, Pair] = {}
    for start in range(0, len(ids), IDS_AT_ONCE):
        for batch in store.scan(Selection(ids=tuple(ids[start : start + IDS_AT_ONCE])), _COLUMNS):
            for record in batch.to_pylist():
                found[record["pair_id"]] = Pair(**record)
    there = [found[pair_id] for pair_id in ids if pair_id in found]
    return [dataclasses.replace(pair, fingerprint=key_of(pair, ignore).fingerprint) for pair in there]


def key_of(pair: Pair, ignore: Sequence[str]) -> RequestKey:
    """The pair's request as the router sees it."""
    return request_key({**json.loads(pair.request), "messages": json.loads(pair.messages)}, ignore)


def kept_records(pairs: Sequence[Pair], ignore: Sequence[str]) -> list[dict[str, Any]]:
    """`KEPT_SCHEMA` records of cleaned pairs. Their fingerprints stay: a mask in a system prompt is not of the kind."""
    columns = [name for name in KEPT_SCHEMA.names if name != "text"]
    return [{**{name: getattr(pair, name) for name in columns}, "text": key_of(pair, ignore).text} for pair in pairs]


def turns_of(messages: str) -> list[Message]:
    """A cleaned pair's conversation as a student knows it."""
    turns = text_turns(json.loads(messages))
    assert turns is not None, "cleaning lets only text pass"
    return [{"role": "system" if t["role"] == "developer" else t["role"], "content": t["content"]} for t in turns]  # type: ignore[misc]


def share_of(*parts: object) -> float:
    """A number in [0, 1) that belongs to these parts for ever: which way a draw goes does not depend on the others."""
    digest = hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64
