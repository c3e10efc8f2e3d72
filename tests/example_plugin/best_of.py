"""Five parts of one's own: the best of n answers is learnt, from TOML files, with a parrot for a teacher."""

from __future__ import annotations

import asyncio
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, BinaryIO, Literal

from pydantic import Field

from distill_ray.config import BaseEngineConfig, BaseRecipeConfig, BaseRewardConfig, RewardConfig, SamplingConfig
from distill_ray.engines import Engine
from distill_ray.plugins import Plugin
from distill_ray.recipes import Engines
from distill_ray.recipes.answers import checked_text, good_ones
from distill_ray.recipes.template import TextTemplate
from distill_ray.records import Answered, Completion, Example, Message, Reject, Row


class BestOfConfig(BaseRecipeConfig):
    """The best of several answers, by a reward."""

    type: Literal["best_of"] = "best_of"

    query: str = "{{ text }}"
    """What teacher and student are asked."""

    samples: Annotated[int, Field(ge=1)] = 4
    """Answers of the teacher per row."""

    reward: RewardConfig
    """What says which is best: any reward, built in or not."""


class BestOfRecipe:
    """Rejection sampling: n answers, of which the student learns the one with the highest reward."""

    fingerprint = ""  # what decides the examples beside the config and this package's version: nothing

    def __init__(self, config: BestOfConfig) -> None:
        self.config = config
        self._query = TextTemplate(config.query, key="recipe.query")
        self.columns = dict.fromkeys(self._query.columns, "recipe.query")

    def query(self, columns: Mapping[str, object]) -> str:
        return self._query.render(columns)

    def teacher_messages(self, row: Row) -> list[Message]:
        return [*row.history, {"role": "user", "content": row.query}]

    def student_messages(self, row: Row) -> list[Message]:
        return self.teacher_messages(row)

    async def distill(self, row: Row, engines: Engines) -> list[Example] | Reject:
        assert engines.reward is not None
        messages = self.teacher_messages(row)
        samples = await engines.teacher.generate(messages, self.config.samples)
        texts = good_ones(samples, lambda sample: checked_text(sample, refusals=[]))  # RowError: a reject
        scores = await asyncio.gather(*(engines.reward.score(Answered(tuple(messages), text)) for text in texts))
        score, text = max(zip(scores, texts, strict=True))
        example = Example(row.row_id, row.split, messages, text, teacher=engines.teacher.name, reward_after=score)
        return [example]


recipe = Plugin(config=BestOfConfig, make=BestOfRecipe)


class ParrotConfig(BaseEngineConfig):
    """Says what it hears, with more and more at the end."""

    type: Literal["parrot"] = "parrot"

    ending: str = "!"
    """Sample i ends with i of these."""


class Parrot(Engine):
    """An engine without a model."""

    def __init__(self, config: ParrotConfig) -> None:
        self.config = config
        self.identity = f"parrot:{config.model}@{config.ending}"  # all that changes an answer

    async def start(self) -> None:
        """A real one loads its model here."""

    async def generate(
        self, messages: Sequence[Message], sampling: SamplingConfig, *, first_sample: int = 0
    ) -> list[Completion]:
        heard = messages[-1]["content"]
        texts = {i: heard + self.config.ending * i for i in range(first_sample, sampling.n)}
        return [Completion(text, "stop", len(heard), len(text), sample_index=i) for i, text in texts.items()]

    async def close(self) -> None:
        """A real one frees its model here."""


engine = Plugin(config=ParrotConfig, make=Parrot)


class EndingsConfig(BaseRewardConfig):
    """The nearer to `best` endings, the better."""

    type: Literal["endings"] = "endings"

    best: int = 2
    """How many."""


class EndingsReward:
    """Higher is better; one number for each answer of the batch."""

    def __init__(self, config: EndingsConfig) -> None:
        self.config = config

    def score(self, batch: Sequence[Answered]) -> list[float]:
        return [-abs(len(item.answer) - len(item.query) - self.config.best) for item in batch]


reward = Plugin(config=EndingsConfig, make=EndingsReward)


def same_letters(answer: str, expected: str) -> float:
    """1 where both have the same letters, in any order."""
    return float(sorted(filter(str.isalpha, answer)) == sorted(filter(str.isalpha, expected)))


def read_toml(file: BinaryIO) -> Iterator[dict[str, Any]]:
    """A TOML file's [[rows]]."""
    yield from tomllib.load(file)["rows"]
