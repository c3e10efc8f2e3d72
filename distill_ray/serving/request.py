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
from distill_ray.serving.routing.conversation import RequestKey, request_key, strip_context


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
    floor: float = 0.0
    """Threshold that drift raised the bundle's to; counts where it is above that."""

    @property
    def version(self) -> str:
        """Of the bundle."""
        return self.bundle.version if self.bundle is not None else ""

    @property
    def threshold(self) -> float | None:
        """The student answers from this score on."""
        return max(self.bundle.manifest.threshold, self.floor) if self.bundle is not None else None


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


def asked_of(call: Call, live: Live) -> Asked:
    """What a bundle looks at in a call."""
    if call.method != "chat":
        return Asked(call, live, [], RequestKey("", "", "not_text"))
    messages, _ = strip_context(call.body["messages"], live.context)
    return Asked(call, live, messages, request_key({**call.body, "messages": messages}, live.ignore))
