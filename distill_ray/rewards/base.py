"""What a reward is: texts in, numbers out, in batches. No Ray here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from distill_ray.records import Answered


class Reward(Protocol):
    """A function of an answer; higher is better."""

    def score(self, batch: Sequence[Answered]) -> list[float]:
        """One number each, in order. NaN where there is none (the row is rejected with that)."""
        ...
