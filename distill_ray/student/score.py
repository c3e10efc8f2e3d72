"""How well a model predicts given answers: mean loss per answer, for evaluation."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from distill_ray.config.train import StudentConfig
from distill_ray.models import resolve_adapter
from distill_ray.student.load import load_student
from distill_ray.student.module import StudentModule, collate
from distill_ray.student.tokens import TokenizedExample, Tokens, TokenWriter


@torch.no_grad()
def answer_losses(
    config: StudentConfig,
    adapter: str | None,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    *,
    max_tokens_per_batch: int,
) -> npt.NDArray[np.float64]:
    """Mean nats per completion token (end token included) of each example. [E]

    Args:
        config: the model to load; its `lora` is ignored.
        adapter: folder of trained adapters to put on it, or None.
        prompts: token ids. [E][T]
        completions: token ids. [E][T]
        max_tokens_per_batch: padded tokens per forward pass.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = load_student(config.model_copy(update={"lora": None, "adapter": None}), dtype=dtype, seed=0)
    start_id = getattr(model.config, "decoder_start_token_id", None) if model.config.is_encoder_decoder else None
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, resolve_adapter(adapter, key="student.adapter"))
    module = StudentModule(model).to(device).eval()
    losses_E = np.zeros(len(prompts))
    with tempfile.TemporaryDirectory() as folder:
        with TokenWriter(Path(folder)) as writer:
            for number, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
                writer.write([TokenizedExample(str(number), str(number), "answer", 1.0, prompt, completion)])
        tokens = Tokens(Path(folder))
        for examples in _batches(tokens.lengths_E, max_tokens_per_batch):
            batch = collate(tokens, examples, tokens.task_tokens(examples), pad_id=0, decoder_start_id=start_id)
            batch = batch.to(device)
            losses_N = F.cross_entropy(module.logits(batch).float(), batch.targets.ids_N, reduction="none").cpu()
            sizes = tokens.completion_tokens_E[examples].tolist()
            losses_E[examples] = [part.mean().item() for part in losses_N.split(sizes)]
    return losses_E


def _batches(lengths_E: npt.NDArray[np.int64], max_tokens: int) -> list[npt.NDArray[np.int64]]:
    """Examples in order of length, cut so that the padded rectangle stays within the budget."""
    batches: list[list[int]] = []
    for example in np.argsort(-lengths_E, kind="stable"):
        if not batches or lengths_E[batches[-1][0]] * (len(batches[-1]) + 1) > max_tokens:
            batches.append([])
        batches[-1].append(int(example))
    return [np.asarray(batch, dtype=np.int64) for batch in batches]
