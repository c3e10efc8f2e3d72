"""Weights to folders that plain `transformers` and `vllm serve` load. safetensors, never pickles.

full       model.safetensors, config.json, generation_config.json, tokenizer, chat template
LoRA       adapter_model.safetensors, adapter_config.json (names the base model), tokenizer, chat template
merged     as full, with the adapter in adapter/
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distill_ray.config.train import StudentConfig
from distill_ray.model_files import in_store
from distill_ray.models import Prompts, resolve_model


def gather_weights(module: nn.Module, *, keep: bool, trainable_only: bool) -> dict[str, Tensor]:
    """Copies of a module's weights on the CPU, whole even where ZeRO-3 has sharded them.

    Every worker has to call it (gathering is a collective); only one needs the result.

    Args:
        module: a Hugging Face model inside a DeepSpeed engine or not.
        keep: whether this worker wants the result; others get {}.
        trainable_only: adapters only.
    """
    weights: dict[str, Tensor] = {}
    persistent = module.state_dict().keys()
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if trainable_only and not parameter.requires_grad:
            continue
        if hasattr(parameter, "ds_id"):
            import deepspeed  # not needed, and slow to import, where nothing is sharded

            with deepspeed.zero.GatheredParameters([parameter]):
                if keep:
                    weights[name] = parameter.detach().cpu().clone()
        elif keep:
            weights[name] = parameter.detach().cpu().clone()
    if keep and not trainable_only:
        weights |= {name: b.detach().cpu().clone() for name, b in module.named_buffers() if name in persistent}
    return weights


def save_model(model: Any, weights: dict[str, Tensor], folder: Path, *, base: str) -> None:
    """Write weights (see `gather_weights`) and config. With adapters: the adapters only, naming their `base`."""
    model.config.use_cache = True  # off while training
    if hasattr(model, "peft_config"):
        model.peft_config["default"].base_model_name_or_path = base
    try:
        model.save_pretrained(folder, state_dict=weights)
    finally:
        model.config.use_cache = False
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty model card


def save_tokenizer(prompts: Prompts, folder: Path) -> None:
    """Write the tokenizer with its chat template."""
    prompts.tokenizer.save_pretrained(folder)


def merge_adapter(config: StudentConfig, adapter: Path, folder: Path) -> None:
    """Write the base model with the adapter's product added to its weights, in the base model's own precision."""
    from peft import PeftModel

    from distill_ray.student.load import load_model_config, load_student

    dtype = load_model_config(config).dtype or torch.float32
    base = load_student(config.model_copy(update={"lora": None, "adapter": None}), dtype=dtype, seed=0)
    merged: Any = PeftModel.from_pretrained(base, str(adapter)).merge_and_unload()
    merged.config.use_cache = True
    merged.save_pretrained(folder)


def base_model_name(config: StudentConfig) -> str:
    """What an adapter's config names as its base: a folder's absolute path, its URL or the hub id."""
    if in_store(config.model):
        return config.model
    path = resolve_model(config.model, key="student.model")
    return str(Path(path).resolve()) if Path(path).is_dir() else path
