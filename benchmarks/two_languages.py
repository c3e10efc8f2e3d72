"""A small world for whole cycles of the flywheel: sentences of two languages, whose name the teacher says."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from distill_ray.demo import language_rows
from distill_ray.serving.collecting.answer import Answer
from distill_ray.serving.collecting.pairs import Pair, make_pair
from distill_ray.serving.routing.conversation import request_key

LANGUAGES = ("de", "tr")
NAMES = {"de": "de", "tr": "tr"}
FLIPPED = {"de": "tr", "tr": "de"}


def sentences(count: int, seed: int) -> list[tuple[str, str]]:
    """(sentence, its language), half of each."""
    rows = [row for row in language_rows(16 * count, seed=seed) if row["label"] in LANGUAGES]
    assert len(rows) >= count
    return [(row["text"], row["label"]) for row in rows[:count]]


def pairs(count: int, seed: int, names: dict[str, str] = NAMES, owners: Sequence[str] = ("shop", "desk")) -> list[Pair]:
    """Pairs as a router makes them."""
    found = []
    for number, (text, language) in enumerate(sentences(count, seed)):
        body = {"messages": [{"role": "user", "content": text}]}
        found.append(
            make_pair(
                body,
                Answer(names[language], "stop", model="large", prompt_tokens=480, completion_tokens=20),
                messages=body["messages"],
                teacher="openai:large",
                owner=owners[number % len(owners)],
                fingerprint=request_key(body, []).fingerprint,
            )
        )
    return found


def config_of(folder: Path, **flywheel: Any) -> Path:
    """Write a config whose student learns this in half a minute."""
    folder.mkdir(parents=True, exist_ok=True)
    raw = {
        "name": "mine",
        "recipe": {"type": "context", "context": {"text": "Say which language it is."}, "query": "{{ text }}"},
        "data": {"source": "unused.jsonl"},
        "teacher": {"type": "fake", "sampling": {"max_tokens": 8}},
        "student": {"model": "demo"},
        "train": {
            "max_steps": 40,
            "epochs": 20,
            "learning_rate": 1.0e-3,
            "max_tokens_per_batch": 1024,
            "validate_every": 10,  # checkpoints to go on from
            "cpus_per_worker": 2,
            "tensorboard": False,
        },
        "evaluate": {"engine": "hf"},
        "calibrate": {"error_budget": 0.15, "confidence": 0.9},
        "serve": {"folder": str(folder / "service")},
        "flywheel": {
            "min_pairs": 200,
            "holdout": 0.3,
            "lora": None,
            "gate": {"min_pairs": 40, "margin": 0.1, "cluster_pairs": 3, "cluster_floor": 0.7},
            **flywheel,
        },
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path
