"""Second looks at answers, in a router: behind the client's back and off its way. Knows no HTTP and no Ray.

    drift    an answer of the student, delivered -> the teacher is asked as on its own route -> compared -> Look
    shadow   an answer, delivered -> a candidate's student, if it would take the request, is asked
                                  -> the teacher, where this was not its answer              -> compared -> Look

Nothing here can delay or change a response: it begins when the client has had all of it. What is not looked at, because
so many looks are under way or the tokens are spent, is counted; so is what fails. The teacher's answers are kept like
any other: they are all that the next training learns of requests that the student takes.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import random
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from distill_ray.config import CalibrateConfig, ServeConfig
from distill_ray.errors import ApiError, DistillError, TextTooLong
from distill_ray.serving.backends import Backend
from distill_ray.serving.bodies import parse_response, students_body, teachers_body
from distill_ray.serving.chunks import whole
from distill_ray.serving.collecting.answer import Answer, whole_answer
from distill_ray.serving.collecting.pairs import opted_out, why_not_kept
from distill_ray.serving.delivery import CHARS_PER_TOKEN, Keep
from distill_ray.serving.front.limits import Limits
from distill_ray.serving.metrics import Metrics
from distill_ray.serving.request import Asked, Live, asked_of
from distill_ray.serving.routing.router import Decision, Reason, decide, screen
from distill_ray.serving.watching.verdict import Both, Judge, is_good, rule_of, said

MOST_AT_ONCE = 4  # per router: a slow teacher is not to be asked for more than it can do
_LOG = logging.getLogger("distill_ray.serving")

Kind = Literal["drift", "shadow"]
# Of a request that no student would have got, or while the teacher is down.
_NOT_TRIED = frozenset({Reason.FORCED, Reason.LATCHED, Reason.UNSUPPORTED, Reason.TEACHER_UNAVAILABLE})


@dataclass(frozen=True, slots=True)
class Look:
    """What a second look found. No text: it crosses processes and is written down."""

    number: int
    """Of this router, counted up."""

    kind: Kind
    version: str
    """Of the bundle whose student was looked at."""

    good: bool
    score: float | None
    """The router's, of the request."""

    tokens: int
    """The teacher's, spent on it."""

    time: float
    """Seconds since the epoch."""


@dataclass(frozen=True)
class Trial:
    """A candidate, and how much it is tried on."""

    live: Live
    share: float
    """Of the requests that it would get."""

    max_tokens: int
    """Of the teacher, for the requests that it would not have answered."""


class SecondLooks:
    """See the module docstring.

    Args:
        config: `serve:`.
        teacher: who is asked again.
        judge: who compares, for bundles whose metric is `judge`.
        keep: is given the teacher's answers.
        report: is told what was found.
        limits: count the tokens, over all routers.
        metrics: this router's.
        chance: draws what is looked at.
    """

    def __init__(
        self,
        config: ServeConfig,
        teacher: Backend,
        judge: Backend,
        *,
        keep: Keep,
        report: Callable[[Look], None],
        limits: Limits,
        metrics: Metrics,
        chance: random.Random | None = None,
    ) -> None:
        self._config, self._teacher, self._judge = config, teacher, judge
        self._keep, self._report, self._limits, self._metrics = keep, report, limits, metrics
        self._chance = chance or random.Random()
        self._numbers = itertools.count(1)
        self._tasks: set[asyncio.Task[None]] = set()
        self.trial: Trial | None = None

    def answered(self, asked: Asked, decision: Decision, answer: Answer) -> None:
        """A client has had the whole of an answer."""
        call, drift, trial = asked.call, self._config.drift, self.trial
        if call.wants != "auto" or opted_out(call.collect_header) or (call.body.get("n") or 1) != 1:
            return
        if drift is not None and decision.reason is Reason.GOOD and self._chance.random() < drift.share:
            purse = _Purse(self._limits, "drift", "", drift.max_tokens_per_day)
            self._begin("drift", purse, lambda: self._look_for_drift(asked, decision, answer, purse))
        if trial is not None and decision.reason not in _NOT_TRIED and self._chance.random() < trial.share:
            pocket = _Purse(self._limits, "shadow", trial.live.version, trial.max_tokens)
            self._begin("shadow", pocket, lambda: self._try_out(asked, decision, answer, trial, pocket))

    async def settled(self) -> None:
        """Returns when no look is under way."""
        while self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)

    # -- one look ----------------------------------------------------------------------------------------------------

    def _begin(self, kind: Kind, purse: _Purse, look: Callable[[], Coroutine[Any, Any, Look | None]]) -> None:
        if len(self._tasks) >= MOST_AT_ONCE:
            self._metrics.second_looks.labels(kind, "skipped").inc()
            return
        task = asyncio.get_running_loop().create_task(self._run(kind, purse, look()))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self, kind: Kind, purse: _Purse, look: Coroutine[Any, Any, Look | None]) -> None:
        try:
            found = await look
            result = "good" if found is not None and found.good else "bad"
            if found is None:  # the candidate would not have got it
                return
            self._report(found)
        except _Spent:
            result = "skipped"
        except (DistillError, TimeoutError, _NoMeasure) as problem:
            _LOG.info("a second look (%s) came to nothing: %s", kind, type(problem).__name__)
            result = "failed"
        except Exception as error:  # a bug here must not end the looks for good
            _LOG.error("a second look (%s) failed: %s", kind, type(error).__name__, exc_info=error)
            self._metrics.errors.labels("second_look").inc()
            result = "failed"
        finally:
            self._metrics.second_look_tokens.labels(kind).inc(purse.tokens)
        self._metrics.second_looks.labels(kind, result).inc()

    async def _look_for_drift(self, asked: Asked, decision: Decision, answer: Answer, purse: _Purse) -> Look | None:
        rule = _rule(asked.live)
        if rule is None:
            return None
        theirs = await self._ask_teacher(asked, purse, keeps=True)
        good = await self._is_good(rule, asked, answer, theirs, purse)
        return self._look("drift", asked, decision, good, purse)

    async def _try_out(
        self, asked: Asked, decision: Decision, answer: Answer, trial: Trial, purse: _Purse
    ) -> Look | None:
        own = asked_of(asked.call, trial.live)
        choice = await self._choice(own, asked)
        rule = _rule(trial.live)
        if choice.route != "student" or rule is None:
            return None
        is_same = _same_question(asked.live, trial.live)
        is_there = is_same and decision.route == "teacher"
        if not is_there:
            purse.require()  # before the candidate's student is asked in vain
        assert trial.live.student is not None
        pieces = trial.live.student.answer("chat", students_body(own, whole=True))
        mine = whole_answer(await whole(pieces, self._config.router.student_whole_timeout_s))
        if is_there:
            await self._require_measure(asked, answer)
        theirs = answer if is_there else await self._ask_teacher(asked if is_same else own, purse, keeps=is_same)
        good = await self._is_good(rule, own, mine, theirs, purse)
        return self._look("shadow", own, choice, good, purse)

    def _look(self, kind: Kind, asked: Asked, decision: Decision, good: bool, purse: _Purse) -> Look:
        number, version = next(self._numbers), asked.live.version
        return Look(number, kind, version, good, decision.score, purse.tokens, time.time())

    async def _choice(self, own: Asked, asked: Asked) -> Decision:
        """The candidate's own decision. Raises EmbedderError."""
        live = own.live
        screened = screen(live.bundle, own.key)
        if screened is not None:
            return screened
        own.vector = asked.vector if own.key.text == asked.key.text else None
        if own.vector is None and live.embedder is not None:
            try:
                own.vector = await live.embedder.embed(own.key.text)
            except TextTooLong:
                return Decision("teacher", Reason.TOO_LONG)
        return decide(live.bundle, own.key, own.vector, self._config.guard, live.floor)

    # -- asking and comparing ----------------------------------------------------------------------------------------

    async def _ask_teacher(self, asked: Asked, purse: _Purse, *, keeps: bool) -> Answer:
        """As on the teacher's route, and never as a stream.

        Raises:
            ApiError: it does not answer; TimeoutError: nor in time.
            _NoMeasure: nothing could be learnt from what it says, so nothing can be held to it.
        """
        purse.require()
        body = teachers_body(asked, whole=True)
        try:
            response = await whole(self._teacher.answer("chat", body), self._config.router.timeout_s)
        except (ApiError, TimeoutError) as error:
            if not isinstance(error, ApiError) or error.status >= 500:  # it may have been at work
                purse.spend(_guessed(body))
            raise
        is_whole = asked.live.parse is None or parse_response(response, asked.live.parse)
        answer = whole_answer(response)
        purse.pay(answer, body)
        if not is_whole:
            self._metrics.pairs.labels("unparsable").inc()
            raise _NoMeasure
        if keeps:
            await self._keep(asked, answer)
        await self._require_measure(asked, answer)
        return answer

    async def _require_measure(self, asked: Asked, answer: Answer) -> None:
        refusals = self._config.collect.refusals  # in a thread: patterns may be slow
        problem = await asyncio.to_thread(why_not_kept, asked.call.body, answer, route="teacher", refusals=refusals)
        if problem is not None:
            raise _NoMeasure

    async def _is_good(self, rule: CalibrateConfig, asked: Asked, mine: Answer, theirs: Answer, purse: _Purse) -> bool:
        if rule.metric == "judge":
            purse.require()
        judge = Judge(self._judge, purse.pay, self._config.router.timeout_s)
        return await is_good(rule, Both(asked.key.text, said(mine), said(theirs)), asked.live.embedder, judge)


def _rule(live: Live) -> CalibrateConfig | None:
    return None if live.bundle is None else rule_of(live.bundle.manifest.summary)


def _same_question(one: Live, other: Live) -> bool:
    """Whether both bundles ask the teacher the same, and read its answer alike."""
    return (one.context, one.parse, one.teacher_sampling) == (other.context, other.parse, other.teacher_sampling)


def _guessed(body: Mapping[str, Any]) -> int:
    """Tokens of a prompt that nobody counted."""
    return len(json.dumps(body["messages"], ensure_ascii=False)) // CHARS_PER_TOKEN


class _Purse:
    """What one look may spend, together with all others of its kind, and what it did."""

    def __init__(self, limits: Limits, kind: Kind, whose: str, most: int) -> None:
        self._limits, self._kind, self._whose, self._most = limits, kind, whose, most
        self.tokens = 0

    def require(self) -> None:
        """Raises _Spent: there is nothing left."""
        if self._limits.is_spent(self._kind, self._whose, self._most):
            raise _Spent

    def pay(self, answer: Answer, body: Mapping[str, Any]) -> None:
        """For an answer to a body. Where nobody counted its tokens, they are guessed: else the budget would not end."""
        prompt, completion = answer.prompt_tokens, answer.completion_tokens
        self.spend(_guessed(body) if prompt is None else prompt)
        self.spend(len(answer.text) // CHARS_PER_TOKEN if completion is None else completion)

    def spend(self, tokens: int) -> None:
        """So many."""
        self.tokens += tokens
        self._limits.spent(self._whose, tokens, self._kind)


class _Spent(Exception):
    """The tokens for looks of this kind are spent."""


class _NoMeasure(Exception):
    """The teacher's answer is cut off, refused, or has nothing to parse: calibration leaves such ones out too."""
