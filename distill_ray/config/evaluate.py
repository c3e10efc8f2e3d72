"""`evaluate:` student against teacher on held-out rows."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from distill_ray.config.base import Config
from distill_ray.config.engine import EngineConfig
from distill_ray.config.reward import JudgeRewardConfig
from distill_ray.plugins import Group, Name

Metric = Annotated[
    Literal["exact_match", "agreement", "token_f1", "equation", "reward", "win_rate", "loss"] | str,
    Name(Group.METRICS),
]


class EvaluateConfig(Config):
    """What is measured on the `test` split, and how."""

    metrics: list[Metric] = ["exact_match", "agreement", "token_f1", "reward", "loss"]
    """exact_match: against `reference`, else the teacher. agreement: with the teacher. token_f1: word overlap.
    equation: both come to the same number. reward: of `recipe.reward`, where the recipe has one (no judge).
    win_rate: how often a judge prefers the student's answer to the teacher's, each pair shown in both orders; for
    answers of which none is the right one. loss: mean nats per token on the teacher's answers."""

    judge: EngineConfig | None = None
    """For `win_rate`: another model than the teacher, if you can, for models prefer their own words. Default: the
    teacher."""

    judge_prompt: str | None = None
    """Sandboxed Jinja over `query`, `a` and `b`, that asks for [[A]], [[B]] or [[C]]. Default: that of a comparing
    `recipe.reward`."""

    reference: str | None = None
    """Column with the gold answer."""

    engine: Literal["vllm", "hf"] = "vllm"
    """What answers for the student: vLLM, or plain transformers (small models on CPU, encoder-decoder models)."""

    max_tokens: Annotated[int, Field(ge=1)] | None = None
    """Most new tokens of a student answer. Default: the teacher's `sampling.max_tokens`."""

    max_rows: Annotated[int, Field(ge=1)] | None = None
    """Evaluate at most so many test rows (the first by row id)."""

    bootstrap: Annotated[int, Field(ge=100)] = 2000
    """Resamples of rows behind each 95 % interval."""

    worst: Annotated[int, Field(ge=0)] = 20
    """How many of the worst examples the report shows."""

    seed: int = 0
    """Of the bootstrap."""

    @property
    def comparison(self) -> JudgeRewardConfig:
        """What a judge is asked for `win_rate`."""
        return JudgeRewardConfig(mode="comparison", prompt=self.judge_prompt)
