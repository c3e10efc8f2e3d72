"""Load the student: causal or seq2seq by its config, all weights or LoRA, safetensors only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from distill_ray.config.train import LoraConfig, StudentConfig
from distill_ray.errors import ConfigError, first_line
from distill_ray.models import resolve_adapter, resolve_model


def load_student(config: StudentConfig, *, dtype: torch.dtype, seed: int, gradient_checkpointing: bool = False) -> Any:
    """Return the model in training mode, on the CPU.

    Args:
        config: `student:` of the run.
        dtype: of the weights.
        seed: of new adapters' initial weights.
        gradient_checkpointing: trade compute for memory.

    Raises:
        ConfigError: there is no such model, or its weights are not safetensors.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    model_config = load_model_config(config)
    auto = AutoModelForSeq2SeqLM if model_config.is_encoder_decoder else AutoModelForCausalLM
    path = resolve_model(config.model, key="student.model")
    try:
        model: Any = auto.from_pretrained(
            path,
            revision=config.revision,
            config=model_config,
            dtype=dtype,
            trust_remote_code=config.trust_remote_code,
            use_safetensors=True,
        )
    except (OSError, ValueError) as error:
        raise ConfigError(f"student.model: cannot load {config.model} ({first_line(error)})") from error
    model.config.use_cache = False  # a key-value cache is of no use to training
    if gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if config.adapter is not None:
        model = load_adapters(model, config.adapter, is_trainable=config.lora is not None)
    elif config.lora is not None:
        model = add_adapters(model, config.lora, seed=seed, base=config.model)
    return model.train()


def load_model_config(config: StudentConfig) -> Any:
    """The Hugging Face config of the student. Raises ConfigError."""
    from transformers import AutoConfig

    path = resolve_model(config.model, key="student.model", with_weights=False)
    try:
        return AutoConfig.from_pretrained(path, revision=config.revision, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError) as error:
        raise ConfigError(f"student.model: cannot load {config.model} ({first_line(error)})") from error


def max_positions(model_config: Any) -> int | None:
    """Longest sequence that the model has positions for; None where it has no such limit (relative positions)."""
    return getattr(model_config.get_text_config(), "max_position_embeddings", None)


def add_adapters(model: Any, config: LoraConfig, *, seed: int, base: str) -> Any:
    """Wrap a model with LoRA adapters; its own weights are frozen."""
    from peft import LoraConfig as PeftLoraConfig
    from peft import TaskType, get_peft_model

    if hasattr(model, "enable_input_require_grads"):
        model.enable_input_require_grads()  # else gradient checkpointing cuts the adapters off from the loss
    torch.manual_seed(seed)  # the same adapters on every worker and in every attempt
    settings: dict[str, Any] = {
        "r": config.rank,
        "lora_alpha": config.alpha if config.alpha is not None else 2 * config.rank,
        "lora_dropout": config.dropout,
        "target_modules": config.target_modules,
        "task_type": TaskType.SEQ_2_SEQ_LM if model.config.is_encoder_decoder else TaskType.CAUSAL_LM,
    }
    try:
        return get_peft_model(model, PeftLoraConfig(**settings))
    except ValueError as error:
        raise ConfigError(f"student.lora: cannot add adapters to {base} ({first_line(error)})") from error


def load_adapters(model: Any, folder: str, *, is_trainable: bool) -> Any:
    """Put trained adapters on a model: to train them on, or merged into its weights.

    Raises:
        ConfigError: there are none in safetensors, or they do not fit the model.
    """
    from peft import PeftModel

    folder = resolve_adapter(folder, key="student.adapter")
    if not (Path(folder) / "adapter_model.safetensors").is_file():
        raise ConfigError(f"student.adapter: no adapter_model.safetensors in {folder}; name a folder of adapters")
    if is_trainable and hasattr(model, "enable_input_require_grads"):
        model.enable_input_require_grads()
    try:
        loaded: Any = PeftModel.from_pretrained(model, folder, is_trainable=is_trainable)
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(f"student.adapter: {folder} does not fit the model ({first_line(error)})") from error
    return loaded if is_trainable else loaded.merge_and_unload()
