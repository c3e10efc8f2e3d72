"""Pairs in a Lance dataset: a folder or an object store, nothing to run. The default.

    URL/pairs.lance             the pairs; `lancedb.connect(URL)` opens it too
    URL/pairs_deletions.lance   what was deleted, append-only
    URL/pairs_lease/            who is at work on them (lease_files.py)

Lance keeps old versions of a dataset. A deletion rewrites the files that held the pairs and drops the versions that
still did; the scheduled compaction drops those older than an hour. What a compaction had written when another process
got in its way belongs to no version, and Lance drops it after a week. Through `lance` itself: `lancedb` takes two
seconds to import and adds nothing that is needed here.
"""

from __future__ import annotations

import contextlib
import datetime
import itertools
import os
import random
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
from fsspec.implementations.local import LocalFileSystem

from distill_ray.errors import StoreError, first_line
from distill_ray.object_store import ObjectStoreError, reach, refused
from distill_ray.serving.collecting.pairs import PAIR_SCHEMA
from distill_ray.serving.collecting.store.base import Deletion, Lease, PairStore, Selection, newest_batch
from distill_ray.serving.collecting.store.lease_files import LeaseFiles

T = TypeVar("T")

IDS_PER_QUERY = 10_000
KEPT_VERSIONS = datetime.timedelta(hours=1)  # readers of an older one may still be at it
RETRY_S = 1.0
LEAST_TRIES = 3  # of a store that takes long to fail: lance asks again for most of what breaks off, not for all
ROWS_PER_FILE = 100_000  # what a compaction reads and writes again at most, where nothing was deleted
_PLACE = re.compile(r",? *\S+\.rs:\d+:\d+")  # of a source file on the machine where lance was built
_REFUSED = "lacked the necessary privileges"  # how lance says 403: it has no type of error for that
CACHE_BYTES = 16 << 20  # of each kind; at Lance's own gigabytes a writer grows for days

DELETION_SCHEMA = pa.schema(
    [
        ("deleted", pa.int64()),
        ("kind", pa.string()),
        ("num", pa.int64()),
        ("pair_ids", pa.list_(pa.string())),
        ("last_batch", pa.int64()),
        ("owner_hash", pa.string()),
    ]
)


class LanceStore(PairStore):
    """Pairs in a Lance dataset.

    Args:
        url: a folder or s3://... (credentials from the environment).
        collection: name of the dataset in it.
    """

    def __init__(self, url: str, collection: str) -> None:
        super().__init__()
        self._pairs = _Dataset(f"{url.rstrip('/')}/{collection}.lance", PAIR_SCHEMA)
        self._deletions = _Dataset(f"{url.rstrip('/')}/{collection}_deletions.lance", DELETION_SCHEMA)
        self._leases = LeaseFiles(f"{url.rstrip('/')}/{collection}_lease")

    def exists(self) -> bool:
        """See `PairStore.exists`."""
        return self._pairs.use(lambda dataset: True, False)

    def _insert(self, table: pa.Table) -> int:
        def merge(dataset: Any) -> int:
            done = dataset.merge_insert("pair_id").when_not_matched_insert_all().execute(table)
            return int(done["num_inserted_rows"])

        return self._pairs.write(merge)

    def _count(self, where: Selection) -> int:
        return self._pairs.use(lambda dataset: int(dataset.count_rows(_sql(where))), 0)

    def _scan(self, where: Selection, columns: list[str], batch_rows: int) -> Iterator[pa.RecordBatch]:
        return self._pairs.scan(columns=columns, filter=_sql(where), batch_size=batch_rows)

    def _remove(self, ids: list[str]) -> None:
        for start in range(0, len(ids), IDS_PER_QUERY):
            where = _one_of(ids[start : start + IDS_PER_QUERY])
            self._pairs.use(lambda dataset, where=where: dataset.delete(where), None)

    def _purge(self) -> None:
        self._rewrite(datetime.timedelta(0))

    def _mark(self, ids: list[str], bundle: str) -> int:
        marks = pa.table({"pair_id": ids, "indexed": [True] * len(ids), "indexed_by": [bundle] * len(ids)})

        def merge(dataset: Any) -> int:
            only_unmarked = dataset.merge_insert("pair_id").when_matched_update_all("target.indexed = false")
            return int(only_unmarked.execute(marks)["num_updated_rows"])

        return self._pairs.use(merge, 0)

    def _unmark(self, bundle: str) -> int:
        changes, where = {"indexed": "false", "indexed_by": "NULL"}, f"indexed_by = {_quoted(bundle)}"
        return self._pairs.use(lambda dataset: int(dataset.update(changes, where=where)["num_rows_updated"]), 0)

    def _last_batch(self) -> int:
        return newest_batch(self._pairs.scan(columns=["batch"]))

    def _log(self, deletion: Deletion) -> None:
        record = {name: getattr(deletion, name) for name in DELETION_SCHEMA.names}
        table = pa.Table.from_pylist([record], schema=DELETION_SCHEMA)
        self._deletions.write(lambda dataset: dataset.insert(table, mode="append"))

    def _logged(self) -> list[Deletion]:
        records = [record for batch in self._deletions.scan() for record in batch.to_pylist()]
        return [Deletion(**{**record, "pair_ids": tuple(record["pair_ids"])}) for record in records]

    def _log_version(self) -> object:
        return self._deletions.use(lambda dataset: dataset.version, 0)

    def _lease(self) -> Lease:
        return self._leases.read()

    def _swap_lease(self, before: Lease, after: Lease) -> None:
        self._leases.swap(before, after)

    def _compact(self) -> None:
        self._rewrite(KEPT_VERSIONS)
        # A pair is looked up before it is added.
        self._pairs.use(lambda dataset: dataset.create_scalar_index("pair_id", "BTREE", replace=True), None)

    def _rewrite(self, kept: datetime.timedelta) -> None:
        """Join small files, take out of all files what is deleted, and drop the versions that are older than `kept`."""

        def rewrite(dataset: Any) -> None:
            dataset.optimize.compact_files(
                target_rows_per_fragment=ROWS_PER_FILE, materialize_deletions=True, materialize_deletions_threshold=0.0
            )
            dataset.cleanup_old_versions(kept)

        self._pairs.use(rewrite, None)


class _Dataset:
    """A dataset that comes into being with its first row.

    Whatever is done sees the newest version. It is done again for RETRY_S, and LEAST_TRIES, if it fails: another
    process may have rewritten the files meanwhile. So it must be something that can be done twice. What fails then is a
    StoreError.
    """

    def __init__(self, uri: str, schema: pa.Schema) -> None:
        self._uri, self._schema = uri, schema
        # Who names an endpoint without TLS (MinIO beside the service) means it; lance wants to be told so again.
        has_tls = not os.environ.get("AWS_ENDPOINT_URL", "").startswith("http://")
        self._options = None if has_tls or "://" not in uri else {"allow_http": "true"}
        self._opened: Any = None
        self._session: Any = None  # holds the caches

    def use(self, do: Callable[[Any], T], otherwise: T) -> T:
        """What `do` makes of the dataset; `otherwise` where nothing was ever written."""
        return self._retried(lambda: otherwise if (dataset := self._newest()) is None else do(dataset))

    def write(self, do: Callable[[Any], T]) -> T:
        """What `do` makes of the dataset, which comes into being if need be."""

        def with_dataset() -> T:
            dataset = self._newest()
            return do(self._create() if dataset is None else dataset)  # an empty one is false

        return self._retried(with_dataset)

    def scan(self, **arguments: Any) -> Iterator[pa.RecordBatch]:
        """Batches of rows. Once the first one is out, a failure is a failure."""

        def begin(dataset: Any) -> tuple[list[pa.RecordBatch], Iterator[pa.RecordBatch]]:
            batches = iter(dataset.to_batches(**arguments))
            return list(itertools.islice(batches, 1)), batches

        first, others = self.use(begin, ([], iter(())))
        yield from first
        with self._translated():
            yield from others

    def _retried(self, do: Callable[[], T]) -> T:
        until = time.monotonic() + RETRY_S
        for tries in itertools.count(1):
            try:
                with self._translated():
                    return do()
            except StoreError as error:
                was_patient = isinstance(error.__cause__, ObjectStoreError)
                if was_patient or (tries >= LEAST_TRIES and time.monotonic() > until):
                    raise
                time.sleep(random.uniform(0.01, 0.1))
        raise AssertionError("it goes on until something is returned or raised")

    def _create(self) -> Any:
        import lance  # here, since it loads a large library that a qdrant store does not need

        lance.write_dataset(self._schema.empty_table(), self._uri, mode="create", storage_options=self._options)
        return self._newest()

    def _newest(self) -> Any:
        import lance

        if self._opened is None:
            fs, path = reach(self._uri)
            fs.invalidate_cache()
            if not fs.exists(f"{path}/_versions"):
                self._require_nothing(fs, path)
                return None
            if self._session is None:
                self._session = lance.Session(  # pyright: ignore[reportPrivateImportUsage]
                    index_cache_size_bytes=CACHE_BYTES, metadata_cache_size_bytes=CACHE_BYTES
                )
            opened = lance.dataset(self._uri, storage_options=self._options, session=self._session)
            if not opened.schema.equals(self._schema, check_metadata=True):
                raise StoreError(
                    f"{self._uri}: written by another version of distill-ray; `pairs export` it with that version, "
                    "or name another serve.collect.store.collection"
                )
            self._opened = opened
        else:
            self._opened.checkout_latest()
        return self._opened

    def _require_nothing(self, fs: Any, path: str) -> None:
        """Where no dataset is, there has to be nothing else: what is damaged is not empty, and never written over."""
        if isinstance(fs, LocalFileSystem):
            for place in (Path(path), *Path(path).parents):
                if place.is_file():
                    raise StoreError(
                        f"{place}: a file, where a folder of the store of pairs belongs; is serve.collect.store right?"
                    )
        if fs.exists(f"{path}/data"):
            raise StoreError(
                f"{self._uri}: damaged: it has data and no _versions, which say what of it counts (half copied, "
                "half restored?); put it back whole, or name another serve.collect.store.collection"
            )

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except StoreError:
            raise
        except Exception as error:  # lance raises OSError, ValueError or RuntimeError, an object store's client its own
            self._opened = None
            why = _PLACE.sub("", first_line(error))
            if _REFUSED in why:
                error = refused("what was asked", self._uri)
            if isinstance(error, ObjectStoreError):
                raise StoreError(f"serve.collect.store: {self._uri}: cannot use the store of pairs: {error}") from error
            raise StoreError(
                f"{self._uri}: cannot use the store of pairs ({why}); check serve.collect.store, the folder's "
                "permissions and the disk's space"
            ) from error


def _sql(where: Selection) -> str | None:
    parts = []
    if where.ids is not None:
        parts.append(_one_of(where.ids))
    if where.owner is not None:
        parts.append(f"owner = {_quoted(where.owner)}")
    if where.indexed is not None:
        parts.append(f"indexed = {'true' if where.indexed else 'false'}")
    if where.until is not None:
        parts.append(f"batch <= {where.until:d}")
    return " AND ".join(parts) or None


def _one_of(ids: tuple[str, ...] | list[str]) -> str:
    return f"pair_id IN ({', '.join(map(_quoted, ids))})" if ids else "false"


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
