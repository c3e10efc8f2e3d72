"""The life of one request: decide, ask, fall back, deliver. Knows no HTTP and no Ray.

    body -> context taken off -> embedded -> decided -> student ------------------------------> pieces
                                                 |          `- fails before its first words -.
                                                 `-> teacher, with context <-----------------'--> pieces, kept

What a request meets (`request.Live`) is read once for each.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from typing import Any

from distill_ray.config import ServeConfig
from distill_ray.errors import ApiError, EmbedderError, TextTooLong
from distill_ray.serving.backends import SHUT, Backend
from distill_ray.serving.bodies import mean_logprob, parse_response, students_body, teachers_body
from distill_ray.serving.breaker import Breaker
from distill_ray.serving.chunks import Started, as_chunks, begin, in_turn, unless
from distill_ray.serving.collecting.answer import Answer, whole_answer
from distill_ray.serving.delivery import Delivery, Done, Keep
from distill_ray.serving.front.limits import Limits
from distill_ray.serving.latch import Latch
from distill_ray.serving.metrics import Metrics
from distill_ray.serving.request import Asked, Call, Live, asked_of
from distill_ray.serving.routing.router import Decision, Reason, decide, screen

_LOG = logging.getLogger("distill_ray.serving")
TEACHER_RETRY_S = 5.0
NUM_SHOWN = 5  # nearest trained requests, when a decision is explained


@dataclass
class Routed:
    """Who answers, and what they say."""

    decision: Decision
    version: str
    pieces: AsyncGenerator[dict[str, Any], None]


class Dispatcher:
    """See the module docstring.

    Args:
        config: `serve:`.
        teacher: answers what the student does not.
        live: the bundle in service; `swap` changes it.
        keep: is given each whole answer of the teacher before its response ends.
        done: is told of each chat request when its client has had the whole answer.
        note: is told of each request, for the status page.
        limits: per owner.
        metrics: this router's.
    """

    def __init__(
        self,
        config: ServeConfig,
        teacher: Backend,
        live: Live,
        *,
        keep: Keep,
        done: Done,
        note: Callable[[dict[str, Any]], None],
        limits: Limits,
        metrics: Metrics,
    ) -> None:
        self._config, self.teacher, self._note = config, teacher, note
        self._limits, self._metrics = limits, metrics
        self._latch = Latch(config.router.latch)
        self._delivery = Delivery(
            config, embed=self._embed, keep=keep, done=done, latch=self._latch, limits=limits, metrics=metrics
        )
        self._breaker = Breaker()
        self.live = live

    def swap(self, live: Live) -> None:
        """Requests from now on meet another bundle; those on their way stay with theirs."""
        self.live, self._breaker = live, Breaker()

    def set_floor(self, floor: float) -> None:
        """Requests from now on meet another threshold, and the same bundle and student."""
        self.live = dataclasses.replace(self.live, floor=floor)

    async def look(self) -> None:
        """Look whether the student is there; called every second or so. Else the first to ask a dead one would wait."""
        breaker, student = self._breaker, self.live.student
        if student is None or not (breaker.is_due if breaker.is_open else student.is_here):
            return
        breaker.looked(is_up=await student.is_up())

    # -- deciding ------------------------------------------------------------------------------------------------

    async def answer(self, call: Call) -> Routed:
        """Route a request. Returns when somebody has begun to say something.

        Raises:
            ApiError: nobody can answer it.
        """
        asked = asked_of(call, self.live)  # once: see `Live`
        decision = await self._decide(asked)
        if decision.score is not None:
            self._metrics.score.observe(decision.score)
        if decision.route == "student":
            try:
                return await self._from_student(asked, decision)
            except _Fallback as failure:
                self._metrics.fallbacks.labels(failure.reason).inc()
                if call.wants == "student":
                    raise failure.error from None
                decision = dataclasses.replace(decision, route="teacher", reason=failure.reason)
        return await self._from_teacher(asked, decision)

    async def explain(self, call: Call) -> dict[str, Any]:
        """Which way a request would go, and why; nobody is asked."""
        asked = asked_of(call, self.live)
        decision = await self._decide(asked)
        bundle = asked.live.bundle
        nearest = [
            {"text": bundle.text(row), "similarity": similarity, "outcome": float(bundle.outcomes_N[row])}
            for row, similarity in decision.neighbours[:NUM_SHOWN]
            if bundle is not None
        ]
        return {
            "route": decision.route,
            "reason": decision.reason,
            "similarity": decision.similarity,
            "score": decision.score,
            "threshold": asked.live.threshold,
            "bundle": asked.live.version,
            "nearest": nearest,
        }

    async def _decide(self, asked: Asked) -> Decision:
        call, live = asked.call, asked.live
        if call.wants == "teacher":
            return Decision("teacher", Reason.FORCED)
        if call.wants == "student":
            if live.student is None:
                raise ApiError(404, "there is no student in service", param="model", code="model_not_found")
            if call.method != "chat":
                raise ApiError(400, "the student answers chats only; use /v1/chat/completions", param="model")
            return Decision("student", Reason.FORCED)
        if call.method != "chat":
            return Decision("teacher", Reason.UNSUPPORTED)
        if self._latch.holds(asked.messages):
            return Decision("teacher", Reason.LATCHED)
        try:
            return await self._weigh(asked)
        except Exception as error:  # whatever is wrong with the decision, the teacher can answer
            _LOG.error("the decision failed: %s", type(error).__name__, exc_info=error)
            self._metrics.errors.labels("decision").inc()
            return Decision("teacher", Reason.ROUTER_FAILED)

    async def _weigh(self, asked: Asked) -> Decision:
        live = asked.live
        screened = screen(live.bundle, asked.key)
        if screened is not None:
            return screened
        if live.student is None or self._breaker.is_open:
            return Decision("teacher", Reason.STUDENT_UNAVAILABLE)
        try:
            await self._embed(asked)
        except TextTooLong:
            return Decision("teacher", Reason.TOO_LONG)
        return decide(live.bundle, asked.key, asked.vector, self._config.guard, live.floor)

    async def _embed(self, asked: Asked) -> None:
        if asked.vector is not None or asked.live.embedder is None or not asked.key.text:
            return
        try:
            asked.vector = await asked.live.embedder.embed(asked.key.text)
        except TextTooLong:
            raise
        except EmbedderError as error:
            _LOG.error("the embedder failed: %s", error)
            self._metrics.errors.labels("embedder").inc()

    # -- asking ------------------------------------------------------------------------------------------------------

    async def _from_student(self, asked: Asked, decision: Decision) -> Routed:
        """Raises _Fallback: it said nothing, or nothing to rely on."""
        live, call = asked.live, asked.call
        assert live.student is not None
        body = students_body(asked)
        cascade = self._config.cascade if not call.streams and decision.reason is not Reason.FORCED else None
        if cascade is not None:
            body["logprobs"] = True
        is_forced = decision.reason is Reason.FORCED
        started = await self._begun(live.student.answer(call.method, body), call.streams, is_forced)
        mean = mean_logprob(started.first[0]) if cascade is not None else None
        if cascade is not None and mean is not None and mean < cascade.min_mean_logprob:
            raise _Fallback(Reason.STUDENT_UNSURE, ApiError(502, "the student is unsure", "server_error"))
        return self._routed(asked, decision, started.pieces(self._config.router.timeout_s))

    async def _begun(self, pieces: AsyncGenerator[dict[str, Any], None], streams: bool, is_forced: bool) -> Started:
        """The student's first words. Raises _Fallback: there are none, or it is found to be gone meanwhile."""
        breaker, router = self._breaker, self._config.router
        timeout_s = router.student_timeout_s if streams else router.student_whole_timeout_s
        try:
            beginning = begin(pieces, timeout_s)
            started = await (beginning if is_forced else unless(breaker.opening(), beginning))
        except TimeoutError:
            breaker.failed()
            raise _Fallback(Reason.STUDENT_TIMEOUT, ApiError(504, "the student is too slow", "server_error")) from None
        except ApiError as error:
            if error.status in SHUT:
                breaker.failed()
                shut = ApiError(
                    503, "the student does not let this service in; its operator has to look", "server_error"
                )
                raise _Fallback(Reason.STUDENT_UNAVAILABLE, shut) from None
            if error.status < 500:
                raise _Fallback(Reason.STUDENT_REFUSED, error) from None
            breaker.failed(is_gone=error.code == "gone")
            raise _Fallback(Reason.STUDENT_UNAVAILABLE, error) from None
        if started is None:
            gone = ApiError(503, "the student does not answer", "server_error", code="gone")
            raise _Fallback(Reason.STUDENT_UNAVAILABLE, gone)
        if not started.has_words:
            breaker.failed()
            raise _Fallback(Reason.STUDENT_EMPTY, ApiError(502, "the student said nothing", "server_error"))
        breaker.succeeded()
        return started

    async def _from_teacher(self, asked: Asked, decision: Decision) -> Routed:
        """Raises ApiError: it cannot answer, and nobody may instead."""
        live, call = asked.live, asked.call
        self._limits.admit_teacher(call.owner)
        parse = live.parse if call.method == "chat" else None
        body = teachers_body(asked, whole=parse is not None)  # the part that counts is known when all is said
        try:
            started = await begin(self.teacher.answer(call.method, body), self._config.router.timeout_s)
            if not started.first:
                raise ApiError(502, "the teacher sent nothing", "server_error")
        except (TimeoutError, ApiError) as problem:
            return await self._without_teacher(asked, decision, teacher_error(problem))
        if parse is None:
            return self._routed(asked, decision, started.pieces(self._config.router.timeout_s))
        response = started.first[0]
        is_whole = parse_response(response, parse)
        pieces = as_chunks(response) if call.streams else [response]
        return self._routed(asked, decision, in_turn(pieces), whole_answer(response), may_keep=is_whole)

    async def _without_teacher(self, asked: Asked, decision: Decision, error: ApiError) -> Routed:
        """The student instead, where the operator allowed it and it has not failed already."""
        if error.status < 500:
            raise error
        self._metrics.errors.labels("teacher").inc()
        may = self._config.degraded == "student" and asked.call.wants == "auto" and asked.live.student is not None
        if not may or asked.key.problem is not None or decision.reason in _NOT_FOR_STUDENT:
            raise error
        instead = dataclasses.replace(decision, route="student", reason=Reason.TEACHER_UNAVAILABLE)
        try:
            return await self._from_student(asked, instead)
        except _Fallback:
            raise error from None

    # -- answering ---------------------------------------------------------------------------------------------------

    def _routed(
        self,
        asked: Asked,
        decision: Decision,
        pieces: AsyncGenerator[dict[str, Any], None],
        answer: Answer | None = None,
        *,
        may_keep: bool = True,
    ) -> Routed:
        """See `Delivery.deliver`."""
        self._metrics.requests.labels(decision.route, decision.reason).inc()
        self._metrics.first.labels(decision.route).observe(time.monotonic() - asked.started)
        self._note(self._noted(asked, decision))
        delivered = self._delivery.deliver(asked, decision, pieces, answer, may_keep=may_keep)
        return Routed(decision, asked.live.version, delivered)

    def _noted(self, asked: Asked, decision: Decision) -> dict[str, Any]:
        return {
            "time": time.time(),
            "route": decision.route,
            "reason": decision.reason,
            "similarity": decision.similarity,
            "score": decision.score,
            "seconds": time.monotonic() - asked.started,
            "owner": asked.call.owner,
            "bundle": asked.live.version,
            "text": asked.key.text[:200] if self._config.show_requests else None,
        }


# Also when the teacher is down: it has failed already, or would read something else than what was sent.
_NOT_FOR_STUDENT = frozenset(
    {Reason.STUDENT_TIMEOUT, Reason.STUDENT_UNAVAILABLE, Reason.STUDENT_EMPTY, Reason.STUDENT_UNSURE}
    | {Reason.STUDENT_REFUSED}
    | {Reason.CONTROL_TOKENS, Reason.UNSUPPORTED}
)


class _Fallback(Exception):
    """The student did not answer; `error` is what the client gets if the teacher may not."""

    def __init__(self, reason: Reason, error: ApiError) -> None:
        super().__init__(reason)
        self.reason, self.error = reason, error


def teacher_error(problem: Exception) -> ApiError:
    """What the client gets when the teacher cannot answer: its own mistake, or 429 or 503 with Retry-After."""
    retry_after = getattr(problem, "retry_after", None) or TEACHER_RETRY_S
    if isinstance(problem, ApiError):
        if problem.status in (400, 413, 415, 422):
            return problem
        if problem.status == 429:  # what it says may name the operator's account
            return ApiError(429, "the teacher is asked too much", "rate_limit_error", retry_after=retry_after)
        if problem.status < 500 and problem.status not in (408, 409):
            return ApiError(503, "the teacher does not let this service in; its operator has to look", "server_error")
    return ApiError(
        503, "the teacher does not answer now", "server_error", code="teacher_down", retry_after=retry_after
    )
