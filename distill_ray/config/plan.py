"""`plan:` what is known before anything is rented: GPUs, prices, speeds. `distill-ray plan` reads it, and the report's
costs take the prices that are given."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from distill_ray.config.base import Config

Positive = Annotated[float, Field(gt=0)]
Price = Annotated[float, Field(ge=0)]


class HardwareConfig(Config):
    """The GPU of a kind of node. Numbers that are given here are taken instead of the table's."""

    gpu: str = "A100-80GB"
    """L4, A10G, L40S, A100-40GB, A100-80GB, H100 or H200. Another name needs the four numbers below."""

    memory_gb: Positive | None = None
    """Memory of one GPU that a program sees, in GiB."""

    bf16_tflops: Positive | None = None
    """Peak of dense bf16 matrix products of one GPU, in 10^12 operations per second."""

    bandwidth_gb_per_second: Positive | None = None
    """Of one GPU's memory, in 10^9 bytes per second."""

    price_per_hour: Price | None = None
    """Of one GPU, with its share of the machine. The table has guesses at list prices in US dollars: give your own. The
    report reckons with none but yours. Where it is given, an engine or worker without a GPU counts as one."""

    prompt_tokens_per_second: Positive | None = None
    """Prompt tokens that one replica of the engine reads per second. Default: estimated."""

    completion_tokens_per_second: Positive | None = None
    """Tokens that one replica of the engine writes per second, all its requests together. Default: estimated."""


class PlannedEngineConfig(HardwareConfig):
    """Where an engine will run, or what its API takes."""

    price_per_million_prompt_tokens: Price | None = None
    """Of an `openai` engine."""

    price_per_million_completion_tokens: Price | None = None
    """Of an `openai` engine."""

    def bill(self, prompt_tokens: float, completion_tokens: float) -> float | None:
        """What so many tokens cost; nothing is off for those in a cache. None: one of the prices is not given."""
        prompt, completion = self.price_per_million_prompt_tokens, self.price_per_million_completion_tokens
        if prompt is None or completion is None:
            return None
        return (prompt * prompt_tokens + completion * completion_tokens) / 1e6


class PlannedTrainingConfig(HardwareConfig):
    """Where the student will be trained, and answer when it is evaluated."""

    train_tokens_per_second: Positive | None = None
    """Tokens of prompt and completion that one worker trains on per second. Default: estimated."""


class PlanConfig(Config):
    """What `distill-ray plan` reckons with."""

    teacher: PlannedEngineConfig = PlannedEngineConfig()
    """The teacher's nodes, or its API's prices."""

    judge: PlannedEngineConfig = PlannedEngineConfig()
    """Those of a judge or reward model of its own. The report's costs take a judge's prices."""

    student: PlannedTrainingConfig = PlannedTrainingConfig()
    """The student's nodes."""

    sample_rows: Annotated[int, Field(ge=1)] = 200
    """Rows that are tokenised, spread evenly over the input. All of it is read and counted."""

    completion_tokens: Positive | None = None
    """Tokens of a teacher's answer, on average. Default: `completion_share` of `sampling.max_tokens`."""

    completion_share: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Share of its `max_tokens` that an answer has where nothing better is known: high, so that the bill is not."""
