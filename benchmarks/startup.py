"""Start-up: from the command to the first completed row, against plain vLLM; and where the seconds go.

    python benchmarks/startup.py --out startup.json

`distill-ray generate` over 64 rows with the demo model on real vLLM, until the first answer is in the ledger on disk;
and a script with nothing but `vllm.LLM(...).chat(...)` over the same 64 chats, until its first answers are back. In
turn, each in a new process, files in the page's cache; the figure is the ratio of the medians. vLLM compiles nothing
in either (`enforce_eager`). Where our seconds go is read from the engine's own log, which has whole seconds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from distill_ray.models import DEMO_MODEL_PATH

ROWS, MAX_TOKENS = 64, 16
ENGINE_ARGS = {"max_model_len": 1024, "enforce_eager": True, "enable_chunked_prefill": False}
ENVIRONMENT = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
STEPS = {
    "command to the engine's configuration (Ray, the actor's process, imports)": "Resolved architecture",
    "vLLM's engine process (imports)": "Initializing a V1 LLM engine",
    "vLLM's worker process (imports)": "Starting to load model",
    "weights": "Loading weights took",
    "cache and warm-up": "init engine (profile, create kv cache, warmup model) took",
}
"""What vLLM says at the end of each."""


def run_ours(folder: Path) -> tuple[float, dict[str, float]]:
    """Seconds until the first row is done, and by step."""
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": f"query {n}"}) + "\n" for n in range(ROWS)))
    config = {
        "recipe": {"type": "context", "context": {"text": "Answer."}, "query": "{{ text }}"},
        "data": {"source": "rows.jsonl"},
        "teacher": {
            "type": "vllm",
            "model": "demo",
            "gpus": 0,
            "engine_kwargs": ENGINE_ARGS,
            "sampling": {"max_tokens": MAX_TOKENS},
        },
        "generate": {"max_reject_frac": 1.0},
    }
    (folder / "config.json").write_text(json.dumps(config))
    run = folder / "run"
    command = [sys.executable, "-m", "distill_ray", "generate", str(folder / "config.json"), "--run-dir", str(run)]
    began = time.time()
    in_subprocess(command, folder)
    first = min(path.stat().st_mtime for path in (run / "calls").glob("*"))
    [log] = (run / "logs").glob("engine-*.log")
    times = [began, *(said_at(log.read_text(), words) for words in STEPS.values())]
    steps = {step: after - before for step, (before, after) in zip(STEPS, itertools.pairwise(times), strict=True)}
    steps["first answers, kept"] = first - times[-1]
    return first - began, {step: round(seconds, 1) for step, seconds in steps.items()}


def run_vllm() -> None:
    """Plain vLLM; says when it has its answers."""
    from vllm import LLM, SamplingParams

    engine = LLM(model=str(DEMO_MODEL_PATH), **ENGINE_ARGS)
    chats: Any = [
        [{"role": "system", "content": "Answer."}, {"role": "user", "content": f"query {n}"}] for n in range(ROWS)
    ]
    engine.chat(chats, SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0), use_tqdm=False)
    print("ANSWERED", time.time(), flush=True)


def plain(folder: Path) -> float:
    """Seconds of plain vLLM, in a process of its own."""
    began = time.time()
    said = in_subprocess([sys.executable, __file__, "--vllm"], folder)
    return next(float(line.split()[1]) for line in said.splitlines() if line.startswith("ANSWERED")) - began


def in_subprocess(command: list[str], folder: Path) -> str:
    """Its standard output."""
    environment = {**ENVIRONMENT, "PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{command[1:3]} failed:\n{done.stderr[-3000:]}")
    return done.stdout


def said_at(log: str, words: str) -> float:
    """When a line of vLLM's with these words was written."""
    found = re.search(rf"(\d\d-\d\d \d\d:\d\d:\d\d) .*{re.escape(words)}", log)
    assert found is not None, words
    return time.mktime(time.strptime(f"{time.localtime().tm_year}-{found[1]}", "%Y-%m-%d %H:%M:%S"))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=3, help="of each side")
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    parser.add_argument("--vllm", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.vllm:
        run_vllm()
        return
    seconds: dict[str, list[float]] = {"ours": [], "vllm": []}
    steps: list[dict[str, float]] = []
    for turn in range(options.turns):
        with tempfile.TemporaryDirectory(prefix="su") as base:
            seconds["vllm"].append(plain(Path(base)))
            took, where = run_ours(Path(base))
            seconds["ours"].append(took)
            steps.append(where)
        print(f"turn {turn + 1}: plain vLLM {seconds['vllm'][-1]:.1f} s, ours {took:.1f} s", flush=True)
    medians = {side: statistics.median(found) for side, found in seconds.items()}
    ratio = medians["ours"] / medians["vllm"]
    print(f"ours / plain vLLM: {ratio:.2f} ({medians['ours']:.1f} against {medians['vllm']:.1f} s)")
    for step in steps[0]:
        print(f"{statistics.median(each[step] for each in steps):6.1f} s  {step}")
    if options.out:
        result = {"ratio": ratio, "median_s": medians, "seconds": seconds, "steps": steps}
        options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
