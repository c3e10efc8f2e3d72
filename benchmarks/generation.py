"""Generation speed: our stage against plain `vllm.LLM.chat` and against `ray.data.llm`, same model and prompts.

    python benchmarks/generation.py --out generation.json

All three answer the same 4,096 chats (the demo's instruction as system prompt, one sentence each) with the same demo
model, engine arguments and sampling. Every answer has exactly 64 tokens: the model is given an end token that it never
says, as vLLM's own benchmarks ignore the end. `--answers natural` lets answers end where the model ends them (about 18
tokens), so that the cost per request weighs more.

Engine start is excluded for all: plain vLLM is timed around `chat`, ours from the moment its engine is ready to the
last row written (tokenising, ledger, files included), `ray.data.llm` from its first batch's arrival in the engine to
the last row. Runs alternate, each in a process of its own; the figure is the ratio of the median tokens per second.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ENGINE_ARGS = {"max_model_len": 1024, "enforce_eager": True, "enable_chunked_prefill": False}
SAMPLING = {"temperature": 0.15, "max_tokens": 64, "seed": 0}
SIDES = ("ours", "vllm", "ray_data_llm")


def chats(number: int) -> tuple[str, list[dict[str, Any]]]:
    """The instruction and rows with a `text` each."""
    from distill_ray.demo import INSTRUCTION_PATH, language_rows

    return INSTRUCTION_PATH.read_text(encoding="utf-8").strip(), language_rows(number, seed=1)


def prepare_model(answers: str, folder: Path) -> Path:
    """The demo model; for answers of fixed length a copy of it that cannot end one."""
    from distill_ray.models import DEMO_MODEL_PATH

    if answers == "natural":
        return DEMO_MODEL_PATH
    shutil.copytree(DEMO_MODEL_PATH, folder, dirs_exist_ok=True)
    for name, changes in {
        "config.json": {"eos_token_id": 0},
        "generation_config.json": {"eos_token_id": 0},
        "tokenizer_config.json": {"eos_token": "<|pad|>"},
    }.items():
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def run_ours(number: int, model: str) -> dict[str, float]:
    """The `generate` stage on Ray."""
    from distill_ray.config import parse_config
    from distill_ray.pipeline.folder import RunFolder
    from distill_ray.pipeline.generate import generate

    context, rows = chats(number)
    with tempfile.TemporaryDirectory() as base:
        source = Path(base, "queries.jsonl")
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
        sampling = dict(SAMPLING)
        config = parse_config(
            {
                "recipe": {"type": "context", "context": {"text": context}},
                "data": {"source": str(source)},
                "generate": {"max_reject_frac": 1.0},  # answers of fixed length are all cut off
                "teacher": {
                    "type": "vllm",
                    "model": model,
                    "gpus": 0,
                    "engine_kwargs": ENGINE_ARGS,
                    "sampling": sampling,
                },
            }
        )
        folder = RunFolder(Path(base, "run"))
        result = generate(config, folder)
        return {"tokens": result.completion_tokens, "seconds": folder.manifest()["seconds"]["generate_work"]}


def run_vllm(number: int, model: str) -> dict[str, float]:
    """Plain vLLM."""
    from vllm import LLM, SamplingParams

    context, rows = chats(number)
    conversations = [[{"role": "system", "content": context}, {"role": "user", "content": row["text"]}] for row in rows]
    llm = LLM(model=model, **ENGINE_ARGS)
    started = time.monotonic()
    outputs = llm.chat(conversations, SamplingParams(**SAMPLING), use_tqdm=False)
    seconds = time.monotonic() - started
    return {"tokens": sum(len(o.outputs[0].token_ids) for o in outputs), "seconds": seconds}


def run_ray_data_llm(number: int, model: str) -> dict[str, float]:
    """Ray's own batch inference: chat template, tokenize, engine, detokenize stages."""
    import ray
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig

    context, rows = chats(number)
    ray.init(address="local", include_dashboard=False, num_cpus=4)
    config = vLLMEngineProcessorConfig(
        model_source=model,
        engine_kwargs=ENGINE_ARGS,
        batch_size=256,
        concurrency=1,
        placement_group_config={"bundles": [{"CPU": 0.5}]},
    )
    processor = build_processor(
        config,
        preprocess=lambda row: {
            "messages": [{"role": "system", "content": context}, {"role": "user", "content": row["text"]}],
            "sampling_params": dict(SAMPLING),
        },
        postprocess=lambda row: {
            "tokens": row["num_generated_tokens"],
            "finished": time.time(),
            "spent": row.get("time_taken_llm", 0.0),
        },
    )
    answers = processor(ray.data.from_items(rows, override_num_blocks=16)).take_all()
    first = min(a["finished"] - a["spent"] for a in answers)
    seconds = max(a["finished"] for a in answers) - first
    return {"tokens": sum(a["tokens"] for a in answers), "seconds": seconds}


def in_subprocess(side: str, number: int, model: Path) -> dict[str, float]:
    """One run; its figures are the line that begins with FIGURES (vLLM prints after it, at its end)."""
    command = [sys.executable, __file__, "--side", side, "--chats", str(number), "--model", str(model)]
    env = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    if done.returncode:
        sys.exit(f"{side} failed:\n{done.stderr[-3000:]}")
    return next(json.loads(line[8:]) for line in done.stdout.splitlines() if line.startswith("FIGURES "))


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    parser.add_argument("--chats", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers", nargs="*", default=list(SIDES[1:]), choices=SIDES[1:])
    parser.add_argument("--answers", choices=("fixed", "natural"), default="fixed")
    parser.add_argument("--model", help=argparse.SUPPRESS)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        print("FIGURES", json.dumps(globals()[f"run_{options.side}"](options.chats, options.model)), flush=True)
        return
    sides = ["ours", *options.peers]
    speeds: dict[str, list[float]] = {side: [] for side in sides}
    with tempfile.TemporaryDirectory() as base:
        model = prepare_model(options.answers, Path(base))
        for _ in range(options.rounds):
            for side in sides:
                figures = in_subprocess(side, options.chats, model)
                speeds[side].append(figures["tokens"] / figures["seconds"])
                print(f"{side:13} {speeds[side][-1]:9,.0f} tokens/s  {figures['tokens']:8} tokens", flush=True)
    medians = {side: statistics.median(values) for side, values in speeds.items()}
    ratios = {side: medians["ours"] / medians[side] for side in options.peers}
    for side, ratio in ratios.items():
        print(f"ours / {side}: {ratio:.2f}")
    if options.out:
        result = {
            "ratios": ratios,
            "medians": medians,
            "tokens_per_second": speeds,
            "chats": options.chats,
            "answers": options.answers,
        }
        options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
