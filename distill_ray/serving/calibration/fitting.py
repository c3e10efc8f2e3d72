"""From measured requests to a score: splits, what is known around each trained request, the best kind of model.

    measured requests -> fit | select | report (near-duplicates stay together)
    fit -> for each trained request: how well the student does around it (`spread_outcomes`)
    fit -> similarity | neighbours | regression, the best by cross-validation (`fit_decision`)

What a request scores in cross-validation comes from models that were not fitted to it or to a near-duplicate of it, and
from features without their outcomes.

Shape suffixes: P measured requests, N trained requests, F features, D dimensions, K neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from datasketch import MinHash, MinHashLSH

from distill_ray.pipeline.planning.planner import normalise
from distill_ray.serving.routing.decision import NUM_FEATURES, DecisionModel, Kind, folded

NEAR_DUPLICATE = 0.8  # Jaccard index of the sets of runs of four characters
SHINGLE = 4
BANDS = (14, 9)  # of how many numbers: datasketch's best for 0.8 where what is missed weighs 0.9 (weights=(0.1, 0.9))
NUM_FOLDS = 5
# Inverse strengths of the penalty on the embedding's weights, for as many numbers as it has; the rest have few.
PENALTIES: dict[Kind, tuple[float, ...]] = {
    "similarity": (1.0,),
    "neighbours": (1.0,),
    "regression": (0.001, 0.01, 0.1, 1.0),
}
BLOCK = 4096  # trained requests compared at once


def near_duplicate_groups(texts: Sequence[str]) -> np.ndarray:
    """Group number per text: texts that are nearly the same, directly or through others, have the same. [P] int64."""
    index = MinHashLSH(num_perm=128, params=BANDS)  # finds too many: they are compared
    unmarked = MinHash(num_perm=128)
    parents = list(range(len(texts)))

    def root(number: int) -> int:
        while parents[number] != number:
            parents[number] = number = parents[parents[number]]
        return number

    shingles_P: list[frozenset[str]] = []
    for number, text in enumerate(texts):
        key = normalise(text)
        shingles = frozenset(key[i : i + SHINGLE] for i in range(max(1, len(key) - SHINGLE + 1)))
        mark = unmarked.copy()  # the permutations are drawn once
        mark.update_batch([shingle.encode() for shingle in shingles])
        for found in index.query(mark):
            other = shingles_P[int(str(found))]
            if len(shingles & other) >= NEAR_DUPLICATE * len(shingles | other):
                parents[root(number)] = root(int(str(found)))
        index.insert(str(number), mark)
        shingles_P.append(shingles)
    return np.array([root(number) for number in range(len(texts))], dtype=np.int64)


def split_groups(groups_P: np.ndarray, shares: Sequence[float], seed: int) -> np.ndarray:
    """Part number per row: whole groups, in random order, each to the part that is furthest from its share. [P] int64.

    Args:
        groups_P: group of each row.
        shares: wanted share of rows of each part.
        seed: of the order.
    """
    names, members_P, sizes = np.unique(groups_P, return_inverse=True, return_counts=True)
    part_of_group = np.zeros(len(names), dtype=np.int64)
    missing = np.asarray(shares, dtype=np.float64) / np.sum(shares) * len(groups_P)
    for group in np.random.default_rng(seed).permutation(len(names)):
        part_of_group[group] = int(np.argmax(missing))
        missing[part_of_group[group]] -= sizes[group]
    return part_of_group[members_P]


def spread_outcomes(
    trained_ND: np.ndarray,
    trained_kinds: Sequence[str],
    measured_PD: np.ndarray,
    measured_kinds: Sequence[str],
    good_P: np.ndarray,
    num_nearest: int,
) -> np.ndarray:
    """How well the student does around each trained request: the mean outcome of measured ones near it. [N] float32.

    One request more counts, with the mean of all outcomes: little is known where little was measured. The student is
    not measured on the trained requests themselves, because it has seen their answers.

    Args:
        trained_ND: unit vectors.
        trained_kinds: fingerprint of each; only measured requests of the same one count.
        measured_PD: unit vectors.
        measured_kinds: fingerprint of each.
        good_P: outcomes, bool.
        num_nearest: how many count.
    """
    prior = (good_P.sum() + 1.0) / (len(good_P) + 2.0)
    outcomes_N = np.full(len(trained_ND), prior, dtype=np.float64)
    trained_kinds_N, measured_kinds_P = np.asarray(trained_kinds), np.asarray(measured_kinds)
    for kind in np.unique(trained_kinds_N):
        rows_N = np.flatnonzero(trained_kinds_N == kind)
        rows_P = np.flatnonzero(measured_kinds_P == kind)
        k = min(num_nearest, len(rows_P))
        if not k:
            continue
        for start in range(0, len(rows_N), BLOCK):
            block = rows_N[start : start + BLOCK]
            similarities = trained_ND[block] @ measured_PD[rows_P].T
            nearest = np.argpartition(-similarities, k - 1, axis=1)[:, :k]
            outcomes_N[block] = (good_P[rows_P][nearest].sum(axis=1) + prior) / (k + 1)
    return outcomes_N.astype(np.float32)


@dataclass(frozen=True)
class Fitted:
    """The chosen model, and how the kinds compare."""

    model: DecisionModel
    log_odds_P: np.ndarray
    """Of each request, from models that have not seen its group."""

    losses: dict[str, float]
    """Mean log loss in cross-validation, by kind; `constant` is what the rate alone gives."""


def fit_decision(features_PF: np.ndarray, embeddings_PD: np.ndarray, good_P: np.ndarray, folds_P: np.ndarray) -> Fitted:
    """Fit all kinds, keep the best. A simpler kind stays if it is within a standard error of the best.

    Args:
        features_PF: of the fit split, each row's from outcomes of other folds.
        embeddings_PD: unit vectors.
        good_P: outcomes, bool.
        folds_P: number of the fold of each.
    """
    tried: list[tuple[Kind, float, np.ndarray]] = []
    for kind, penalties in PENALTIES.items():
        inputs = _inputs(kind, features_PF, embeddings_PD)
        of_kind: list[tuple[Kind, float, np.ndarray]] = [
            (kind, c, _out_of_fold(kind, c, inputs, good_P, folds_P)) for c in penalties
        ]
        tried.append(min(of_kind, key=lambda each: _log_losses(each[2], good_P).mean()))
    losses = [_log_losses(log_odds, good_P) for _, _, log_odds in tried]
    best = int(np.argmin([loss.mean() for loss in losses]))
    chosen = next(n for n in range(len(tried)) if n == best or _is_as_good(losses[n], losses[best]))
    kind, c, log_odds_P = tried[chosen]
    rate = _shrunk_rate(good_P)
    return Fitted(
        model=_fit(kind, c, _inputs(kind, features_PF, embeddings_PD), good_P),
        log_odds_P=log_odds_P,
        losses={
            **{kind: float(loss.mean()) for (kind, _, _), loss in zip(tried, losses, strict=True)},
            "constant": float(_log_losses(np.full(len(good_P), math.log(rate / (1 - rate))), good_P).mean()),
        },
    )


def _is_as_good(loss_P: np.ndarray, best_P: np.ndarray) -> bool:
    """Whether a loss is within one standard error of the difference from the best."""
    difference_P = loss_P - best_P
    return bool(difference_P.mean() <= difference_P.std(ddof=1) / math.sqrt(len(difference_P)))


def _inputs(kind: Kind, features_PF: np.ndarray, embeddings_PD: np.ndarray) -> np.ndarray:
    features = features_PF[:, : NUM_FEATURES[kind]]
    return np.hstack([features, embeddings_PD]) if kind == "regression" else features


def _out_of_fold(kind: Kind, c: float, inputs: np.ndarray, good_P: np.ndarray, folds_P: np.ndarray) -> np.ndarray:
    """Log-odds of each row under a model of the other folds. [P]"""
    log_odds_P = np.empty(len(good_P))
    for fold in np.unique(folds_P):
        inside = folds_P == fold
        num = NUM_FEATURES[kind]
        model = _fit(kind, c, inputs[~inside], good_P[~inside])
        log_odds_P[inside] = model.log_odds(inputs[inside, :num], inputs[inside, num:])
    return log_odds_P


def _fit(kind: Kind, c: float, inputs: np.ndarray, good_P: np.ndarray) -> DecisionModel:
    """A logistic regression on standardised inputs. With one class only there is nothing to fit: the rate counts."""
    from sklearn.linear_model import LogisticRegression  # heavy, and not needed to serve

    mean, scale = inputs.mean(axis=0), inputs.std(axis=0)
    scale = np.where(scale > 1e-9, scale, 1.0)
    if good_P.all() or not good_P.any():
        rate = _shrunk_rate(good_P)
        return folded(kind, math.log(rate / (1 - rate)), np.zeros(inputs.shape[1]), mean, scale)
    fitted = LogisticRegression(C=c, max_iter=2000).fit((inputs - mean) / scale, good_P)
    return folded(kind, float(fitted.intercept_[0]), fitted.coef_[0], mean, scale)


def _shrunk_rate(good_P: np.ndarray) -> float:
    return float((good_P.sum() + 1.0) / (len(good_P) + 2.0))


def _log_losses(log_odds_P: np.ndarray, good_P: np.ndarray) -> np.ndarray:
    """-log of the probability of what happened. [P]"""
    return np.logaddexp(0.0, np.where(good_P, -log_odds_P, log_odds_P))
