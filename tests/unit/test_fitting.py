"""Splits that share nothing, outcomes that leak nothing, and the kind of score that the data deserve."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss

from distill_ray.serving.calibration.fitting import fit_decision, near_duplicate_groups, split_groups, spread_outcomes
from distill_ray.serving.routing.decision import FEATURES

SENTENCE = "please tell me when the next train to the coast leaves from this station on a working day"


def unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def test_near_duplicates_have_one_group_and_others_their_own() -> None:
    texts = [
        SENTENCE,
        f"{SENTENCE}?",
        SENTENCE.upper(),
        "how do I bake bread",
        "How do I bake  bread",
        "something else",
    ]
    groups = near_duplicate_groups(texts).tolist()
    assert groups[0] == groups[1] == groups[2]
    assert groups[3] == groups[4]
    assert len(set(groups)) == 3


def test_groups_are_joined_through_what_they_have_in_common() -> None:
    words = SENTENCE.split()
    chain = [" ".join(words), " ".join([*words[:-1], "night"]), " ".join([*words[:-1], "night", "too"])]
    assert len(set(near_duplicate_groups(chain).tolist())) == 1


@given(st.lists(st.integers(0, 30), min_size=1, max_size=200), st.integers(0, 5))
def test_a_group_is_never_divided(groups: list[int], seed: int) -> None:
    names = np.array(groups)
    parts = split_groups(names, (0.3, 0.5, 0.2), seed)
    assert all(len(set(parts[names == name].tolist())) == 1 for name in set(groups))
    assert (split_groups(names, (0.3, 0.5, 0.2), seed) == parts).all()


def test_parts_have_their_shares_and_the_seed_decides_who_is_where() -> None:
    parts = split_groups(np.arange(1000), (0.3, 0.5, 0.2), 0)
    assert np.bincount(parts).tolist() == [300, 500, 200]
    assert (parts != split_groups(np.arange(1000), (0.3, 0.5, 0.2), 1)).any()


def test_outcomes_are_those_of_the_nearest_measured_requests_of_the_same_kind() -> None:
    rng = np.random.default_rng(0)
    trained, measured = unit(rng.standard_normal((50, 8))), unit(rng.standard_normal((40, 8)))
    good = rng.random(40) < 0.7
    kinds_N, kinds_P = ["a"] * 30 + ["b"] * 10 + ["c"] * 10, ["a"] * 25 + ["b"] * 15
    found = spread_outcomes(trained, kinds_N, measured, kinds_P, good, 5)
    prior = (good.sum() + 1) / (len(good) + 2)
    for row in range(50):
        of_kind = [p for p in range(40) if kinds_P[p] == kinds_N[row]]
        nearest = sorted(of_kind, key=lambda p: -float(trained[row] @ measured[p]))[:5]
        expected = (sum(good[p] for p in nearest) + prior) / (len(nearest) + 1)
        assert found[row] == pytest.approx(expected, abs=1e-6)


def inputs(num: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.random.Generator]:
    rng = np.random.default_rng(seed)
    return rng.random((num, len(FEATURES))), unit(rng.standard_normal((num, 12))), rng


def test_the_kind_is_the_one_that_the_outcomes_depend_on() -> None:
    features, embeddings, rng = inputs(1500, 0)
    folds = np.arange(1500) % 5
    for kind, log_odds in (
        ("similarity", 12 * (features[:, 0] - 0.5)),
        ("neighbours", 12 * (features[:, 2] - 0.5)),
        ("regression", 12 * embeddings[:, 3]),
    ):
        good = rng.random(1500) < 1 / (1 + np.exp(-log_odds))
        fitted = fit_decision(features, embeddings, good, folds)
        assert fitted.model.kind == kind
        assert fitted.losses[kind] < fitted.losses["constant"] - 0.1


def test_where_nothing_helps_the_simplest_kind_stays() -> None:
    features, embeddings, rng = inputs(400, 1)
    fitted = fit_decision(features, embeddings, rng.random(400) < 0.9, np.arange(400) % 5)
    assert fitted.model.kind == "similarity"


def test_the_weights_are_those_of_a_logistic_regression_on_standardised_inputs() -> None:
    features, embeddings, rng = inputs(500, 2)
    good = rng.random(500) < 1 / (1 + np.exp(-6 * (features[:, 0] - 0.4)))
    folds = np.arange(500) % 5
    fitted = fit_decision(features, embeddings, good, folds)
    first = features[:, :1]
    standard = (first - first.mean()) / first.std()
    reference = LogisticRegression(C=1.0, max_iter=2000).fit(standard, good)
    assert fitted.model.kind == "similarity"
    assert fitted.model.log_odds(features, embeddings) == pytest.approx(reference.decision_function(standard), abs=1e-6)
    rate = (good.sum() + 1) / (len(good) + 2)
    assert fitted.losses["constant"] == pytest.approx(log_loss(good, np.full(len(good), rate)), abs=1e-9)


def test_a_request_is_scored_by_models_that_have_not_seen_it() -> None:
    """Turning round an outcome changes what the other folds score, and nothing of its own."""
    features, embeddings, rng = inputs(1000, 3)
    good, folds = rng.random(1000) < 1 / (1 + np.exp(-12 * (features[:, 0] - 0.5))), np.arange(1000) % 5
    turned = good.copy()
    turned[0] = not good[0]
    before, after = (fit_decision(features, embeddings, outcomes, folds) for outcomes in (good, turned))
    assert before.model.kind == after.model.kind == "similarity"
    same = before.log_odds_P == after.log_odds_P
    assert same[folds == 0].all()
    assert not same[folds != 0].any()


@pytest.mark.parametrize("value", [True, False])
def test_outcomes_that_are_all_the_same_give_their_rate(value: bool) -> None:
    features, embeddings, _ = inputs(100, 4)
    fitted = fit_decision(features, embeddings, np.full(100, value), np.arange(100) % 5)
    expected = 101 / 102 if value else 1 / 102
    assert fitted.model.probability(features[0], embeddings[0]) == pytest.approx(expected)
