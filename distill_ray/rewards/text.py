"""Rewards that need no model."""

from __future__ import annotations

import math
from collections.abc import Sequence

from distill_ray.config.reward import LengthRewardConfig, RegexRewardConfig
from distill_ray.errors import RowError
from distill_ray.recipes.patterns import count_matches
from distill_ray.records import Answered


class RegexReward:
    """Number of matches x score."""

    def __init__(self, config: RegexRewardConfig) -> None:
        self._config = config

    def score(self, batch: Sequence[Answered]) -> list[float]:
        """One number per answer; NaN where the pattern takes too long."""
        return [self._score(item.answer) for item in batch]

    def _score(self, text: str) -> float:
        try:
            return self._config.score * count_matches(self._config.pattern, text, self._config.most)
        except RowError:
            return math.nan


class LengthReward:
    """Minus the distance from the best length."""

    def __init__(self, config: LengthRewardConfig) -> None:
        self._config = config

    def score(self, batch: Sequence[Answered]) -> list[float]:
        """One number per answer."""
        return [-float(abs(self._length(item.answer) - self._config.target)) for item in batch]

    def _length(self, text: str) -> int:
        return len(text.split()) if self._config.unit == "words" else len(text)
