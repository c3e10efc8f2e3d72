"""How good are routers on recorded pairs? As RouteLLM measures it (Ong et al. 2024, arXiv 2406.18665, section 2).

    recorded pairs (query, how right the small model was, how right the large one) -> near-duplicates in groups
        -> ten random halves: one trains each router, the other is measured -> PGR over the share of large calls

PGR is the part of the quality between the small model alone (0) and the large one alone (1) that a router gets. APGR is
the area under it, CPT(x) the least share of large calls that recovers x %; the paper adds up ten shares, here it is
every one that a threshold can give. Calls that no threshold tells apart are taken in random order: a straight line.

A router is a score, and what scores low goes to the large model. All but `perfect` score what they can know:

    random       drawn: what luck gives on this many pairs (its expectation is APGR 0.5 and CPT(x) = x %)
    similarity   cosine to the nearest request for which the small model is known to be as good
    neighbours   how often it was as good on the nearest requests
    fitted       the service's own score, fitted by the code that `calibrate` uses; without guard and far limit
    logprob      mean log-probability of the small model's answer: what `serve.cascade` looks at
    cascade      the fitted score, the answer's words and length, its cosine to the query, its log-probability
    perfect      what each model is going to be worth: nothing can be better

In a recorded file nobody knows what the small model was trained on, so the training half stands for that: its requests
are the index, and outcomes are known there. To the similarity alone, which knows no outcomes, only those are shown for
which the small model was as good, as a distilled student was trained on what it can do.

"As good" is `small >= large`, as in a calibration. A request that both get wrong gains nothing by the large model; to
learn `small is right` would send it there.

Shape suffixes: P pairs, T points of a curve, K neighbours, D dimensions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from distill_ray.config.serve import CalibrateConfig
from distill_ray.errors import DataError
from distill_ray.serving.calibration.fitting import fit_decision, near_duplicate_groups, split_groups
from distill_ray.serving.calibration.study import Fit, request_features
from distill_ray.serving.calibration.vectors import Vectors
from distill_ray.serving.routing.index import NearestIndex

NUM_SPLITS = 10
TRAINED_SHARE = 0.5
LEAST_DIFFERENT = 100  # queries, near-duplicates counted once: 50 to train on, 50 to measure
LEVELS = {"cpt_50": 0.5, "cpt_80": 0.8}
NO_GAP = 1e-9  # what is left of a difference of 0 when it is added up
DRAWN_SHARES = np.linspace(0.0, 1.0, 101)

Nearest = list[tuple[np.ndarray, np.ndarray]]
"""Per request: similarities [K], rows [K]."""


@dataclass(frozen=True)
class Answers:
    """The small model's own answers."""

    texts: list[str]
    vectors_PD: np.ndarray
    """Unit vectors; 0 where an answer cannot be embedded."""


@dataclass(frozen=True)
class Recorded:
    """Recorded pairs, row by row."""

    queries: Vectors
    small_P: np.ndarray
    """How right the small model was, 0..1."""

    large_P: np.ndarray
    answers: Answers | None = None
    logprobs_P: np.ndarray | None = None
    """Mean log-probability of the small model's answer, nats per token."""


# -- what RouteLLM measures --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Curve:
    """PGR at the shares of large calls that a router's thresholds can give; straight lines between."""

    shares_T: np.ndarray
    """Rising from 0 to 1."""

    pgr_T: np.ndarray
    """From 0 to 1; below 0 and above 1 where the small model is better on what it keeps or loses."""

    def at(self, shares: np.ndarray) -> np.ndarray:
        """PGR at given shares."""
        return np.interp(shares, self.shares_T, self.pgr_T)


def pgr_curve(scores_P: np.ndarray, small_P: np.ndarray, large_P: np.ndarray) -> Curve:
    """The curve of a router: the lowest scores go to the large model first.

    Raises:
        ValueError: a score is not finite, or the large model is not better, so that there is nothing to recover.
    """
    if not np.isfinite(scores_P).all():
        raise ValueError("a score is not finite")
    order = np.argsort(scores_P, kind="stable")
    gained = np.cumsum((large_P - small_P)[order], dtype=np.float64)
    if not len(gained) or gained[-1] <= 0:
        raise ValueError("the large model is not better than the small one: there is nothing to recover")
    is_last = np.append(np.diff(scores_P[order]) > 0, True)  # of its score: a threshold cannot divide equal ones
    ends = np.flatnonzero(is_last) + 1
    return Curve(np.append(0.0, ends / len(gained)), np.append(0.0, gained[is_last] / gained[-1]))


def apgr(curve: Curve) -> float:
    """Average performance gap recovered: the area under the curve."""
    return float(np.trapezoid(curve.pgr_T, curve.shares_T))


def cpt(curve: Curve, level: float) -> float:
    """Call-performance threshold: the least share of large calls at which PGR is at least `level` (in (0, 1])."""
    at = int(np.argmax(curve.pgr_T >= level))  # the last point is 1, so there is one
    (before, after), (low, high) = curve.shares_T[at - 1 : at + 1], curve.pgr_T[at - 1 : at + 1]
    return float(before + (after - before) * (level - low) / (high - low))


# -- routers side by side ----------------------------------------------------------------------------------------------


def replay(
    recorded: Recorded, config: CalibrateConfig, show: Callable[[int], None] = lambda done: None
) -> dict[str, Any]:
    """Train and measure every router on random halves. Returns figures as JSON has them.

    Args:
        recorded: the pairs.
        config: `calibrate`: neighbours and seed.
        show: told how many splits are done.

    Raises:
        DataError: too few different queries, or the large model is not better than the small one.
    """
    num = len(recorded.small_P)
    groups_P = near_duplicate_groups(recorded.queries.texts)
    num_groups = len(np.unique(groups_P))
    if num_groups < LEAST_DIFFERENT:
        raise DataError(
            f"{num} rows, of which {num_groups} have different queries (near-duplicates count once); at least "
            f"{LEAST_DIFFERENT} are needed: half of them train the routers, half are measured"
        )
    difference_P = recorded.large_P - recorded.small_P
    gap, error = float(difference_P.mean()), float(difference_P.std(ddof=1) / np.sqrt(num))
    if gap <= NO_GAP:
        raise DataError(
            f"the large model is not better than the small one: its mean is {recorded.large_P.mean():.3f}, the small "
            f"one's {recorded.small_P.mean():.3f}. There is no gap to recover, so PGR, APGR and CPT have no meaning"
        )
    curves: dict[str, list[Curve]] = {}
    num_left_out = 0
    for split in range(NUM_SPLITS):
        parts_P = split_groups(groups_P, (TRAINED_SHARE, 1 - TRAINED_SHARE), config.seed + split)
        train, test = np.flatnonzero(parts_P == 0), np.flatnonzero(parts_P == 1)
        if difference_P[test].mean() > NO_GAP:
            with threadpool_limits(1):  # on matrices as small as these, threads wait for one another
                scores = router_scores(recorded, config, groups_P, train, test, config.seed + split)
            for name, of_router in scores.items():
                curve = pgr_curve(of_router, recorded.small_P[test], recorded.large_P[test])
                curves.setdefault(name, []).append(curve)
        else:
            num_left_out += 1
        show(split + 1)
    if not curves:
        raise DataError(
            f"the large model is better by {gap:.4f} ± {error:.4f} on {num} rows, and in none of {NUM_SPLITS} random "
            "halves is it better: the gap is too small to measure what a router recovers of it; record more pairs"
        )
    return {
        "rows": num,
        "different": num_groups,
        "small": float(recorded.small_P.mean()),
        "large": float(recorded.large_P.mean()),
        "large_better": int((difference_P > 0).sum()),
        "small_better": int((difference_P < 0).sum()),
        "gap": gap,
        "gap_error": error,
        "is_sure": gap > 2 * error,
        "splits": NUM_SPLITS,
        "splits_left_out": num_left_out,
        "neighbours": config.neighbours,
        "seed": config.seed,
        "shares": DRAWN_SHARES.tolist(),
        "routers": {name: _summary(of_router) for name, of_router in curves.items()},
    }


def router_scores(
    recorded: Recorded, config: CalibrateConfig, groups_P: np.ndarray, train: np.ndarray, test: np.ndarray, seed: int
) -> dict[str, np.ndarray]:
    """What each router makes of the rows `test`, after it has seen the rows `train`. Low goes to the large model."""
    good = (recorded.small_P >= recorded.large_P)[train]
    known, asked = recorded.queries.take(train), recorded.queries.take(test)
    index = NearestIndex.build(known.vectors_ND, known.kinds)
    nearest: Nearest = [
        index.search(vector, kind, config.neighbours)
        for vector, kind in zip(asked.vectors_ND, asked.kinds, strict=True)
    ]
    others = _nearest_of_others(index, known, groups_P[train], config.neighbours)
    fit = Fit(config, "off", known, known, others, good, groups_P[train], np.arange(len(train)))
    features = np.stack([request_features(known, asked, nearest, fit.outcomes_N, row) for row in range(len(test))])
    log_odds = fit.fitted.model.log_odds(features, asked.vectors_ND)
    scores = {
        "random": np.random.default_rng(seed).random(len(test)),
        "similarity": _nearest_good(known.take(np.flatnonzero(good)), asked),
        "neighbours": np.array([good[rows].mean() for _, rows in nearest]),
        "fitted": log_odds,
    }
    if recorded.logprobs_P is not None:
        scores["logprob"] = recorded.logprobs_P[test]
    if recorded.answers is not None or recorded.logprobs_P is not None:
        shown_train, shown_test = _in_view(recorded, fit, features, log_odds, good, train, test)
        scores["cascade"] = _log_odds(shown_train, good, shown_test)
    return scores | {"perfect": (recorded.small_P - recorded.large_P)[test]}


def _nearest_of_others(index: NearestIndex, known: Vectors, groups_P: np.ndarray, neighbours: int) -> Nearest:
    """The nearest of the index's own requests to each, without itself and its near-duplicates."""
    sizes = np.bincount(groups_P)
    found: Nearest = []
    for vector, kind, group in zip(known.vectors_ND, known.kinds, groups_P, strict=True):
        similarities, rows = index.search(vector, kind, neighbours + int(sizes[group]))
        is_other = groups_P[rows] != group
        found.append((similarities[is_other][:neighbours], rows[is_other][:neighbours]))
    return found


def _nearest_good(good: Vectors, asked: Vectors) -> np.ndarray:
    """Cosine to the nearest request for which the small model was as good; -1 where there is none."""
    index = NearestIndex.build(good.vectors_ND, good.kinds)
    found = [index.search(vector, kind, 1)[0] for vector, kind in zip(asked.vectors_ND, asked.kinds, strict=True)]
    return np.array([similarities[0] if len(similarities) else -1.0 for similarities in found])


def _in_view(
    recorded: Recorded,
    fit: Fit,
    features: np.ndarray,
    log_odds: np.ndarray,
    good: np.ndarray,
    train: np.ndarray,
    test: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """What a cascade sees of the training rows and of those to be measured: [P, columns] each.

    Of training rows, scores are those of models that have not seen them (`Fitted.log_odds_P`).
    """
    columns = [(fit.fitted.log_odds_P, log_odds)]
    if recorded.answers is not None:
        vectors_PD = recorded.answers.vectors_PD
        by_words = fit_decision(fit.features, vectors_PD[train], good, fit.folds)
        columns.append((by_words.log_odds_P, by_words.model.log_odds(features, vectors_PD[test])))
        cosines = (vectors_PD * recorded.queries.vectors_ND).sum(axis=1)
        lengths = np.log1p([len(text) for text in recorded.answers.texts])
        columns += [(of[train], of[test]) for of in (cosines, lengths)]
    if recorded.logprobs_P is not None:
        columns.append((recorded.logprobs_P[train], recorded.logprobs_P[test]))
    seen, asked = zip(*columns, strict=True)
    return np.column_stack(seen), np.column_stack(asked)


def _log_odds(inputs: np.ndarray, good: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """Of a logistic regression on standardised columns. With one class only there is nothing to learn."""
    from sklearn.linear_model import LogisticRegression  # heavy, and not needed to parse a command
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if good.all() or not good.any():
        return np.zeros(len(asked))
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    return model.fit(inputs, good).decision_function(asked)


# -- figures -----------------------------------------------------------------------------------------------------------


def _summary(curves: list[Curve]) -> dict[str, Any]:
    """Of a router over the splits; PGR is their mean at DRAWN_SHARES."""
    figures = {"apgr": _spread([apgr(curve) for curve in curves])}
    figures |= {name: _spread([cpt(curve, level) for curve in curves]) for name, level in LEVELS.items()}
    pgr = np.mean([curve.at(DRAWN_SHARES) for curve in curves], axis=0)
    return {**figures, "over_random": figures["apgr"]["mean"] / 0.5, "pgr": pgr.tolist()}


def _spread(values: list[float]) -> dict[str, Any]:
    return {
        "mean": float(np.mean(values)),
        "sd": float(np.std(values, ddof=1)) if len(values) > 1 else None,
        "min": min(values),
        "max": max(values),
        "values": values,
    }
