"""A language model as the reward: a rating in double brackets, or a comparison in both orders.

Zheng et al. 2023 (arXiv 2306.05685, section 3): judges prefer the answer that they see first, so a comparison is asked
twice, the other way round the second time, and averaged.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import NamedTuple, TypeVar

import regex

from distill_ray.config.reward import COMPARISON_PROMPT, JUDGE_PROMPT, JudgeRewardConfig
from distill_ray.errors import ConfigError, RowError
from distill_ray.recipes.answers import show
from distill_ray.recipes.base import Answerer
from distill_ray.recipes.template import TextTemplate
from distill_ray.records import Answered, RejectReason

T = TypeVar("T")

_RATING = regex.compile(r"\[\[\s*(-?\d+(?:\.\d+)?)\s*\]\]")
_VERDICT = regex.compile(r"\[\[\s*([ABC])\s*\]\]")
_SHARE = {"A": 1.0, "B": 0.0, "C": 0.5}  # of the win that the first answer gets


class Verdicts(NamedTuple):
    """Shares of the win of the answer that was shown first, in both orders of a pair."""

    first: float
    second: float

    @property
    def share(self) -> float:
        """Of the win that the pair's first answer gets."""
        return (self.first + 1.0 - self.second) / 2

    @property
    def shown_first(self) -> float:
        """Of the win that went to what was shown first; 0.5 of a judge who does not mind the order."""
        return (self.first + self.second) / 2


class JudgeReward:
    """See the module docstring. Calls go through the ledger like the teacher's.

    Raises:
        ConfigError: the prompt does not compile or does not show what is judged. `key` is its dotted key.
    """

    def __init__(self, config: JudgeRewardConfig, key: str = "recipe.reward.prompt") -> None:
        self._config = config
        default = JUDGE_PROMPT if config.mode == "rating" else COMPARISON_PROMPT
        self._prompt = TextTemplate(config.prompt or default, key=key)
        shown = {"answer"} if config.mode == "rating" else {"a", "b"}
        if missing := shown - self._prompt.columns:
            raise ConfigError(
                f"{key}: a {config.mode} has to show {' and '.join(sorted(missing))} ({{{{ {sorted(missing)[0]} }}}})"
            )

    async def rate(self, item: Answered, judge: Answerer) -> float:
        """The rating of one answer. Raises RowError: none, or one out of range."""
        text = await self._ask(judge, answer=item.answer, query=item.query)
        found = _RATING.findall(text)
        if not found:
            raise RowError(RejectReason.NO_REWARD, f"the judge gives no rating in [[ ]]: {show(text)}")
        rating = float(found[-1])
        if not self._config.lowest <= rating <= self._config.highest:
            raise RowError(
                RejectReason.NO_REWARD,
                f"the judge's rating {rating:g} is not in {self._config.lowest:g}..{self._config.highest:g}",
            )
        return rating

    async def compare(self, first: Answered, second: Answered, judge: Answerer) -> tuple[float, float]:
        """Shares of the win, over both orders; they add up to 1. Raises RowError: a comparison without a verdict."""
        share = (await self.verdicts(first, second, judge)).share
        return share, 1.0 - share

    async def verdicts(self, first: Answered, second: Answered, judge: Answerer) -> Verdicts:
        """What is said in either order. Raises RowError: a comparison without a verdict."""
        one, other = await both(
            self._ask(judge, a=first.answer, b=second.answer, query=first.query),
            self._ask(judge, a=second.answer, b=first.answer, query=first.query),
        )
        return Verdicts(_share(one), _share(other))

    async def rate_both(self, first: Answered, second: Answered, judge: Answerer) -> tuple[float, float]:
        """The ratings of two answers, each by itself. Raises RowError: one has none."""
        return await both(self.rate(first, judge), self.rate(second, judge))

    def prompt(self, **values: str) -> str:
        """What the judge is asked, with these values in it: `query`, and `answer` or `a` and `b`."""
        return self._prompt.render(
            {**values, "lowest": f"{self._config.lowest:g}", "highest": f"{self._config.highest:g}"}
        )

    async def _ask(self, judge: Answerer, **values: str) -> str:
        [answer, *_] = await judge.generate([{"role": "user", "content": self.prompt(**values)}])
        return answer.text


async def both(first: Awaitable[T], second: Awaitable[T]) -> tuple[T, T]:
    """The results of two questions, once both are answered: when one fails, the other's answer is paid for as well."""
    one, other = await asyncio.gather(first, second, return_exceptions=True)
    if isinstance(one, BaseException):
        raise one
    if isinstance(other, BaseException):
        raise other
    return one, other


def _share(text: str) -> float:
    found = _VERDICT.findall(text)
    if not found:
        raise RowError(RejectReason.NO_REWARD, f"the judge gives no verdict [[A]], [[B]] or [[C]]: {show(text)}")
    return _SHARE[found[-1]]
