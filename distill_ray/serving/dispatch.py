"""The life of one request: decide, ask, fall back, keep. Knows no HTTP and no Ray.

    body -> context recognised -> embedded -> decided -> student ------------------------------> pieces
                                                 |          `- fails before its first words -.
                                                 `-> teacher, with context <-----------------'--> pieces, kept

`Live` is what a request meets: a bundle and the student that belongs to it. It is read once per request and swapped as
a whole, so no request ever sees student N with index M.
"""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from distill_ray.serving.router import Bundle, Decision

from distill_ray.config import ParseConfig
from distill_ray.records import Message
from distill_ray.serving.backends import Backend, Method


class Embeds(Protocol):
    """What turns a request's text into a vector."""

    async def embed(self, text: str) -> np.ndarray: ...


@dataclass(frozen=True)
class Live:
    """What a request meets, all of one version."""

    bundle: Bundle | None = None
    student: Backend | None = None
    embedder: Embeds | None = None
    context: tuple[Message, ...] = ()
    parse: ParseConfig | None = None
    teacher_defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    student_defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)

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
    collect: bool = True
    idempotency_key: str | None = None

    @property
    def streams(self) -> bool:
        """Whether the client wants chunks."""
        return bool(self.body.get("stream"))


@dataclass
class Routed:
    """Who answers, and what they say."""

    decision: Decision
    version: str
    pieces: AsyncIterator[dict[str, Any]]
