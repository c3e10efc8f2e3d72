"""The section `flywheel:`: how collected pairs become the next student."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from distill_ray.config.base import Config, Pattern


class CleanConfig(Config):
    """Which pairs a student may learn from. Each that may not has its reason in the cycle's folder."""

    min_chars: Annotated[int, Field(ge=1)] = 1
    """Of an answer."""

    max_chars: Annotated[int, Field(ge=1)] = 32_000
    """Of a conversation's user turns and its answer together."""

    drop: list[Pattern] = []
    """Regular expressions: a pair whose user turns or answer match one is dropped."""

    mask: list[Literal["email", "phone", "key"]] = ["email", "phone", "key"]
    """What looks like one is replaced by <email>, <phone> or <key> before anything is learnt."""

    per_cluster: Annotated[int, Field(ge=1)] = 10
    """Most pairs of one near-duplicate cluster: somebody who sends one thing over and over teaches it once."""

    owner_share: Annotated[float, Field(gt=0, le=1)] = 0.8
    """Most of what is learnt that may come from one owner, where there are several."""
