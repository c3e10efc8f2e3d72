"""Clusters of requests: where a candidate is not good enough, the teacher goes on answering.

Trained requests of one fingerprint are put together by their vectors (k-means); held-out ones belong to the nearest
centre. Which clusters fall short is decided on the part of the held-out pairs that fits the score (`study.FIT`): what
selects the threshold must not have had a say in what it is selected for.

Shape suffixes: N trained requests, P held-out requests, D dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from distill_ray.config.flywheel import GateConfig
from distill_ray.serving.calibration.guarantee import interval
from distill_ray.serving.calibration.study import FIT, Vectors, parts_of

MOST = 40
SHOWN = 80  # characters of the request that stands for a cluster


@dataclass(frozen=True)
class Cluster:
    """One cluster, as the verdict's page shows it."""

    name: str
    """The trained request nearest to its centre."""

    trained: int
    held_out: int
    good: int
    """Of the held-out requests, answered as well as by the teacher."""

    low: float | None
    high: float | None
    looked_at: int
    """Held-out requests that decided."""

    stays: str | None
    """Why it stays with the teacher; None: it does not."""


@dataclass(frozen=True)
class Clustered:
    """All clusters, and the one of each trained request."""

    clusters: list[Cluster]
    labels_N: np.ndarray
    middles: list[int]
    """The row of the trained request that each cluster is named after."""

    @property
    def passes_N(self) -> np.ndarray:
        """Whether each trained request is in a cluster that passed. bool."""
        good = np.array([cluster.stays is None for cluster in self.clusters], dtype=bool)
        return good[self.labels_N] if len(self.labels_N) else np.zeros(0, dtype=bool)


def cluster(
    trained: Vectors, measured: Vectors, good_P: np.ndarray, config: GateConfig, *, confidence: float, seed: int
) -> Clustered:
    """Find the clusters, and which of them fall short.

    Args:
        trained: what the candidate was trained on.
        measured: held-out requests, in the order in which the calibration will see them.
        good_P: whether the candidate's answer is as good as the teacher's, bool.
        config: `flywheel.gate`.
        confidence: of the intervals.
        seed: `calibrate.seed`, which splits the held-out requests.
    """
    parts_P = parts_of(measured.texts, seed)[1] if measured.texts else np.zeros(0, dtype=np.int64)
    decides_P = parts_P == FIT
    kinds_N, kinds_P = np.asarray(trained.kinds), np.asarray(measured.kinds)
    labels_N = np.zeros(len(trained.texts), dtype=np.int64)
    clusters: list[Cluster] = []
    middles: list[int] = []
    for kind in sorted(set(trained.kinds)):
        rows_N = np.flatnonzero(kinds_N == kind)
        rows_P = np.flatnonzero(kinds_P == kind) if len(kinds_P) else np.zeros(0, dtype=np.int64)
        most = int(decides_P[rows_P].sum()) // (3 * config.cluster_pairs)
        own_N, centres_CD = _k_means(trained.vectors_ND[rows_N], most, seed)
        own_P = (measured.vectors_ND[rows_P] @ centres_CD.T).argmax(axis=1) if len(rows_P) else rows_P
        labels_N[rows_N] = own_N + len(clusters)
        for number in range(len(centres_CD)):
            members_N, members_P = rows_N[own_N == number], rows_P[own_P == number]
            nearest = members_N[int((trained.vectors_ND[members_N] @ centres_CD[number]).argmax())]
            name = " ".join(trained.texts[int(nearest)].split())[:SHOWN]
            middles.append(nearest)
            clusters.append(_judged(name, len(members_N), good_P[members_P], decides_P[members_P], config, confidence))
    return Clustered(clusters, labels_N, middles)


def _judged(
    name: str, num_trained: int, good_M: np.ndarray, decides_M: np.ndarray, config: GateConfig, confidence: float
) -> Cluster:
    looked_at, num_good = int(decides_M.sum()), int(good_M.sum())
    low, high = interval(num_good, len(good_M), confidence) if len(good_M) else (None, None)
    stays = None
    if looked_at < config.cluster_pairs:
        stays = f"{looked_at} held-out requests decide, {config.cluster_pairs} are needed"
    elif (share := float(good_M[decides_M].mean())) < config.cluster_floor:
        stays = f"{share:.0%} of {looked_at} are as good, {config.cluster_floor:.0%} are needed"
    return Cluster(name, num_trained, len(good_M), num_good, low, high, looked_at, stays)


def _k_means(vectors_ND: np.ndarray, most: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Label of each vector, and the centres. None is empty."""
    from sklearn.cluster import KMeans  # heavy

    num = max(1, min(most, MOST, len(vectors_ND) // 2))
    if num == 1:
        return np.zeros(len(vectors_ND), dtype=np.int64), vectors_ND.mean(axis=0, keepdims=True)
    fitted: Any = KMeans(num, n_init=8, random_state=seed).fit(vectors_ND)  # type: ignore[arg-type]
    used, labels_N = np.unique(fitted.labels_, return_inverse=True)
    return labels_N.astype(np.int64), fitted.cluster_centers_[used].astype(np.float32)
