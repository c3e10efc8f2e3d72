"""`generate:` limits and sizes of the generation stage. The defaults fit most runs."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from distill_ray.config.base import Config


class GenerateConfig(Config):
    """How generation is cut into partitions, and when it stops early."""

    max_reject_frac: Annotated[float, Field(ge=0, le=1)] = 0.1
    """The run stops when more than this share of rows is rejected. `duplicate` rows do not count."""

    max_teacher_tokens: Annotated[int, Field(ge=1)] | None = None
    """Stop paying after so many prompt + completion tokens; the rows left are rejects (`token_budget`) that the next
    run takes up again."""

    rows_per_partition: Annotated[int, Field(ge=1)] = 2000
    """A partition is the unit of resume and output. Their number is fixed when a run folder is first planned."""

    flush_s: Annotated[float, Field(gt=0)] | None = None
    """Seconds between writes of finished calls to the ledger. Default: 0.1 on a local disk, 5 on an object store."""
