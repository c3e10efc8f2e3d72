"""The embedder on onnxruntime, and the cache of the models made for it. Never imports torch.

    $DISTILL_RAY_CACHE or ~/.cache/distill-ray /onnx/DIGEST/   model.onnx  tokenizer.json  embedder.json
                                                 or refused.txt: why this model cannot be used so

A folder appears whole or not at all, made by one process while others wait for it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import numpy as np
import onnxruntime
import tokenizers

from distill_ray.errors import EmbedderError
from distill_ray.node_cache import cache_root, filled_once
from distill_ray.serving.routing.embedder_model import ModelFiles, TextEmbedder

Precision = Literal["float32", "int8"]
FORMAT = 2  # of the folder; another one is made anew
INPUTS = ("input_ids", "attention_mask", "token_type_ids")  # those that a tokenizer can fill
OUTPUT = "sentence_vector"


class OnnxEmbedder(TextEmbedder):
    """A model as `embedder_torch.TorchEmbedder.export` writes it, or `quantise` after it.

    Raises:
        EmbedderError: a file is missing or damaged.
    """

    def __init__(
        self, model: ModelFiles, folder: Path, *, batch_size: int, threads: int, precision: Precision = "float32"
    ) -> None:
        if precision == "int8":  # one scale for all texts of a run: a vector would depend on who asks at the same time
            batch_size = 1
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # the models next door need the cores
        try:
            about = json.loads((folder / "embedder.json").read_bytes())
            self._tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
            providers = ["CPUExecutionProvider"]
            self._session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=providers)
            self._inputs = [tensor.name for tensor in self._session.get_inputs()]
            self._prompt = str(about["prompt"])
            super().__init__(
                model,
                dim=about["dim"],
                max_tokens=about["max_tokens"],
                batch_size=batch_size,
                form="" if precision == "float32" else f"/{precision}",
            )
        except Exception as error:  # neither library has a base class for its errors
            raise EmbedderError(f"{folder}: cannot load the embedder ({error}); delete this folder") from error

    def _count(self, text: str) -> int:
        return len(self._tokenizer.encode(self._prompt + text).ids)

    def _run(self, texts: Sequence[str]) -> np.ndarray:
        encodings = self._tokenizer.encode_batch([self._prompt + text for text in texts])  # padded to the longest
        rows = [(encoding.ids, encoding.attention_mask, encoding.type_ids) for encoding in encodings]
        columns = dict(zip(INPUTS, np.array(rows, dtype=np.int64).transpose(1, 0, 2), strict=True))
        feed = {name: columns[name] for name in self._inputs}
        return np.asarray(self._session.run([OUTPUT], feed)[0])


def quantise(folder: Path) -> None:
    """`model.onnx` in int8, in its place: weights per channel once, activations as each text needs."""
    from onnxruntime.quantization import QuantType, quant_pre_process, quantize_dynamic

    model, prepared = folder / "model.onnx", folder / "prepared.onnx"
    quant_pre_process(model, prepared, skip_symbolic_shape=True)
    quantize_dynamic(prepared, model, ["MatMul"], per_channel=True, weight_type=QuantType.QInt8)
    prepared.unlink()


def cache_folder(model: ModelFiles, precision: Precision = "float32") -> Path:
    """Where a model's ONNX form is, or will be. Another torch may export what this one cannot."""
    form = "" if precision == "float32" else f"-{precision}"
    return cache_root() / "onnx" / f"{model.digest}-{FORMAT}-torch{version('torch')}{form}"


def made_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """The folder, filled by `make` if no process has done so yet. That `make` cannot do it is remembered too.

    Raises:
        EmbedderError: `make` raised it, now or before; or the cache cannot be written.
    """
    try:
        filled_once(folder, lambda unfinished: _fill(unfinished, make))
        refused = folder / "refused.txt"
        if refused.exists():
            raise EmbedderError(refused.read_text(encoding="utf-8"))
    except OSError as error:
        raise EmbedderError(
            f"{folder}: cannot make this folder ({error.strerror or error}); set DISTILL_RAY_CACHE to one that you may "
            "write to"
        ) from error
    return folder


def _fill(folder: Path, make: Callable[[Path], None]) -> None:
    try:
        make(folder)
    except EmbedderError as error:
        shutil.rmtree(folder)
        folder.mkdir()
        (folder / "refused.txt").write_text(str(error), encoding="utf-8")
