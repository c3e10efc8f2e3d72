"""The counter of a running generation: one small Ray actor that workers report to and that says when to stop."""

from __future__ import annotations

import time
from collections import Counter, deque
from typing import Any

from distill_ray.errors import TooManyRejects
from distill_ray.records import RejectReason

RECENT_S = 10.0  # over which the speed is taken
_SUMMED = ("rows", "calls", "replayed", "paid_tokens")


class Tally:
    """Counts rows, calls, tokens and rejects of one run.

    Args:
        rows_in: planned rows.
        max_reject_frac: stop when more than this share of all rows is rejected.
        max_tokens: stop paying after so many tokens; None for no limit.
        rejects: of partitions that were finished before.
        rows_done: of partitions that were finished before.
        replayed: answers of partitions that were finished before.
    """

    # A duplicate is what the user asked to drop, a chain that is not accepted what a reward is there for; rows behind
    # the token budget are only postponed.
    NOT_COUNTED = frozenset(
        reason.value for reason in (RejectReason.DUPLICATE, RejectReason.NOT_ACCEPTED, RejectReason.TOKEN_BUDGET)
    )

    def __init__(
        self,
        rows_in: int,
        max_reject_frac: float,
        max_tokens: int | None,
        rejects: dict[str, int],
        rows_done: int,
        replayed: int = 0,
    ) -> None:
        self._rows_in, self._max_reject_frac, self._max_tokens = rows_in, max_reject_frac, max_tokens
        self._finished_rows = rows_done
        self._finished_answers = replayed
        # Sums are kept, not made at each report: of tens of thousands of partitions, thousands report every second.
        self._partitions: dict[int, dict[str, Any]] = {}
        self._sums = Counter[str]()
        self._rejects = Counter(rejects)
        self._ready_at: list[float] = []  # of each engine
        self._created = time.monotonic()
        self._engine_start_s = 0.0
        self._work_s = 0.0
        self._samples: list[str] = []
        self._retries: dict[str, int] = {}
        self._recent: deque[tuple[float, int]] = deque()

    def engine_started(self) -> None:
        """One more engine is ready."""
        self._ready_at.append(time.monotonic())
        self._engine_start_s = self._engine_start_s or self._ready_at[0] - self._created

    def report(self, partition: int, figures: dict[str, Any], samples: list[str], retries: tuple[str, int]) -> bool:
        """Take the figures of one partition so far (they replace earlier ones: a restarted partition counts once).

        Args:
            partition: its index.
            figures: `worker.Figures` as a dict.
            samples: a few rejects as lines for people.
            retries: the worker, and what its engine asked again so far.

        Returns:
            Whether the token budget is spent.

        Raises:
            TooManyRejects: so many rows are rejected that the run cannot end well.
        """
        self._replace(partition, figures)
        self._retries[retries[0]] = retries[1]
        self._samples = (self._samples + samples)[:3]
        now = time.monotonic()
        self._work_s = now - self._created - self._engine_start_s
        self._recent.append((now, self._sums["paid_tokens"]))
        while now - self._recent[0][0] > RECENT_S:
            self._recent.popleft()
        counted = sum(n for reason, n in self._rejects.items() if reason not in self.NOT_COUNTED)
        if counted > self._max_reject_frac * self._rows_in:
            raise TooManyRejects(
                self.message(counted, self._rows_in, self._max_reject_frac, self._rejects, self._samples)
            )
        return self._max_tokens is not None and self._sums["paid_tokens"] >= self._max_tokens

    def state(self) -> dict[str, Any]:
        """For the progress display."""
        now = time.monotonic()
        (t0, n0), (t1, n1) = (self._recent[0], self._recent[-1]) if self._recent else ((0.0, 0), (0.0, 0))
        return {
            "rows": self._finished_rows + self._sums["rows"],
            "calls": self._sums["calls"],
            "replayed": self._finished_answers + self._sums["replayed"],
            "tokens_per_second": (n1 - n0) / (t1 - t0) if t1 > t0 else 0.0,
            "rejects": {reason: count for reason, count in self._rejects.most_common() if count},
            "engines": len(self._ready_at),
            "engine_retries": sum(self._retries.values()),
            "engine_start_s": round(self._engine_start_s, 2),  # until the first engine was ready
            "work_s": round(self._work_s, 2),  # from then on
            # What is rented counts from when it starts, for which all are taken to need as long as the first one.
            "engine_seconds": round(sum(now - ready + self._engine_start_s for ready in self._ready_at), 2),
            "working_seconds": round(sum(now - ready for ready in self._ready_at), 2),
        }

    def _replace(self, partition: int, figures: dict[str, Any]) -> None:
        before = self._partitions.get(partition)
        for key in _SUMMED:
            self._sums[key] += figures[key] - (before[key] if before else 0)
        self._rejects.update(figures["rejects"])
        self._rejects.subtract(before["rejects"] if before else {})
        self._partitions[partition] = figures

    @staticmethod
    def message(
        counted: int, rows_in: int, limit: float, rejects: dict[str, int] | Counter[str], samples: list[str]
    ) -> str:
        """What a person needs to know when too many rows are rejected."""
        reasons = ", ".join(f"{reason} {count}" for reason, count in Counter(rejects).most_common() if count)
        shown = "".join(f"\n  e.g. {sample}" for sample in samples)
        return (
            f"{counted} of {rows_in} rows were rejected ({reasons}), more than generate.max_reject_frac {limit} "
            f"allows.{shown}\n  Look with `distill-ray preview`, mend the cause or raise generate.max_reject_frac, "
            "and run the same command again: calls already paid for are kept"
        )
