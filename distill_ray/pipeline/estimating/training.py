"""The training in the plan: how many tokens, whether a worker's GPU holds them, how long they take."""

from __future__ import annotations

from dataclasses import dataclass

from distill_ray.config import LoraConfig, RunConfig
from distill_ray.config.engine import DEMO_MODEL
from distill_ray.pipeline.estimating.calls import Learnt
from distill_ray.pipeline.estimating.figures import Figure, best, given_price, price
from distill_ray.pipeline.estimating.fits import Fit, on_cpu, training_fit
from distill_ray.pipeline.estimating.hardware import gpu_of
from distill_ray.pipeline.estimating.measured import Measured
from distill_ray.pipeline.estimating.memory import TrainingSetup
from distill_ray.pipeline.estimating.sizes import ModelSize, model_size
from distill_ray.pipeline.estimating.speed import (
    CPU_FLOPS,
    TRAINING_MFU,
    forward_share,
    of_training,
    of_training_on_cpus,
)

TRAINING_START_S = 120.0
"""Until the first step: workers, weights, optimizer states."""


@dataclass(frozen=True, slots=True)
class PlannedTraining:
    """The training with its load."""

    prompt_tokens: float
    """All epochs together."""

    completion_tokens: float
    gpu: str
    gpus_per_worker: int
    price_per_gpu_hour: float
    start_s: float
    """Until the first step."""

    seconds: float | None
    """From there to the end, on one worker; None: it does not fit."""

    fit: Fit
    figures: list[Figure]


def planned_gpus(config: RunConfig) -> int:
    """GPUs of a worker: as the config says, else one unless it is the built-in model."""
    if config.train.gpus_per_worker is not None:
        return config.train.gpus_per_worker
    return int(config.student.model != DEMO_MODEL)


def planned_training(
    config: RunConfig, each: Learnt, rows: int, validation_rows: int, longest: int, measured: Measured
) -> PlannedTraining:
    """Reckon with the training.

    Args:
        config: student and training.
        each: what the student gets of a row.
        rows: of the split `train`.
        validation_rows: of the split `validation`.
        longest: tokens of the longest sampled example.
        measured: by a trial.

    Raises:
        ConfigError: an unknown GPU, or a model of unknown size.
    """
    train = config.train
    size = model_size(config.student, key="student.model", lora=config.student.lora or LoraConfig())
    num_gpus = planned_gpus(config)
    rented = list[Figure]()
    lora, checkpointing = config.student.lora is not None, train.gradient_checkpointing
    if num_gpus:
        setup = training_setup(config, size, each)
        speed, how = of_training(setup), f"{TRAINING_MFU:g} of the bf16 peak (TRAINING_MFU)"
        fit, gpu, price_per_hour = (
            training_fit(setup, longest, "plan.student"),
            setup.gpu.name,
            setup.gpu.price_per_hour,
        )
        how_long = "workers, weights, optimizer states (TRAINING_START_S)"
        rented = [
            Figure("train: seconds until the first step", TRAINING_START_S, "estimated", how_long),
            price("train", setup.gpu, "plan.student"),
        ]
    else:
        speed = of_training_on_cpus(size, train.cpus_per_worker, lora=lora, gradient_checkpointing=checkpointing)
        how = f"{CPU_FLOPS:.0e} operations per second and core (CPU_FLOPS): a rough guess"
        fit, gpu = on_cpu("train", size, train.cpus_per_worker * train.workers.fewest), "CPU"
        price_per_hour = config.plan.student.price_per_hour or 0.0
        rented = given_price("train", config.plan.student, "plan.student")
    figure = best(
        "train: tokens per second and worker",
        estimated=speed,
        how=how,
        key="plan.student.train_tokens_per_second",
        given=config.plan.student.train_tokens_per_second,
        measured=measured.train_tokens_per_second,
        measured_in=measured.where,
    )
    per_example = each.prompt + each.completion
    per_epoch = rows * each.examples * per_example
    step_tokens = train.max_tokens_per_batch * train.num_parts
    tokens = per_epoch * train.epochs
    if train.max_steps is not None:
        tokens = min(tokens, float(train.max_steps * step_tokens))
    validations = tokens / (train.validate_every * step_tokens if train.validate_every else max(1.0, per_epoch))
    validated = validations * validation_rows * each.examples * per_example
    work = tokens + validated * forward_share(lora=lora, gradient_checkpointing=checkpointing)
    return PlannedTraining(
        prompt_tokens=tokens * each.prompt / max(1.0, per_example),
        completion_tokens=tokens * each.completion / max(1.0, per_example),
        gpu=gpu,
        gpus_per_worker=num_gpus,
        price_per_gpu_hour=price_per_hour,
        start_s=TRAINING_START_S if num_gpus else 0.0,
        seconds=work / figure.value if fit.fits else None,
        fit=fit,
        figures=[figure, *rented] if fit.fits else [],
    )


def training_setup(config: RunConfig, size: ModelSize, each: Learnt) -> TrainingSetup:
    """A worker of the fewest, who hold most each, as plain numbers. Raises ConfigError: an unknown GPU."""
    train = config.train
    return TrainingSetup(
        size=size,
        gpu=gpu_of(config.plan.student, key="plan.student"),
        workers=train.workers.fewest,
        zero_stage=train.deepspeed.zero_stage,
        offload_optimizer=train.deepspeed.offload_optimizer,
        lora=config.student.lora is not None,
        dtype_bytes=4 if train.precision == "fp32" else 2,
        max_tokens_per_batch=train.max_tokens_per_batch,
        gradient_checkpointing=train.gradient_checkpointing,
        completion_share=each.completion / max(1.0, each.prompt + each.completion),
    )
