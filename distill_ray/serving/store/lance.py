"""Pairs in a Lance dataset: a folder or an object store, nothing to run. The default.

    URL/pairs.lance             the pairs; `lancedb.connect(URL)` opens it too
    URL/pairs_deletions.lance   what was deleted, append-only

Lance keeps old versions of a dataset. A deletion rewrites the files that held the pairs and drops the versions that
still did; the scheduled compaction drops those older than an hour. Through `lance` itself: `lancedb` takes two seconds
to import and adds nothing that is needed here.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterator
from typing import Any

import fsspec
import pyarrow as pa

from distill_ray.errors import StoreError
from distill_ray.serving.pairs import PAIR_SCHEMA
from distill_ray.serving.store.base import Deletion, PairStore, Selection, newest_batch

IDS_PER_QUERY = 10_000
KEPT_VERSIONS = datetime.timedelta(hours=1)  # readers of an older one may still be at it

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

    def _insert(self, table: pa.Table) -> int:
        with self._pairs.written() as dataset:
            done = dataset.merge_insert("pair_id").when_not_matched_insert_all().execute(table)
            return int(done["num_inserted_rows"])

    def _count(self, where: Selection) -> int:
        with self._pairs.read() as dataset:
            return 0 if dataset is None else int(dataset.count_rows(_sql(where)))

    def _scan(self, where: Selection, columns: list[str], batch_rows: int) -> Iterator[pa.RecordBatch]:
        with self._pairs.read() as dataset:
            if dataset is not None:
                yield from dataset.to_batches(columns=columns, filter=_sql(where), batch_size=batch_rows)

    def _remove(self, ids: list[str]) -> None:
        with self._pairs.read() as dataset:
            if dataset is None:
                return
            for start in range(0, len(ids), IDS_PER_QUERY):
                dataset.delete(_one_of(ids[start : start + IDS_PER_QUERY]))

    def _purge(self) -> None:
        with self._pairs.read() as dataset:
            if dataset is not None:
                dataset.optimize.compact_files(materialize_deletions=True, materialize_deletions_threshold=0.0)
                dataset.cleanup_old_versions(datetime.timedelta(0))

    def _mark(self, ids: list[str], bundle: str) -> int:
        marks = pa.table({"pair_id": ids, "indexed": [True] * len(ids), "indexed_by": [bundle] * len(ids)})
        with self._pairs.read() as dataset:
            if dataset is None:
                return 0
            merge = dataset.merge_insert("pair_id").when_matched_update_all("target.indexed = false")
            return int(merge.execute(marks)["num_updated_rows"])

    def _unmark(self, bundle: str) -> int:
        with self._pairs.read() as dataset:
            if dataset is None:
                return 0
            changes = {"indexed": "false", "indexed_by": "NULL"}
            return int(dataset.update(changes, where=f"indexed_by = {_quoted(bundle)}")["num_rows_updated"])

    def _last_batch(self) -> int:
        with self._pairs.read() as dataset:
            return 0 if dataset is None else newest_batch(dataset.to_batches(columns=["batch"]))

    def _log(self, deletion: Deletion) -> None:
        record = {name: getattr(deletion, name) for name in DELETION_SCHEMA.names}
        with self._deletions.written() as dataset:
            dataset.insert(pa.Table.from_pylist([record], schema=DELETION_SCHEMA), mode="append")

    def _logged(self) -> list[Deletion]:
        with self._deletions.read() as dataset:
            records = [] if dataset is None else dataset.to_table().to_pylist()
        return [Deletion(**{**record, "pair_ids": tuple(record["pair_ids"])}) for record in records]

    def _log_version(self) -> object:
        with self._deletions.read() as dataset:
            return 0 if dataset is None else dataset.version

    def _compact(self) -> None:
        with self._pairs.read() as dataset:
            if dataset is not None:
                dataset.optimize.compact_files()
                dataset.create_scalar_index("pair_id", "BTREE", replace=True)  # a pair is looked up before it is added
                dataset.cleanup_old_versions(KEPT_VERSIONS)


class _Dataset:
    """A dataset that comes into being with its first row. Its errors become ours here."""

    def __init__(self, uri: str, schema: pa.Schema) -> None:
        self._uri, self._schema = uri, schema
        # Who names an endpoint without TLS (MinIO beside the service) means it; lance wants to be told so again.
        has_tls = not os.environ.get("AWS_ENDPOINT_URL", "").startswith("http://")
        self._options = None if has_tls or "://" not in uri else {"allow_http": "true"}
        self._opened: Any = None

    @contextlib.contextmanager
    def read(self) -> Iterator[Any]:
        """The newest version; None where nothing was ever written."""
        with self._translated():
            yield self._newest()

    @contextlib.contextmanager
    def written(self) -> Iterator[Any]:
        """The newest version, made if need be."""
        import lance  # here, since it loads a large library that a qdrant store does not need

        with self._translated():
            if self._newest() is None:
                self._opened = lance.write_dataset(
                    self._schema.empty_table(), self._uri, mode="create", storage_options=self._options
                )
            yield self._opened

    def _newest(self) -> Any:
        import lance

        if self._opened is None:
            fs, path = fsspec.core.url_to_fs(self._uri)
            fs.invalidate_cache()
            if not fs.exists(f"{path}/_versions"):
                return None
            opened = lance.dataset(self._uri, storage_options=self._options)
            if not opened.schema.equals(self._schema, check_metadata=True):
                raise StoreError(
                    f"{self._uri}: written by another version of distill-ray; `pairs export` it with that version, "
                    "or name another serve.collect.store.collection"
                )
            self._opened = opened
        else:
            self._opened.checkout_latest()
        return self._opened

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except StoreError:
            raise
        except Exception as error:  # lance raises OSError, ValueError or RuntimeError, an object store's client its own
            self._opened = None
            why = (str(error).strip().splitlines() or [type(error).__name__])[0]
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
