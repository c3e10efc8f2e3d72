"""Folders that look like large models: a config.json with their sizes, the demo's tokenizer, no weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from distill_ray.models import DEMO_MODEL_PATH

# https://huggingface.co/Qwen/Qwen2.5-7B-Instruct/blob/main/config.json
QWEN_7B: dict[str, Any] = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "dtype": "bfloat16",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 152064,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": False,
}
# https://huggingface.co/Qwen/Qwen3-30B-A3B/blob/main/config.json
QWEN_30B_A3B: dict[str, Any] = QWEN_7B | {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "vocab_size": 151936,
}


def make_folder(folder: Path, config: dict[str, Any], *, stored_bytes: int | None = None) -> Path:
    """Write one; with `stored_bytes`, as the index of its weights says."""
    shutil.copytree(DEMO_MODEL_PATH, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    demo = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(demo | config))
    if stored_bytes is not None:
        index = {"metadata": {"total_size": stored_bytes}, "weight_map": {}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder
