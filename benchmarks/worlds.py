"""Simulated requests whose truth is known: for `streams.py`.

A world is a mixture of topics around centres in an embedding space. Each request has a true probability that the
student's answer is as good as the teacher's; held-out requests have an outcome drawn from it.

Shape suffixes: T topics, N requests, P held-out requests, D dimensions.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from distill_ray.serving.calibration.study import Vectors

DIM = 24
SPREAD = 0.8  # length of the noise around a centre: two requests of a topic have a cosine of about 0.6
BESIDE = 0.85  # cosine of two neighbouring centres
KIND = "k"  # the fingerprint of all
LETTERS = 20  # of a request: its text says nothing, and is quickly read


@dataclass(frozen=True)
class Topic:
    """Requests around one centre."""

    weight: float
    good: float
    """How often the student is as good as the teacher."""

    beyond: float | None = None
    """The same on the other side of a plane through the centre. Default: no other."""

    beside: int | None = None
    """Number of the topic that it lies beside. Default: somewhere."""


@dataclass(frozen=True)
class Mix:
    """What the requests are like, how many are held out, and what is promised."""

    name: str
    topics: tuple[Topic, ...]
    held_out: int = 400
    trained: int = 600
    budget: float = 0.05
    confidence: float = 0.95
    repeated: float = 0.0
    """Share of held-out requests that come in bursts: nearly the same text, the same outcome."""

    burst: int = 1
    """Requests in one."""


class World:
    """Where topics lie is drawn from the seed; further topics do not move those before them."""

    def __init__(self, topics: Sequence[Topic], seed: int) -> None:
        random = np.random.default_rng(seed)
        self._weights_T = np.array([topic.weight for topic in topics]) / sum(topic.weight for topic in topics)
        self._good_T = np.array([topic.good for topic in topics])
        self._beyond_T = np.array([topic.good if topic.beyond is None else topic.beyond for topic in topics])
        centres: list[np.ndarray] = []
        planes: list[np.ndarray] = []
        for topic in topics:
            centre, plane = unit(random.standard_normal((2, DIM)))
            if topic.beside is not None:
                other = centres[topic.beside]
                centre = BESIDE * other + (1 - BESIDE**2) ** 0.5 * unit(centre - (centre @ other) * other)
            centres.append(centre)
            planes.append(plane)
        self._centres_TD, self._planes_TD = np.array(centres), np.array(planes)

    def draw(self, num: int, random: np.random.Generator) -> tuple[Vectors, np.ndarray]:
        """Independent requests, and the probability that the student is as good on each. [N]"""
        topic_N = random.choice(len(self._weights_T), num, p=self._weights_T)
        noise_ND = SPREAD * random.standard_normal((num, DIM)) / DIM**0.5
        is_beyond_N = np.einsum("nd,nd->n", noise_ND, self._planes_TD[topic_N]) > 0
        good_N = np.where(is_beyond_N, self._beyond_T[topic_N], self._good_T[topic_N])
        vectors_ND = unit(self._centres_TD[topic_N] + noise_ND).astype(np.float32)
        return Vectors(_texts(num, random), [KIND] * num, vectors_ND), good_N

    def measure(self, mix: Mix, random: np.random.Generator) -> tuple[Vectors, np.ndarray]:
        """Held-out requests and their outcomes, in random order. [P] bool."""
        num_bursts = round(mix.repeated * mix.held_out / mix.burst)
        first, good_N = self.draw(mix.held_out - num_bursts * (mix.burst - 1), random)
        is_good_N = random.random(len(good_N)) < good_N
        times_N = np.where(np.arange(len(good_N)) < num_bursts, mix.burst, 1)
        rows_P = random.permutation(np.repeat(np.arange(len(good_N)), times_N))
        texts = [first.texts[row] + string.ascii_letters[number % 52] for number, row in enumerate(rows_P)]
        near_PD = unit(first.vectors_ND[rows_P] + 0.01 * random.standard_normal((len(rows_P), DIM)))
        return Vectors(texts, [KIND] * len(texts), near_PD.astype(np.float32)), is_good_N[rows_P]


def unit(vectors: np.ndarray) -> np.ndarray:
    """Of length 1."""
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def _texts(num: int, random: np.random.Generator) -> list[str]:
    """Random letters: no two texts are nearly the same."""
    letters = random.integers(ord("a"), ord("z") + 1, (num, LETTERS), dtype=np.uint8)
    return [row.tobytes().decode() for row in letters]
