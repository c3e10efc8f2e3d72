"""The section `flywheel:`: how collected pairs become the next student."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from distill_ray.config.base import Config, FilePath, Pattern, ServerUrl
from distill_ray.config.train import LoraConfig


class CleanConfig(Config):
    """Which pairs a student may learn from. Each that may not has its reason in the cycle's folder."""

    min_chars: Annotated[int, Field(ge=1)] = 1
    """Of an answer."""

    max_chars: Annotated[int, Field(ge=1)] = 32_000
    """Of a conversation's user turns and its answer together."""

    max_age_days: Annotated[float, Field(gt=0)] | None = None
    """Older pairs are not learnt any more: facts change."""

    same_teacher: bool = True
    """Only answers of the teacher that gave the newest one are learnt: two teachers teach two manners."""

    drop: list[Pattern] = []
    """Regular expressions: a pair whose user turns or answer match one is dropped."""

    mask: list[Literal["email", "phone", "key"]] = ["email", "phone", "key"]
    """What looks like one is replaced by <email>, <phone> or <key> before anything is learnt."""

    per_cluster: Annotated[int, Field(ge=1)] = 10
    """Most pairs of one near-duplicate cluster: somebody who sends one thing over and over teaches it once."""

    owner_share: Annotated[float, Field(gt=0, le=1)] = 0.8
    """Most of what is learnt that may come from one owner, where there are several."""

    min_owners: Annotated[int, Field(ge=1)] = 1
    """Owners that a cycle takes: with 2 or more, one alone cannot say what everybody's student learns."""

    @model_validator(mode="after")
    def _something_is_left(self) -> CleanConfig:
        if self.max_chars < self.min_chars:
            raise ValueError(
                f"max_chars: {self.max_chars}, and an answer alone has min_chars: {self.min_chars} or more, so no pair "
                f"would be left; give max_chars {self.min_chars} or more"
            )
        return self


class RayTrainerConfig(Config):
    """Here, as `distill-ray train` does it: with the sections `student` and `train`."""

    type: Literal["ray"] = "ray"


class OpenAITrainerConfig(Config):
    """The fine-tuning API of a vendor: upload, job, poll. The service then asks the resulting model there."""

    type: Literal["openai"] = "openai"

    model: Annotated[str, Field(min_length=1)]
    """The vendor's base model."""

    base_url: ServerUrl = "https://api.openai.com/v1"
    """The API, up to and including /v1."""

    api_key_env: str | None = "OPENAI_API_KEY"
    """Name of the environment variable with the key; null for a server that asks for none. Never the key itself."""

    hyperparameters: dict[str, Any] = {}
    """Of supervised fine-tuning, as the vendor names them, for example {n_epochs: 3}. Empty: the vendor chooses."""

    suffix: Annotated[str, Field(min_length=1, max_length=64)] | None = None
    """Part of the resulting model's name."""

    extra_body: dict[str, Any] = {}
    """Sent with the job as it is, for what only this vendor knows: {seed: 1}."""

    poll_s: Annotated[float, Field(gt=0)] = 30.0
    """Seconds between two looks at the job."""

    timeout_s: Annotated[float, Field(gt=0)] = 300.0
    """Seconds that one request waits for the vendor to say something."""


TrainerConfig = Annotated[RayTrainerConfig | OpenAITrainerConfig, Field(discriminator="type")]


class GateConfig(Config):
    """What a candidate has to show before it may serve."""

    margin: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """How much worse than the current student it may be at most: on the new held-out pairs, on those of earlier
    cycles, and on both together."""

    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.95
    """With which that is to be shown."""

    min_pairs: Annotated[int, Field(ge=1)] = 100
    """Held-out requests without near-duplicates that a verdict takes; with fewer nothing is trained. A threshold may
    take more: 118 with the default `calibrate.error_budget` and `calibrate.confidence`."""

    regressions: FilePath | None = None
    """JSON lines of prompts that every student has to answer rightly: {"text" or "messages": ..., and one of "equals",
    "contains", "matches", "lacks": ...}."""

    cluster_floor: Annotated[float, Field(ge=0, le=1)] = 0.8
    """A cluster of requests stays with the teacher where a smaller share of the student's answers is as good."""

    cluster_pairs: Annotated[int, Field(ge=1)] = 5
    """Held-out requests that a cluster takes; with fewer it stays with the teacher."""


class ShadowConfig(Config):
    """The candidate answers real requests too, unseen by clients, before it may serve."""

    share: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Of the requests that it would get."""

    pairs: Annotated[int, Field(ge=1)] = 200
    """Answers to compare at most; it ends before that where the bound is clear."""

    max_tokens: Annotated[int, Field(ge=0)] = 100_000
    """Teacher tokens spent on requests that the teacher would not have answered."""

    timeout_s: Annotated[float, Field(gt=0)] = 86_400.0
    """Seconds after which the candidate is not promoted, for lack of traffic."""


class FlywheelConfig(Config):
    """From collected pairs to a promoted student: what one cycle does."""

    min_pairs: Annotated[int, Field(ge=1)] = 1000
    """Pairs stored since the last cycle that the next one takes; with fewer it ends at once. Nothing is trained either
    where those held out cannot show enough (`gate.min_pairs`, `calibrate.error_budget`)."""

    clean: CleanConfig = CleanConfig()
    """Which pairs may be learnt from."""

    holdout: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Share of the pairs that no student is ever trained on, by near-duplicate cluster."""

    evaluation: list[FilePath] = []
    """Files (JSON lines, CSV, Parquet) whose requests stay unlearnt, and whatever is nearly the same: your own
    evaluation sets."""

    evaluation_column: str = "text"
    """Their column with the request."""

    replay: Annotated[float, Field(ge=0)] = 0.5
    """Older pairs that are learnt again, as a share of the new ones: against forgetting."""

    start_from: Literal["current", "base"] = "current"
    """current: the student in service learns on. base: `student.model` learns from scratch, so raise `replay`."""

    lora: LoraConfig | None = LoraConfig()
    """Adapters, whatever `student.lora` says; null trains all weights. On a student with all weights trained they are
    merged into them."""

    trainer: TrainerConfig = RayTrainerConfig()
    """Who trains."""

    gate: GateConfig = GateConfig()
    """What a candidate has to show."""

    shadow: ShadowConfig | None = None
    """A trial on real traffic, where given."""

    keep_bundles: Annotated[int, Field(ge=2)] = 5
    """Bundles that stay installed."""
