"""Training speed: our trainer against TRL's SFTTrainer at its best CPU setting, on the same data and model.

    python benchmarks/training.py --out training.json

Both train the demo model (3.4 M parameters, 4 k vocabulary) from the same weights, in fp32, one worker, the same number
of torch threads and epochs, and the same mean number of tokens per optimizer step, with loss on completions only. TRL
groups by length, does no gradient checkpointing and does not log. Runs alternate (ours, theirs, ours, ...), each in a
process of its own. Measured is the time from the end of the first optimizer step to the end of the last, so start-up
counts for neither; tokens are those that are not padding. The figure is the ratio of the medians.

That both learn the same is checked by the loss of the trained models on held-out examples; each pair of runs has a seed
of its own (data order), so that the spread shows what is noise.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from distill_ray.models import DEMO_MODEL_PATH, ChatTokenizer
from distill_ray.records import Example, Message, Split, examples_table

EPOCHS, LEARNING_RATE, MAX_TOKENS_PER_BATCH, WARMUP_RATIO = 2, 1e-3, 2048, 0.03


def make_examples(number: int, split: Split) -> list[Example]:
    """Chat examples: prompts of 20-60 tokens, completions from a few tokens to a few hundred (log-normal)."""
    rng = random.Random(split)
    tokenizer = ChatTokenizer(str(DEMO_MODEL_PATH)).tokenizer
    words = sorted({w for i in range(300, 4000) if (w := tokenizer.decode([i]).strip()).isalpha() and len(w) > 2})[:400]
    examples = []
    for i in range(number):
        prompt = rng.choices(words, k=rng.randint(8, 40))
        completion = [prompt[j % len(prompt)] for j in range(min(300, max(1, int(rng.lognormvariate(3.2, 0.9)))))]
        messages: list[Message] = [{"role": "user", "content": " ".join(prompt)}]
        examples.append(Example(f"{split}-{i}", split, messages, " ".join(completion)))
    return examples


def run_ours(workdir: Path, threads: int, seed: int) -> dict[str, Any]:
    """Train with our trainer."""
    from distill_ray.config.run import parse_config
    from distill_ray.pipeline.folder import RunFolder
    from distill_ray.pipeline.training.train import train

    folder = RunFolder(workdir / "run")
    folder.write_table(examples_table(read_examples(workdir, "train")), "examples", "00000.parquet")
    config = parse_config(
        {
            "recipe": {"type": "context", "context": {"text": "-"}, "query": "-"},
            "data": {"source": "-"},
            "teacher": {"type": "fake"},
            "student": {"model": "demo"},
            "train": {
                "epochs": EPOCHS,
                "learning_rate": LEARNING_RATE,
                "warmup_ratio": WARMUP_RATIO,
                "max_tokens_per_batch": MAX_TOKENS_PER_BATCH,
                "threads_per_worker": threads,
                "precision": "fp32",
                "seed": seed,
                "tensorboard": False,
            },
        }
    )
    train(config, folder)
    lines = [json.loads(line) for line in folder.read_bytes("metrics.jsonl").splitlines()]
    steps = [line for line in lines if "loss" in line][1:]
    seconds = sum(s["tokens"] / s["tokens_per_second"] for s in steps)
    tokens = sum(s["tokens"] for s in steps)
    return {"tokens": tokens, "seconds": seconds, "steps": len(steps) + 1, "student": str(workdir / "run" / "student")}


def run_trl(workdir: Path, threads: int, seed: int, batch_size: int) -> dict[str, Any]:
    """Train with TRL, grouped by length."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    torch.set_num_threads(threads)
    examples = read_examples(workdir, "train")
    data = Dataset.from_list(
        [{"prompt": list(e.messages), "completion": [{"role": "assistant", "content": e.completion}]} for e in examples]
    )
    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            ends.append(time.perf_counter())

    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(DEMO_MODEL_PATH, dtype=torch.float32),
        processing_class=AutoTokenizer.from_pretrained(DEMO_MODEL_PATH),
        train_dataset=data,
        args=SFTConfig(
            output_dir=str(workdir / "trl"),
            num_train_epochs=EPOCHS,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="cosine",
            warmup_steps=WARMUP_RATIO,
            per_device_train_batch_size=batch_size,
            train_sampling_strategy="group_by_length",
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            max_length=2048,
            completion_only_loss=True,
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            seed=seed,
        ),
        callbacks=[Clock()],
    )
    tokenised: Any = trainer.train_dataset
    lengths = [len(ids) for ids in tokenised["input_ids"]]
    trainer.train()
    trainer.save_model(str(workdir / "trl-student"))
    tokens = sum(lengths) * EPOCHS * (len(ends) - 1) / len(ends)
    return {
        "tokens": tokens,
        "seconds": ends[-1] - ends[0],
        "steps": len(ends),
        "student": str(workdir / "trl-student"),
    }


def held_out_loss(workdir: Path, student: str) -> float:
    """Mean nats per completion token of a trained model."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32).eval()
    tokenizer = ChatTokenizer(str(DEMO_MODEL_PATH))
    total, count = 0.0, 0
    with torch.no_grad():
        for example in read_examples(workdir, "validation"):
            prompt, completion = tokenizer.prompt_ids(example.messages), tokenizer.completion_ids(example.completion)
            ids = torch.tensor([prompt + completion])
            labels = torch.tensor([[-100] * len(prompt) + completion])
            total += model(input_ids=ids, labels=labels).loss.item() * len(completion)
            count += len(completion)
    return total / count


def read_examples(workdir: Path, split: str) -> list[Example]:
    """The examples that both sides train on."""
    return [Example(**record) for record in json.loads((workdir.parent / f"{split}.json").read_text())]


def write_examples(base: Path, number: int) -> None:
    """Write the data."""
    splits: list[tuple[Split, int]] = [("train", number), ("validation", 100)]
    for split, count in splits:
        examples = make_examples(count, split)
        records = [
            {"row_id": e.row_id, "split": e.split, "messages": e.messages, "completion": e.completion} for e in examples
        ]
        (base / f"{split}.json").write_text(json.dumps(records))


def in_subprocess(side: str, workdir: Path, threads: int, seed: int, batch_size: int) -> dict[str, Any]:
    """One run of one side."""
    workdir.mkdir()
    arguments = [side, str(workdir), str(threads), str(seed), str(batch_size)]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    done = subprocess.run(
        [sys.executable, __file__, "--worker", *arguments], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise SystemExit(f"{side} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    parser.add_argument("--examples", type=int, default=2000)
    parser.add_argument("--pairs", type=int, default=3, help="runs of each side")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--worker", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        side, workdir = options.worker[:2]
        threads, seed, batch_size = map(int, options.worker[2:])
        path = Path(workdir)
        figures = run_ours(path, threads, seed) if side == "ours" else run_trl(path, threads, seed, batch_size)
        figures["tokens_per_second"] = figures["tokens"] / figures["seconds"]
        figures["held_out_loss"] = held_out_loss(path, figures.pop("student"))
        print(json.dumps(figures))
        return
    runs: dict[str, list[dict[str, Any]]] = {"ours": [], "trl": []}
    with tempfile.TemporaryDirectory() as base:
        write_examples(Path(base), options.examples)
        batch_size = 0
        for pair in range(options.pairs):
            for side in runs:
                figures = in_subprocess(side, Path(base) / f"{side}-{pair}", options.threads, pair, batch_size)
                runs[side].append(figures)
                # As many examples a step as ours had in the mean: then tokens per step are the same in the mean.
                batch_size = batch_size or round(options.examples * EPOCHS / figures["steps"])
                print(
                    f"{side:5} {figures['tokens_per_second']:9,.0f} tokens/s  {figures['steps']:5} steps  "
                    f"held-out loss {figures['held_out_loss']:.4f}",
                    flush=True,
                )
    medians = {side: statistics.median(r["tokens_per_second"] for r in each) for side, each in runs.items()}
    ratio = medians["ours"] / medians["trl"]
    print(f"median {medians['ours']:,.0f} against {medians['trl']:,.0f} tokens/s: {ratio:.2f} times TRL")
    losses = {side: [r["held_out_loss"] for r in each] for side, each in runs.items()}
    for side, values in losses.items():
        spread = statistics.stdev(values) if len(values) > 1 else float("nan")
        print(f"{side:5} held-out loss {statistics.mean(values):.4f}, standard deviation over seeds {spread:.4f}")
    if options.out:
        result = {"ratio": ratio, "median": medians, "batch_size_trl": batch_size, "runs": runs}
        options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
