"""One engine in the plan: where it runs, whether it fits, how fast it is, what it is paid for.

An engine is a teacher, a judge of its own, or what answers for the student when it is evaluated.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from distill_ray.config import (
    BaseEngineConfig,
    FakeEngineConfig,
    HardwareConfig,
    HfEngineConfig,
    OpenAIEngineConfig,
    PlannedEngineConfig,
    Replicas,
    VllmEngineConfig,
)
from distill_ray.errors import ConfigError
from distill_ray.pipeline.estimating.calls import Ask
from distill_ray.pipeline.estimating.figures import Figure, best, given_price, price
from distill_ray.pipeline.estimating.fits import Fit, engine_fit, on_cpu
from distill_ray.pipeline.estimating.hardware import gpu_of
from distill_ray.pipeline.estimating.measured import Measured
from distill_ray.pipeline.estimating.memory import MAX_NUM_SEQS, EngineSetup
from distill_ray.pipeline.estimating.sizes import DTYPE_BYTES, ModelSize, model_size
from distill_ray.pipeline.estimating.speed import Speed, of_api, on_cpus, on_gpus

UTILISATION = 0.9  # vLLM's default gpu_memory_utilization
ENGINE_START_S = 180.0
"""Until an engine answers: loading, compiling, CUDA graphs. Large models and cold disks take longer."""

CPU_ENGINE_START_S = 10.0
"""Without compiling; about what the demo takes."""


@dataclass(frozen=True, slots=True)
class Load:
    """Tokens of all requests to one engine."""

    requests: float
    answers: float
    prompt: float
    fresh: float
    completion: float


def load_of(asks: list[Ask], role: str, prompts: float) -> Load:
    """What a role is asked over so many different prompts."""
    mine = [ask for ask in asks if ask.role == role]
    return Load(
        requests=prompts * sum(a.requests for a in mine),
        answers=prompts * sum(a.requests * a.answers for a in mine),
        prompt=prompts * sum(a.requests * a.prompt for a in mine),
        fresh=prompts * sum(a.requests * a.fresh for a in mine),
        completion=prompts * sum(a.requests * a.answers * a.completion for a in mine),
    )


@dataclass(frozen=True, slots=True)
class Planned:
    """One engine with its load."""

    load: Load
    replicas: Replicas
    gpu: str
    num_gpus: int
    price_per_gpu_hour: float
    seconds: float | None
    """Of one replica, for all of the load. None: it does not fit."""

    start_s: float
    money: float | None
    """That is paid by the token; None: nobody says how much."""

    fit: Fit | None
    figures: list[Figure]


def planned_engine(
    engine: BaseEngineConfig,
    plan: HardwareConfig,
    asks: list[Ask],
    *,
    role: str,
    prompts: float,
    longest: int,
    shared: int,
    key: str,
    plan_key: str,
    measured: Measured,
) -> Planned:
    """Reckon with one engine.

    Args:
        engine: its section.
        plan: its hardware.
        asks: what a row asks for.
        role: which of the asks are its own.
        prompts: how many different prompts there are.
        longest: tokens of the longest sampled request with its answer.
        shared: tokens that all requests begin with.
        key: dotted key of the engine.
        plan_key: that of its hardware.
        measured: by a trial.

    Raises:
        ConfigError: an unknown GPU, or a model of unknown size.
    """
    load = load_of(asks, role, prompts)
    tokens = (load.prompt + load.completion) / max(1.0, load.requests)
    if not isinstance(engine, VllmEngineConfig | HfEngineConfig):
        return _elsewhere(engine, plan, load, key=key, plan_key=plan_key, measured=measured)
    size = model_size(engine, key=f"{key}.model")
    start = best(
        f"{key}: seconds until a replica answers",
        estimated=ENGINE_START_S if engine.num_gpus else CPU_ENGINE_START_S,
        how="loading, compiling, CUDA graphs (ENGINE_START_S)" if engine.num_gpus else "loading (CPU_ENGINE_START_S)",
        key="",
        measured=measured.engine_start_s,
        measured_in=measured.where,
        measurable=key == "teacher",
    )
    rented = list[Figure]()
    if not engine.num_gpus:
        speed, fit = on_cpus(size, engine.cpus), on_cpu(key, size, engine.cpus)
        price_per_hour, gpu = plan.price_per_hour or 0.0, "CPU"
        rented = given_price(key, plan, plan_key)
    else:
        setup = engine_setup(engine, size, plan, longest, plan_key)
        speed, fit = on_gpus(setup, tokens, shared), engine_fit(setup, tokens, shared, longest, key, plan_key)
        price_per_hour, gpu = setup.gpu.price_per_hour, setup.gpu.name
        rented = [price(key, setup.gpu, plan_key)]
    seconds, figures = _seconds(load, speed, plan, key, plan_key, measured)
    return Planned(
        load=load,
        replicas=engine.replicas,
        gpu=gpu,
        num_gpus=engine.num_gpus,
        price_per_gpu_hour=price_per_hour,
        seconds=seconds if fit.fits else None,
        start_s=start.value,
        money=0.0,
        fit=fit,
        figures=[*figures, start, *rented] if fit.fits else [],
    )


def engine_setup(
    engine: VllmEngineConfig | HfEngineConfig, size: ModelSize, plan: HardwareConfig, longest: int, plan_key: str
) -> EngineSetup:
    """The engine as plain numbers. Plain transformers set nothing aside for sequences longer than the `longest`.

    Raises:
        ConfigError: an unknown GPU.
    """
    gpu = gpu_of(plan, key=plan_key)
    if isinstance(engine, HfEngineConfig):  # layers one after the other over its GPUs, in the model's own dtype
        weights = size.weight_bytes or size.parameters * size.dtype_bytes
        return EngineSetup(
            size=size,
            gpu=gpu,
            tensor=1,
            pipeline=engine.num_gpus,
            utilisation=1.0,
            weight_bytes=weights,
            cache_dtype_bytes=size.dtype_bytes,
            max_model_len=longest,
            max_num_seqs=engine.batch_size,
        )
    kwargs = engine.engine_kwargs
    # vLLM's `auto` never computes in fp32: https://docs.vllm.ai/en/latest/configuration/engine_args.html (--dtype)
    dtype = DTYPE_BYTES.get(str(kwargs.get("dtype", "auto")), 2)
    pipeline = int(_number(engine, "pipeline_parallel_size", 1))
    return EngineSetup(
        size=size,
        gpu=gpu,
        tensor=max(1, engine.num_gpus // pipeline),
        pipeline=pipeline,
        utilisation=_number(engine, "gpu_memory_utilization", UTILISATION),
        weight_bytes=size.weight_bytes or size.parameters * _weight_bytes(kwargs.get("quantization"), dtype),
        cache_dtype_bytes=1 if str(kwargs.get("kv_cache_dtype", "auto")).startswith("fp8") else dtype,
        max_model_len=int(_number(engine, "max_model_len", size.positions)),
        max_num_seqs=min(engine.max_concurrency, int(_number(engine, "max_num_seqs", MAX_NUM_SEQS))),
    )


def _number(engine: VllmEngineConfig, name: str, default: float) -> float:
    """One of vLLM's arguments. Raises ConfigError: it is no positive number."""
    value = engine.engine_kwargs.get(name)
    if value is None:
        return default
    if not isinstance(value, int | float) or not value > 0:
        raise ConfigError(f"{engine.model}: engine_kwargs.{name}: a number above 0 is needed (got {value!r})")
    return value


def _weight_bytes(quantization: object, dtype: int) -> float:
    """Per parameter, where vLLM quantises a model while it loads it."""
    return {"fp8": 1.0, "bitsandbytes": 0.5}.get(str(quantization), float(dtype))


def _seconds(
    load: Load, speed: Speed, plan: HardwareConfig, key: str, plan_key: str, measured: Measured
) -> tuple[float, list[Figure]]:
    """Of one replica for all of the load. A key counts all tokens of prompts, an estimate those that are not cached."""
    if measured.answers_per_second is not None:
        rate = measured.answers_per_second
        return load.answers / rate, [Figure(f"{key}: answers per second and replica", rate, "measured", measured.where)]

    def per_second(kind: str, estimated: float, how: str, given: float | None) -> Figure:
        return best(
            f"{key}: {kind} tokens per second and replica",
            estimated=estimated,
            how=how,
            key=f"{plan_key}.{kind}_tokens_per_second",
            given=given,
            measurable=key == "teacher",
        )

    prompt = per_second("prompt", speed.prompt, speed.prompt_how, plan.prompt_tokens_per_second)
    completion = per_second("completion", speed.completion, speed.completion_how, plan.completion_tokens_per_second)
    tokens = load.prompt if prompt.origin == "given" else load.fresh
    shown = [figure for figure in (prompt, completion) if math.isfinite(figure.value)]
    return tokens / prompt.value + load.completion / completion.value, shown


def _elsewhere(
    engine: BaseEngineConfig, plan: HardwareConfig, load: Load, *, key: str, plan_key: str, measured: Measured
) -> Planned:
    """An API, a fake, an engine of another package: no memory of ours, but perhaps GPUs that Ray reserves."""
    seconds, figures, money = 0.0, list[Figure](), 0.0
    gpu = gpu_of(plan, key=plan_key) if engine.num_gpus else None
    if isinstance(engine, FakeEngineConfig):
        seconds = engine.latency_s * load.requests / engine.max_concurrency
    else:
        seconds, figures = _seconds(load, of_api(engine.max_concurrency), plan, key, plan_key, measured)
    price_per_hour = gpu.price_per_hour if gpu else plan.price_per_hour or 0.0
    if isinstance(engine, OpenAIEngineConfig) and isinstance(plan, PlannedEngineConfig):
        money = plan.bill(load.prompt, load.completion)
        price_per_hour = 0.0
    return Planned(
        load=load,
        replicas=engine.replicas,
        gpu="API" if isinstance(engine, OpenAIEngineConfig) else gpu.name if gpu else "CPU",
        num_gpus=engine.num_gpus,
        price_per_gpu_hour=price_per_hour,
        seconds=seconds,
        start_s=0.0,
        money=money,
        fit=None,
        figures=figures,
    )
