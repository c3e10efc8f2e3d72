"""Student or teacher: a pure function of the bundle and the request. No I/O, no clock, no Ray; well under 1 ms.

    screen    what needs no vector: nothing to serve, no text, another kind of request
    decide    nearest trained requests of the same kind -> far? -> guard -> score against the threshold

Whatever is unclear goes to the teacher, and the reason says why. `calibrate` asks `weigh`, which is all of `decide`
behind the search, so requests are served by the very rule that was measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from typing import Literal, Protocol

import numpy as np

from distill_ray.serving.routing.bundle import Bundle
from distill_ray.serving.routing.conversation import RequestKey
from distill_ray.serving.routing.decision import DecisionModel, features_of
from distill_ray.serving.routing.features import contains_and_adds, marks_of, mismatch

Route = Literal["student", "teacher"]
Guard = Literal["off", "strict"]


class Reason(StrEnum):
    """Why a request went where it went. A closed set: metrics, headers and tests rely on the codes."""

    GOOD = "good"
    NO_BUNDLE = "no_bundle"
    EMPTY = "empty"
    NOT_TEXT = "not_text"
    TOO_LONG = "too_long"
    CONTROL_TOKENS = "control_tokens"
    OTHER_FINGERPRINT = "other_fingerprint"
    FAR = "far"
    BELOW_THRESHOLD = "below_threshold"
    GUARD_NUMBERS = "guard_numbers"
    GUARD_NEGATION = "guard_negation"
    GUARD_NAMES = "guard_names"
    GUARD_ADDS = "guard_adds"
    # Of the service, which decides before or after the router does.
    FORCED = "forced"
    LATCHED = "latched"
    UNSUPPORTED = "unsupported"
    EMBEDDER_FAILED = "embedder_failed"
    ROUTER_FAILED = "router_failed"
    STUDENT_UNAVAILABLE = "student_unavailable"
    STUDENT_REFUSED = "student_refused"
    STUDENT_TIMEOUT = "student_timeout"
    STUDENT_EMPTY = "student_empty"
    STUDENT_UNSURE = "student_unsure"
    TEACHER_UNAVAILABLE = "teacher_unavailable"


@dataclass(frozen=True, slots=True)
class Decision:
    """Who answers, and why."""

    route: Route
    reason: Reason
    similarity: float | None = None
    """Cosine to the nearest trained request of the same kind."""

    score: float | None = None
    """Probability that the student's answer is as good as the teacher's."""

    neighbours: tuple[tuple[int, float], ...] = ()
    """(row of the bundle's entries, similarity), most similar first: for the status page."""


_PROBLEMS = {"empty": Reason.EMPTY, "not_text": Reason.NOT_TEXT}
_GUARDED = {
    "numbers": Reason.GUARD_NUMBERS,
    "negation": Reason.GUARD_NEGATION,
    "names": Reason.GUARD_NAMES,
}


# The same trained requests are the nearest ones again and again.
_marks_of_trained = lru_cache(maxsize=1 << 14)(marks_of)


def screen(bundle: Bundle | None, key: RequestKey) -> Decision | None:
    """What is clear without a vector; None: embed it and `decide`."""
    if key.problem is not None:
        return Decision("teacher", _PROBLEMS[key.problem])
    if bundle is None:
        return Decision("teacher", Reason.NO_BUNDLE)
    if key.fingerprint not in bundle.fingerprints:
        return Decision("teacher", Reason.OTHER_FINGERPRINT)
    if bundle.spells_control_tokens(key.text):
        return Decision("teacher", Reason.CONTROL_TOKENS)
    return None


def decide(
    bundle: Bundle | None,
    key: RequestKey,
    vector_D: np.ndarray | None,
    guard: Guard | None = None,
    floor: float = 0.0,
) -> Decision:
    """Who answers a request.

    Args:
        bundle: the current one.
        key: of the request, without the bundle's context, made with the bundle's `ignore`.
        vector_D: of `key.text`, of unit length; None: the embedder failed.
        guard: the service's; a bundle chosen with a strict guard stays strict. Default: the bundle's.
        floor: a threshold that counts where it is above the bundle's.
    """
    screened = screen(bundle, key)
    if screened is not None:
        return screened
    assert bundle is not None
    if vector_D is None or not np.isfinite(vector_D).all():
        return Decision("teacher", Reason.EMBEDDER_FAILED)
    similarities_K, rows_K = bundle.index.search(vector_D, key.fingerprint, bundle.manifest.neighbours)
    if not len(rows_K):
        return Decision("teacher", Reason.OTHER_FINGERPRINT)
    outcomes_K, nearest = bundle.outcomes_N[rows_K], bundle.text(int(rows_K[0]))
    found = weigh(bundle.manifest, key.text, vector_D, similarities_K, outcomes_K, nearest, guard, floor)
    neighbours = tuple(zip(rows_K.tolist(), similarities_K.tolist(), strict=True))
    return Decision(found.route, found.reason, found.similarity, found.score, neighbours)


class Rule(Protocol):
    """What decides beside the neighbours. A bundle's manifest is one, and what `study` tries out."""

    @property
    def model(self) -> DecisionModel: ...  # noqa: D102

    @property
    def threshold(self) -> float: ...  # noqa: D102

    @property
    def far(self) -> float: ...  # noqa: D102

    @property
    def guard(self) -> Guard: ...  # noqa: D102


def weigh(
    rule: Rule,
    text: str,
    vector_D: np.ndarray,
    similarities_K: np.ndarray,
    outcomes_K: np.ndarray,
    nearest: str,
    guard: Guard | None = None,
    floor: float = 0.0,
) -> Decision:
    """The decision once the nearest trained requests are known.

    Args:
        rule: of the bundle, or one that is tried out.
        text: of the request.
        vector_D: of it.
        similarities_K: most similar first; at least one.
        outcomes_K: how well the student does on each.
        nearest: text of the most similar one.
        guard: see `decide`.
        floor: see `decide`.
    """
    similarity = float(similarities_K[0])
    marks, marks_of_nearest = marks_of(text), _marks_of_trained(nearest)
    differs = mismatch(marks, marks_of_nearest)
    score = rule.model.probability(features_of(similarities_K, outcomes_K, len(text), differs), vector_D)
    is_strict = "strict" in (rule.guard, guard)
    if similarity < rule.far:
        return Decision("teacher", Reason.FAR, similarity, score)
    if is_strict and differs:
        first = next(reason for name, reason in _GUARDED.items() if name in differs)
        return Decision("teacher", first, similarity, score)
    if is_strict and contains_and_adds(marks, marks_of_nearest):
        return Decision("teacher", Reason.GUARD_ADDS, similarity, score)
    if not score >= max(rule.threshold, floor):  # a NaN is no probability
        return Decision("teacher", Reason.BELOW_THRESHOLD, similarity, score)
    return Decision("student", Reason.GOOD, similarity, score)
