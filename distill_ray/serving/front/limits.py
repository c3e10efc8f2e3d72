"""How much may be asked: an owner's requests in a minute and tokens of the teacher in a day, and what second looks at
answers may spend.

Each router counts its own and learns of the others' when it reports (`Usage.exchange`), so nothing on the way of a
request waits for another process; what the others let through in that second is what the limit can be exceeded by.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable

from distill_ray.config.serve import LimitsConfig
from distill_ray.errors import ApiError

MINUTE, DAY = 60, 86_400
# What is counted, over how many seconds; tokens of looks at a candidate ("shadow") for as long as it is one.
PERIODS = {"requests": MINUTE, "tokens": DAY, "drift": DAY, "shadow": math.inf}

Entry = tuple[str, str, int]  # what, whose (an owner; the candidate's version; "" for drift), start of the period


class Limits:
    """One router's view.

    Args:
        config: `serve.limits`.
        clock: seconds since the epoch.
    """

    def __init__(self, config: LimitsConfig, clock: Callable[[], float] = time.time) -> None:
        self._config, self._clock = config, clock
        self._own: Counter[Entry] = Counter()  # since the last report
        self._all: Counter[Entry] = Counter()  # of everybody, when last reported

    def admit(self, owner: str) -> None:
        """Count a request. Raises ApiError: 429, there were too many in this minute."""
        entry, left = self._entry("requests", owner)
        most = self._config.requests_per_minute
        if most is not None and self._own[entry] + self._all[entry] >= most:
            raise _too_many(f"{most} requests a minute are allowed", left, "rate_limit_exceeded")
        self._own[entry] += 1

    def admit_teacher(self, owner: str) -> None:
        """Raises ApiError: 429, the day's tokens of the teacher are spent."""
        _, left = self._entry("tokens", owner)
        most = self._config.teacher_tokens_per_day
        if most is not None and self.is_spent("tokens", owner, most):
            raise _too_many(f"{most} tokens of the large model a day are allowed", left, "insufficient_quota")

    def is_spent(self, what: str, whose: str, most: int) -> bool:
        """Whether that much was used in this period, as far as this router knows."""
        entry, _ = self._entry(what, whose)
        return self._own[entry] + self._all[entry] >= most

    def spent(self, whose: str, tokens: int, what: str = "tokens") -> None:
        """The teacher's answer took so many."""
        self._own[self._entry(what, whose)[0]] += tokens

    def report(self) -> dict[Entry, int]:
        """What is new since the last report. Counted as everybody's from now on."""
        new, self._own = dict(self._own), Counter()
        self._all.update(new)
        return new

    def learn(self, totals: dict[Entry, int]) -> None:
        """What everybody has used, this router's reports included."""
        self._all = Counter(totals)

    def _entry(self, what: str, whose: str) -> tuple[Entry, float]:
        now, period = self._clock(), PERIODS[what]
        start = 0 if math.isinf(period) else int(now // period * period)
        return (what, whose, start), start + period - now


class Usage:
    """Everybody's reports, added up; kept in one place.

    Args:
        totals: what was kept of an earlier process.
        clock: seconds since the epoch.
    """

    def __init__(self, totals: Iterable[tuple[Entry, int]] = (), clock: Callable[[], float] = time.time) -> None:
        self._totals: Counter[Entry] = Counter(dict(totals))
        self._clock = clock

    def exchange(self, report: dict[Entry, int]) -> dict[Entry, int]:
        """Add a router's report; returns the totals of the running periods."""
        self._totals.update(report)
        now = self._clock()
        for entry in [e for e in self._totals if e[2] + PERIODS.get(e[0], 0) <= now]:
            del self._totals[entry]
        return dict(self._totals)


def _too_many(message: str, wait_s: float, code: str) -> ApiError:
    return ApiError(429, message, "rate_limit_error", code=code, retry_after=max(1.0, wait_s))
