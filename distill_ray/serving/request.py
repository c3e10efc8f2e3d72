"""A request on its way: what was asked, and what it meets.

`Live` is a bundle and the student that belongs to it. It is read once per request and swapped as a whole, so no request
ever sees student N with index M.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from distill_ray.config import ParseConfig, SamplingConfig
from distill_ray.records import Message
from distill_ray.serving.backends import Backend, Method
from distill_ray.serving.routing.bundle import Bundle
from distill_ray.serving.routing.conversation import RequestKey


class Embeds(Protocol):
    """Turns the text of a request into a vector [D]."""

    async def embed(self, text: str) -> np.ndarray:
        """Raises EmbedderError: it has none. TextTooLong: the embedder would read only its beginning."""
        ...


@dataclass(frozen=True)
class Live:
    """What a request meets, all of one version."""

    bundle: Bundle | None = None
    student: Backend | None = None
    embedder: Embeds | None = None
    ignore: tuple[str, ...] = ()
    context: tuple[Message, ...] = ()
    parse: ParseConfig | None = None
    teacher_sampling: SamplingConfig | None = None

    @property
    def version(self) -> str:
        """Of the bundle."""
        return self.bundle.version if self.bundle is not None else ""


@dataclass(frozen=True)
class Call:
    """A checked request."""

    method: Method
    body: Mapping[str, Any]
    wants: str = "auto"  # auto | teacher | student
    owner: str = ""
    collect_header: str | None = None
    idempotency_key: str | None = None

    @property
    def streams(self) -> bool:
        """Whether the client wants chunks."""
        return bool(self.body.get("stream"))


@dataclass
class Asked:
    """A call on its way: what was found out about it."""

    call: Call
    live: Live
    messages: list[Mapping[str, Any]]  # without the bundle's context
    key: RequestKey
    vector: np.ndarray | None = None
    started: float = field(default_factory=time.monotonic)
