"""Requests as vectors: embedded as the router embeds them, many at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from distill_ray.pipeline.progress import Progress
from distill_ray.serving.routing.conversation import RequestKey
from distill_ray.serving.routing.embedder import Embedder

EMBEDDED_AT_ONCE = 512


@dataclass(frozen=True)
class Vectors:
    """Requests of one sort, row by row."""

    texts: list[str]
    kinds: list[str]
    """Fingerprints."""

    vectors_ND: np.ndarray

    def take(self, rows: np.ndarray) -> Vectors:
        """Some of the rows."""
        return Vectors([self.texts[row] for row in rows], [self.kinds[row] for row in rows], self.vectors_ND[rows])


def is_short(key: RequestKey, embedder: Embedder) -> bool:
    """Whether a request can be embedded; the teacher answers the others."""
    return key.problem is None and embedder.count_tokens(key.text) <= embedder.max_tokens


def vectors_of(keys: Sequence[RequestKey], embedder: Embedder) -> Vectors:
    """Embed requests that are short enough."""
    texts = [key.text for key in keys]
    return Vectors(texts, [key.fingerprint for key in keys], embedded(texts, embedder, "requests"))


def embedded(texts: Sequence[str], embedder: Embedder, unit: str) -> np.ndarray:
    """Vectors of texts that are short enough, with progress. [N, D] float32."""
    vectors_ND = np.empty((len(texts), embedder.dim), dtype=np.float32)
    with Progress("embed", total=len(texts), unit=unit) as progress:
        for start in range(0, len(texts), EMBEDDED_AT_ONCE):
            part = slice(start, start + EMBEDDED_AT_ONCE)
            vectors_ND[part] = embedder.embed(texts[part])
            progress.update(min(part.stop, len(texts)))
    return vectors_ND
