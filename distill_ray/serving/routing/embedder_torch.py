"""The embedder on sentence-transformers: for models that have no ONNX form, and to make and check that form."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import tokenizers
import torch
from sentence_transformers import SentenceTransformer

from distill_ray.errors import EmbedderError
from distill_ray.serving.routing.embedder_model import ModelFiles, TextEmbedder
from distill_ray.serving.routing.embedder_onnx import INPUTS, OUTPUT

OPSET = 23  # the first in which attention is one operator: a quarter less time for long texts


class TorchEmbedder(TextEmbedder):
    """A model in sentence-transformers, on the CPU.

    Raises:
        EmbedderError: sentence-transformers cannot load it (it would run the model's own code, a file is damaged).
    """

    def __init__(self, model: ModelFiles, *, batch_size: int, threads: int | None = None) -> None:
        if threads is not None:
            torch.set_num_threads(threads)  # of the whole process
        try:
            self._model = SentenceTransformer(
                str(model.folder), device="cpu", model_kwargs={"use_safetensors": True}, local_files_only=True
            ).eval()
            dim = len(self._model.encode("x", show_progress_bar=False))
        except Exception as error:  # whatever a damaged file makes the libraries raise
            raise EmbedderError(f"{model.folder}: sentence-transformers cannot load it ({error})") from error
        max_tokens = int(self._model.max_seq_length or 512)
        super().__init__(model, dim=dim, max_tokens=max_tokens, batch_size=batch_size)

    @property
    def _prompt(self) -> str:
        return self._model.prompts.get(self._model.default_prompt_name or "") or ""

    def _count(self, text: str) -> int:
        return len(self._model.tokenizer(self._prompt + text, truncation=False, verbose=False)["input_ids"])

    def _run(self, texts: Sequence[str]) -> np.ndarray:
        return self._model.encode(list(texts), batch_size=len(texts), show_progress_bar=False, convert_to_numpy=True)

    def export(self, folder: Path) -> None:
        """Write the model, all its modules in a row, as ONNX: `OnnxEmbedder` reads the folder.

        Raises:
            EmbedderError: this model cannot be exported.
        """
        fast = getattr(self._model.tokenizer, "backend_tokenizer", None)
        features = self._model.preprocess(["as an example", "two texts of other lengths"])
        inputs = {name: value for name, value in features.items() if isinstance(value, torch.Tensor)}
        if fast is None or not set(inputs) <= set(INPUTS):
            raise EmbedderError(f"{self.identity}: no ONNX form (its inputs are {', '.join(inputs)})")
        try:
            _export(_Vectors(self._model, list(inputs)).eval(), inputs, folder / "model.onnx")
        except OSError:  # the disk's fault, not the model's
            raise
        except Exception as error:  # the exporter raises whatever the model's code raises under it
            raise EmbedderError(f"{self.identity}: no ONNX form ({type(error).__name__})") from error
        tokenizer = tokenizers.Tokenizer.from_str(fast.to_str())
        tokenizer.no_truncation()  # longer text is refused, never cut
        tokenizer.enable_padding(**{**(fast.padding or {}), "length": None})
        tokenizer.save(str(folder / "tokenizer.json"))
        about = {"dim": self.dim, "max_tokens": self.max_tokens, "prompt": self._prompt}
        (folder / "embedder.json").write_text(json.dumps(about), encoding="utf-8")


class _Vectors(torch.nn.Module):
    """All modules of a sentence-transformers model, from tensors to vectors."""

    def __init__(self, model: SentenceTransformer, names: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self.names = names

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        """[N, T] each -> [N, D]."""
        return self.model(dict(zip(self.names, tensors, strict=True)))["sentence_embedding"]


def _export(model: _Vectors, inputs: Mapping[str, torch.Tensor], path: Path) -> None:
    axes = {0: torch.export.Dim("texts"), 1: torch.export.Dim("tokens")}
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)  # it tells of each package that is not there
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                model,
                tuple(inputs.values()),
                path,
                input_names=list(inputs),
                output_names=[OUTPUT],
                dynamic_shapes=(tuple(axes for _ in inputs),),
                opset_version=OPSET,
                dynamo=True,
                external_data=False,
                verbose=False,
            )
    finally:
        log.setLevel(level)
