"""Plain transformers `generate`, on CPU or GPU: encoder-decoder models (T5), small models, no vLLM needed.

A request's way: check and tokenise -> queue -> batch -> `hf_model.HfModel.generate`, in a thread -> its caller.
Requests that arrive within a few milliseconds are generated together, up to `batch_size` rows at a time, each with
its own temperature, seed, `max_tokens` and stop strings; a batch returns when its longest row is done, so for volume
use vLLM. How a row is sampled and where it ends: `hf_model`.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from transformers import AsyncTextIteratorStreamer

from distill_ray.config.engine import HfEngineConfig, SamplingConfig
from distill_ray.engines.base import Engine, hash_ids
from distill_ray.engines.hf_model import HfModel, Request, cut_at_stop
from distill_ray.errors import RequestRejected, TransientEngineError
from distill_ray.models import Prompts, model_identity, prompts_of
from distill_ray.records import Completion, Message, RejectReason

_COLLECT_S = 0.005  # how long the first request of a batch waits for others


class HfEngine(Engine):
    """See the module docstring. One model per instance; `stream` gives one answer piece by piece."""

    def __init__(self, config: HfEngineConfig) -> None:
        self.config = config
        self.identity = f"hf:{model_identity(config.model, config.revision)}"
        if config.adapter:
            self.identity += f"+{model_identity(config.adapter)}"
        self._model: HfModel | None = None
        self._queue: asyncio.Queue[Request] = asyncio.Queue()
        self._batcher: asyncio.Task[None] | None = None
        self._open: set[Request] = set()
        self._thread: ThreadPoolExecutor | None = None  # one thread: a model generates one batch at a time

    async def start(self) -> None:
        """Load the model, in the thread that will run it."""
        if self._model is not None:
            return
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="hf-engine")
        try:
            self._model = await self._in_thread(HfModel, self.config, self._prompts)
        except BaseException:
            await self.close()
            raise
        self._batcher = asyncio.create_task(self._run_batches())

    async def generate(
        self, messages: Sequence[Message], sampling: SamplingConfig, *, first_sample: int = 0
    ) -> list[Completion]:
        """Queue one row per sample; rows of other calls may share their batch."""
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
                safe = cut_at_stop(text, sampling.stop)
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
        """End the requests that wait or run with a `TransientEngineError`, then free the model."""
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
        """Hash of the prompt's token ids."""
        return hash_ids(self._prompts.prompt_ids(messages))

    @functools.cached_property
    def _prompts(self) -> Prompts:
        """There before the model is: calls that are in the ledger need no model, only their prompt's key."""
        return prompts_of(self.config, key="teacher.model")

    @property
    def _ready(self) -> HfModel:
        assert self._model is not None, "start() first"
        return self._model

    async def _in_thread(self, function: Any, *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, functools.partial(function, *args))

    def _request(self, messages: Sequence[Message], sampling: SamplingConfig, index: int) -> Request:
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
        return Request(prompt_ids, sampling, index, min(sampling.max_tokens, room), answer)

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
