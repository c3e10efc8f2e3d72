"""A transformers model, loaded, and the generation of one batch in which every row has its own settings.

`_Sampler` draws per row by inverse transform from a stream of numbers that depends only on (prompt, seed + sample
index), so a sample does not depend on what else is in its batch, up to rounding. After a stop string `token_ids` end
with the token that completes it; no end token is added.

The model's own generation defaults (top_k, repetition penalty, ...) are not used: the config says how to sample. A
model with a chat template gets token ids from `models.ChatTokenizer`, an encoder-decoder without one from
`models.PlainPrompts`. Either way, text that spells a control token stays text.

`hf.HfEngine` collects the batches and answers the callers.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.utils import logging as transformers_logging

from distill_ray.config.engine import HfEngineConfig, SamplingConfig
from distill_ray.engines.base import hash_ids
from distill_ray.errors import ConfigError, TransientEngineError, first_line
from distill_ray.models import Prompts, resolve_adapter, resolve_model
from distill_ray.records import Completion, Message

# Shape suffixes: B rows of a batch, T positions, V vocabulary.


@dataclass(slots=True, eq=False)
class Request:
    """One row of a batch: one sample of one call."""

    prompt_ids: list[int]
    sampling: SamplingConfig
    sample_index: int
    max_new_tokens: int
    answer: asyncio.Future[Completion]
    cancelled: threading.Event = field(default_factory=threading.Event)

    def draws(self) -> np.ndarray:
        """Uniform numbers in [0, 1), one per new token; the prompt is mixed in, so rows are independent."""
        prompt = np.frombuffer(hash_ids(self.prompt_ids), dtype=np.uint32)
        seed = (self.sampling.seed + self.sample_index, *prompt.tolist())
        return np.random.default_rng(seed).random(self.max_new_tokens, dtype=np.float32)


class HfModel:
    """Weights and tokenizer, loaded. Everything here runs in the engine's thread, save tokenisation."""

    def __init__(self, config: HfEngineConfig, prompts: Prompts) -> None:
        path = resolve_model(config.model, key="teacher.model")
        kwargs = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
        try:
            self.is_seq2seq = bool(AutoConfig.from_pretrained(path, **kwargs).is_encoder_decoder)
            self.model: Any = _load(config, path, self.is_seq2seq, kwargs).eval()
        except (OSError, ValueError) as error:
            reason = first_line(error)
            what = config.model + (f" with the adapters {config.adapter}" if config.adapter else "")
            raise ConfigError(f"teacher.model: cannot load {what} ({reason})") from error
        self.prompts = prompts
        self.tokenizer: Any = self.prompts.tokenizer
        self.max_positions = self._max_positions()
        defaults = self.model.generation_config
        self.end_ids = _id_list(defaults.eos_token_id) | {self.prompts.end_id}
        # Replaced, for `generate` would mix the model's own sampling defaults into ours.
        self.model.generation_config = GenerationConfig(
            eos_token_id=sorted(self.end_ids),
            pad_token_id=self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else min(self.end_ids),
            bos_token_id=defaults.bos_token_id,
            decoder_start_token_id=defaults.decoder_start_token_id,
            forced_bos_token_id=defaults.forced_bos_token_id,
            do_sample=False,  # `_Sampler` leaves one token for greedy to take
        )

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Token ids that the model (the encoder, where it has one) reads. [T]"""
        return self.prompts.prompt_ids(messages)

    def room(self, prompt_tokens: int) -> int:
        """How many new tokens fit; an encoder-decoder's answer has positions of its own."""
        if self.max_positions is None:
            return 1 << 30
        if self.is_seq2seq:
            return self.max_positions if prompt_tokens <= self.max_positions else 0
        return self.max_positions - prompt_tokens

    def generate(self, batch: Sequence[Request], streamer: Any = None) -> list[Completion]:
        """Answer the requests, in their order. A batch that does not fit into memory is cut into halves.

        Raises:
            TransientEngineError: a single row does not fit, or the device failed.
        """
        try:
            new_ids = self._generate_ids(batch, streamer)
        except torch.OutOfMemoryError as error:
            if len(batch) == 1:
                raise TransientEngineError(
                    f"out of memory on one prompt of {len(batch[0].prompt_ids)} tokens; take a smaller model"
                ) from error
        except RuntimeError as error:
            raise TransientEngineError(f"generate failed ({first_line(error)})") from error
        else:
            return [self._completion(request, ids) for request, ids in zip(batch, new_ids, strict=True)]
        torch.cuda.empty_cache()
        middle = len(batch) // 2
        return self.generate(batch[:middle]) + self.generate(batch[middle:])

    @torch.inference_mode()
    def _generate_ids(self, batch: Sequence[Request], streamer: Any) -> list[list[int]]:
        longest = max(len(request.prompt_ids) for request in batch)
        pad_id = self.model.generation_config.pad_token_id
        ids_BT = torch.full((len(batch), longest), pad_id)
        mask_BT = torch.zeros_like(ids_BT)
        # Padded on the left, so that every answer starts at the same position.
        for b, request in enumerate(batch):
            ids_BT[b, longest - len(request.prompt_ids) :] = torch.tensor(request.prompt_ids)
            mask_BT[b, longest - len(request.prompt_ids) :] = 1
        start = 1 if self.is_seq2seq else longest  # a decoder of its own starts from its start token
        stopper = _Stopper(batch, start, self.tokenizer)
        output_BT = self.model.generate(
            input_ids=ids_BT.to(self.model.device),
            attention_mask=mask_BT.to(self.model.device),
            max_new_tokens=max(request.max_new_tokens for request in batch),
            logits_processor=LogitsProcessorList([_Sampler(batch, start)]),
            stopping_criteria=StoppingCriteriaList([stopper]),
            streamer=streamer,
        )
        return [row[start:].tolist() for row in output_BT.cpu()]

    def _completion(self, request: Request, new_ids: list[int]) -> Completion:
        """Cut the row at its end: an end token, a stop string or its own `max_new_tokens`."""
        ids = new_ids[: request.max_new_tokens]
        end = next((t for t, token in enumerate(ids) if token in self.end_ids), None)
        finish_reason = "length" if end is None else "stop"
        ids = ids if end is None else ids[: end + 1]
        text = self._decode(ids)
        if cut_at_stop(text, request.sampling.stop) != text:
            text, finish_reason = cut_at_stop(text, request.sampling.stop), "stop"
            ids = self._shortest_with_stop(ids, request.sampling.stop)
        return Completion(
            text=text,
            finish_reason=finish_reason,
            prompt_tokens=len(request.prompt_ids),
            completion_tokens=len(ids),
            sample_index=request.sample_index,
            token_ids=ids,
        )

    def _shortest_with_stop(self, ids: list[int], stop: Sequence[str]) -> list[int]:
        """The ids up to the token that completes the stop string: a batch may run a row past it."""
        for end in range(1, len(ids)):
            text = self._decode(ids[:end])
            if cut_at_stop(text, stop) != text:
                return ids[:end]
        return ids

    def _decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _max_positions(self) -> int | None:
        """Most positions, from the model's config; T5 has relative ones, so there its tokenizer says."""
        text_config = self.model.config.get_text_config()
        positions = getattr(text_config, "max_position_embeddings", None)
        if positions is None and self.tokenizer.model_max_length < 1_000_000:  # a huge number stands for none
            positions = self.tokenizer.model_max_length
        return positions


class _Sampler(LogitsProcessor):
    """Leaves one finite score in each row that samples: the drawn token's. Greedy rows stay as they are."""

    def __init__(self, batch: Sequence[Request], start: int) -> None:
        self._start = start
        self._sampled = [b for b, request in enumerate(batch) if request.sampling.temperature > 0]
        rows = [batch[b] for b in self._sampled]
        self._temperature_B = torch.tensor([row.sampling.temperature for row in rows])
        self._top_p_B = torch.tensor([row.sampling.top_p for row in rows])
        self._draws_BT = torch.zeros(len(rows), max((row.max_new_tokens for row in rows), default=0))
        for draws_T, row in zip(self._draws_BT, rows, strict=True):
            draws_T[: row.max_new_tokens] = torch.from_numpy(row.draws())

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> Any:
        step = input_ids.shape[1] - self._start
        if not self._sampled or step >= self._draws_BT.shape[1]:
            return scores
        device = scores.device
        logits_BV = scores[self._sampled].double() / self._temperature_B.to(device)[:, None]
        probs_BV, order_BV = logits_BV.softmax(-1).sort(dim=-1, descending=True, stable=True)
        before_BV = probs_BV.cumsum(-1) - probs_BV
        # Nucleus: the smallest set with mass top_p, always the best token (Holtzman et al. 2020, 1904.09751).
        probs_BV = probs_BV.where(before_BV < self._top_p_B.to(device)[:, None], 0.0)
        mass_BV = probs_BV.cumsum(-1)
        drawn_B = self._draws_BT[:, step].to(device).double() * mass_BV[:, -1]
        rank_B1 = (mass_BV <= drawn_B[:, None]).sum(-1, keepdim=True).clamp(max=probs_BV.shape[1] - 1)
        chosen = torch.full_like(scores[self._sampled], -torch.inf)
        chosen.scatter_(1, order_BV.gather(1, rank_B1), 0.0)
        scores[self._sampled] = chosen
        return scores


class _Stopper(StoppingCriteria):
    """Ends each row at its own `max_new_tokens` or stop string, or when its caller has left."""

    def __init__(self, batch: Sequence[Request], start: int, tokenizer: Any) -> None:
        self._batch = batch
        self._start = start
        self._tokenizer = tokenizer

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:
        num_new = input_ids.shape[1] - self._start
        done = [
            num_new >= request.max_new_tokens or request.cancelled.is_set() or self._has_stop(request, row)
            for request, row in zip(self._batch, input_ids, strict=True)
        ]
        return torch.tensor(done, device=input_ids.device)

    def _has_stop(self, request: Request, row: torch.Tensor) -> bool:
        if not request.sampling.stop:
            return False
        # A token is at least a byte and a character at most four, so a short tail can hold the string.
        tail = max(self._start, len(row) - 4 * max(map(len, request.sampling.stop)) - 4)
        text = self._tokenizer.decode(row[tail:], skip_special_tokens=True)
        return any(stop in text for stop in request.sampling.stop)


def _load(config: HfEngineConfig, path: str, is_seq2seq: bool, kwargs: dict[str, Any]) -> Any:
    transformers_logging.disable_progress_bar()  # a bar per engine actor is noise; downloads keep theirs
    auto = AutoModelForSeq2SeqLM if is_seq2seq else AutoModelForCausalLM
    kwargs = {**kwargs, "use_safetensors": True}  # other formats run code when they are read
    if config.num_gpus == 0:
        model = auto.from_pretrained(path, dtype=torch.float32, **kwargs)
    else:
        placement = "auto" if config.num_gpus > 1 else "cuda"
        model = auto.from_pretrained(path, dtype="auto", device_map=placement, **kwargs)
    if config.adapter is None:
        return model
    from peft import PeftModel  # heavy, and only for adapters

    return PeftModel.from_pretrained(model, resolve_adapter(config.adapter, key="teacher.adapter")).merge_and_unload()


def _id_list(ids: int | list[int] | None) -> set[int]:
    return set() if ids is None else {ids} if isinstance(ids, int) else set(ids)


def cut_at_stop(text: str, stop: Sequence[str]) -> str:
    """The text up to the first of the stop strings."""
    return text[: min((text.index(s) for s in stop if s in text), default=len(text))]


def has_gpu() -> bool:
    """Whether torch sees one."""
    return torch.cuda.is_available()
