"""From the spools to the store: a drain in every router, one writer behind them all.

    Spool -> Drain (a thread of each router) -> deliver -> Writer (one per store) -> PairStore

`deliver` is `Writer.write`, called here or on another machine. It returns when the store has the pairs; only then does
the spool forget them. While the store is away the drain tries again at longer and longer intervals, and what is
collected meanwhile waits in the spool: no request waits for any of this.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from distill_ray.errors import StoreError
from distill_ray.object_store import ObjectStoreError
from distill_ray.serving.collecting.pairs import Pair
from distill_ray.serving.collecting.spool import Spool
from distill_ray.serving.collecting.store.base import PairStore

T = TypeVar("T")

LONGEST_WAIT_S = 60.0  # between two tries while the store is away
MOST_WRITES = 200  # between two compactions: each leaves a small file, which every later one has to look into


class Writer:
    """The one that adds to a store. Thread-safe; its methods block.

    Args:
        open_store: makes a connection; called again when one has failed.
        compact_s: seconds between two compactions at most.
        clock: seconds.
    """

    def __init__(
        self, open_store: Callable[[], PairStore], compact_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._open_store = open_store
        self._compact_s = compact_s
        self._clock = clock
        self._lock = threading.Lock()
        self._store: PairStore | None = None
        self._compact_at, self._num_writes = clock() + compact_s, 0
        self.num_stored = 0
        """New pairs."""
        self.num_passed_over = 0
        """Pairs that were there already, or are deleted."""
        self.num_failures = 0
        """Times that the store could not be used, though it was tried twice."""
        self.num_compactions = 0

    def write(self, pairs: Sequence[Pair]) -> int:
        """Add pairs; returns how many are new. Compacts afterwards where that is due.

        Raises:
            StoreError: they are not stored, as far as is known; to add them again is safe.
        """
        with self._lock:
            num_new = self._with_store(lambda store: store.add(pairs))
            self.num_stored += num_new
            self.num_passed_over += len(pairs) - num_new
            self._num_writes += 1
            if self._num_writes >= MOST_WRITES or self._clock() >= self._compact_at:
                self._compact()
            return num_new

    def _compact(self) -> None:
        self._compact_at, self._num_writes = self._clock() + self._compact_s, 0
        try:
            self._with_store(lambda store: store.compact())
        except StoreError:
            return  # counted; the pairs are stored, and the next time will do
        self.num_compactions += 1

    def _with_store(self, use: Callable[[PairStore], T]) -> T:
        """Twice at most, the second time with a new connection: the old one may be all that is wrong."""
        try:
            try:
                return use(self._connected())
            except StoreError as error:
                if isinstance(error.__cause__, ObjectStoreError):  # asked long enough, and without a connection
                    raise
                self._disconnect()
                return use(self._connected())
        except StoreError:
            self._disconnect()
            self.num_failures += 1
            raise

    def _connected(self) -> PairStore:
        if self._store is None:
            self._store = self._open_store()
        return self._store

    def _disconnect(self) -> None:
        store, self._store = self._store, None
        if store is not None:
            store.close()

    def close(self) -> None:
        """Let go of the store."""
        with self._lock:
            self._disconnect()


class Drain:
    """Brings what waits in a spool to the writer, in a thread of its own.

    Args:
        spool: of this process.
        deliver: raises (whatever it likes) where the pairs are not stored.
        batch: pairs delivered together.
        flush_s: seconds that a pair waits for others at most.
        failed: is told of each failure, in the drain's thread.
    """

    def __init__(
        self,
        spool: Spool,
        deliver: Callable[[list[Pair]], object],
        batch: int,
        flush_s: float,
        failed: Callable[[Exception], None],
    ) -> None:
        self._spool = spool
        self._deliver = deliver
        self._failed = failed
        self._batch = batch
        self._flush_s = flush_s
        self._failures_in_a_row = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="spool-drain", daemon=True)
        self.num_delivered = 0

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def close(self, timeout_s: float = 5.0) -> None:
        """Deliver once more what waits, if that can be done in time; what cannot waits for the next process."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def flush(self) -> bool:
        """Deliver all that waits now; False where it could not be."""
        try:
            self._spool.inherit()
            # Smaller after each failure: it may be the size of the message that does not go through.
            while pairs := (taken := self._spool.take(max(1, self._batch >> self._failures_in_a_row))).pairs:
                self._deliver(pairs)
                self._spool.ack(taken)
                self.num_delivered += len(pairs)
                self._failures_in_a_row = 0
        except Exception as error:  # of store, way or disk: the pairs are in the spool all the same
            self._failures_in_a_row += 1
            self._failed(error)
            return False
        return True

    @property
    def wait_s(self) -> float:
        """Seconds until the next try."""
        if not self._failures_in_a_row:
            return self._flush_s
        wait_s = min(LONGEST_WAIT_S, self._flush_s * 2.0 ** min(self._failures_in_a_row, 32))
        return wait_s * random.uniform(0.5, 1.0)  # so that all the routers do not come back at once

    def _run(self) -> None:
        while not self._stop.wait(self.wait_s):
            self.flush()
        self.flush()
