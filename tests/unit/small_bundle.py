"""A bundle with ten trained requests and no real weights, and an embedder of words: for tests of all that serves."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from distill_ray.config import SamplingConfig
from distill_ray.config.serve import EmbedderConfig
from distill_ray.serving.routing.bundle import ENTRIES_SCHEMA, write_bundle
from distill_ray.serving.routing.conversation import request_key
from distill_ray.serving.routing.decision import DecisionModel
from distill_ray.serving.routing.index import NearestIndex
from distill_ray.serving.routing.manifest import Manifest, StudentSpec

DIM = 64
REQUESTS = [
    "Turn on the light in the kitchen",
    "Turn on the radio in the kitchen",
    "Is the shop in Berlin open on Monday",
    "Is the shop in Paris open on Sunday",
    "Wake me at 7 tomorrow",
    "Wake me at 9 tomorrow",
    "Does the soup contain milk",
    "Does the bread contain nuts",
    "Enable the alarm in the garage",
    "Play the song that my sister likes",
]


class WordEmbedder:
    """A text is the sum of a random vector per word: similar words, similar vectors. No model."""

    identity = "words@1"
    dim = DIM
    max_tokens = 256

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """[N, D] float32, unit length."""
        vectors_ND = np.stack([sum((self._word(word) for word in text.split()), np.zeros(DIM)) for text in texts])
        lengths_N1 = np.linalg.norm(vectors_ND, axis=1, keepdims=True)
        return (vectors_ND / np.maximum(lengths_N1, 1e-9)).astype(np.float32)

    def count_tokens(self, text: str) -> int:
        """Words."""
        return len(text.split())

    def _word(self, word: str) -> np.ndarray:
        seed = int.from_bytes(hashlib.blake2b(word.casefold().encode(), digest_size=8).digest(), "big")
        return np.random.default_rng(seed).standard_normal(DIM)


def body(text: str) -> dict[str, Any]:
    """A request of one user turn."""
    return {"messages": [{"role": "user", "content": text}]}


def manifest(**changes: Any) -> Manifest:
    """Everything that is as near as 0.6 to something trained is good."""
    fields: dict[str, Any] = {
        "version": "0123456789ab",
        "name": "small",
        "created": "2026-01-01T00:00:00+00:00",
        "made_with": "0.1.0",
        "context": [{"role": "system", "content": "You are a home assistant."}],
        "student": StudentSpec(
            kind="full", sampling=SamplingConfig(temperature=0.0), control_tokens=["<|im_end|>", "<|im_start|>"]
        ),
        "teacher": "fake",
        "teacher_sampling": SamplingConfig(),
        "embedder": EmbedderConfig(),
        "embedder_identity": WordEmbedder.identity,
        "neighbours": 3,
        "model": DecisionModel(kind="similarity", intercept=-6.0, weights=[10.0]),
        "threshold": 0.5,
        "far": 0.2,
        "guard": "off",
        "summary": {"share": 0.8},
        "data": "test",
    }
    return Manifest(**{**fields, **changes})


def remote_spec(base_url: str, api_key_env: str | None = None, model: str = "ft:small:1") -> StudentSpec:
    """Of a student that a server somewhere else has."""
    sampling = SamplingConfig(temperature=0.0, max_tokens=32)
    return StudentSpec(kind="remote", base=model, base_url=base_url, api_key_env=api_key_env, sampling=sampling)


def write_small_bundle(folder: Path, **changes: Any) -> Path:
    """Write the bundle. `changes` are of its manifest."""
    made = manifest(**changes)
    student = None if made.student.kind == "remote" else folder.parent / f"student-of-{folder.name}"
    if student is not None:
        student.mkdir(parents=True, exist_ok=True)
        (student / "config.json").write_text("{}")
        (student / "model.safetensors").write_bytes(b"weights")
    fingerprints = [request_key(body(text), []).fingerprint for text in REQUESTS]
    entries = pa.table(
        {
            "example_id": [f"r{n}/answer/0" for n in range(len(REQUESTS))],
            "text": REQUESTS,
            "fingerprint": fingerprints,
            "outcome": pa.array([0.9] * len(REQUESTS), pa.float32()),
        }
    ).cast(ENTRIES_SCHEMA)
    index = NearestIndex.build(WordEmbedder().embed(REQUESTS), fingerprints)
    reports = {"calibration.json": b"{}", "curve.json": b"{}", "curve.svg": b"<svg/>"}
    return write_bundle(folder, made, student=student, index=index, entries=entries, reports=reports)
