"""How many parameters a model has, from its config alone: the model is built without memory (torch's meta device)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from distill_ray.config.train import LoraConfig


@dataclass(frozen=True, slots=True)
class ParameterCount:
    """Parameters of a model. Of tied embeddings the weights count once."""

    total: int
    experts: int
    """Those of a mixture's experts, of which a token uses some."""

    adapters: int
    """Of the LoRA adapters that were asked for."""


def count_parameters(model_config: Any, lora: LoraConfig | None = None) -> ParameterCount:
    """Count, without weights.

    Args:
        model_config: a transformers config.
        lora: adapters of rank r add r x (inputs + outputs) parameters to a linear layer (Hu et al. 2021,
            arXiv 2106.09685, section 4.1).

    Raises:
        ValueError: transformers has no such model.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    auto = AutoModelForSeq2SeqLM if model_config.is_encoder_decoder else AutoModelForCausalLM
    with torch.device("meta"):
        model: Any = auto.from_config(model_config)
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    return ParameterCount(sum(p.numel() for p in model.parameters()), experts, _adapters(model, lora))


def _adapters(model: Any, lora: LoraConfig | None) -> int:
    if lora is None:
        return 0
    head = model.get_output_embeddings()
    layers = [
        (name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head
    ]
    if lora.target_modules != "all-linear":
        layers = [(name, module) for name, module in layers if name.rpartition(".")[2] in lora.target_modules]
    return sum(lora.rank * (module.in_features + module.out_features) for _, module in layers)
