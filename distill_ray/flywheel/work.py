"""What every step of a cycle has at hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from distill_ray.config import RunConfig
from distill_ray.flywheel.cycles import Cycle
from distill_ray.flywheel.lease import Held
from distill_ray.serving.calibration.assemble import calibrating_embedder
from distill_ray.serving.collecting.store import PairStore
from distill_ray.serving.routing.bundles import Bundles
from distill_ray.serving.routing.embedder import Embedder


@dataclass
class Work:
    """A cycle at work."""

    config: RunConfig
    service: Path
    """The service's folder."""

    cycle: Cycle
    before: Sequence[Cycle]
    """Cycles that came to an end."""

    store: PairStore
    bundles: Bundles
    lease: Held
    say: Callable[[str], None]
    again: bool = False
    """Take what refused cycles set aside too."""

    @property
    def seed(self) -> int:
        """Of every draw in a cycle."""
        return self.config.calibrate.seed

    @cached_property
    def embedder(self) -> Embedder:
        """The service's, on all cores; remembers what it embedded."""
        return Remembering(calibrating_embedder(self.config))

    @property
    def current(self) -> Path | None:
        """Folder of the bundle in service when the cycle began to train; None: the teacher answered everything.

        From a bucket it comes without the student's weights: these are asked on whatever node has room.
        """
        version = self.cycle.needed("train")["current"]
        return self.bundles.path(version, with_student=False) if version is not None else None


class Remembering:
    """An embedder that embeds a text once: gate and bundle look at the same requests."""

    def __init__(self, embedder: Embedder) -> None:
        self._embedder = embedder
        self._known: dict[str, np.ndarray] = {}
        self.identity, self.dim, self.max_tokens = embedder.identity, embedder.dim, embedder.max_tokens

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """[N, D]"""
        missing = [text for text in dict.fromkeys(texts) if text not in self._known]
        if missing:
            self._known.update(zip(missing, self._embedder.embed(missing), strict=True))
        return np.stack([self._known[text] for text in texts]) if texts else np.zeros((0, self.dim), np.float32)

    def count_tokens(self, text: str) -> int:
        """Of a text."""
        return self._embedder.count_tokens(text)
