"""The score: one weighted sum, the same for one request as for many, and for what is read back from JSON."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from distill_ray.serving.routing.decision import (
    FEATURES,
    NUM_FEATURES,
    DecisionModel,
    Kind,
    features_of,
    folded,
    sigmoid,
)

NUM = len(FEATURES)
DIM = 16
KINDS: tuple[Kind, ...] = ("similarity", "neighbours", "regression")


def model_of(kind: Kind, seed: int = 0) -> DecisionModel:
    rng = np.random.default_rng(seed)
    num = NUM_FEATURES[kind] + (DIM if kind == "regression" else 0)
    return folded(kind, 0.3, rng.standard_normal(num), rng.standard_normal(num), rng.random(num) + 0.5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_of_raw_features_does_what_that_of_standardised_ones_does(kind: Kind) -> None:
    rng = np.random.default_rng(0)
    num = NUM_FEATURES[kind] + (DIM if kind == "regression" else 0)
    weights, mean, scale = rng.standard_normal(num), rng.standard_normal(num), rng.random(num) + 0.5
    features, embeddings = rng.standard_normal((20, NUM)), rng.standard_normal((20, DIM))
    inputs = np.hstack([features[:, : NUM_FEATURES[kind]], embeddings])[:, :num]
    expected = (inputs - mean) / scale @ weights + 0.3
    assert folded(kind, 0.3, weights, mean, scale).log_odds(features, embeddings) == pytest.approx(expected)


@pytest.mark.parametrize("kind", KINDS)
def test_one_request_scores_exactly_what_it_scores_among_many_and_after_json(kind: Kind) -> None:
    rng = np.random.default_rng(1)
    features, embeddings = rng.standard_normal((50, NUM)), rng.standard_normal((50, DIM)).astype(np.float32)
    model = model_of(kind)
    again = DecisionModel.model_validate_json(model.model_dump_json())
    together = model.log_odds(features, embeddings)
    for number in range(50):
        assert again.probability(features[number], embeddings[number]) == sigmoid(float(together[number]))


@given(st.floats(allow_nan=False))
def test_a_probability_is_one(log_odds: float) -> None:
    assert 0.0 <= sigmoid(log_odds) <= 1.0
    assert sigmoid(log_odds) == pytest.approx(1.0 - sigmoid(-log_odds))
    if abs(log_odds) < 30:
        assert math.log(sigmoid(log_odds) / sigmoid(-log_odds)) == pytest.approx(log_odds, abs=1e-6)


def test_features_are_what_their_names_say() -> None:
    found = features_of(np.array([0.9, 0.3], np.float32), np.array([1.0, 0.0], np.float32), 99, frozenset({"names"}))
    expected = [0.9, 0.6, 0.75, math.log(100), 0.0, 0.0, 1.0]
    assert dict(zip(FEATURES, found, strict=True)) == pytest.approx(dict(zip(FEATURES, expected, strict=True)))


@pytest.mark.parametrize("similarities", [[0.0, 0.0], [-0.4, -0.9]])
def test_neighbours_that_are_like_nothing_still_give_numbers(similarities: list[float]) -> None:
    assert np.isfinite(features_of(np.array(similarities), np.array([1.0, 0.0]), 0, frozenset())).all()


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": "similarity", "weights": [1.0, 2.0]},
        {"kind": "similarity", "weights": [1.0], "embedding_weights": [1.0]},
        {"kind": "regression", "weights": [0.0] * NUM},
        {"kind": "similarity", "weights": [math.nan]},
        {"kind": "pickle", "weights": [1.0]},
    ],
)
def test_a_model_that_does_not_fit_its_kind_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        DecisionModel.model_validate({"intercept": 0.0, **wrong})
