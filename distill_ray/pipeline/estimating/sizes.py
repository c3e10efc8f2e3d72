"""What a model weighs: its parameters, its key-value cache and its shape, from config.json and the weights' index."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill_ray.config import LoraConfig
from distill_ray.errors import ConfigError
from distill_ray.model_files import in_store, sizes
from distill_ray.models import load_model_config, resolve_model
from distill_ray.student.size import ParameterCount, count_parameters

INDEX = "model.safetensors.index.json"
DTYPE_BYTES = {"float32": 4, "float": 4, "bfloat16": 2, "float16": 2, "half": 2}
QUANTISED_BITS = {"fp8": 8, "mxfp4": 4, "awq": 4, "gptq": 4, "bitsandbytes": 4, "bitsandbytes_4bit": 4}
CHANGED_LOGITS = ("final_logit_softcapping", "logits_scaling")  # something stands behind the head


@dataclass(frozen=True, slots=True)
class ModelSize:
    """A model in numbers."""

    name: str
    parameters: int
    active_parameters: int
    """That one token uses: all, but for a mixture of experts."""

    adapter_parameters: int
    weight_bytes: float
    """Of the weights as they are stored, where they are quantised; else 0."""

    dtype_bytes: int
    """Of a parameter, as the config says."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    latent: int
    """Values per token and layer where keys and values are compressed into one vector (DeepSeek's MLA); else 0."""

    hidden: int
    intermediate: int
    """Width of the feed-forward layer: of a mixture, of all experts that a token uses."""

    vocabulary: int
    positions: int
    """Longest sequence."""

    head_is_separable: bool
    """Whether training computes logits for completion tokens only (see `student.module`)."""

    @property
    def is_quantised(self) -> bool:
        """Whether the weights are stored with fewer bits than they are computed with."""
        return self.weight_bytes > 0


def model_size(section: Any, *, key: str, lora: LoraConfig | None = None) -> ModelSize:
    """The size of the model that a section of the config (`model`, `revision`, `trust_remote_code`) names.

    Args:
        section: `teacher:`, `student:`, ...
        key: dotted key of its model, for messages.
        lora: adapters to count.

    Raises:
        ConfigError: there is no such model, or nothing says how large it is.
    """
    config = load_model_config(section, key=key)
    text = config.get_text_config()
    dtype_bytes = DTYPE_BYTES.get(str(config.dtype or "float32").removeprefix("torch."), 2)
    quantisation = getattr(config, "quantization_config", None)
    count = _counted(section, config, lora, dtype_bytes, key)
    per_token = getattr(text, "num_experts_per_tok", None) or 1
    share = per_token / _first(text, "num_experts", "num_local_experts", "n_routed_experts", default=per_token)
    heads = _first(text, "num_attention_heads", "num_heads")
    hidden = _first(text, "hidden_size", "d_model")
    intermediate = _first(text, "intermediate_size", "d_ff", "ffn_dim", "decoder_ffn_dim", default=4 * hidden)
    is_mixture = count.experts > 0
    return ModelSize(
        name=section.model,
        parameters=count.total,
        active_parameters=round(count.total - count.experts * (1 - share)),
        adapter_parameters=count.adapters,
        weight_bytes=_quantised_bytes(section, quantisation, count.total, key) if quantisation else 0.0,
        dtype_bytes=dtype_bytes,
        num_layers=_first(text, "num_hidden_layers", "num_layers"),
        num_heads=heads,
        num_kv_heads=_first(text, "num_key_value_heads", default=heads),
        head_dim=_first(text, "head_dim", "d_kv", default=hidden // heads),
        latent=text.kv_lora_rank + text.qk_rope_head_dim if getattr(text, "kv_lora_rank", None) else 0,
        hidden=hidden,
        intermediate=_first(text, "moe_intermediate_size", default=intermediate) * per_token
        if is_mixture
        else intermediate,
        vocabulary=text.vocab_size,
        positions=_first(text, "max_position_embeddings", "n_positions", default=32768),
        head_is_separable=not (config.is_encoder_decoder or any(getattr(text, name, None) for name in CHANGED_LOGITS)),
    )


def _first(config: Any, *names: str, default: int | None = None) -> int:
    """The first of these settings that a model's config has: families name them differently."""
    found = next((value for name in names if (value := getattr(config, name, None)) is not None), default)
    if found is None:
        raise ConfigError(f"the config.json of this model ({config.model_type}) has none of {', '.join(names)}")
    return int(found)


def _counted(section: Any, config: Any, lora: LoraConfig | None, dtype_bytes: int, key: str) -> ParameterCount:
    """Exact where transformers knows the architecture, else from the size of the weights."""
    try:
        return count_parameters(config, lora)
    except (ValueError, ImportError, AttributeError) as error:
        stored = _stored_bytes(section, key)
        if stored is None:
            raise ConfigError(
                f"{key}: nothing says how large {section.model} is: transformers does not know its architecture, and "
                f"it has no {INDEX}; download it, and give its folder"
            ) from error
        return ParameterCount(stored // dtype_bytes, 0, 0)


def _quantised_bytes(section: Any, quantisation: Any, parameters: int, key: str) -> float:
    stored = _stored_bytes(section, key)
    if stored is not None:
        return float(stored)
    settings = quantisation if isinstance(quantisation, dict) else quantisation.to_dict()
    bits = settings.get("bits") or QUANTISED_BITS.get(str(settings.get("quant_method")), 8)
    return parameters * bits / 8


def _stored_bytes(section: Any, key: str) -> int | None:
    """Of all weights: what their index says, else the sizes of the files; None where only a name is there."""
    if in_store(section.model):
        found = sizes(section.model, key=key)
        return sum(size for name, size in found.items() if name.endswith(".safetensors")) or None
    folder = Path(resolve_model(section.model, key=key))
    if folder.is_dir():
        index: Path | None = folder / INDEX
    else:
        from transformers.utils.hub import cached_file  # a small file, from the hub or its cache

        found = cached_file(
            section.model,
            INDEX,
            revision=section.revision,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        index = Path(found) if isinstance(found, str) else None
    if index is not None and index.is_file():
        total = json.loads(index.read_text(encoding="utf-8")).get("metadata", {}).get("total_size")
        if total:
            return int(total)
    return sum(file.stat().st_size for file in folder.glob("*.safetensors")) or None
