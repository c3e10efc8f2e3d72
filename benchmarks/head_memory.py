"""Memory of a training step at a vocabulary of 150 k: the head on completions only, and on every position.

    python benchmarks/head_memory.py --out head_memory.json

A Llama with random weights (2 layers, width 64, 151,936 tokens), one micro-batch in fp32 of which a fifth of the
tokens is the answer; forward, backward and an AdamW step: our module as it is, our module with the head on every
position, and transformers' own loss. Each in a process of its own; measured is the peak of its resident memory by the
kernel's count (VmHWM), and how much of that came after model and optimizer were there. All three have the same loss.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

VOCABULARY, WIDTH, LAYERS = 151_936, 64, 2
SIDES = ("completions only", "every position", "transformers")


def resident(kind: str) -> float:
    """MiB of this process: VmRSS now, VmHWM at its highest."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(kind)]
    return int(line.split()[1]) / 1024


def step(side: str, rows: int, length: int) -> dict[str, float]:
    """One optimizer step; loss and memory."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from distill_ray.student.losses import Targets
    from distill_ray.student.module import Batch, StudentModule

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=length,
        tie_word_embeddings=True,
    )
    module = StudentModule(LlamaForCausalLM(config))
    assert module.head_is_separable
    module.head_is_separable = side == "completions only"
    optimizer = torch.optim.AdamW(module.parameters())
    answer = length // 5
    ids_BT = torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))
    predicts_BT = torch.zeros(rows, length, dtype=torch.bool)
    predicts_BT[:, length - answer - 1 : -1] = True
    ids_N = ids_BT[:, length - answer :].reshape(-1)
    for parameter in module.parameters():  # all that is there in every step but the first, and touched
        optimizer.state[parameter] = {
            "step": torch.zeros(()),
            "exp_avg": torch.zeros_like(parameter).add_(1e-9),
            "exp_avg_sq": torch.zeros_like(parameter).add_(1e-9),
        }
        parameter.grad = torch.zeros_like(parameter).add_(0.0)
    before = resident("VmRSS")
    if side == "transformers":
        labels_BT = torch.where(torch.roll(predicts_BT, 1, dims=1), ids_BT, -100)
        loss = module.model(input_ids=ids_BT, labels=labels_BT, use_cache=False).loss
    else:
        targets = Targets(ids_N=ids_N, coefficients_N=torch.full((len(ids_N),), 1 / len(ids_N)))
        loss = module(Batch(ids_BT, torch.ones_like(predicts_BT), predicts_BT, targets))
    loss.backward()
    optimizer.step()
    peak = resident("VmHWM")
    return {"loss": loss.item(), "peak_MiB": peak, "of_the_step_MiB": peak - before}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4, help="sequences of the micro-batch")
    parser.add_argument("--length", type=int, default=512, help="tokens of each")
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        print("FIGURES", json.dumps(step(options.side, options.rows, options.length)), flush=True)
        return
    found: dict[str, dict[str, Any]] = {}
    for side in SIDES:
        size = ["--rows", str(options.rows), "--length", str(options.length)]
        command = [sys.executable, __file__, "--side", side, *size]
        lines = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()
        found[side] = next(json.loads(line[8:]) for line in lines if line.startswith("FIGURES "))
        of = found[side]
        print(
            f"{side:17} peak {of['peak_MiB']:7,.0f} MiB, of the step {of['of_the_step_MiB']:7,.0f}, "
            f"loss {of['loss']:.5f}"
        )
    losses = [of["loss"] for of in found.values()]
    assert max(losses) - min(losses) < 1e-4, losses
    ours = found["completions only"]
    ratios = {
        f"{kind} against {side}": ours[kind] / found[side][kind]
        for side in SIDES[1:]
        for kind in ("peak_MiB", "of_the_step_MiB")
    }
    for name, ratio in ratios.items():
        print(f"{name}: {ratio:.2f}")
    if options.out:
        options.out.write_text(
            json.dumps({"ratios": ratios, "sides": found, "rows": options.rows, "length": options.length}, indent=2)
            + "\n"
        )


if __name__ == "__main__":
    main()
