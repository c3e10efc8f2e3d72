"""What the router adds to a request before any model is asked: the key of the request, its vector, its neighbours.

    python benchmarks/decision.py --out decision.json

Decision: `request_key` and `router.decide` (in it the search for 8 neighbours, a logistic regression over the
embedding, a strict guard) on one thread, at 1,000, 20,000 and 200,000 indexed requests of one kind. Vectors are
synthetic: 384 dimensions, clusters of 100 rows each, cosine 0.8 to their centre (so two of a cluster have 0.64), and
the requests asked are new ones of the same clusters. recall@1: how often the nearest neighbour found is as near as
the nearest there is, by exhaustive search. Bytes per entry: of the files; and what the process that loads and
searches them grows by (nothing where it fits into memory freed before). Another one built them.

Embedding: one text at a time, the default model on onnxruntime and on sentence-transformers, one thread each, text by
text in turn.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil

DIM = 384
ROWS_PER_CLUSTER = 100
CENTRE_COSINE = 0.8
NEIGHBOURS = 8
NUM_REQUESTS = 2000
BODY = {
    "model": "auto",
    "messages": [
        {"role": "system", "content": "You are the assistant of a hotel. Today is 2026-11-21. Answer in one sentence."},
        {"role": "user", "content": "Could you move my booking 88213 from 2026-12-01 to the week after?"},
    ],
}
IGNORE = [r"\d{4}-\d{2}-\d{2}"]
TEXTS = {
    "a question": "Could you move my booking to the week after, please?",
    "a paragraph": "Could you move my booking to the week after, and tell me what it would cost? " * 4,
    "near the limit": "Could you move my booking to the week after, and tell me what it would cost? " * 13,
}


def clustered(num_rows: int, num_queries: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows [N, D] and queries [Q, D] around the same centres."""
    random = np.random.default_rng(0)

    def unit(num: int) -> np.ndarray:
        vectors = random.standard_normal((num, DIM), dtype=np.float32)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    centres = unit(max(1, num_rows // ROWS_PER_CLUSTER))
    chosen = centres[random.integers(len(centres), size=num_rows + num_queries)]
    vectors = CENTRE_COSINE * chosen + (1 - CENTRE_COSINE**2) ** 0.5 * unit(len(chosen))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors[:num_rows], vectors[num_rows:]


def seconds_each(act: Callable[[Any], object], arguments: Any) -> np.ndarray:
    """Seconds of each call."""
    seconds = []
    for argument in arguments:
        started = time.perf_counter()
        act(argument)
        seconds.append(time.perf_counter() - started)
    return np.array(seconds)


def milliseconds(seconds: np.ndarray) -> dict[str, float]:
    """Median and 99th percentile."""
    return {"p50_ms": float(np.median(seconds)) * 1e3, "p99_ms": float(np.percentile(seconds, 99)) * 1e3}


def build(num_rows: int, folder: Path) -> dict[str, Any]:
    """Save an index, queries and how near their nearest rows are."""
    from distill_ray.serving.routing.conversation import request_key
    from distill_ray.serving.routing.index import NearestIndex

    rows, queries = clustered(num_rows, NUM_REQUESTS)
    started = time.perf_counter()
    index = NearestIndex.build(rows, [request_key(BODY, IGNORE).fingerprint] * num_rows)
    seconds = time.perf_counter() - started
    index.save(folder)
    size = sum(file.stat().st_size for file in folder.iterdir())
    NearestIndex.build(rows[:10], [""] * 10).save(folder / "small")
    np.save(folder / "queries.npy", queries)
    nearest = [(queries[i : i + 100] @ rows.T).max(axis=1) for i in range(0, NUM_REQUESTS, 100)]
    np.save(folder / "nearest.npy", np.concatenate(nearest))
    return {"build_s": seconds, "file_bytes_per_entry": size / num_rows}


def search(folder: Path) -> dict[str, Any]:
    """Load the index and decide about each query."""
    from distill_ray.serving.routing.conversation import request_key
    from distill_ray.serving.routing.index import NearestIndex
    from distill_ray.serving.routing.router import decide

    queries, nearest = np.load(folder / "queries.npy"), np.load(folder / "nearest.npy")
    fingerprint = request_key(BODY, IGNORE).fingerprint
    NearestIndex.load(folder / "small")  # what the libraries themselves take does not count
    before = psutil.Process().memory_info().rss
    index = NearestIndex.load(folder)
    grown = psutil.Process().memory_info().rss - before

    bundle = bundle_around(index)

    def decide_about(query: np.ndarray) -> None:
        decide(bundle, request_key(BODY, IGNORE), query)

    seconds_each(decide_about, queries[:200])  # warm
    assert decide(bundle, request_key(BODY, IGNORE), queries[0]).score is not None, "it was not decided to the end"
    found = [index.search(query, fingerprint, 1)[0][0] for query in queries]
    return {
        "search": milliseconds(seconds_each(lambda query: index.search(query, fingerprint, NEIGHBOURS), queries)),
        "decision": milliseconds(seconds_each(decide_about, queries)),
        "recall_at_1": float(np.mean(np.array(found) >= nearest - 1e-5)),
        "memory_bytes_per_entry": grown / len(index),
    }


def bundle_around(index: Any) -> Any:
    """A bundle in memory: the index, a text and an outcome for each row, and the model that has most to do."""
    import pyarrow as pa

    from distill_ray.config import EmbedderConfig, SamplingConfig
    from distill_ray.serving.routing.bundle import Bundle
    from distill_ray.serving.routing.conversation import request_key
    from distill_ray.serving.routing.decision import NUM_FEATURES, DecisionModel
    from distill_ray.serving.routing.manifest import Manifest, StudentSpec

    model = DecisionModel(
        kind="regression", intercept=0.0, weights=[0.1] * NUM_FEATURES["regression"], embedding_weights=[0.01] * DIM
    )
    manifest = Manifest(
        version="0123456789ab",
        name="benchmark",
        created="2026-01-01T00:00:00+00:00",
        made_with="0.1.0",
        context=[],
        student=StudentSpec(kind="full", sampling=SamplingConfig(), control_tokens=["<|im_end|>", "<|im_start|>"]),
        teacher="none",
        teacher_sampling=SamplingConfig(),
        embedder=EmbedderConfig(),
        embedder_identity="synthetic",
        neighbours=NEIGHBOURS,
        model=model,
        threshold=0.5,
        far=0.0,
        guard="strict",
        summary={},
        data="synthetic",
    )
    entries = pa.table(
        {
            "text": [f"Could you move booking {row} to Monday, please?" for row in range(len(index))],
            "fingerprint": [request_key(BODY, IGNORE).fingerprint] * len(index),
        }
    )
    return Bundle(Path(), manifest, index, np.full(len(index), 0.9, dtype=np.float32), entries)


def embedding(rounds: int) -> list[dict[str, Any]]:
    """Both runtimes, text by text in turn."""
    from distill_ray.config.serve import EmbedderConfig
    from distill_ray.serving.routing.embedder import load_embedder

    embedders = {runtime: load_embedder(EmbedderConfig(runtime=runtime)) for runtime in ("onnx", "torch")}
    results = []
    for name, text in TEXTS.items():
        seconds: dict[str, list[float]] = {runtime: [] for runtime in embedders}
        for embedder in embedders.values():
            seconds_each(embedder.embed, [[text]] * 10)  # warm
        for _ in range(rounds):
            for runtime, embedder in embedders.items():
                seconds[runtime] += list(seconds_each(embedder.embed, [[text]]))
        of = {runtime: milliseconds(np.array(each)) for runtime, each in seconds.items()}
        ratio = of["onnx"]["p50_ms"] / of["torch"]["p50_ms"]
        results.append({"text": name, "tokens": embedders["onnx"].count_tokens(text), **of, "ratio": ratio})
    return results


def in_subprocess(*arguments: str) -> Any:
    """One step in a process of its own."""
    done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(arguments)} failed:\n{done.stderr[-3000:]}")
    return next(json.loads(line[8:]) for line in done.stdout.splitlines() if line.startswith("FIGURES "))


def times(of: dict[str, Any], *names: str) -> str:
    """Cells of a table."""
    return " | ".join(f"{of[name][p]:.2f} ms" for name in names for p in ("p50_ms", "p99_ms"))


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000, 20_000, 200_000])
    parser.add_argument("--rounds", type=int, default=200, help="of the embedding")
    parser.add_argument("--step", choices=("build", "search", "embedding"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step is not None:
        steps: dict[str, Callable[[], Any]] = {
            "build": lambda: build(options.rows[0], options.folder),
            "search": lambda: search(options.folder),
            "embedding": lambda: embedding(options.rounds),
        }
        print("FIGURES", json.dumps(steps[options.step]()), flush=True)
        return
    indexes = []
    print("| rows | search p50 | p99 | decision p50 | p99 | recall@1 | bytes: file | memory | built in |")
    print("|---|---|---|---|---|---|---|---|---|")
    for num_rows in options.rows:
        with tempfile.TemporaryDirectory() as folder:
            built = in_subprocess("--step", "build", "--rows", str(num_rows), "--folder", folder)
            indexes.append({"rows": num_rows, **built, **in_subprocess("--step", "search", "--folder", folder)})
        of = indexes[-1]
        size = f"{of['file_bytes_per_entry']:,.0f} | {of['memory_bytes_per_entry']:,.0f}"
        rest = f"{of['recall_at_1']:.3f} | {size} | {of['build_s']:.0f} s"
        print(f"| {num_rows:,} | {times(of, 'search', 'decision')} | {rest} |", flush=True)
    texts = in_subprocess("--step", "embedding", "--rounds", str(options.rounds))
    print("\n| text | tokens | onnxruntime p50 | p99 | sentence-transformers p50 | p99 | onnx / torch |")
    print("|---|---|---|---|---|---|---|")
    for of in texts:
        print(f"| {of['text']} | {of['tokens']} | {times(of, 'onnx', 'torch')} | {of['ratio']:.2f} |")
    if options.out:
        options.out.write_text(json.dumps({"indexes": indexes, "embedding": texts}, indent=2) + "\n")


if __name__ == "__main__":
    main()
