"""Soft targets: what keeping the top k costs, in speed and in bytes.

    python benchmarks/logprobs.py --out logprobs.json

Speed: tokens/s of the `generate` stage with `teacher.sampling.top_logprobs: 20` over the same without, same prompts,
model and engine arguments, from the moment the engine is ready to the last row written. Runs alternate, each in a
process of its own; the figure is the ratio of the medians.

Bytes: one run at k = 32. What its `calls/*.parquet` and `examples/*.parquet` have more than those of the run without,
per completion token, beside the raw size of k token ids (int32), k log-probabilities (float32) and the tail (float32):
k * 8 + 4.

Every answer has exactly 64 tokens: the model is a copy that cannot end one, and `fixed_length.py` reports it as ended,
since what is cut off is rejected and would not be stored. Text that goes on behind its end is less certain than a real
answer, and so compresses worse. `--answers natural` takes the model's own.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from generation import ENGINE_ARGS, SAMPLING, chats, prepare_model

SPEED_K = 20
STORAGE_K = 32
STORED = ("calls", "examples")


def run(number: int, model: str, k: int) -> dict[str, Any]:
    """The `generate` stage with `top_logprobs: k`."""
    from distill_ray.config import parse_config
    from distill_ray.pipeline.folder import RunFolder
    from distill_ray.pipeline.generate import generate

    context, rows = chats(number)
    with tempfile.TemporaryDirectory() as base:
        source = Path(base, "queries.jsonl")
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = parse_config(
            {
                "recipe": {"type": "context", "context": {"text": context}},
                "data": {"source": str(source)},
                "teacher": {
                    "type": "vllm",
                    "model": model,
                    "gpus": 0,
                    "engine_kwargs": {**ENGINE_ARGS, "scheduler_cls": "fixed_length.FixedLengthScheduler"},
                    "sampling": {**SAMPLING, "top_logprobs": k},
                },
            }
        )
        folder = RunFolder(Path(base, "run"))
        result = generate(config, folder)
        assert result.rows_with_examples == number, f"answers were rejected: {result}"
        return {
            "tokens": result.completion_tokens,
            "seconds": folder.manifest()["seconds"]["generate_work"],
            "bytes": {
                name: sum(file.stat().st_size for file in Path(base, "run", name).glob("*.parquet")) for name in STORED
            },
        }


def in_subprocess(number: int, model: Path, k: int) -> dict[str, Any]:
    """One run in a process of its own."""
    command = [sys.executable, __file__, "--k", str(k), "--rows", str(number), "--model", str(model)]
    here = str(Path(__file__).resolve().parent)
    path = os.pathsep.join(p for p in (here, os.environ.get("PYTHONPATH")) if p)
    env = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    if done.returncode:
        sys.exit(f"k = {k} failed:\n{done.stderr[-3000:]}")
    figures = next(json.loads(line[8:]) for line in done.stdout.splitlines() if line.startswith("FIGURES "))
    speed = figures["tokens"] / figures["seconds"]
    stored = ", ".join(f"{name} {size:,} bytes" for name, size in figures["bytes"].items())
    print(f"k = {k:2} {speed:9,.0f} tokens/s  {figures['tokens']:8} tokens  {stored}", flush=True)
    return {**figures, "tokens_per_second": speed}


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--answers", choices=("fixed", "natural"), default="fixed")
    parser.add_argument("--model", help=argparse.SUPPRESS)
    parser.add_argument("--k", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.k is not None:
        print("FIGURES", json.dumps(run(options.rows, options.model, options.k)), flush=True)
        return
    runs: dict[int, list[dict[str, Any]]] = {0: [], SPEED_K: []}
    with tempfile.TemporaryDirectory() as base:
        model = prepare_model(options.answers, Path(base))
        for _ in range(options.rounds):
            for k, of_k in runs.items():
                of_k.append(in_subprocess(options.rows, model, k))
        stored = in_subprocess(options.rows, model, STORAGE_K)
    medians = {k: statistics.median(run["tokens_per_second"] for run in of_k) for k, of_k in runs.items()}
    ratio = medians[SPEED_K] / medians[0]
    print(f"top {SPEED_K} / none: {ratio:.2f} of its tokens/s")
    plain, raw = runs[0][0], STORAGE_K * 8 + 4
    per_token = {name: (stored["bytes"][name] - plain["bytes"][name]) / stored["tokens"] for name in STORED}
    for name, size in per_token.items():
        print(f"{name}/*.parquet, k = {STORAGE_K}: {size:.0f} bytes per token more than without ({raw} raw)")
    if options.out:
        result = {
            "ratio": ratio,
            "medians": medians,
            "bytes_per_token": per_token,
            "raw_bytes_per_token": raw,
            "runs": {**runs, STORAGE_K: [stored]},
            "rows": options.rows,
            "answers": options.answers,
        }
        options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
