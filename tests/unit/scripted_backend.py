"""A backend that answers, or misbehaves, by a script; and a dispatcher with two of them around a small bundle."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distill_ray.config import ServeConfig
from distill_ray.errors import ApiError
from distill_ray.serving.backends import Backend, Method
from distill_ray.serving.collecting.answer import Answer
from distill_ray.serving.dispatch import Dispatcher
from distill_ray.serving.front.limits import Limits
from distill_ray.serving.metrics import Metrics
from distill_ray.serving.request import Asked, Call, Live
from distill_ray.serving.routing.bundle import Bundle, load_bundle
from distill_ray.serving.routing.embedder import BatchedEmbedder
from distill_ray.serving.watching.second_look import Look, SecondLooks
from tests.unit.small_bundle import WordEmbedder, write_small_bundle


def whole(text: str | None, finish_reason: str = "stop", **message: Any) -> dict[str, Any]:
    """A response."""
    return {
        "id": "c1",
        "object": "chat.completion",
        "created": 1,
        "model": "upstream",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": text, **message},
                "logprobs": None,
                "finish_reason": finish_reason,
            }
        ],
        "usage": {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10},
    }


def chunks(*texts: str, finish_reason: str | None = "stop") -> list[dict[str, Any]]:
    """A stream: its role, a chunk per text, its end, its usage."""
    head = {"id": "c1", "object": "chat.completion.chunk", "created": 1, "model": "upstream"}

    def chunk(delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
        return {**head, "choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}]}

    said = [chunk({"role": "assistant", "content": ""}), *(chunk({"content": text}) for text in texts)]
    usage = {"prompt_tokens": 7, "completion_tokens": len(texts), "total_tokens": 7 + len(texts)}
    return [*said, chunk({}, finish_reason), {**head, "choices": [], "usage": usage}]


class Scripted(Backend):
    """Says `text`, or what `script` makes of a body: pieces, of which an error is raised and a number is waited for."""

    def __init__(
        self, name: str, text: str = "", script: Callable[[Mapping[str, Any]], list[Any]] | None = None
    ) -> None:
        self.name, self._text, self.script = name, text or f"the {name} says", script
        self.bodies: list[dict[str, Any]] = []
        self.num_closed = 0
        self.up = True

    async def answer(self, method: Method, body: Mapping[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        self.bodies.append(dict(body))
        usual = chunks(*(f"{word} " for word in self._text.split())) if body.get("stream") else [whole(self._text)]
        try:
            for piece in self.script(body) if self.script is not None else usual:
                if isinstance(piece, Exception):
                    raise piece
                if isinstance(piece, float | int):
                    await asyncio.sleep(piece)
                else:
                    yield piece
        finally:
            self.num_closed += 1

    is_here = True

    async def is_up(self) -> bool:
        return self.up


@dataclass
class Rig:
    """A dispatcher and everything around it."""

    dispatcher: Dispatcher
    teacher: Scripted
    student: Scripted
    bundle: Bundle
    metrics: Metrics
    limits: Limits
    looks: SecondLooks
    found: list[Look] = field(default_factory=list)
    kept: list[tuple[Asked, Answer]] = field(default_factory=list)
    noted: list[dict[str, Any]] = field(default_factory=list)

    async def ask(self, text: str, *, wants: str = "auto", **body: Any) -> tuple[Any, list[dict[str, Any]]]:
        """Route a request of one turn; returns the decision and all pieces."""
        messages = body.pop("messages", [{"role": "user", "content": text}])
        call = Call("chat", {"messages": messages, "model": "auto", **body}, wants=wants, owner="alice")
        routed = await self.dispatcher.answer(call)
        return routed.decision, [piece async for piece in routed.pieces]

    def count(self, name: str, **labels: str) -> float:
        """A counter of the router."""
        return self.metrics.registry.get_sample_value(f"distill_{name}", labels) or 0.0


def make_rig(
    folder: Path, *, bundle: Mapping[str, Any] | None = None, judge: Scripted | None = None, **config: Any
) -> Rig:
    """`bundle`: changes of its manifest. `config`: keys of `serve:`."""
    loaded = load_bundle(write_small_bundle(folder / "bundle", **(bundle or {})), WordEmbedder.identity)
    router = {"student_timeout_s": 0.3, "student_whole_timeout_s": 0.3, "timeout_s": 0.6, **config.pop("router", {})}
    serve = ServeConfig.model_validate({"router": router, **config})
    teacher, student, metrics, limits = Scripted("teacher"), Scripted("student"), Metrics(), Limits(serve.limits)
    manifest = loaded.manifest
    live = Live(
        bundle=loaded,
        student=student,
        embedder=BatchedEmbedder(WordEmbedder()),
        context=tuple(manifest.context),  # type: ignore[arg-type]
        parse=manifest.parse,
        teacher_sampling=manifest.teacher_sampling,
    )
    rig = Rig(None, teacher, student, loaded, metrics, limits, None)  # type: ignore[arg-type]

    async def keep(asked: Asked, answer: Answer) -> None:
        rig.kept.append((asked, answer))

    counting: dict[str, Any] = {"limits": limits, "metrics": metrics}
    rig.looks = SecondLooks(
        serve, teacher, judge or teacher, keep=keep, report=rig.found.append, chance=random.Random(0), **counting
    )
    rig.dispatcher = Dispatcher(
        serve, teacher, live, keep=keep, done=rig.looks.answered, note=rig.noted.append, **counting
    )
    return rig


def text_of(pieces: list[dict[str, Any]]) -> str:
    """What a client reads."""
    texts = []
    for piece in pieces:
        for choice in piece["choices"]:
            texts.append((choice.get("message") or choice.get("delta") or {}).get("content") or "")
    return "".join(texts)


DOWN = ApiError(503, "gone", "server_error", code="gone")
