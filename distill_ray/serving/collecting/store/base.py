"""The seam between collected pairs and what holds them: what every store does, on top of what each one brings.

A pair is stored once, by its id, in numbered batches; a snapshot is the number of the last batch, so it needs no room
and what is deleted leaves it too. A deletion is written down (when, what kind, how many, which ids; no text, no name)
before anything is removed. That record is what keeps a pair deleted that still waits in a spool, or is sent again.

One process adds (the writer). Any number may read, delete and mark meanwhile. Who trains on the pairs holds their lease
(flywheel/lease.py); a store only keeps it, and swaps it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
from pydantic import TypeAdapter

from distill_ray.serving.collecting.pairs import PAIR_SCHEMA, Pair, pairs_table

TEXT_COLUMNS = ("messages", "request", "completion", "tool_calls")  # where `contains` looks


@dataclass(frozen=True, slots=True)
class Selection:
    """Which pairs: those for which everything that is given holds."""

    ids: tuple[str, ...] | None = None
    owner: str | None = None
    contains: str | None = None
    """Somewhere in the conversation, the answer or the tools; upper and lower case are one."""
    indexed: bool | None = None
    until: int | None = None
    """A snapshot: nothing that was stored after it."""


ALL = Selection()


@dataclass(frozen=True, slots=True)
class Deletion:
    """What is remembered of a deletion."""

    deleted: int  # ns since 1970, UTC
    kind: str  # what was given: "ids", "owner", "contains", "owner+contains", ...
    num: int  # pairs that were removed
    pair_ids: tuple[str, ...]
    last_batch: int  # stored by then: its number is not given again, though nothing may be left of it
    owner_hash: str | None = None  # set where everything of an owner was deleted


@dataclass(frozen=True, slots=True)
class Where:
    """Where the holder of a lease runs."""

    host: str = ""  # its name, for people
    machine: str = ""  # the kernel's boot and the name space of the pid; empty: it cannot be told
    pid: int = 0
    started: int = 0  # of the process, in ticks after that boot, whatever the clock says
    since: str = ""  # the same by the clock, UTC, for people
    folder: str = ""  # of the service


@dataclass(frozen=True, slots=True)
class Lease:
    """Who is at work on a store. The first one is free, and the same on all stores."""

    token: int = 0  # grows with each holder
    beat: int = 0  # grows while one holds it
    holder: str = ""  # a name that nobody else ever had; empty: free
    where: Where = Where()


LEASE = TypeAdapter(Lease)  # to JSON and back; what another version wrote beside it is passed over


@dataclass(slots=True)
class _Tombstones:
    """What may not come back."""

    version: object = None
    last_batch: int = 0
    ids: set[str] = field(default_factory=set)
    owners: dict[str, int] = field(default_factory=dict)  # hash -> everything up to then

    def cover(self, pair_id: str, owner: str, created: int) -> bool:
        return pair_id in self.ids or (bool(self.owners) and created <= self.owners.get(owner_hash(owner), -1))


class PairStore(ABC):
    """Pairs by id. All methods block; those that reach the store raise StoreError where it cannot be used."""

    def __init__(self) -> None:
        self._tombstones = _Tombstones()
        self._batch: int | None = None  # the last one that this process added

    # -- what the service and the flywheel use -------------------------------------------------------------------

    def add(self, pairs: Sequence[Pair]) -> int:
        """Store pairs as one batch; returns how many are new. Those that are there, or were deleted, are passed over.

        All or none of them are stored, and adding them again changes nothing.
        """
        gone = self._read_tombstones()
        first = {p.pair_id: p for p in reversed(pairs) if not gone.cover(p.pair_id, p.owner, p.created)}
        if not first:
            return 0
        if self._batch is None:
            self._batch = max(self._last_batch(), gone.last_batch)
        self._batch += 1
        num_new = self._insert(pairs_table(reversed(first.values()), self._batch))
        # Somebody may have deleted them between the look and the insert. He removes after he has written it down, so
        # one of the two of us sees the other.
        gone = self._read_tombstones()
        late = [p.pair_id for p in first.values() if gone.cover(p.pair_id, p.owner, p.created)]
        if late:
            self._remove(late)
        return max(0, num_new - len(late))

    def count(self, where: Selection = ALL) -> int:
        """Number of pairs."""
        return self._count(where) if where.contains is None else len(self._ids(where))

    def scan(
        self, where: Selection = ALL, columns: Sequence[str] | None = None, batch_rows: int = 1024
    ) -> Iterator[pa.RecordBatch]:
        """Pairs in batches, in no particular order, with these columns of `PAIR_SCHEMA` (default: all)."""
        columns = list(columns or PAIR_SCHEMA.names)
        if where.contains is None:
            yield from self._scan(where, columns, batch_rows)
            return
        read = list(dict.fromkeys([*columns, *TEXT_COLUMNS]))
        for batch in self._scan(where, read, batch_rows):
            found = batch.filter(pa.array([_holds(record, where.contains) for record in batch.to_pylist()], pa.bool_()))
            if found.num_rows:
                yield found.select(columns)

    def delete(self, where: Selection) -> int:
        """Remove pairs for good, from snapshots and from the disk too; returns how many.

        Ids that are not there are remembered as well, and with an owner alone everything of that owner up to now: what
        still waits in a spool is never stored. A reader in the middle of a scan may meet a StoreError.

        Raises:
            ValueError: nothing is selected, which would be everything.
        """
        if where == ALL:
            raise ValueError("delete: select something")
        kinds = [f.name for f in dataclasses.fields(where) if getattr(where, f.name) is not None]
        asked = where.ids if kinds == ["ids"] and where.ids else ()
        whole_owner = owner_hash(where.owner) if where.owner is not None and kinds == ["owner"] else None
        num_deleted = 0
        for is_first in (True, False):  # looked up again: the writer goes on meanwhile
            ids = self._ids(where)
            if not ids and not is_first:
                break
            self._log(
                Deletion(
                    deleted=time.time_ns(),
                    kind="+".join(kinds),
                    num=len(ids),
                    pair_ids=tuple(dict.fromkeys([*ids, *asked])),
                    last_batch=self._last_batch(),
                    owner_hash=whole_owner,
                )
            )
            self._remove(ids)
            num_deleted += len(ids)
        self._purge()
        return num_deleted

    def deletions(self) -> list[Deletion]:
        """All there were, oldest first."""
        return sorted(self._logged(), key=lambda deletion: deletion.deleted)

    def mark_indexed(self, ids: Sequence[str], bundle: str) -> int:
        """Say that a promoted bundle was trained on these pairs; returns how many were not marked yet.

        The first bundle's mark stays: so going back from a later one unmarks only what that one brought.
        """
        return self._mark(list(ids), bundle) if ids else 0

    def unmark_indexed(self, bundle: str) -> int:
        """Take the marks of a bundle back; returns how many."""
        return self._unmark(bundle)

    def snapshot(self) -> int:
        """A number that stands for all pairs stored by now: `Selection(until=...)`. What is deleted later leaves it."""
        return self._last_batch()

    def lease(self) -> Lease:
        """Who is at work on this store, read anew."""
        return self._lease()

    def swap_lease(self, before: Lease, after: Lease) -> bool:
        """Put a lease in the place of another, if that one is still there. Returns whether it is there now.

        Of all who swap the same one, with holders or beats of their own, at most one hears True. Who hears False, or
        meets a StoreError, has to look who has it: his own swap may have come through and been swapped again, or may
        yet come through.
        """
        self._swap_lease(before, after)
        return self._lease() == after

    def compact(self) -> None:
        """Finish deletions that were interrupted, and put the store's files in order."""
        gone = self._read_tombstones()
        left = [
            record["pair_id"]
            for batch in self._scan(ALL, ["pair_id", "owner", "created"], 10_000)
            for record in batch.to_pylist()
            if gone.cover(**record)
        ]
        if left:
            self._remove(left)
            self._purge()
        self._compact()

    def close(self) -> None:  # noqa: B027 (most have nothing to close)
        """Let go of the connection."""

    # -- what a store brings -------------------------------------------------------------------------------------
    # `Selection.contains` never reaches it, and no id comes twice.

    @abstractmethod
    def exists(self) -> bool:
        """Whether a pair was ever stored here, though it may have been deleted since."""

    @abstractmethod
    def _insert(self, table: pa.Table) -> int:
        """Store the rows whose id is not there, all or none; returns how many. The others stay as they are."""

    @abstractmethod
    def _count(self, where: Selection) -> int: ...

    @abstractmethod
    def _scan(self, where: Selection, columns: list[str], batch_rows: int) -> Iterator[pa.RecordBatch]: ...

    @abstractmethod
    def _remove(self, ids: list[str]) -> None: ...

    @abstractmethod
    def _purge(self) -> None:
        """Leave nothing of what was removed on the disk."""

    @abstractmethod
    def _mark(self, ids: list[str], bundle: str) -> int: ...

    @abstractmethod
    def _unmark(self, bundle: str) -> int: ...

    @abstractmethod
    def _last_batch(self) -> int:
        """Highest `batch` of any pair, read anew; 0 where there is none."""

    @abstractmethod
    def _log(self, deletion: Deletion) -> None: ...

    @abstractmethod
    def _logged(self) -> list[Deletion]: ...

    @abstractmethod
    def _log_version(self) -> object:
        """Changes with every `_log`, and costs little to ask."""

    @abstractmethod
    def _compact(self) -> None: ...

    @abstractmethod
    def _lease(self) -> Lease:
        """Written last; `Lease()` where none ever was."""

    @abstractmethod
    def _swap_lease(self, before: Lease, after: Lease) -> None:
        """Atomically write `after` if `before` is there, also where neither of them ever was.

        It may have no effect though it seems to: whoever asks looks again.
        """

    # -- shared --------------------------------------------------------------------------------------------------

    def _ids(self, where: Selection) -> list[str]:
        return [pair_id for batch in self.scan(where, ["pair_id"]) for pair_id in batch["pair_id"].to_pylist()]

    def _read_tombstones(self) -> _Tombstones:
        version = self._log_version()
        if version != self._tombstones.version:
            fresh = _Tombstones(version)
            for deletion in self._logged():
                fresh.ids.update(deletion.pair_ids)
                fresh.last_batch = max(fresh.last_batch, deletion.last_batch)
                if deletion.owner_hash is not None:
                    before = fresh.owners.get(deletion.owner_hash, -1)
                    fresh.owners[deletion.owner_hash] = max(before, deletion.deleted)
            self._tombstones = fresh
        return self._tombstones


def owner_hash(owner: str) -> str:
    """What stands for an owner in the record of deletions."""
    return hashlib.blake2b(owner.encode(), digest_size=16).hexdigest()


def newest_batch(batches: Iterator[pa.RecordBatch]) -> int:
    """Highest `batch` in what was scanned; 0 where nothing was."""
    return max((int(batch["batch"].to_numpy().max()) for batch in batches if batch.num_rows), default=0)


def _holds(record: Mapping[str, Any], text: str) -> bool:
    wanted = _plain(text)
    texts = [leaf for name in TEXT_COLUMNS if record[name] for leaf in _leaves(record[name])]
    return any(wanted in _plain(leaf) for leaf in texts)


def _plain(text: str) -> str:
    return unicodedata.normalize("NFC", text).casefold()


def _leaves(value: Any) -> Iterator[str]:
    """The texts in JSON, also of JSON that is a text in it: there a quote or an umlaut is written in another way."""
    if isinstance(value, str):
        yield value
        if value[:1] in ("{", "["):
            try:
                yield from _leaves(json.loads(value))
            except ValueError:
                return
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item)
