"""Where a candidate is not good enough the teacher goes on answering: clusters, and who may decide on them."""

from __future__ import annotations

import numpy as np

from distill_ray.config.flywheel import GateConfig
from distill_ray.flywheel.clusters import Clustered, cluster
from distill_ray.serving.calibration.study import FIT, Vectors, parts_of

CONFIG = GateConfig(cluster_pairs=3, cluster_floor=0.8)
TOPICS = ["soup", "train", "tax", "song"]


def requests(topics: list[int], seed: int, kinds: list[str] | None = None) -> Vectors:
    """Points around a direction of their own for each topic."""
    random = np.random.default_rng(seed)
    vectors = np.eye(8, dtype=np.float32)[topics] + 0.1 * random.standard_normal((len(topics), 8)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    texts = [f"{TOPICS[topic]} {seed} {n * 7919} {random.integers(10**9)}" for n, topic in enumerate(topics)]
    return Vectors(texts, kinds or ["k"] * len(topics), vectors)


def clustered(good: np.ndarray, trained: Vectors, measured: Vectors) -> Clustered:
    return cluster(trained, measured, good, CONFIG, confidence=0.95, seed=0)


def test_a_bad_topic_stays_with_the_teacher_and_the_others_pass() -> None:
    of_trained, of_measured = [n % 4 for n in range(200)], [n % 4 for n in range(240)]
    trained, measured = requests(of_trained, 1), requests(of_measured, 2)
    found = clustered(np.array([topic != 2 for topic in of_measured]), trained, measured)
    passes = found.passes_N
    assert [bool(each) for each in passes] == [topic != 2 for topic in of_trained]
    assert {c.name.split()[0] for c in found.clusters if c.stays} == {"tax"}
    assert all("0% of" in c.stays for c in found.clusters if c.stays)
    assert sum(c.trained for c in found.clusters) == 200
    assert sum(c.held_out for c in found.clusters) == 240


def test_only_the_part_that_fits_decides() -> None:
    topics = [0] * 60
    trained, measured = requests(topics, 1), requests(topics, 2)
    parts = parts_of(measured.texts, 0)[1]
    enough = [c.stays for c in clustered(parts == FIT, trained, measured).clusters if c.looked_at >= 3]
    assert enough
    assert set(enough) == {None}
    assert not clustered(parts != FIT, trained, measured).passes_N.any()


def test_what_was_hardly_measured_stays_with_the_teacher() -> None:
    trained = requests([0] * 20 + [1] * 20, 1, kinds=["a"] * 20 + ["b"] * 20)
    measured = requests([0] * 40, 2, kinds=["a"] * 40)
    found = clustered(np.ones(40, dtype=bool), trained, measured)
    assert found.passes_N.tolist() == [True] * 20 + [False] * 20
    assert {c.stays for c in found.clusters if not c.held_out} == {"0 held-out requests decide, 3 are needed"}


def test_nothing_measured_and_nothing_trained_are_no_accident() -> None:
    nothing = Vectors([], [], np.zeros((0, 8), np.float32))
    assert clustered(np.zeros(0, dtype=bool), nothing, nothing).clusters == []
    found = clustered(np.zeros(0, dtype=bool), requests([0, 1], 1), nothing)
    assert not found.passes_N.any()
