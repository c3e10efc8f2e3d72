"""Answers as they arrive: whole responses, or the chunks of a stream; and waiting for their first words."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine, Iterable, Iterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeVar

from distill_ray.errors import ApiError

T = TypeVar("T")


def says_something(piece: Mapping[str, Any]) -> bool:
    """Whether a response or chunk has any content: before that, somebody else can still answer instead."""
    for choice in piece.get("choices") or ():
        said = choice.get("message") or choice.get("delta") or {}
        if (said.get("content") or choice.get("text") or "").strip() or said.get("tool_calls") or said.get("refusal"):
            return True
    return False


def as_chunks(response: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """A whole chat response as the chunks of a stream, the usage at its end."""
    head = {"id": response.get("id"), "object": "chat.completion.chunk"}
    head |= {name: response.get(name) for name in ("created", "model", "system_fingerprint")}
    for choice in response.get("choices") or ():
        index, said = choice.get("index", 0), {k: v for k, v in choice["message"].items() if v is not None}
        if said.get("tool_calls"):
            said["tool_calls"] = [{**call, "index": place} for place, call in enumerate(said["tool_calls"])]
        logprobs = {"logprobs": choice.get("logprobs")}
        yield {**head, "choices": [{"index": index, "delta": said, **logprobs, "finish_reason": None}]}
        yield {**head, "choices": [{"index": index, "delta": {}, "finish_reason": choice.get("finish_reason")}]}
    if response.get("usage"):
        yield {**head, "choices": [], "usage": response["usage"]}


@dataclass
class Started:
    """An answer of which the first words are there: `first`, and what follows."""

    first: list[dict[str, Any]]
    rest: AsyncGenerator[dict[str, Any], None]

    @property
    def has_words(self) -> bool:
        """Whether anything was said; if not, it is over."""
        return any(map(says_something, self.first))

    async def pieces(self, timeout_s: float) -> AsyncGenerator[dict[str, Any], None]:
        """All of it. Raises TimeoutError: nothing came for so long."""
        try:
            for piece in self.first:
                yield piece
            while True:
                try:
                    async with asyncio.timeout(timeout_s):
                        piece = await anext(self.rest)
                except StopAsyncIteration:
                    return
                yield piece
        finally:
            await self.rest.aclose()


async def begin(pieces: AsyncGenerator[dict[str, Any], None], timeout_s: float) -> Started:
    """Wait for the first words; if it fails before them, end it.

    Raises:
        TimeoutError: they did not come.
        ApiError: of whoever answers.
    """
    first: list[dict[str, Any]] = []
    try:
        async with asyncio.timeout(timeout_s):
            async for piece in pieces:
                first.append(piece)
                if says_something(piece):
                    break
    except BaseException:
        await pieces.aclose()
        raise
    return Started(first, pieces)


async def whole(pieces: AsyncGenerator[dict[str, Any], None], timeout_s: float) -> dict[str, Any]:
    """The one piece of an answer that is not streamed.

    Raises:
        TimeoutError: it did not come.
        ApiError: of whoever answers, or there was none.
    """
    async with asyncio.timeout(timeout_s), aclosing(pieces):
        async for piece in pieces:
            return piece
    raise ApiError(502, "nothing was said", "server_error")


async def unless(event: Coroutine[Any, Any, None], work: Coroutine[Any, Any, T]) -> T | None:
    """What `work` comes to; None where `event` comes first, and `work` is ended."""
    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(event)]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].result() if tasks[0].done() else None  # type: ignore[return-value]
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def in_turn(pieces: Iterable[dict[str, Any]]) -> AsyncGenerator[dict[str, Any], None]:
    """Pieces that are there already."""
    for piece in pieces:
        yield piece
