"""What would fit where something does not: each way is tried with the same arithmetic before it is named."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from distill_ray.pipeline.estimating.hardware import GPUS, Gpu
from distill_ray.pipeline.estimating.memory import EngineSetup, TrainingSetup

MOST_TENSOR = 8  # GPUs of one machine
MOST_WORKERS = 64


def engine_remedies(setup: EngineSetup, *, key: str, plan_key: str, longest: int) -> list[str]:
    """Ways to make an engine fit, each by itself.

    Args:
        setup: one that does not fit.
        key: dotted key of the engine.
        plan_key: that of its hardware.
        longest: tokens of the longest sampled prompt with its answer: no less is of use.
    """
    return [
        *(_more_gpus(setup, key) if key != "student" else []),  # it is evaluated on one GPU
        *_other_gpu(setup, plan_key),
        *_shorter(setup, key, longest),
        *_quantised(setup, key),
    ]


def _more_gpus(setup: EngineSetup, key: str) -> Iterator[str]:
    tensor = setup.tensor * 2
    while tensor <= MOST_TENSOR and setup.size.num_heads % tensor == 0:
        if dataclasses.replace(setup, tensor=tensor).fits:
            yield f"{key}.gpus: {tensor * setup.pipeline}" + _of(tensor, setup.pipeline)
            return
        tensor *= 2


def _of(tensor: int, pipeline: int) -> str:
    return f" (tensor {tensor} x pipeline {pipeline})" if pipeline > 1 else " (tensor parallel)"


def _other_gpu(setup: EngineSetup | TrainingSetup, plan_key: str) -> Iterator[str]:
    fitting = [gpu for gpu in _larger(setup.gpu) if dataclasses.replace(setup, gpu=gpu).fits]
    if fitting:
        yield f"{plan_key}.gpu: {min(fitting, key=lambda gpu: gpu.price_per_hour).name}"


def _larger(gpu: Gpu) -> list[Gpu]:
    return [other for other in GPUS.values() if other.memory > gpu.memory]


def _shorter(setup: EngineSetup, key: str, longest: int) -> Iterator[str]:
    tokens = setup.longest()
    if longest <= tokens < setup.max_model_len:
        yield f"{key}.engine_kwargs.max_model_len: {tokens} at most (the longest sampled request has {longest})"


def _quantised(setup: EngineSetup, key: str) -> Iterator[str]:
    if setup.size.is_quantised:
        return
    for bits in (8, 4):
        smaller = dataclasses.replace(setup, weight_bytes=setup.size.parameters * bits / 8)
        if smaller.weight_bytes < setup.weight_bytes and smaller.fits:
            yield f"{key}.model: one that is quantised to {bits} bits"
            return


def training_remedies(setup: TrainingSetup, *, plan_key: str, longest: int) -> list[str]:
    """Ways to make a training fit, each by itself; where none does, with gradient checkpointing beside it.

    Args:
        setup: one that does not fit.
        plan_key: dotted key of its hardware.
        longest: tokens of the longest sampled example: a batch has to hold it.
    """
    checkpointed = dataclasses.replace(setup, gradient_checkpointing=True)
    alone = list(_changes(setup, plan_key, longest))
    if checkpointed.fits and not setup.gradient_checkpointing:
        alone.insert(0, "train.gradient_checkpointing: true")
    if alone or setup.gradient_checkpointing:
        return alone
    return [f"train.gradient_checkpointing: true and {way}" for way in _changes(checkpointed, plan_key, longest)]


def _changes(setup: TrainingSetup, plan_key: str, longest: int) -> Iterator[str]:
    tokens = setup.max_tokens_per_batch // 2
    while tokens >= longest:
        if dataclasses.replace(setup, max_tokens_per_batch=tokens).fits:
            yield f"train.max_tokens_per_batch: {tokens}"
            break
        tokens //= 2
    yield from _more_workers(setup)
    if not setup.lora and setup.size.adapter_parameters and dataclasses.replace(setup, lora=True).fits:
        yield "student.lora: {rank: 32}"
    if not setup.offload_optimizer and dataclasses.replace(setup, offload_optimizer=True).fits:
        yield f"train.deepspeed.offload_optimizer: true ({setup.optimizer_bytes / 2**30:.0f} GiB of CPU memory)"
    yield from _other_gpu(setup, plan_key)


def _more_workers(setup: TrainingSetup) -> Iterator[str]:
    """The fewest workers with which sharding is enough."""
    workers = setup.workers
    while workers <= MOST_WORKERS:
        for stage in range(max(1, setup.zero_stage), 4):
            if dataclasses.replace(setup, workers=workers, zero_stage=stage).fits:
                yield f"train.workers: {workers}, train.deepspeed.zero_stage: {stage}"
                return
        workers *= 2
