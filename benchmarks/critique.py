"""Draft, critique, revise: our one engine against three `ray.data.llm` processors in a row, whole runs.

    python benchmarks/critique.py --out critique.json

Both sides take the same 2,048 rows (the demo's instruction as system prompt, one sentence each) through the same three
turns with the same demo model, engine arguments, sampling and requests; each turn has exactly 64 tokens. Ours is the
`generate` stage with the self_critique recipe (`accept: {type: always}`: no reward, as the peer has none), examples,
ledger and all. The peer is what Ray's own library offers for it: three processors in one dataset, each of which renders
the conversation so far, answered rows written to Parquet. The figure is the ratio of the median seconds of whole
processes, engine starts included: one engine instead of three is part of what is compared.

`--peer-stages streamed` runs the peer's three engines at once, as Ray Data does by itself; `materialized` runs one
processor after the other, each to its end, so that no two engines share the cores.

Turns of fixed length: the model is a copy that cannot end an answer, and `fixed_length.py` reports answers of 64 tokens
as ended, on both sides, since we would reject them as cut off. Our text is one token shorter for it (the one that
"ended" the answer), so later prompts are one or two tokens shorter than the peer's. The same file counts what the
engines found in their prefix caches.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from generation import ENGINE_ARGS, SAMPLING, chats, prepare_model

SIDES = ("ours", "ray_data_llm")
TURNS = 3
COUNTS_VARIABLE = "BENCHMARK_PREFIX_COUNTS"
ENGINE = {**ENGINE_ARGS, "scheduler_cls": "fixed_length.FixedLengthScheduler"}


def run_ours(number: int, model: str, stages: str) -> int:
    """The `generate` stage; returns completion tokens."""
    from distill_ray.config import parse_config
    from distill_ray.pipeline.folder import RunFolder
    from distill_ray.pipeline.generate import generate

    instruction, rows = chats(number)
    with tempfile.TemporaryDirectory() as base:
        source = Path(base, "queries.jsonl")
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = parse_config(
            {
                "recipe": {"type": "self_critique", "instruction": instruction, "accept": {"type": "always"}},
                "data": {"source": str(source)},
                "teacher": {
                    "type": "vllm",
                    "model": model,
                    "gpus": 0,
                    "engine_kwargs": ENGINE,
                    "sampling": dict(SAMPLING),
                },
            }
        )
        result = generate(config, RunFolder(Path(base, "run")))
        assert result.rows_with_examples == number, f"chains were cut short: {result}"
        return result.completion_tokens


def run_ray_data_llm(number: int, model: str, stages: str) -> int:
    """Three processors; returns completion tokens."""
    import ray
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig

    from distill_ray.config.recipe import CRITIQUE_REQUEST, REVISION_REQUEST

    instruction, rows = chats(number)
    ray.init(address="local", include_dashboard=False, num_cpus=4 * TURNS)

    def before(row: dict[str, Any], request: str | None) -> dict[str, Any]:
        if request is None:
            messages = [{"role": "system", "content": instruction}, {"role": "user", "content": row["text"]}]
        else:
            messages = [*row["messages"], {"role": "user", "content": request}]
        return {"messages": messages, "sampling_params": dict(SAMPLING)}

    def after(row: dict[str, Any]) -> dict[str, Any]:
        answer = row["generated_text"].strip()
        return {
            "messages": [*row["messages"], {"role": "assistant", "content": answer}],
            "tokens": row.get("tokens", 0) + row["num_generated_tokens"],
        }

    def processor(request: str | None) -> Any:
        config = vLLMEngineProcessorConfig(
            model_source=model,
            engine_kwargs=dict(ENGINE),
            batch_size=256,
            concurrency=1,
            placement_group_config={"bundles": [{"CPU": 0.5}]},
        )
        return build_processor(config, preprocess=lambda row: before(row, request), postprocess=after)

    dataset = ray.data.from_items(rows, override_num_blocks=16)
    for request in (None, CRITIQUE_REQUEST, REVISION_REQUEST):
        dataset = processor(request)(dataset)
        if stages == "materialized":
            dataset = dataset.materialize()
    with tempfile.TemporaryDirectory() as base:
        dataset.write_parquet(base)
        import pyarrow.parquet as pq

        table = pq.read_table(base, columns=["tokens"])
    assert table.num_rows == number, table.num_rows
    return sum(table["tokens"].to_pylist())


def in_subprocess(side: str, number: int, model: Path, stages: str) -> dict[str, Any]:
    """One whole run: seconds of the process, tokens, and what each of its engines counted, turn by turn."""
    command = [sys.executable, __file__, "--side", side, "--rows", str(number), "--model", str(model)]
    command += ["--peer-stages", stages]
    here = str(Path(__file__).resolve().parent)
    path = os.pathsep.join(p for p in (here, os.environ.get("PYTHONPATH")) if p)
    with tempfile.TemporaryDirectory() as counts:
        env = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
        started = time.monotonic()
        done = subprocess.run(
            command, capture_output=True, text=True, env={**env, COUNTS_VARIABLE: counts}, check=False
        )
        seconds = time.monotonic() - started
        if done.returncode:
            sys.exit(f"{side} failed:\n{done.stderr[-3000:]}")
        tokens = next(int(line[8:]) for line in done.stdout.splitlines() if line.startswith("FIGURES "))
        engines = [json.loads(path.read_text()) for path in Path(counts).glob("*.json")]
    assert tokens == number * TURNS * SAMPLING["max_tokens"], f"{side}: {tokens} tokens"
    return {"seconds": seconds, "tokens": tokens, "engines": sorted(engines, key=lambda e: e["prompt_tokens"])}


def hit_rate(engines: list[dict[str, Any]]) -> float:
    """Share of the prompt tokens that the prefix caches had."""
    return sum(e["cached_tokens"] for e in engines) / sum(e["prompt_tokens"] for e in engines)


def show(side: str, run: dict[str, Any]) -> None:
    """One line per run."""
    engines = run["engines"]
    each = ", ".join(f"{e['cached_tokens']:,} of {e['prompt_tokens']:,}" for e in engines)
    print(f"{side:13} {run['seconds']:6.1f} s  prefix cache {hit_rate(engines):.3f} ({each})", flush=True)


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=SIDES)
    parser.add_argument("--peer-stages", choices=("streamed", "materialized"), default="streamed")
    parser.add_argument("--model", help=argparse.SUPPRESS)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        tokens = globals()[f"run_{options.side}"](options.rows, options.model, options.peer_stages)
        print("FIGURES", tokens, flush=True)
        return
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in options.sides}
    with tempfile.TemporaryDirectory() as base:
        model = prepare_model("fixed", Path(base))
        for _ in range(options.rounds):
            for side in options.sides:
                runs[side].append(in_subprocess(side, options.rows, model, options.peer_stages))
                show(side, runs[side][-1])
    medians = {side: statistics.median(run["seconds"] for run in of_side) for side, of_side in runs.items()}
    result: dict[str, Any] = {"rows": options.rows, "peer_stages": options.peer_stages, "seconds": medians}
    if set(SIDES) <= medians.keys():
        result["ratio"] = medians["ours"] / medians["ray_data_llm"]
        print(f"ours / ray_data_llm: {result['ratio']:.2f} of its time")
    if options.out:
        options.out.write_text(json.dumps({**result, "runs": runs}, indent=2) + "\n")


if __name__ == "__main__":
    main()
