"""Tokens per second of what fits, from peaks that are never reached: each constant says which share of one is taken.

A token costs 2 FLOPs per parameter forward and 4 backward (Kaplan et al. 2020, arXiv 2001.08361, section 2.1);
attention over the sequence itself is left out, as it is small up to some thousand tokens. A step of decoding reads all
weights, and the keys and values of every sequence, once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from distill_ray.pipeline.estimating.memory import EngineSetup, TrainingSetup
from distill_ray.pipeline.estimating.sizes import ModelSize

PREFILL_UTILISATION = 0.4
"""Of the bf16 peak while prompts are read: large matrix products reach 0.5 to 0.7, scheduling takes its part."""

DECODE_BANDWIDTH = 0.6
"""Of the memory's bandwidth while tokens are written: kernels reach 0.8, the gaps between steps take their part."""

TRAINING_MFU = 0.35
"""Of the bf16 peak in training. PaLM reports 0.46 (arXiv 2204.02311, section 4.1), Korthikanti et al. 0.42 to 0.56
(arXiv 2205.05198, table 5); small models, short sequences and plain kernels stay below."""

CPU_FLOPS = 2e10
"""Operations per second and CPU core. The demo's model is read and trained about so fast; a large one is not."""

API_TOKENS_PER_SECOND = 40.0
"""Tokens that an API writes per second and request, without its rate limits, which nobody knows here."""


@dataclass(frozen=True, slots=True)
class Speed:
    """Of one replica."""

    prompt: float
    """Tokens read per second."""

    completion: float
    """Tokens written per second, all requests together."""

    prompt_how: str
    """What it is reckoned from."""

    completion_how: str


def on_gpus(setup: EngineSetup, tokens: float, shared: float) -> Speed:
    """Of an engine that fits, with as many sequences at once as it has room for.

    Args:
        setup: the engine.
        tokens: mean length of a request with its answer.
        shared: tokens that all requests begin with.
    """
    at_once = max(1, setup.concurrent(tokens, shared))
    flops = setup.gpu.flops * setup.num_gpus * PREFILL_UTILISATION
    bandwidth = setup.gpu.bandwidth * setup.num_gpus * DECODE_BANDWIDTH
    share = min(1.0, at_once * setup.size.active_parameters / setup.size.parameters)  # experts that a step touches
    cache = at_once * tokens * setup.cache_per_token * setup.num_gpus
    by_memory = (setup.weight_bytes * share + cache) / bandwidth
    by_compute = at_once * 2 * setup.size.active_parameters / flops
    return Speed(
        flops / (2 * setup.size.active_parameters),
        at_once / max(by_memory, by_compute),
        f"{PREFILL_UTILISATION:g} of the bf16 peak (PREFILL_UTILISATION); the prefix cache costs nothing",
        f"{DECODE_BANDWIDTH:g} of the bandwidth (DECODE_BANDWIDTH), {at_once} requests of {tokens:,.0f} tokens at once",
    )


def on_cpus(size: ModelSize, cpus: float) -> Speed:
    """Of an engine without a GPU: batches are as large as they need to be."""
    speed = cpus * CPU_FLOPS / (2 * size.active_parameters)
    how = f"{CPU_FLOPS:.0e} operations per second and core (CPU_FLOPS): a rough guess"
    return Speed(speed, speed, how, how)


def of_api(max_concurrency: int) -> Speed:
    """Of an API: prompts are read in no time beside what is written."""
    how = f"{max_concurrency} requests at once x {API_TOKENS_PER_SECOND:g} (API_TOKENS_PER_SECOND), without rate limits"
    return Speed(math.inf, max_concurrency * API_TOKENS_PER_SECOND, how, how)


def flops_per_trained_token(active: int, *, lora: bool, gradient_checkpointing: bool) -> float:
    """2 per parameter forward, 2 for the gradients of activations, 2 for those of weights, 2 for a second forward.

    Adapters leave out the gradients of the frozen weights.
    """
    return active * (2.0 + 2.0 + (0.0 if lora else 2.0) + (2.0 if gradient_checkpointing else 0.0))


def of_training(setup: TrainingSetup) -> float:
    """Tokens per second of one worker on a GPU."""
    per_token = flops_per_trained_token(
        setup.size.active_parameters, lora=setup.lora, gradient_checkpointing=setup.gradient_checkpointing
    )
    return setup.gpu.flops * TRAINING_MFU / per_token


def of_training_on_cpus(size: ModelSize, cpus: float, *, lora: bool, gradient_checkpointing: bool) -> float:
    """Tokens per second of one worker without a GPU."""
    flops = flops_per_trained_token(size.active_parameters, lora=lora, gradient_checkpointing=gradient_checkpointing)
    return cpus * CPU_FLOPS / flops


def forward_share(*, lora: bool, gradient_checkpointing: bool) -> float:
    """What a token of validation costs, as a share of one that is trained on."""
    return 2.0 / flops_per_trained_token(1, lora=lora, gradient_checkpointing=gradient_checkpointing)
