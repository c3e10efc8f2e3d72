"""Rewards: rows per second of our classifier reward against the plain transformers pipeline at the same batch size.

    python benchmarks/rewards.py --out rewards.json

Film reviews of one sentence to a dozen, as drafts and revisions differ, scored by the built-in sentiment classifier
(2 layers, width 64) and by one of the same kind with random weights (6 layers, width 384, the size of MiniLM), where
less is overhead. Both sides on the same threads, in turn, in one process, with the model loaded; the pipeline gets
all texts in one call with `batch_size` and `top_k=None`, so it gives every label's score, of which the reward is a
sum. Both must give the same numbers. The figure is the ratio of the medians; ours sorts texts by length before it
batches them.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from distill_ray.config.reward import ClassifierRewardConfig
from distill_ray.demo.reviews import review_chat
from distill_ray.models import DEMO_MODELS
from distill_ray.records import Answered

LABELS = {"positive": 1.0, "mixed": 0.25}
SENTIMENT = DEMO_MODELS["demo-sentiment"]


def reviews(number: int) -> list[str]:
    """Texts."""
    rng = random.Random(0)
    return [
        " ".join(review_chat(rng).draft for _ in range(min(8, max(1, int(rng.lognormvariate(0.3, 0.8))))))
        for _ in range(number)
    ]


def larger_model(folder: Path) -> Path:
    """A classifier with random weights beside the built-in tokenizer."""
    import torch
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig.from_pretrained(
        SENTIMENT, hidden_size=384, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=12
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(SENTIMENT).save_pretrained(folder)
    return folder


def compared(model: Path, texts: list[str], batch_size: int, rounds: int) -> dict[str, Any]:
    """Rows per second of both, and their ratio."""
    from transformers import pipeline

    from distill_ray.rewards.models import ClassifierReward

    reward = ClassifierReward(ClassifierRewardConfig(model=str(model), labels=LABELS, batch_size=batch_size))
    theirs = pipeline("text-classification", model=str(model), batch_size=batch_size, top_k=None, truncation=True)
    items = [Answered(({"role": "user", "content": ""},), text) for text in texts]

    def by_pipeline() -> list[float]:
        found: Any = theirs(texts)
        return [sum(LABELS.get(each["label"], 0.0) * each["score"] for each in scores) for scores in found]

    sides: dict[str, Callable[[], list[float]]] = {"ours": lambda: reward.score(items), "pipeline": by_pipeline}
    speeds: dict[str, list[float]] = {side: [] for side in sides}
    scores: dict[str, list[float]] = {}
    for side, work in sides.items():
        scores[side] = work()  # warm
    assert max(abs(a - b) for a, b in zip(*scores.values(), strict=True)) < 1e-4
    for _ in range(rounds):
        for side, work in sides.items():
            began = time.perf_counter()
            work()
            speeds[side].append(len(texts) / (time.perf_counter() - began))
    medians = {side: statistics.median(found) for side, found in speeds.items()}
    return {"ratio": medians["ours"] / medians["pipeline"], "rows_per_s": medians, "rounds": speeds}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    options = parser.parse_args()
    texts = reviews(options.rows)
    with tempfile.TemporaryDirectory() as base:
        models = {"built-in": SENTIMENT, "6 layers, width 384": larger_model(Path(base))}
        found = {name: compared(model, texts, options.batch_size, options.rounds) for name, model in models.items()}
    for name, of in found.items():
        speeds = of["rows_per_s"]
        print(
            f"{name:20} ours {speeds['ours']:8,.0f} rows/s, pipeline {speeds['pipeline']:8,.0f}: "
            f"{of['ratio']:.2f} times"
        )
    if options.out:
        options.out.write_text(json.dumps({"batch_size": options.batch_size, "models": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
