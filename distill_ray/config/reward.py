"""`recipe.reward:` what makes one answer better than another, as a number. One variant a kind of reward."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from distill_ray.config.base import Config, Pattern
from distill_ray.config.engine import EngineConfig, NoEngineConfig, SamplingConfig
from distill_ray.plugins import Group, Variants


class BaseRewardConfig(Config):
    """The base of all rewards, of those from another package (`distill_ray.plugins`) too."""

    if TYPE_CHECKING:
        type: Any  # each variant's own Literal


class ModelRewardConfig(BaseRewardConfig):
    """A model, on actors of its own."""

    model: str
    """A folder, the URL of one in a store, a hub id, `demo-sentiment` or `demo-names`."""

    revision: str | None = None
    """Commit or tag of a hub model."""

    trust_remote_code: bool = False
    """Runs code that ships with the model. Leave it off unless you have read that code."""

    replicas: Annotated[int, Field(ge=1)] = 1
    """Actors that score."""

    gpus: Annotated[int, Field(ge=0, le=1)] = 0
    """GPUs per replica."""

    cpus: Annotated[float, Field(gt=0)] = 1.0
    """CPUs that Ray reserves per replica."""

    node_labels: dict[str, str] = {}
    """Only nodes of the cluster with these labels hold a replica."""

    batch_size: Annotated[int, Field(ge=1)] = 32
    """Texts per forward pass."""


class ClassifierRewardConfig(ModelRewardConfig):
    """A text classifier: the mean of the labels' scores, weighted by their probabilities."""

    type: Literal["classifier"] = "classifier"

    labels: Annotated[dict[str, float], Field(min_length=1)]
    """Score of each label, for example {negative: 0, positive: 1}. Labels that are not here count 0."""

    with_prompt: bool = False
    """Give the classifier the query too, as the first text of a pair."""


class RewardModelConfig(ModelRewardConfig):
    """A scalar reward model (a sequence classifier with one output) over the chat template."""

    type: Literal["reward_model"] = "reward_model"


class EntitiesRewardConfig(ModelRewardConfig):
    """Named entities, fewer is better: minus their number (consecutive pieces of one name count once)."""

    type: Literal["entities"] = "entities"

    labels: Annotated[list[str], Field(min_length=1)] = ["PER"]
    """Kinds of entities that count, without the B- and I- of the tagging scheme."""


class RegexRewardConfig(BaseRewardConfig):
    """A pattern: its number of matches times `score`."""

    type: Literal["regex"] = "regex"

    pattern: Pattern
    """Regular expression."""

    score: float = 1.0
    """Of a match. Negative: matches are bad."""

    most: Annotated[int, Field(ge=1)] = 1
    """Matches that count at most."""

    @field_validator("score")
    @classmethod
    def _tells_answers_apart(cls, value: float) -> float:
        if value == 0:
            raise ValueError("0 makes every reward 0; take a number above 0, or below where matches are bad")
        return value


class LengthRewardConfig(BaseRewardConfig):
    """Length: minus the distance from `target`."""

    type: Literal["length"] = "length"

    target: Annotated[int, Field(ge=0)] = 0
    """The best length. 0: the shorter the better."""

    unit: Literal["words", "characters"] = "words"
    """What is counted."""


JUDGE_PROMPT = """You judge the answer to a question.

Question:
{{ query }}

Answer:
{{ answer }}

How good is the answer: helpful, correct and harmless? Think briefly, then end with your rating from {{ lowest }} (bad)
to {{ highest }} (perfect) in double brackets, for example [[{{ highest }}]]."""

COMPARISON_PROMPT = """You compare two answers to a question.

Question:
{{ query }}

Answer A:
{{ a }}

Answer B:
{{ b }}

Which is better: more helpful, correct and harmless? Think briefly, then end with [[A]], [[B]], or [[C]] for a tie."""


class JudgeRewardConfig(BaseRewardConfig):
    """A language model that rates. Zheng et al. 2023 (arXiv 2306.05685): ratings, or comparisons in both orders."""

    type: Literal["judge"] = "judge"

    engine: EngineConfig | None = None
    """Who judges. Default: the teacher."""

    mode: Literal["rating", "comparison"] = "rating"
    """rating: each answer by itself. comparison: draft against revision in both orders, averaged."""

    prompt: str | None = None
    """Sandboxed Jinja over `query` and `answer` (rating) or `a` and `b` (comparison). It asks for [[n]] or [[A]]."""

    lowest: float = 1.0
    """Of a rating; one outside lowest..highest is no rating."""

    highest: float = 10.0
    """Of a rating."""

    max_tokens: Annotated[int, Field(ge=1)] = 512
    """Of the judge's answer."""

    @model_validator(mode="after")
    def _has_a_scale(self) -> JudgeRewardConfig:
        if self.lowest >= self.highest:
            raise ValueError(f"lowest ({self.lowest:g}) is not below highest ({self.highest:g})")
        if isinstance(self.engine, NoEngineConfig):
            raise ValueError("engine.type none is nobody; name an engine that judges, or leave `engine` out")
        if self.engine is not None and self.engine.sampling != SamplingConfig():
            raise ValueError(
                "engine.sampling: a judge answers at temperature 0 with `max_tokens` of the reward; leave it out"
            )
        return self


RewardConfig = Annotated[
    ClassifierRewardConfig
    | RewardModelConfig
    | EntitiesRewardConfig
    | RegexRewardConfig
    | LengthRewardConfig
    | JudgeRewardConfig
    | BaseRewardConfig,
    Variants(Group.REWARDS),
]
