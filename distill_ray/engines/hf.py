"""Plain transformers `generate`, on CPU or GPU: encoder-decoder models (T5), small models, no vLLM needed.

Requests that arrive within a few milliseconds are generated together, in a thread, up to `batch_size` rows at
a time; a batch returns when its longest row is done, so for volume use vLLM. Each row has its own
temperature, seed, `max_tokens` and stop strings: `_Sampler` draws per row by inverse transform from a stream
of numbers that depends only on (prompt, seed + sample index), so a sample does not depend on what else is in
its batch, up to rounding. After a stop string `token_ids` end with the token that completes it; no end token
is added.

The model's own generation defaults (top_k, repetition penalty, ...) are not used: the config says how to
sample. A model with a chat template gets token ids from `models.ChatTokenizer`; an encoder-decoder without
one gets the contents of the messages joined by blank lines. Either way, text that spells a control token
stays text.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import threading
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import (
    AsyncTextIteratorStreamer,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.utils import logging as transformers_logging

from distill_ray.config.engine import HfEngineConfig, SamplingConfig
from distill_ray.engines.base import Engine
from distill_ray.errors import ConfigError, RequestRejected, TransientEngineError
from distill_ray.models import ChatTokenizer, model_identity, resolve_model
from distill_ray.records import Completion, Message, RejectReason

# Shape suffixes: B rows of a batch, T positions, V vocabulary.

_COLLECT_S = 0.005  # how long the first request of a batch waits for others


@dataclass(slots=True, eq=False)
class _Request:
    """One row of a batch: one sample of one call."""

    prompt_ids: list[int]
    sampling: SamplingConfig
    sample_index: int
    max_new_tokens: int
    answer: asyncio.Future[Completion]
    cancelled: threading.Event = field(default_factory=threading.Event)

    def draws(self) -> np.ndarray:
        """Uniform numbers in [0, 1), one per new token; the prompt is mixed in, so rows are independent."""
        prompt = np.frombuffer(_hash_ids(self.prompt_ids), dtype=np.uint32)
        seed = (self.sampling.seed + self.sample_index, *prompt.tolist())
        return np.random.default_rng(seed).random(self.max_new_tokens, dtype=np.float32)


class HfEngine(Engine):
    """See the module docstring. One model per instance; `stream` gives one answer piece by piece."""

    def __init__(self, config: HfEngineConfig) -> None:
        self.config = config
        self.identity = f"hf:{model_identity(config.model, config.revision)}"
        if config.adapter:
            self.identity += f"+{model_identity(config.adapter)}"
        self._model: _Model | None = None
        self._queue: asyncio.Queue[_Request] = asyncio.Queue()
        self._batcher: asyncio.Task[None] | None = None
        self._open: set[_Request] = set()
        self._thread: ThreadPoolExecutor | None = None  # one thread: a model generates one batch at a time

    async def start(self) -> None:
        if self._model is not None:
            return
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="hf-engine")
        try:
            self._model = await self._in_thread(_Model, self.config)
        except BaseException:
            await self.close()
            raise
        self._batcher = asyncio.create_task(self._run_batches())

    async def generate(
        self, messages: Sequence[Message], sampling: SamplingConfig, *, first_sample: int = 0
    ) -> list[Completion]:
        requests = [self._request(messages, sampling, i) for i in range(first_sample, sampling.n)]
        self._open.update(requests)
        for request in requests:
            self._queue.put_nowait(request)
        try:
            samples = list(await asyncio.gather(*(request.answer for request in requests)))
        finally:
            self._open.difference_update(requests)
            for request in requests:  # stops those whose caller has left
                request.cancelled.set()
        for completion in samples[1:]:
            completion.prompt_tokens = 0  # counted once per call
        return samples

    async def stream(self, messages: Sequence[Message], sampling: SamplingConfig) -> AsyncIterator[str]:
        """One answer, piece by piece, in words; a stop string and what follows never appears."""
        request = self._request(messages, sampling.model_copy(update={"n": 1}), 0)
        request.answer.cancel()  # it is not for the batcher
        streamer = AsyncTextIteratorStreamer(
            self._ready.tokenizer, skip_prompt=not self._ready.is_seq2seq, skip_special_tokens=True
        )
        answer = asyncio.ensure_future(self._in_thread(self._ready.generate, [request], streamer))
        answer.add_done_callback(lambda _: streamer.text_queue.put_nowait(None))  # an error ends the stream too
        self._open.add(request)
        sent = text = ""
        held_back = max((len(stop) for stop in sampling.stop), default=1) - 1  # may begin a stop string
        try:
            while (piece := await streamer.text_queue.get()) is not None:
                text += piece
                safe = _cut_at_stop(text, sampling.stop)
                if safe == text:
                    safe = text[: len(text) - held_back]
                yield safe[len(sent) :]
                sent = max(sent, safe, key=len)
            [completion] = await answer
            yield completion.text[len(sent) :]
        finally:
            request.cancelled.set()
            self._open.discard(request)

    async def close(self) -> None:
        for request in self._open:
            request.cancelled.set()  # ends a running batch at its next token
            if not request.answer.done():
                request.answer.set_exception(TransientEngineError("the hf engine was closed"))
        batcher, self._batcher = self._batcher, None
        if batcher is not None:
            batcher.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await batcher
        thread, self._thread = self._thread, None
        if thread is not None:
            await asyncio.to_thread(thread.shutdown)
        self._model = None

    def prompt_key(self, messages: Sequence[Message]) -> bytes:
        return _hash_ids(self._ready.prompt_ids(messages))

    @property
    def _ready(self) -> _Model:
        assert self._model is not None, "start() first"
        return self._model

    async def _in_thread(self, function: Any, *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, functools.partial(function, *args))

    def _request(self, messages: Sequence[Message], sampling: SamplingConfig, index: int) -> _Request:
        """Check and tokenise.

        Raises:
            RequestRejected: too long, or asks for what this engine cannot do.
        """
        if sampling.top_logprobs or sampling.structured:
            raise RequestRejected(
                RejectReason.BAD_REQUEST,
                "the hf engine has neither top_logprobs nor structured output; use vllm",
            )
        prompt_ids = self._ready.prompt_ids(messages)
        room = self._ready.room(len(prompt_ids))
        if room < 1:
            raise RequestRejected(
                RejectReason.PROMPT_TOO_LONG,
                f"the prompt has {len(prompt_ids)} tokens and {self.config.model} takes "
                f"{self._ready.max_positions}" + ("" if self._ready.is_seq2seq else " with the answer"),
            )
        answer = asyncio.get_running_loop().create_future()
        return _Request(prompt_ids, sampling, index, min(sampling.max_tokens, room), answer)

    async def _run_batches(self) -> None:
        while True:
            batch = [await self._queue.get()]
            await asyncio.sleep(_COLLECT_S)
            while len(batch) < self.config.batch_size and not self._queue.empty():
                batch.append(self._queue.get_nowait())
            batch = [request for request in batch if not request.answer.done()]  # done: its caller has left
            if not batch:
                continue
            try:
                completions = await self._in_thread(self._ready.generate, batch)
            except Exception as error:  # each caller gets it; the engine goes on
                for request in batch:
                    if not request.answer.done():
                        request.answer.set_exception(error)
                continue
            for request, completion in zip(batch, completions, strict=True):
                if not request.answer.done():
                    request.answer.set_result(completion)


class _Model:
    """Weights and tokenizer, loaded. Everything here runs in the engine's thread, save tokenisation."""

    def __init__(self, config: HfEngineConfig) -> None:
        path = resolve_model(config.model, key="teacher.model")
        kwargs = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
        try:
            self.is_seq2seq = bool(AutoConfig.from_pretrained(path, **kwargs).is_encoder_decoder)
            self.model: Any = _load(config, path, self.is_seq2seq, kwargs).eval()
        except (OSError, ValueError) as error:
            first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
            what = config.model + (f" with the adapters {config.adapter}" if config.adapter else "")
            raise ConfigError(f"teacher.model: cannot load {what} ({first_line})") from error
        self.prompts = _prompt_maker(config, path, self.is_seq2seq)
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
        return self.prompts.prompt_ids(messages)

    def room(self, prompt_tokens: int) -> int:
        """How many new tokens fit; an encoder-decoder's answer has positions of its own."""
        if self.max_positions is None:
            return 1 << 30
        if self.is_seq2seq:
            return self.max_positions if prompt_tokens <= self.max_positions else 0
        return self.max_positions - prompt_tokens

    def generate(self, batch: Sequence[_Request], streamer: Any = None) -> list[Completion]:
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
            raise TransientEngineError(f"generate failed ({str(error).splitlines()[0]})") from error
        else:
            return [self._completion(request, ids) for request, ids in zip(batch, new_ids, strict=True)]
        torch.cuda.empty_cache()
        middle = len(batch) // 2
        return self.generate(batch[:middle]) + self.generate(batch[middle:])

    @torch.inference_mode()
    def _generate_ids(self, batch: Sequence[_Request], streamer: Any) -> list[list[int]]:
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

    def _completion(self, request: _Request, new_ids: list[int]) -> Completion:
        """Cut the row at its end: an end token, a stop string or its own `max_new_tokens`."""
        ids = new_ids[: request.max_new_tokens]
        end = next((t for t, token in enumerate(ids) if token in self.end_ids), None)
        finish_reason = "length" if end is None else "stop"
        ids = ids if end is None else ids[: end + 1]
        text = self._decode(ids)
        if _cut_at_stop(text, request.sampling.stop) != text:
            text, finish_reason = _cut_at_stop(text, request.sampling.stop), "stop"
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
            if _cut_at_stop(text, stop) != text:
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

    def __init__(self, batch: Sequence[_Request], start: int) -> None:
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

    def __init__(self, batch: Sequence[_Request], start: int, tokenizer: Any) -> None:
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

    def _has_stop(self, request: _Request, row: torch.Tensor) -> bool:
        if not request.sampling.stop:
            return False
        # A token is at least a byte and a character at most four, so a short tail can hold the string.
        tail = max(self._start, len(row) - 4 * max(map(len, request.sampling.stop)) - 4)
        text = self._tokenizer.decode(row[tail:], skip_special_tokens=True)
        return any(stop in text for stop in request.sampling.stop)


class _PlainPrompts:
    """Prompts for an encoder-decoder without a chat template: the contents, joined by blank lines."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.end_id: int = tokenizer.eos_token_id

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        text = "\n\n".join(message["content"] for message in messages)
        ids = self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        around = self.tokenizer.encode("")  # what the tokenizer puts around a text: T5 an end, BART both
        ends = around[-1:] if around and around[-1] == self.end_id else []
        return around[: len(around) - len(ends)] + ids + ends


def _load(config: HfEngineConfig, path: str, is_seq2seq: bool, kwargs: dict[str, Any]) -> Any:
    transformers_logging.disable_progress_bar()  # a bar per engine actor is noise; downloads keep theirs
    auto = AutoModelForSeq2SeqLM if is_seq2seq else AutoModelForCausalLM
    if config.num_gpus == 0:
        model = auto.from_pretrained(path, dtype=torch.float32, **kwargs)
    else:
        placement = "auto" if config.num_gpus > 1 else "cuda"
        model = auto.from_pretrained(path, dtype="auto", device_map=placement, **kwargs)
    if config.adapter is None:
        return model
    from peft import PeftModel  # heavy, and only for adapters

    return PeftModel.from_pretrained(model, config.adapter).merge_and_unload()


def _prompt_maker(config: HfEngineConfig, path: str, is_seq2seq: bool) -> ChatTokenizer | _PlainPrompts:
    if is_seq2seq and config.chat_template is None:
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                path, revision=config.revision, trust_remote_code=config.trust_remote_code
            )
        except (OSError, ValueError) as error:
            raise ConfigError(f"teacher.model: cannot load a tokenizer from {config.model}") from error
        if not tokenizer.chat_template:
            return _PlainPrompts(tokenizer)
    return ChatTokenizer(
        config.model,
        revision=config.revision,
        chat_template=config.chat_template,
        chat_template_kwargs=config.chat_template_kwargs,
        trust_remote_code=config.trust_remote_code,
        key="teacher.model",
    )


def _id_list(ids: int | list[int] | None) -> set[int]:
    return set() if ids is None else {ids} if isinstance(ids, int) else set(ids)


def _hash_ids(ids: Sequence[int]) -> bytes:
    return hashlib.blake2b(np.asarray(ids, dtype=np.int32).tobytes(), digest_size=16).digest()


def _cut_at_stop(text: str, stop: Sequence[str]) -> str:
    return text[: min((text.index(s) for s in stop if s in text), default=len(text))]
