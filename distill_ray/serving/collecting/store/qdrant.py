"""Pairs in a Qdrant server.

    COLLECTION             a point per pair, its columns as payload
    COLLECTION_deletions   what was deleted, append-only
    COLLECTION_lease       who is at work on them: one point

The points have no vector: no nearest neighbour is ever asked of the store (the bundle's index answers that), and a
collection has one size of vector, while embedders change. The embedding is part of the payload, as base64.
Tested with the in-process mode of `qdrant-client`, which answers like a server but knows no payload indexes; a server
could not be installed where this was written.
"""

from __future__ import annotations

import base64
import contextlib
import uuid
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from qdrant_client import models
from qdrant_client.http.exceptions import ApiException

from distill_ray.errors import StoreError, first_line
from distill_ray.serving.collecting.pairs import PAIR_SCHEMA
from distill_ray.serving.collecting.store.base import LEASE, Deletion, Lease, PairStore, Selection

if TYPE_CHECKING:
    from qdrant_client import QdrantClient

INDEXED = {
    "owner": models.PayloadSchemaType.KEYWORD,
    "indexed": models.PayloadSchemaType.BOOL,
    "indexed_by": models.PayloadSchemaType.KEYWORD,
    "batch": models.PayloadSchemaType.INTEGER,
}
LEASE_INDEXED = {"token": models.PayloadSchemaType.INTEGER, "beat": models.PayloadSchemaType.INTEGER}
LEASE_ID = str(uuid.UUID(int=0))
IDS_PER_QUERY = 10_000
IDS_PER_RECORD = 10_000  # of deletions: a request has a limit


class QdrantStore(PairStore):
    """Pairs in a Qdrant server.

    Args:
        client: connected to it.
        collection: made with the first pair.
        has_payload_indexes: False for the client's in-process mode.
    """

    def __init__(self, client: QdrantClient, collection: str, *, has_payload_indexes: bool = True) -> None:
        super().__init__()
        self._client = client
        self._pairs = collection
        self._deletions = f"{collection}_deletions"
        self._leases = f"{collection}_lease"
        self._indexed = {self._pairs: INDEXED, self._leases: LEASE_INDEXED} if has_payload_indexes else {}
        self._there: set[str] = set()  # collections that exist

    def exists(self) -> bool:
        """See `PairStore.exists`."""
        with self._translated():
            return self._exists(self._pairs)

    def _insert(self, table: pa.Table) -> int:
        records = {_point_id(record["pair_id"]): record for record in table.to_pylist()}
        with self._translated():
            self._make(self._pairs)
            known = self._client.retrieve(self._pairs, list(records), with_payload=False)
            for point in known:
                del records[str(point.id)]
            points = [models.PointStruct(id=i, vector={}, payload=_payload(record)) for i, record in records.items()]
            if points:
                self._client.upsert(self._pairs, points, wait=True)
        return len(points)

    def _count(self, where: Selection) -> int:
        with self._translated():
            if not self._exists(self._pairs):
                return 0
            return self._client.count(self._pairs, count_filter=_filter(where), exact=True).count

    def _scan(self, where: Selection, columns: list[str], batch_rows: int) -> Iterator[pa.RecordBatch]:
        schema = pa.schema([PAIR_SCHEMA.field(name) for name in columns])
        for payloads in self._scroll(self._pairs, _filter(where), columns, batch_rows):
            yield pa.RecordBatch.from_pylist([_record(payload) for payload in payloads], schema=schema)

    def _remove(self, ids: list[str]) -> None:
        with self._translated():
            if not self._exists(self._pairs):
                return
            for start in range(0, len(ids), IDS_PER_QUERY):
                points: list[Any] = [_point_id(i) for i in ids[start : start + IDS_PER_QUERY]]
                self._client.delete(self._pairs, models.PointIdsList(points=points), wait=True)

    def _purge(self) -> None:
        """The server's optimizer rewrites segments by itself."""

    def _mark(self, ids: list[str], bundle: str) -> int:
        num_marked = 0
        for start in range(0, len(ids), IDS_PER_QUERY):
            where = Selection(ids=tuple(ids[start : start + IDS_PER_QUERY]), indexed=False)
            num_marked += self._set({"indexed": True, "indexed_by": bundle}, _filter(where))
        return num_marked

    def _unmark(self, bundle: str) -> int:
        return self._set({"indexed": False, "indexed_by": None}, models.Filter(must=[_is("indexed_by", bundle)]))

    def _set(self, changes: dict[str, Any], where: models.Filter | None) -> int:
        with self._translated():
            if not self._exists(self._pairs) or where is None:
                return 0
            num_changed = self._client.count(self._pairs, count_filter=where, exact=True).count
            self._client.set_payload(self._pairs, changes, points=where, wait=True)
        return num_changed

    def _last_batch(self) -> int:
        with self._translated():
            if not self._exists(self._pairs):
                return 0
            newest = models.OrderBy(key="batch", direction=models.Direction.DESC)
            points, _ = self._client.scroll(self._pairs, limit=1, order_by=newest, with_payload=["batch"])
        return int((points[0].payload or {})["batch"]) if points else 0

    def _log(self, deletion: Deletion) -> None:
        ids = deletion.pair_ids
        parts = [ids[start : start + IDS_PER_RECORD] for start in range(0, len(ids), IDS_PER_RECORD)] or [()]
        with self._translated():
            self._make(self._deletions)
            for number, part in enumerate(parts):
                payload = {
                    "deleted": deletion.deleted,
                    "kind": deletion.kind,
                    "num": deletion.num if number == 0 else 0,
                    "pair_ids": part,
                    "last_batch": deletion.last_batch,
                    "owner_hash": deletion.owner_hash,
                }
                point = models.PointStruct(id=str(uuid.uuid4()), vector={}, payload=payload)
                self._client.upsert(self._deletions, [point], wait=True)

    def _logged(self) -> list[Deletion]:
        found = self._scroll(self._deletions, None, True, 100)
        return [Deletion(**{**p, "pair_ids": tuple(p["pair_ids"])}) for payloads in found for p in payloads]

    def _log_version(self) -> object:
        with self._translated():
            return self._client.count(self._deletions, exact=True).count if self._exists(self._deletions) else 0

    def _compact(self) -> None:
        """The server's optimizer does it."""

    def _lease(self) -> Lease:
        with self._translated():
            if not self._exists(self._leases):
                return Lease()
            points = self._client.retrieve(self._leases, [LEASE_ID], consistency=models.ReadConsistencyType.MAJORITY)
            return LEASE.validate_python(points[0].payload) if points else Lease()

    def _swap_lease(self, before: Lease, after: Lease) -> None:
        """The filter is the condition: a shard makes one change after the other, and a strong order goes by its leader.

        Only the very first point needs a server that knows INSERT_ONLY, or one runner at that moment.
        """
        strong = models.WriteOrdering.STRONG
        with self._translated():
            self._make(self._leases)
            if not self._client.retrieve(self._leases, [LEASE_ID]):
                first = models.PointStruct(id=LEASE_ID, vector={}, payload=LEASE.dump_python(Lease()))
                mode = models.UpdateMode.INSERT_ONLY
                self._client.upsert(self._leases, [first], wait=True, ordering=strong, update_mode=mode)
            same = models.Filter(must=[_is("token", before.token), _is("beat", before.beat)])
            payload = LEASE.dump_python(after)
            self._client.set_payload(self._leases, payload, points=same, wait=True, ordering=strong)

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def _scroll(
        self, collection: str, where: models.Filter | None, columns: list[str] | bool, batch_rows: int
    ) -> Iterator[list[dict[str, Any]]]:
        offset: Any = None
        while True:
            with self._translated():
                if not self._exists(collection):
                    return
                points, offset = self._client.scroll(
                    collection, scroll_filter=where, limit=batch_rows, offset=offset, with_payload=columns
                )
            if points:
                yield [point.payload or {} for point in points]
            if offset is None:
                return

    def _exists(self, collection: str) -> bool:
        if collection not in self._there and self._client.collection_exists(collection):
            self._there.add(collection)
        return collection in self._there

    def _make(self, collection: str) -> None:
        if self._exists(collection):
            return
        try:
            self._client.create_collection(collection, vectors_config={})
        except (ApiException, ValueError):
            if not self._exists(collection):  # somebody else was not faster
                raise
        for name, kind in self._indexed.get(collection, {}).items():
            self._client.create_payload_index(collection, name, kind, wait=True)

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except (ApiException, OSError, ValueError, RuntimeError) as error:
            self._there.clear()
            why = first_line(error)
            raise StoreError(
                f"qdrant collection {self._pairs}: cannot use the store of pairs ({why}); is the server of "
                "serve.collect.store.url up, and the key of api_key_env right?"
            ) from error


def _point_id(pair_id: str) -> str:
    """Qdrant takes UUIDs; a pair's id is one already, but a person may ask for anything."""
    return str(uuid.uuid5(uuid.NAMESPACE_OID, pair_id))


def _payload(record: dict[str, Any]) -> dict[str, Any]:
    embedding = record["embedding"]
    if embedding is None:
        return record
    return {**record, "embedding": base64.b64encode(np.asarray(embedding, "<f4").tobytes()).decode()}


def _record(payload: dict[str, Any]) -> dict[str, Any]:
    embedding = payload.get("embedding")
    if embedding is None:
        return payload
    return {**payload, "embedding": np.frombuffer(base64.b64decode(embedding), "<f4")}


def _filter(where: Selection) -> models.Filter | None:
    must: list[Any] = []
    if where.ids is not None:
        must.append(models.HasIdCondition(has_id=[_point_id(i) for i in where.ids]))
    if where.owner is not None:
        must.append(_is("owner", where.owner))
    if where.indexed is not None:
        must.append(_is("indexed", where.indexed))
    if where.until is not None:
        must.append(models.FieldCondition(key="batch", range=models.Range(lte=where.until)))
    return models.Filter(must=must) if must else None


def _is(key: str, value: str | int) -> models.FieldCondition:
    return models.FieldCondition(key=key, match=models.MatchValue(value=value))
