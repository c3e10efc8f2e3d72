"""Pairs for tests: as a router makes them, and as hypothesis does."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from hypothesis import strategies as st

from distill_ray.serving.collecting.answer import Answer
from distill_ray.serving.collecting.pairs import Pair, make_pair

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


def pair(question: str = "Wo ist der Bahnhof?", answer: str = "German", **changes: Any) -> Pair:
    """A pair as the router makes it."""
    given: dict[str, Any] = {
        "messages": [{"role": "user", "content": question}],
        "teacher": "openai/large@1",
        "owner": "shop",
        "fingerprint": "0123456789abcdef",
        "bundle": "v1",
        "embedder": "minilm",
        "embedding": np.linspace(-1, 1, 8, dtype=np.float32),
    }
    body = {"model": "auto", "temperature": 0.5, "user": "someone@example.com"}
    said = changes.pop("said", Answer(answer, "stop", model="large", prompt_tokens=7, completion_tokens=1))
    return dataclasses.replace(make_pair(body | changes.pop("body", {}), said, **given | changes), created=1)


def pairs(count: int, **changes: Any) -> list[Pair]:
    """So many different ones."""
    return [pair(f"question {number}", f"answer {number}", **changes) for number in range(count)]


any_pair = st.builds(
    lambda question, answer, owner, embedding: pair(question, answer, owner=owner, embedding=embedding),
    TEXT,
    TEXT,
    TEXT,
    st.none()
    | st.lists(st.floats(width=32, allow_nan=False), max_size=4).map(lambda values: np.array(values, np.float32)),
)
