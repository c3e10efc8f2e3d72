"""What turns the text of a request into a vector, alone or together with those of other requests.

    load_embedder   a model on its fastest runtime: onnxruntime where that gives the same vectors, else torch
    BatchedEmbedder one text per request in, batches to the runtime

The ONNX form is made once per machine (embedder_onnx.py) and compared with sentence-transformers before it is used. A
process that finds it made imports no torch.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import shutil
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from distill_ray.config.serve import EmbedderConfig
from distill_ray.errors import EmbedderError
from distill_ray.serving.routing.embedder_model import ModelFiles, find_model
from distill_ray.serving.routing.embedder_onnx import OnnxEmbedder, cache_folder, made_once, quantise

log = logging.getLogger(__name__)

SAME_FROM = 0.999  # cosine of two runtimes' vectors of one text
NEAR_FROM = 0.95  # of its vectors in float32 and int8
# Short, long, other scripts, and all in one batch, so that padding counts.
COMPARED = (
    "Hello",
    "Please enable two-factor authentication for my account, and tell me how to undo it.",
    "user: What is 12.5% of 80?\nassistant: 10\nuser: And of 160?",
    "¿Dónde está la biblioteca? 図書館はどこですか。 أين المكتبة؟",
    "The quick brown fox jumps over the lazy dog. " * 12,
)


class Embedder(Protocol):
    """Texts to vectors of unit length. Any number of threads may call."""

    identity: str
    """Model, hash of its files, and limit; not the runtime. Vectors of different identities never meet."""

    dim: int
    max_tokens: int

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """[N, D] float32. Raises TextTooLong: a text has more than max_tokens; EmbedderError: no vector."""
        ...

    def count_tokens(self, text: str) -> int:
        """Tokens of a text; of one that is far too long, some number over max_tokens."""
        ...


def load_embedder(config: EmbedderConfig) -> Embedder:
    """Load the embedder that a config names. The first time on a machine takes half a minute, then under a second.

    Raises:
        EmbedderError: no such model; or `runtime: onnx` or `precision: int8` and the model cannot be used so.
    """
    model = find_model(config)
    if config.runtime != "torch":
        try:
            folder = made_once(cache_folder(model), lambda new: _make_onnx(model, new))
            if config.precision == "int8":
                exact = folder
                folder = made_once(cache_folder(model, "int8"), lambda new: _make_int8(model, exact, new))
            return OnnxEmbedder(
                model, folder, batch_size=config.batch_size, threads=config.threads, precision=config.precision
            )
        except EmbedderError as error:
            if config.runtime == "onnx" or config.precision != "float32":
                raise
            log.warning("embedder on torch, which is slower, because: %s", error)
    from distill_ray.serving.routing.embedder_torch import TorchEmbedder  # torch takes seconds to import

    return TorchEmbedder(model, batch_size=config.batch_size, threads=config.threads)


def _make_onnx(model: ModelFiles, folder: Path) -> None:
    from distill_ray.serving.routing.embedder_torch import TorchEmbedder

    original = TorchEmbedder(model, batch_size=len(COMPARED))
    original.export(folder)
    exported = OnnxEmbedder(model, folder, batch_size=len(COMPARED), threads=1)
    texts = [text for text in COMPARED if original.count_tokens(text) <= original.max_tokens]
    if [exported.count_tokens(text) for text in texts] != [original.count_tokens(text) for text in texts]:
        raise EmbedderError(f"{model.name}: its ONNX form counts tokens differently")
    _compare(original, exported, texts, SAME_FROM)


def _make_int8(model: ModelFiles, exact: Path, folder: Path) -> None:
    shutil.copytree(exact, folder, dirs_exist_ok=True)
    quantise(folder)
    original = OnnxEmbedder(model, exact, batch_size=len(COMPARED), threads=1)
    quantised = OnnxEmbedder(model, folder, batch_size=1, threads=1, precision="int8")
    texts = [text for text in COMPARED if original.count_tokens(text) <= original.max_tokens]
    _compare(original, quantised, texts, NEAR_FROM)


def _compare(original: Embedder, other: Embedder, texts: Sequence[str], least: float) -> None:
    cosines = (original.embed(texts) * other.embed(texts)).sum(axis=1)
    if not cosines.min() >= least:
        raise EmbedderError(f"{other.identity}: its ONNX form gives other vectors (cosine {cosines.min():.4f})")


class _Waiting(NamedTuple):
    text: str
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[np.ndarray]


class BatchedEmbedder:
    """Embeds what concurrent requests ask for together: a batch is what came in while the last one was at work.

    So nobody waits for company. One thread works for all event loops.

    Args:
        embedder: who does it.
        batch_size: texts embedded together at most.
        max_waiting: requests that wait for their turn at most.
    """

    def __init__(self, embedder: Embedder, *, batch_size: int = 64, max_waiting: int = 1024) -> None:
        self._embedder = embedder
        self._batch_size = batch_size
        self._waiting: queue.Queue[_Waiting | None] = queue.Queue(max_waiting)
        self._thread = threading.Thread(target=self._work, name="embedder", daemon=True)
        self._thread.start()

    async def embed(self, text: str) -> np.ndarray:
        """The vector of a text. [D] float32, unit length.

        Raises:
            TextTooLong: it has more than max_tokens.
            EmbedderError: too many wait already; or the embedder failed on this text.
        """
        loop = asyncio.get_running_loop()
        waiting = _Waiting(text, loop, loop.create_future())
        try:
            self._waiting.put_nowait(waiting)
        except queue.Full:
            raise EmbedderError(f"{self._waiting.maxsize} requests wait for the embedder already") from None
        return await waiting.future

    def close(self) -> None:
        """End the thread when all that wait now have their answers."""
        self._waiting.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (first := self._waiting.get()) is not None:
            batch: list[_Waiting] = [first]
            is_last = False
            with contextlib.suppress(queue.Empty):
                while len(batch) < self._batch_size and not is_last:
                    following = self._waiting.get_nowait()
                    is_last = following is None
                    batch += [following] if following else []
            batch = [waiting for waiting in batch if not waiting.future.cancelled()]  # its client has gone
            for waiting, answer in zip(batch, self._answers([waiting.text for waiting in batch]), strict=True):
                with contextlib.suppress(RuntimeError):  # its event loop has ended
                    waiting.loop.call_soon_threadsafe(_settle, waiting.future, answer)
            if is_last:
                return

    def _answers(self, texts: Sequence[str]) -> list[np.ndarray | EmbedderError]:
        """A vector or an error for each: one bad text takes no other with it, nor makes all others go one by one."""
        try:
            return list(self._embedder.embed(texts))
        except Exception as error:
            if len(texts) > 1:
                half = len(texts) // 2
                return self._answers(texts[:half]) + self._answers(texts[half:])
            if isinstance(error, EmbedderError):
                return [error]
            return [EmbedderError(f"the embedder failed: {type(error).__name__}")]


def _settle(future: asyncio.Future[np.ndarray], answer: np.ndarray | EmbedderError) -> None:
    if future.done():
        return
    if isinstance(answer, EmbedderError):
        future.set_exception(answer)
    else:
        future.set_result(answer)
