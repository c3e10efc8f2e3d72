"""The planner's working memory on disk: what occurred before, and rows by partition. A temporary SQLite file.

Nothing here grows in memory: keys are 16-byte hashes in a B-tree, sorting rows into partitions is an index.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from distill_ray.errors import RunFolderError

FLUSH_ROWS = 1000
CACHE_KIB = 64 * 1024


class Scratch:
    """See the module. Use `Scratch.temporary` to get one that is removed afterwards."""

    def __init__(self, path: Path) -> None:
        self._db = sqlite3.connect(path, isolation_level=None)
        # Nothing here has to outlive the process: no journal, no waiting for the disk.
        for pragma in (
            "journal_mode=OFF",
            "synchronous=OFF",
            "locking_mode=EXCLUSIVE",
            f"cache_size=-{CACHE_KIB}",
        ):
            self._db.execute(f"PRAGMA {pragma}")
        self._db.execute("CREATE TABLE seen (key BLOB PRIMARY KEY, times INTEGER, place TEXT) WITHOUT ROWID")
        self._db.execute("CREATE TABLE rows (partition INTEGER, row_id TEXT, record TEXT)")
        self._db.execute("BEGIN")
        self._pending: list[tuple[int, str, str]] = []

    @classmethod
    @contextlib.contextmanager
    def temporary(cls, folder: Path | None) -> Iterator[Scratch]:
        """A new one below `folder` (the system's temporary folder if None), removed at the end.

        Raises:
            RunFolderError: the disk is full.
        """
        if folder is None:
            path = Path(tempfile.mkdtemp(prefix="distill-ray-plan-"))
        else:  # one name, so that what a killed run left is cleared away
            path = folder / ".tmp-plan"
            shutil.rmtree(path, ignore_errors=True)
            path.mkdir(parents=True)
        try:
            scratch = cls(path / "plan.sqlite")
            try:
                yield scratch
            finally:
                scratch._db.close()
        except sqlite3.Error as error:
            raise RunFolderError(f"{path}: cannot sort the input there ({error}); check the disk's space") from error
        finally:
            shutil.rmtree(path, ignore_errors=True)

    def saw(self, kind: str, text: str, place: str) -> tuple[int, str]:
        """Note that `text` occurs at `place`; return how often it did by now, and where first."""
        times, first = self._db.execute(
            "INSERT INTO seen VALUES (?, 1, ?) ON CONFLICT (key) DO UPDATE SET times = times + 1"
            " RETURNING times, place",
            (_key(kind, text), place),
        ).fetchone()
        return times, first

    def place(self, kind: str, text: str) -> str | None:
        """Where `text` occurred first, or None."""
        found = self._db.execute("SELECT place FROM seen WHERE key = ?", (_key(kind, text),)).fetchone()
        return found[0] if found else None

    def add(self, partition: int, row_id: str, record: str) -> None:
        """Keep a row (as text) for its partition."""
        self._pending.append((partition, row_id, record))
        if len(self._pending) >= FLUSH_ROWS:
            self._flush()

    def rows_by_partition(self, num_partitions: int) -> Iterator[tuple[int, Sequence[str]]]:
        """Partition by partition, in order, empty ones too; the rows of each sorted by id."""
        self._flush()
        self._db.execute("CREATE INDEX by_partition ON rows (partition, row_id)")
        for index in range(num_partitions):
            found = self._db.execute("SELECT record FROM rows WHERE partition = ? ORDER BY row_id", (index,))
            yield index, [record for (record,) in found]

    def _flush(self) -> None:
        self._db.executemany("INSERT INTO rows VALUES (?, ?, ?)", self._pending)
        self._pending.clear()


def _key(kind: str, text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16, person=kind.encode()).digest()
