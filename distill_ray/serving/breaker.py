"""After a few failures in a row, nobody waits for the one that fails, for a while."""

from __future__ import annotations

import time
from collections.abc import Callable

FAILURES = 3
REST_S = 10.0


class Breaker:
    """Counts failures in a row.

    Args:
        failures: so many and it opens.
        rest_s: seconds until one request may try again.
        clock: seconds, monotonic.
    """

    def __init__(
        self, failures: int = FAILURES, rest_s: float = REST_S, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._failures, self._rest_s, self._clock = failures, rest_s, clock
        self._in_a_row, self._closed_at = 0, 0.0

    @property
    def is_open(self) -> bool:
        """Nobody should be sent there now. When the rest is over, one request at a time finds it closed."""
        if self._in_a_row < self._failures:
            return False
        if self._clock() < self._closed_at:
            return True
        self._closed_at = self._clock() + self._rest_s
        return False

    def succeeded(self) -> None:
        """It answered."""
        self._in_a_row = 0

    def failed(self) -> None:
        """It did not."""
        self._in_a_row += 1
        self._closed_at = self._clock() + self._rest_s
