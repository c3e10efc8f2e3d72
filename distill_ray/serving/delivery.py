"""From an answer's pieces to the client: shaped, counted, and the teacher's kept before the last one."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

from distill_ray.config import ServeConfig
from distill_ray.errors import ApiError
from distill_ray.serving.bodies import for_client
from distill_ray.serving.collecting.answer import Answer, StreamedAnswer, whole_answer
from distill_ray.serving.front.limits import Limits
from distill_ray.serving.latch import Latch
from distill_ray.serving.metrics import Metrics
from distill_ray.serving.request import Asked, Live
from distill_ray.serving.routing.router import Decision

CHARS_PER_TOKEN = 4  # where nobody counted them

Keep = Callable[[Asked, Answer], Awaitable[None]]  # keeps a teacher's answer; never raises
Done = Callable[[Asked, Decision, Answer], None]  # is told of a whole answer; never raises, and takes no time


class Delivery:
    """See the module docstring.

    Args:
        config: `serve:`.
        embed: finds the vector of a request, where it can.
        keep: is given each whole answer of the teacher before its response ends.
        done: is told of each whole answer to a chat behind its last piece, but of a teacher's that may not be kept.
        latch: remembers the conversations that the teacher answered.
        limits: per owner.
        metrics: this router's.
    """

    def __init__(
        self,
        config: ServeConfig,
        *,
        embed: Callable[[Asked], Awaitable[None]],
        keep: Keep,
        done: Done,
        latch: Latch,
        limits: Limits,
        metrics: Metrics,
    ) -> None:
        self._config, self._embed, self._keep, self._done = config, embed, keep, done
        self._latch, self._limits, self._metrics = latch, limits, metrics

    async def deliver(
        self,
        asked: Asked,
        decision: Decision,
        pieces: AsyncGenerator[dict[str, Any], None],
        answer: Answer | None = None,
        *,
        may_keep: bool = True,
    ) -> AsyncGenerator[dict[str, Any], None]:
        """What the client gets.

        Args:
            asked: the request.
            decision: who answers.
            pieces: what they say.
            answer: where it is known whole already, in other pieces than the client gets.
            may_keep: False for a teacher's answer that nothing can be learnt from.

        Raises:
            ApiError: whoever answers breaks off.
        """
        call, route, said, num_pieces, is_over = asked.call, decision.route, StreamedAnswer(), 0, False
        try:
            async with aclosing(pieces):
                async for piece in pieces:
                    num_pieces += 1
                    if call.streams:
                        said.add(piece)
                    else:
                        answer = answer or whole_answer(piece)
                        await self._finish(asked, route, answer, may_keep)
                    is_over = is_over or not call.streams
                    shown = for_client(piece, call.body, shows_route=self._config.headers)
                    if shown is not None:
                        yield shown
                    if not call.streams:  # all is said; whoever said it may be gone by now
                        break
            is_over = True
        except (ApiError, TimeoutError) as error:
            self._metrics.errors.labels(f"{route}_midway").inc()
            if isinstance(error, ApiError) and error.status < 500:
                raise
            # In our words: a server's own may name its operator's account, or the route.
            status = 504 if isinstance(error, TimeoutError) else 502
            raise ApiError(status, "the model stopped in the middle of its answer", "server_error") from error
        finally:
            if not is_over and route == "teacher":  # leaving early is no way round the day's tokens
                self._limits.spent(call.owner, num_pieces + len(asked.key.text) // CHARS_PER_TOKEN)
        if call.streams:
            answer = answer or said.answer
            await self._finish(asked, route, answer, may_keep)
        if call.method == "chat" and answer is not None and may_keep:
            self._done(asked, decision, answer)

    async def _finish(self, asked: Asked, route: str, answer: Answer, may_keep: bool) -> None:
        call, metrics = asked.call, self._metrics
        prompt_tokens, completion_tokens = answer.prompt_tokens or 0, answer.completion_tokens or 0
        metrics.whole.labels(route).observe(time.monotonic() - asked.started)
        metrics.tokens.labels(route, "prompt").inc(prompt_tokens)
        metrics.tokens.labels(route, "completion").inc(completion_tokens)
        if route == "student":
            self._count_savings(asked.live, prompt_tokens, completion_tokens)
            return
        self._limits.spent(call.owner, prompt_tokens + completion_tokens)
        if call.method != "chat":
            return
        self._latch.remember(asked.messages, answer.text)
        if may_keep:
            with contextlib.suppress(Exception):  # kept without a vector
                await self._embed(asked)
            await self._keep(asked, answer)
        else:
            metrics.pairs.labels("unparsable").inc()

    def _count_savings(self, live: Live, prompt_tokens: int, completion_tokens: int) -> None:
        """Against what the teacher took per request in the run behind the bundle."""
        assert live.bundle is not None
        usual = live.bundle.manifest.summary
        teacher_prompt = float(usual.get("teacher_prompt_tokens") or prompt_tokens)
        teacher_completion = float(usual.get("teacher_completion_tokens") or completion_tokens)
        prices = self._config.prices
        self._metrics.saved_tokens.inc(teacher_prompt + teacher_completion)
        per_million = (
            teacher_prompt * prices.teacher_prompt
            + teacher_completion * prices.teacher_completion
            - prompt_tokens * prices.student_prompt
            - completion_tokens * prices.student_completion
        )
        self._metrics.saved_money.inc(max(0.0, per_million / 1e6))
