"""Micro-batch in, loss out. The one place that knows causal from seq2seq.

Shapes: B examples, T positions (padded), H hidden width, N completion tokens, V vocabulary.

    causal    ids      p p p c c e .        the hidden state before each completion token (c, and the end e)
    predicts it;
              predicts . . x x x . .        the language-model head runs on those positions only
    seq2seq   encoder reads p p p, decoder reads <start> c c and predicts c c e

At a vocabulary of 150 k the head dominates memory, and prompts are long and completions short: skipping the
prompt's logits takes the peak of a step to a third of transformers' own (`benchmarks/head_memory.py`).

Causal models get no attention mask: padding is on the right, so no real position ever looks at it, and
attention has a faster kernel without one.

Only modules are called, never raw weights: DeepSpeed's ZeRO-3 gathers a module's parameters when it is
called.
"""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from distill_ray.config.train import CrossEntropyConfig, LossConfig
from distill_ray.student.losses import Targets, compute_loss
from distill_ray.student.tokens import Tokens


@dataclasses.dataclass(slots=True)
class Batch:
    """One micro-batch. `predicts_BT` marks the positions whose logits predict a completion token, row by
    row."""

    ids_BT: Tensor  # causal: prompt + completion; seq2seq: prompt
    mask_BT: Tensor
    predicts_BT: Tensor  # seq2seq: over the decoder's positions
    targets: Targets
    decoder_ids_BT: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        """The same on another device."""
        return dataclasses.replace(_moved(self, device), targets=_moved(self.targets, device))


T = TypeVar("T", Batch, Targets)


def _moved(tensors: T, device: torch.device) -> T:
    values = {f.name: getattr(tensors, f.name) for f in dataclasses.fields(tensors)}
    moved: dict[str, Any] = {
        name: value.to(device, non_blocking=True) for name, value in values.items() if isinstance(value, Tensor)
    }
    return dataclasses.replace(tensors, **moved)


def collate(
    tokens: Tokens,
    examples: npt.NDArray[np.int64],
    task_tokens: npt.NDArray[np.int64],
    *,
    pad_id: int,
    decoder_start_id: int | None = None,
) -> Batch:
    """Pad examples to one rectangle.

    Args:
        tokens: the split they come from.
        examples: which; none at all gives a batch of one pad token and no targets, because every worker has
        to run the
            same collectives as the others.
        task_tokens: completion tokens of each task in the whole optimizer step. [num tasks]
        pad_id: any valid id; padding is masked.
        decoder_start_id: given for seq2seq.
    """
    ids = [torch.from_numpy(tokens.ids(e).astype(np.int64)) for e in examples]
    prompts = tokens.prompt_tokens_E[examples]
    completions = tokens.completion_tokens_E[examples]
    targets = [row[p:] for row, p in zip(ids, prompts, strict=True)]
    per_example = tokens.weights_E[examples] / np.maximum(1, task_tokens[tokens.tasks_E[examples]])
    loss = Targets(
        ids_N=torch.cat(targets) if targets else torch.zeros(0, dtype=torch.int64),
        coefficients_N=torch.from_numpy(np.repeat(per_example, completions).astype(np.float32)),
    )
    if tokens.topk:
        loss.topk_ids_NK, loss.topk_logprobs_NK = map(torch.from_numpy, tokens.soft_targets(examples))
    if decoder_start_id is None:
        ids_BT, mask_BT = _pad(ids, pad_id)
        begins = torch.from_numpy(prompts - 1)[:, None]
        ends = torch.from_numpy(prompts + completions - 1)[:, None]
        positions = torch.arange(ids_BT.shape[1])[None]
        predicts_BT = (positions >= begins) & (positions < ends) if targets else torch.zeros_like(mask_BT)
        return Batch(ids_BT, mask_BT, predicts_BT, loss)
    ids_BT, mask_BT = _pad([row[:p] for row, p in zip(ids, prompts, strict=True)], pad_id)
    start = torch.tensor([decoder_start_id])
    decoder_ids_BT, predicts_BT = _pad([torch.cat([start, t[:-1]]) for t in targets], pad_id)
    return Batch(
        ids_BT,
        mask_BT,
        predicts_BT if targets else torch.zeros_like(predicts_BT),
        loss,
        decoder_ids_BT,
    )


def _pad(rows: list[Tensor], pad_id: int) -> tuple[Tensor, Tensor]:
    """Right-padded ids and the mask of what is real. [B, T], [B, T]"""
    if not rows:
        return torch.full((1, 1), pad_id, dtype=torch.int64), torch.ones((1, 1), dtype=torch.bool)
    padded = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad_id)
    lengths = torch.tensor([len(row) for row in rows])
    return padded, torch.arange(padded.shape[1])[None] < lengths[:, None]


class StudentModule(nn.Module):
    """A Hugging Face model (with or without adapters) whose forward gives the loss of a micro-batch."""

    def __init__(self, model: Any, loss: LossConfig | None = None) -> None:
        super().__init__()
        self.model = model
        self.loss = loss or CrossEntropyConfig()
        self.head_is_separable = head_is_separable(base_model(model))

    def forward(self, batch: Batch) -> Tensor:
        """Loss of a micro-batch, in nats; see `losses` for what it adds up to."""
        return compute_loss(self.loss, self.logits(batch), batch.targets)

    def logits(self, batch: Batch) -> Tensor:
        """Logits that predict the completion tokens. [N, V]"""
        if not self.head_is_separable:
            return self._all_logits(batch)[batch.predicts_BT]
        base = base_model(self.model)
        hidden_BTH = base.get_decoder()(input_ids=batch.ids_BT, use_cache=False).last_hidden_state
        return base.get_output_embeddings()(hidden_BTH[batch.predicts_BT])

    def _all_logits(self, batch: Batch) -> Tensor:
        if batch.decoder_ids_BT is None:
            return self.model(input_ids=batch.ids_BT, use_cache=False).logits
        return self.model(
            input_ids=batch.ids_BT,
            attention_mask=batch.mask_BT.long(),
            decoder_input_ids=batch.decoder_ids_BT,
            use_cache=False,
        ).logits


def base_model(model: Any) -> Any:
    """The Hugging Face model itself; adapters are modules inside it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@torch.no_grad()
def head_is_separable(model: Any) -> bool:
    """Whether logits are exactly head(decoder's last hidden state), with nothing before or after.

    Some models scale or soft-cap (Gemma's final_logit_softcapping, Granite's logits_scaling, T5's scaled
    hidden state). Instead of a list of names that grows old, we look: the head's output is replaced by noise
    for one tiny forward pass, which has to come out untouched, and the head's input has to be the decoder's
    output.
    """
    head = model.get_output_embeddings()
    if model.config.is_encoder_decoder or head is None:
        return False
    seen: dict[str, Tensor] = {}

    def replace_output(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(output.shape, generator=generator).to(output) * 50.0
        seen["input"], seen["noise"] = inputs[0], noise
        return noise

    was_training = model.training
    model.eval()
    hook = head.register_forward_hook(replace_output)
    try:
        ids = torch.zeros((1, 2), dtype=torch.int64, device=head.weight.device)
        hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
        logits = model(input_ids=ids, use_cache=False).logits
    finally:
        hook.remove()
        model.train(was_training)
    return "noise" in seen and torch.equal(logits, seen["noise"]) and torch.equal(hidden, seen["input"])
