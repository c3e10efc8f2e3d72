"""The statistics of a calibration: arrays in, a rule and its figures out. No files, no engine.

    fit       which kind of score, its weights, the far limit, and the order in which thresholds are tested
    select    the loosest threshold of that order that keeps the budget (`guarantee.num_passing`)
    report    what that comes to: share on the student and error with its interval; looked at once, at the end

Half of the measured requests select, because what they can show is what limits the share: 59 requests without an error
for 5 % at 95 %. Near-duplicates stay in one part, so that nothing is selected on what was fitted. What they are nobody
knows: one thing sent over and over, whose outcome is one piece of news, or what many ask. So the budget has to hold
twice: for requests as independent draws from what the service will be asked, and for groups of near-duplicates as such.

Shape suffixes: P measured requests, N trained requests, F features, D dimensions, K neighbours.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from distill_ray.config.serve import CalibrateConfig, PricesConfig
from distill_ray.serving.calibration.curve import curve_points
from distill_ray.serving.calibration.fitting import (
    NUM_FOLDS,
    Fitted,
    fit_decision,
    near_duplicate_groups,
    split_groups,
    spread_outcomes,
)
from distill_ray.serving.calibration.guarantee import (
    Count,
    expected_p_value,
    interval,
    num_needed,
    num_needed_without_error,
    num_passing,
    upper_bound,
)
from distill_ray.serving.calibration.polarity import PAIRS
from distill_ray.serving.calibration.vectors import Vectors
from distill_ray.serving.routing.decision import DecisionModel, features_of, sigmoid
from distill_ray.serving.routing.embedder import Embedder
from distill_ray.serving.routing.features import marks_of, mismatch
from distill_ray.serving.routing.index import NearestIndex
from distill_ray.serving.routing.manifest import NEVER
from distill_ray.serving.routing.router import Decision, Guard, Reason, weigh

SHARES = (0.3, 0.5, 0.2)  # of fit, select, report
FIT, SELECT, REPORT = range(3)
NUM_THRESHOLDS = 50
NUM_BINS = 5  # of the score, to see whether it means what it says
LEAST_TO_FIT = 4 * NUM_FOLDS  # and to speak of a rate


@dataclass(frozen=True)
class Rule:
    """What the router needs beside the neighbours; a bundle's manifest has the same."""

    model: DecisionModel
    threshold: float
    far: float
    guard: Guard


@dataclass(frozen=True)
class Study:
    """What a calibration came to."""

    rule: Rule
    index: NearestIndex
    outcomes_N: np.ndarray
    """How well the student does around each trained request."""

    figures: dict[str, Any]
    """For calibration.json."""

    curve: list[dict[str, float | None]]
    """For curve.json: a point per threshold."""


@dataclass(frozen=True)
class _Weighed:
    """Requests under a rule with threshold 0, and whether the student was good."""

    decisions: list[Decision]
    good_P: np.ndarray
    groups_P: np.ndarray
    """Near-duplicates have the same number."""

    def scores(self) -> list[float]:
        """Of the requests that only a threshold keeps from the student."""
        return [decision.score or 0.0 for decision in self.decisions if decision.reason is Reason.GOOD]

    def count(self, threshold: float) -> Count:
        """Of requests."""
        routed_P = self._routed(threshold)
        return Count(len(routed_P), int(routed_P.sum()), int((routed_P & ~self.good_P).sum()))

    def count_once(self, threshold: float) -> Count:
        """Of near-duplicate groups: each counts once, as bad as its requests on the student are in the mean."""
        routed_P = self._routed(threshold)
        _, members_P = np.unique(self.groups_P, return_inverse=True)
        num_routed_G = np.bincount(members_P, routed_P)
        num_bad_G = np.bincount(members_P, routed_P & ~self.good_P)
        is_routed_G = num_routed_G > 0
        num_bad = float((num_bad_G[is_routed_G] / num_routed_G[is_routed_G]).sum())
        return Count(len(num_routed_G), int(is_routed_G.sum()), num_bad)

    def worse_count(self, threshold: float, confidence: float) -> Count:
        """That of the two which shows less."""
        return max(
            (self.count(threshold), self.count_once(threshold)),
            key=lambda count: upper_bound(count.num_bad, count.num_routed, confidence),
        )

    def _routed(self, threshold: float) -> np.ndarray:
        return self._scores_P >= threshold

    @cached_property
    def _scores_P(self) -> np.ndarray:
        """-inf where no threshold would help."""
        return np.array([d.score or 0.0 if d.reason is Reason.GOOD else -np.inf for d in self.decisions])


def study(
    config: CalibrateConfig,
    guard: Guard,
    prices: PricesConfig,
    trained: Vectors,
    measured: Vectors,
    good_P: np.ndarray,
    embedder: Embedder,
    *,
    tokens: Mapping[str, float],
    agree_P: np.ndarray | None = None,
) -> Study:
    """Fit, select, report.

    Args:
        config: `calibrate`.
        guard: of the router.
        prices: of a token.
        trained: requests that the student was trained on; what the router will search.
        measured: requests that it never saw.
        good_P: whether its answer to each is as good as the teacher's.
        embedder: for the polarity pairs.
        tokens: mean tokens of a request, where known: teacher_prompt, teacher_completion, student_prompt.
        agree_P: whether it is as good where the teacher's answer is what is right, as it is for a running service.
            Default: good_P.
    """
    index = NearestIndex.build(trained.vectors_ND, trained.kinds)
    nearest = [
        index.search(vector, kind, config.neighbours)
        for vector, kind in zip(measured.vectors_ND, measured.kinds, strict=True)
    ]
    groups_P, parts_P = parts_of(measured.texts, config.seed)
    fit = Fit(config, guard, trained, measured, nearest, good_P, groups_P, np.flatnonzero(parts_P == FIT))
    outcomes_N, fitted, far = fit.outcomes_N, fit.fitted, fit.far
    rule = Rule(fitted.model, 0.0, far, guard)

    def weighed(part: int | tuple[int, ...], under: Rule = rule, is_good_P: np.ndarray = good_P) -> _Weighed:
        rows = np.flatnonzero(np.isin(parts_P, part))
        decisions = [_decision(under, trained, measured, nearest, outcomes_N, row) for row in rows]
        return _Weighed(decisions, is_good_P[rows], groups_P[rows])

    thresholds = _order(fit.weighed, len(np.unique(groups_P[parts_P == SELECT])), config)
    select = weighed(SELECT)
    counts = [select.worse_count(threshold, config.confidence) for threshold in thresholds]
    num = num_passing(counts, config.error_budget, config.confidence)
    threshold = thresholds[num - 1] if num else NEVER
    rule = Rule(fitted.model, threshold, far, guard)
    report = weighed(REPORT)
    strict = weighed(REPORT, Rule(fitted.model, 0.0, far, "strict"))
    reported, selected = report.count(threshold), select.worse_count(threshold, config.confidence)
    low, high = _interval(report, threshold, config.confidence)
    drift_budget = config.error_budget
    if num and agree_P is not None and (agree_P != good_P).any():
        seen = weighed((SELECT, REPORT), is_good_P=agree_P).worse_count(threshold, config.confidence)
        drift_budget = max(drift_budget, upper_bound(seen.num_bad, seen.num_routed, config.confidence))
    figures: dict[str, Any] = {
        "metric": config.metric,
        "good_from": config.good_from,
        "error_budget": config.error_budget,
        "drift_budget": drift_budget,
        "confidence": config.confidence,
        "guard": guard,
        "pairs": len(good_P),
        "pairs_good": int(good_P.sum()),
        "groups": len(np.unique(groups_P)),
        "largest_group": int(np.bincount(groups_P).max()) if len(groups_P) else 0,
        "trained": len(trained.texts),
        "kind": fitted.model.kind,
        "log_loss": dict(fitted.losses),
        "far": far,
        "threshold": threshold if num else None,
        "fit": _part(fit.weighed, threshold),
        "select": {
            **_part(select, threshold),
            "error_upper": upper_bound(selected.num_bad, selected.num_routed, config.confidence) if num else None,
        },
        "report": {**_part(report, threshold), "reasons": _reasons(report, threshold), "score": _reliability(report)},
        "share": reported.share,
        "share_strict": strict.count(threshold).share,
        "error": reported.error,
        "error_low": low if reported.num_routed else None,
        "error_high": high if reported.num_routed else None,
        **_missing(config, select, thresholds, num, len(good_P)),
        "polarity": polarity(rule, index, trained, outcomes_N, config.neighbours, embedder),
    }
    drawn = weighed((SELECT, REPORT))
    points = curve_points(drawn.count, drawn.scores(), config.confidence, prices, tokens)
    return Study(rule, index, outcomes_N, figures, points)


def parts_of(texts: Sequence[str], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Near-duplicate group of each measured request, and its part: FIT, SELECT or REPORT. [P], [P]"""
    groups_P = near_duplicate_groups(texts)
    return groups_P, split_groups(groups_P, SHARES, seed)


class Fit:
    """What comes of the fit split: the score, what is known around each trained request, the far limit.

    `features` and `folds` are of its requests (those of a kind that was trained), each row's from outcomes of other
    folds.
    """

    def __init__(
        self,
        config: CalibrateConfig,
        guard: Guard,
        trained: Vectors,
        measured: Vectors,
        nearest: Sequence[tuple[np.ndarray, np.ndarray]],
        good_P: np.ndarray,
        groups_P: np.ndarray,
        rows: np.ndarray,
    ) -> None:
        rows = np.array([row for row in rows if len(nearest[row][1])], dtype=np.int64)  # nothing of its kind is trained
        good, vectors = good_P[rows], measured.vectors_ND[rows]
        folds = split_groups(groups_P[rows], [1.0] * NUM_FOLDS, config.seed + 1)

        def spread(known: np.ndarray) -> np.ndarray:
            kinds = [measured.kinds[row] for row in rows[known]]
            return spread_outcomes(
                trained.vectors_ND, trained.kinds, vectors[known], kinds, good[known], config.neighbours
            )

        self.outcomes_N = spread(np.ones(len(rows), dtype=bool))
        features = np.zeros((len(rows), len(features_of(np.ones(1), np.ones(1), 0, frozenset()))))
        for fold in np.unique(folds):
            outcomes_N = spread(folds != fold)
            for number in np.flatnonzero(folds == fold).tolist():
                features[number] = request_features(trained, measured, nearest, outcomes_N, int(rows[number]))
        self.features, self.folds = features, folds
        is_enough = len(rows) >= LEAST_TO_FIT and len(np.unique(folds)) == NUM_FOLDS
        self.fitted = fit_decision(features, vectors, good, folds) if is_enough else _unfitted(good)
        similarities = features[:, 0]
        self.far = float(np.quantile(similarities, config.far)) if len(rows) else 1.0
        rule = Rule(self.fitted.model, 0.0, self.far, guard)
        decisions: list[Decision] = []
        for number, row in enumerate(rows):
            found = _decision(rule, trained, measured, nearest, self.outcomes_N, row)
            score = sigmoid(float(self.fitted.log_odds_P[number]))
            decisions.append(Decision(found.route, found.reason, found.similarity, score))
        self.weighed = _Weighed(decisions, good, groups_P[rows])


def _unfitted(good_P: np.ndarray) -> Fitted:
    """Of too few requests: the rate alone."""
    rate = (good_P.sum() + 1.0) / (len(good_P) + 2.0)
    model = DecisionModel(kind="similarity", intercept=math.log(rate / (1 - rate)), weights=[0.0])
    return Fitted(model, np.full(len(good_P), model.intercept), {})


def _order(fit: _Weighed, num_select: int, config: CalibrateConfig) -> list[float]:
    """The thresholds to test, in the order of testing: from the one most likely to pass on to looser ones.

    Made from the outcomes of the fit split alone: an order that had seen those of the select split would void the
    guarantee. The strictest threshold is a bad start: it lets so few requests pass that no number of good answers could
    show anything. `num_select` near-duplicate groups select.
    """
    scores = fit.scores()
    if not scores:
        return [0.0]
    levels = np.linspace(1.0, 0.0, NUM_THRESHOLDS, endpoint=False)
    thresholds = list(dict.fromkeys([*np.quantile(scores, levels).tolist(), 0.0]))

    def expected(threshold: float) -> float:
        count = fit.count_once(threshold)
        error = (count.num_bad + 1.0) / (count.num_routed + 2.0)  # of a few requests without an error little is known
        return expected_p_value(error, count.share * num_select, config.error_budget)

    start = min(range(len(thresholds)), key=lambda n: expected(thresholds[n]))
    return thresholds[start:]


def _missing(
    config: CalibrateConfig, select: _Weighed, thresholds: Sequence[float], num: int, num_pairs: int
) -> dict[str, Any]:
    """Where no threshold passes: why, and about how many more pairs it takes if the rates stay what they are."""
    if num:
        return {"why": None, "missing_pairs": 0}
    budget, confidence = config.error_budget, config.confidence
    # The fit split chose this threshold, so its own error there is flattering.
    here = select.worse_count(thresholds[0], confidence)
    if here.num_routed < LEAST_TO_FIT:  # a rate of so few says nothing
        here = select.worse_count(0.0, confidence)
    least = num_needed_without_error(budget, confidence)
    needed = num_needed(here.error, budget, confidence) if here.error is not None else least
    if needed is None:
        why = (
            f"{here.num_bad:.4g} of {here.num_routed} answers of the student that were looked at are worse "
            f"({here.error:.1%}), and the budget is {budget:.1%}: no number of pairs helps; train a better student or "
            "raise calibrate.error_budget"
        )
        return {"why": why, "missing_pairs": None}
    share = here.num_routed / max(1, len(select.decisions)) or 1.0  # of requests; near-duplicates add nothing
    missing = max(1, math.ceil(max(needed, least) / share / SHARES[SELECT]) - num_pairs)
    why = (
        f"{num_pairs} held-out pairs cannot show that at most {budget:.1%} of the student's answers are worse with "
        f"{confidence:.0%} confidence; about {missing} more pairs can, if the rates stay what they are"
    )
    return {"why": why, "missing_pairs": missing}


# -- one request -------------------------------------------------------------------------------------------------------


def request_features(
    trained: Vectors,
    measured: Vectors,
    nearest: Sequence[tuple[np.ndarray, np.ndarray]],
    outcomes_N: np.ndarray,
    row: int,
) -> np.ndarray:
    """The features of a measured request that has neighbours. [F]"""
    similarities_K, rows_K = nearest[row]
    text = measured.texts[row]
    differs = mismatch(marks_of(text), marks_of(trained.texts[int(rows_K[0])]))
    return features_of(similarities_K, outcomes_N[rows_K], len(text), differs)


def _decision(
    rule: Rule,
    trained: Vectors,
    measured: Vectors,
    nearest: Sequence[tuple[np.ndarray, np.ndarray]],
    outcomes_N: np.ndarray,
    row: int,
) -> Decision:
    """The router's own."""
    similarities_K, rows_K = nearest[row]
    if not len(rows_K):
        return Decision("teacher", Reason.OTHER_FINGERPRINT)
    closest = trained.texts[int(rows_K[0])]
    return weigh(rule, measured.texts[row], measured.vectors_ND[row], similarities_K, outcomes_N[rows_K], closest)


# -- figures -----------------------------------------------------------------------------------------------------------


def _interval(weighed: _Weighed, threshold: float, confidence: float) -> tuple[float, float]:
    """Of the error: as wide as both ways of counting make it."""
    counts = weighed.count(threshold), weighed.count_once(threshold)
    lows, highs = zip(*(interval(count.num_bad, count.num_routed, confidence) for count in counts), strict=True)
    return min(lows), max(highs)


def _part(weighed: _Weighed, threshold: float) -> dict[str, Any]:
    count = weighed.count(threshold)
    return {
        "pairs": count.num,
        "good": int(weighed.good_P.sum()),
        "routed": count.num_routed,
        "routed_groups": weighed.count_once(threshold).num_routed,
        "bad": count.num_bad,
        "share": count.share,
        "error": count.error,
    }


def _reasons(weighed: _Weighed, threshold: float) -> dict[str, int]:
    def reason(decision: Decision) -> str:
        is_below = decision.reason is Reason.GOOD and (decision.score or 0.0) < threshold
        return (Reason.BELOW_THRESHOLD if is_below else decision.reason).value

    return dict(Counter(map(reason, weighed.decisions)).most_common())


def _reliability(weighed: _Weighed) -> dict[str, Any]:
    """Does a score of 0.9 mean 90 %? Brier score (mean squared error), and mean score beside the rate, bin by bin."""
    scored = [(d.score, bool(g)) for d, g in zip(weighed.decisions, weighed.good_P, strict=True) if d.score is not None]
    if not scored:
        return {"brier": None, "bins": []}
    scored.sort()
    bins = [part for part in np.array_split(np.array(scored, dtype=np.float64), NUM_BINS) if len(part)]
    return {
        "brier": float(np.mean([(score - good) ** 2 for score, good in scored])),
        "bins": [
            {"num": len(part), "score": float(p), "good": float(g)} for part in bins for p, g in [part.mean(axis=0)]
        ],
    }


def polarity(
    rule: Rule, index: NearestIndex, trained: Vectors, outcomes_N: np.ndarray, neighbours: int, embedder: Embedder
) -> dict[str, Any]:
    """How many requests would pass for one of similar words and another meaning, without and with the guard.

    As if the first of each pair had been trained on, and the student did well there: it is the nearest neighbour of the
    second, before those of the index.
    """
    kind = Counter(trained.kinds).most_common(1)[0][0] if trained.kinds else ""
    vectors_a = embedder.embed([pair.trained for pair in PAIRS])
    vectors_b = embedder.embed([pair.asked for pair in PAIRS])
    crossing: dict[str, Counter[str]] = {"off": Counter(), "strict": Counter()}
    similar: list[float] = []
    for pair, a, b in zip(PAIRS, vectors_a, vectors_b, strict=True):
        others, rows = index.search(b, kind, neighbours - 1)
        similarities = np.concatenate([[a @ b], others]).astype(np.float32)
        outcomes = np.concatenate([[1.0], outcomes_N[rows]])
        order = np.argsort(-similarities, kind="stable")
        similar.append(float(a @ b))
        for guard in ("off", "strict"):
            under = Rule(rule.model, rule.threshold, rule.far, guard)
            nearest = pair.trained if order[0] == 0 else trained.texts[int(rows[order[0] - 1])]
            found = weigh(under, pair.asked, b, similarities[order], outcomes[order], nearest)
            crossing[guard][pair.kind] += found.route == "student"
    return {
        "pairs": len(PAIRS),
        "mean_similarity": float(np.mean(similar)),
        "crossing": {guard: {"all": sum(counts.values()), **counts} for guard, counts in crossing.items()},
    }
