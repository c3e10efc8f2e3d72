"""The score of a request: a calibrated probability that the student's answer is as good as the teacher's.

    nearest trained requests (similarity, how well the student does there) + signs of the text -> logistic regression

Three kinds, of which `calibrate` keeps the best: `similarity` knows only how near the nearest trained request is,
`neighbours` also how well the student does around there and what differs in the text, `regression` the embedding itself
too. All are one weighted sum, so a model is a list of numbers in a JSON file, and a score costs microseconds.

Shape suffixes: N requests, K neighbours, F features, D dimensions of the embedding.
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, model_validator

from distill_ray.config.base import Config
from distill_ray.serving.routing.features import Mismatch

Kind = Literal["similarity", "neighbours", "regression"]

FEATURES = ("nearest", "mean_similarity", "outcome", "length", "numbers", "negation", "names")
NUM_FEATURES: dict[Kind, int] = {"similarity": 1, "neighbours": len(FEATURES), "regression": len(FEATURES)}


def features_of(
    similarities_K: np.ndarray, outcomes_K: np.ndarray, num_chars: int, differs: frozenset[Mismatch]
) -> np.ndarray:
    """The features of a request. [F] float64, named by FEATURES.

    Args:
        similarities_K: cosine to the nearest trained requests, most similar first; at least one.
        outcomes_K: how well the student does on each, 0..1.
        num_chars: length of the request.
        differs: what `features.mismatch` finds between the request and the nearest one.
    """
    weights_K = np.maximum(similarities_K.astype(np.float64), 1e-6)
    return np.array(
        [
            similarities_K[0],
            similarities_K.mean(),
            (outcomes_K * weights_K).sum() / weights_K.sum(),
            math.log1p(num_chars),
            "numbers" in differs,
            "negation" in differs,
            "names" in differs,
        ],
        dtype=np.float64,
    )


class DecisionModel(Config):
    """A fitted model. Frozen; its JSON reads back to the same numbers."""

    kind: Kind
    """What it looks at."""

    intercept: float
    """Log-odds where all else is 0."""

    weights: list[float]
    """Of the first features in FEATURES. [F]"""

    embedding_weights: Annotated[list[float], Field(repr=False)] = []
    """Of the embedding, for `regression`. [D]"""

    @model_validator(mode="after")
    def _fits_its_kind(self) -> DecisionModel:
        if len(self.weights) != NUM_FEATURES[self.kind]:
            raise ValueError(f"{self.kind} has {NUM_FEATURES[self.kind]} weights (got {len(self.weights)})")
        if (self.kind == "regression") != bool(self.embedding_weights):
            raise ValueError(f"{self.kind}: embedding_weights belong to `regression`, and only there")
        return self

    @cached_property
    def _weights_F(self) -> np.ndarray:
        return np.asarray(self.weights, dtype=np.float64)

    @cached_property
    def _weights_D(self) -> np.ndarray:
        return np.asarray(self.embedding_weights, dtype=np.float64)

    def log_odds(self, features_NF: np.ndarray, embeddings_ND: np.ndarray) -> np.ndarray:
        """Log-odds that the student is as good. [N], or a number for one request. Float64."""
        num = NUM_FEATURES[self.kind]
        # einsum adds up in the same order for one row and for many: a request served scores what it was calibrated at.
        total = np.einsum("...f,f->...", features_NF[..., :num], self._weights_F) + self.intercept
        if self.kind == "regression":
            total = total + np.einsum("...d,d->...", embeddings_ND.astype(np.float64), self._weights_D)
        return total

    def probability(self, features_F: np.ndarray, embedding_D: np.ndarray) -> float:
        """Probability that the student's answer to one request is as good as the teacher's."""
        return sigmoid(float(self.log_odds(features_F, embedding_D)))


def sigmoid(log_odds: float) -> float:
    """1 / (1 + exp(-x)), for any x."""
    if log_odds >= 0:
        return 1.0 / (1.0 + math.exp(-log_odds))
    grown = math.exp(log_odds)
    return grown / (1.0 + grown)


def folded(kind: Kind, intercept: float, weights: np.ndarray, mean: np.ndarray, scale: np.ndarray) -> DecisionModel:
    """The model of raw features that does what one of standardised features does ((x - mean) / scale).

    Args:
        kind: of the model.
        intercept: of the standardised model.
        weights: features first, then the embedding. [F + D]
        mean: of each feature. [F + D]
        scale: of each feature, positive. [F + D]
    """
    raw = weights / scale
    num = NUM_FEATURES[kind]
    return DecisionModel(
        kind=kind,
        intercept=float(intercept - raw @ mean),
        weights=raw[:num].tolist(),
        embedding_weights=raw[num:].tolist(),
    )
