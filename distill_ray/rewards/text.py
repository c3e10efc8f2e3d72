"""Rewards that need no model."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import regex

from distill_ray.config.reward import LengthRewardConfig, RegexRewardConfig
from distill_ray.records import Answered

LIMIT_S = 2.0


class RegexReward:
    """Number of matches x score."""

    def __init__(self, config: RegexRewardConfig) -> None:
        self._config = config
        self._pattern = regex.compile(config.pattern)

    def score(self, batch: Sequence[Answered]) -> list[float]:
        """One number per answer; NaN where the pattern takes too long."""
        return [self._score(item.answer) for item in batch]

    def _score(self, text: str) -> float:
        matches = self._pattern.finditer(text, timeout=LIMIT_S, concurrent=True)
        try:
            return self._config.score * sum(1 for _ in itertools.islice(matches, self._config.most))
        except TimeoutError:
            return float("nan")


class LengthReward:
    """Minus the distance from the best length."""

    def __init__(self, config: LengthRewardConfig) -> None:
        self._config = config

    def score(self, batch: Sequence[Answered]) -> list[float]:
        """One number per answer."""
        return [-float(abs(self._length(item.answer) - self._config.target)) for item in batch]

    def _length(self, text: str) -> int:
        return len(text.split()) if self._config.unit == "words" else len(text)
