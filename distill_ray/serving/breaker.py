"""After failures, nobody waits for the one that fails: requests go elsewhere until it has been looked at.

Requests never try it out: whoever watches (`replica`) looks whether it is up, after a rest that grows while failures
go on.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

FAILURES, MISSES = 3, 2
REST_S, LONGEST_REST_S = 5.0, 120.0


class Breaker:
    """Counts failures in a row.

    Args:
        failures: so many and it opens.
        clock: seconds, monotonic.
    """

    def __init__(self, failures: int = FAILURES, clock: Callable[[], float] = time.monotonic) -> None:
        self._most, self._clock = failures, clock
        self._in_a_row = self._openings = self._missed = 0
        self._rests_until = 0.0
        self._opened = asyncio.Event()

    @property
    def is_open(self) -> bool:
        """Nobody should be sent there."""
        return self._opened.is_set()

    async def opening(self) -> None:
        """Returns when it opens: who still waits for an answer need not go on."""
        await self._opened.wait()

    @property
    def is_due(self) -> bool:
        """It is open and has rested: somebody should look."""
        return self.is_open and self._clock() >= self._rests_until

    def succeeded(self) -> None:
        """It answered a request."""
        self._in_a_row = self._openings = 0

    def failed(self, *, is_gone: bool = False) -> None:
        """It did not. `is_gone`: its process is not there, so the next request would not be answered either."""
        self._in_a_row += 1
        if self.is_open or not (is_gone or self._in_a_row >= self._most):
            return
        self._opened.set()
        rest_s = 0.0 if is_gone else min(LONGEST_REST_S, REST_S * 2.0**self._openings)
        self._openings += 1
        self._rests_until = self._clock() + rest_s

    def looked(self, *, is_up: bool) -> None:
        """Somebody looked. If it is up, requests go there again; the first failures open it for longer.

        Not up once may be a busy machine; twice, and nobody is sent there.
        """
        self._missed = 0 if is_up else self._missed + 1
        if is_up:
            self._opened.clear()
            self._in_a_row = 0
        elif self._missed >= MISSES:
            self.failed(is_gone=True)
