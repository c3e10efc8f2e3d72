"""How many requests a remote server is asked at once: as many as it takes without a 429."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncIterator, Callable


class AdaptiveLimiter:
    """At most `limit` requests in flight: halves on 429, climbs by one per round trip on success.

    Additive increase, multiplicative decrease, as TCP does (Chiu and Jain 1989). A burst of 429s is one
    signal: requests that were admitted before the last cut do not cut again. While a server's Retry-After
    runs, nobody is admitted. First come, first served. Used from one event loop.
    """

    def __init__(self, most: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.most = most
        self.limit = float(most)
        self.num_in_flight = 0
        self._clock = clock
        self._num_admitted = 0
        self._cut_at = 0  # value of _num_admitted at the last cut
        self._paused_until = float("-inf")
        self._timer: asyncio.TimerHandle | None = None
        self._waiting: deque[asyncio.Future[None]] = deque()

    @contextlib.asynccontextmanager
    async def slot(self) -> AsyncIterator[int]:
        """Wait for a place; gives the ticket that `throttled` wants."""
        waiter = asyncio.get_running_loop().create_future()
        self._waiting.append(waiter)
        self._admit()
        try:
            await waiter
        except asyncio.CancelledError:
            if not waiter.cancelled():  # admitted and cancelled in the same turn of the loop
                self._leave()
            raise
        try:
            yield self._next_ticket()
        finally:
            self._leave()

    def succeeded(self) -> None:
        """A request was answered: climb by one place per `limit` answers."""
        self.limit = min(float(self.most), self.limit + 1.0 / self.limit)
        self._admit()

    def throttled(self, ticket: int, pause_s: float = 0.0) -> None:
        """A request met a 429: halve, once per burst, and admit nobody for `pause_s` seconds."""
        if ticket >= self._cut_at:
            self.limit = max(1.0, self.limit / 2)
            self._cut_at = self._num_admitted
        self._paused_until = max(self._paused_until, self._clock() + pause_s)

    def _next_ticket(self) -> int:
        self._num_admitted += 1
        return self._num_admitted - 1

    def _leave(self) -> None:
        self.num_in_flight -= 1
        self._admit()

    def _end_pause(self) -> None:
        self._timer = None
        self._admit()

    def _admit(self) -> None:
        pause_s = self._paused_until - self._clock()
        if pause_s > 0:
            if self._waiting and self._timer is None:
                self._timer = asyncio.get_running_loop().call_later(pause_s, self._end_pause)
            return
        while self._waiting and self.num_in_flight < int(self.limit):
            waiter = self._waiting.popleft()
            if not waiter.done():  # done here means cancelled while waiting
                self.num_in_flight += 1
                waiter.set_result(None)
