"""When does what second looks find break a bundle's error budget? No files, no clock.

    looks at the student in service -> share of bad ones above the budget, for certain -> raise the threshold
                                    -> again                                           -> go back

Calibration promised a share of worse answers for requests like the measured ones. A bound that holds at any time
(`anytime.exceeded_since`) says when that promise is broken: a student that keeps its budget, however tightly, is ever
acted upon with probability 1 - confidence at most, however long it serves.

The new threshold is the lowest one above which looks were within the budget, those of the bad stretch and all of them,
LEAST_LEFT or more. So few show little; but what may go wrong above it is little too, and the second break comes soon.
Where there is no such threshold, and at the second break, the bundle is gone back from. After each action looks count
anew, and only those above the new threshold do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from distill_ray.serving.calibration.anytime import STRETCH, exceeded_since, highest_bound

LEAST_LEFT = 5  # looks above a new threshold
WINDOW = 10 * STRETCH  # looks that are kept; a multiple of STRETCH


@dataclass(frozen=True, slots=True)
class Action:
    """What is to be done about the current bundle, and why."""

    what: Literal["raise", "rollback"]
    threshold: float | None
    """The new one, to raise to."""

    looks: int
    """In the stretch that shows it."""

    bad: int
    """Of these."""

    bound: float
    """Lower bound of the share of bad ones."""


class DriftWatch:
    """What looks at one bundle's student have found since it was last acted upon.

    Args:
        budget: share of bad ones that was promised.
        confidence: with which it is broken before anything is done.
        floor: threshold that it was raised to; None: it was not.
    """

    def __init__(self, budget: float, confidence: float, floor: float | None = None) -> None:
        self.budget, self.confidence, self.floor = budget, confidence, floor
        self._scores: list[float] = []
        self._bad: list[bool] = []
        self._num_before = 0

    def add(self, score: float, *, good: bool) -> None:
        """Take in a look. One at a request that would not go to the student any more does not count."""
        if self.floor is not None and not score >= self.floor:
            return
        self._scores.append(score)
        self._bad.append(not good)
        if len(self._bad) >= WINDOW + STRETCH:
            del self._scores[:STRETCH], self._bad[:STRETCH]
            self._num_before += STRETCH

    def due(self) -> Action | None:
        """What is to be done; None: nothing. The same again until it is done (`raised`)."""
        bad_N, alpha = np.array(self._bad, dtype=np.float64), 1.0 - self.confidence
        start = exceeded_since(bad_N, self.budget, alpha, self._num_before)
        if start is None:
            return None
        threshold = None if self.floor is not None else self._threshold_within_budget(start)
        return Action(
            "rollback" if threshold is None else "raise",
            threshold,
            looks=len(bad_N) - start,
            bad=int(bad_N[start:].sum()),
            bound=highest_bound(bad_N, alpha, self._num_before),
        )

    def raised(self, floor: float) -> None:
        """The threshold is this now."""
        self.floor = floor
        self._scores, self._bad, self._num_before = [], [], 0

    @property
    def num_looks(self) -> int:
        """That count, the last ones of many."""
        return len(self._bad)

    @property
    def agreement(self) -> float | None:
        """Share of good ones among them; None of none."""
        return 1.0 - sum(self._bad) / len(self._bad) if self._bad else None

    @property
    def agreement_bound(self) -> float:
        """What it has been under, for a while at least, with the confidence asked for."""
        return 1.0 - highest_bound(np.array(self._bad, dtype=np.float64), 1.0 - self.confidence, self._num_before)

    def _threshold_within_budget(self, start: int) -> float | None:
        scores_N, bad_N = np.array(self._scores), np.array(self._bad)
        is_late_N = np.arange(len(bad_N)) >= start
        for threshold in np.unique(scores_N)[1:]:  # the lowest one is where it stands already
            is_left_N = scores_N >= threshold
            left, late = bad_N[is_left_N], bad_N[is_left_N & is_late_N]
            is_within = all(part.mean() <= self.budget for part in (left, late) if len(part))
            if len(left) >= LEAST_LEFT and is_within:
                return float(threshold)
        return None

    def to_json(self) -> dict[str, Any]:
        """For a file; `floor` is kept elsewhere."""
        looks = [[score, int(bad)] for score, bad in zip(self._scores, self._bad, strict=True)]
        return {"num_before": self._num_before, "looks": looks}

    def restore(self, saved: dict[str, Any]) -> None:
        """Go on from `to_json`. Raises KeyError, TypeError, ValueError: it is something else."""
        self._num_before = int(saved["num_before"]) // STRETCH * STRETCH
        self._scores, self._bad = [], []
        for score, bad in saved["looks"]:
            self.add(float(score), good=not bad)
