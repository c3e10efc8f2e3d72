"""Nobody: in the teacher's place where a recipe's answers are in the data."""

from __future__ import annotations

from collections.abc import Sequence

from distill_ray.config.engine import NoEngineConfig, SamplingConfig
from distill_ray.engines.base import Engine
from distill_ray.errors import ConfigError
from distill_ray.records import Completion, Message


class NoEngine(Engine):
    """Never started, never asked."""

    identity = "none:"

    def __init__(self, config: NoEngineConfig) -> None:
        self.config = config

    async def start(self) -> None:
        """Raise: something asks for a teacher after all."""
        raise ConfigError("teacher: this recipe asks a teacher, and teacher.type is `none`; name one")

    async def generate(
        self, messages: Sequence[Message], sampling: SamplingConfig, *, first_sample: int = 0
    ) -> list[Completion]:
        """See `start`."""
        await self.start()
        return []

    async def close(self) -> None:
        """Nothing to free."""
