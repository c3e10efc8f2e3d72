"""Does it fit, in words: what a GPU holds, how much room there is, and what would fit where it does not."""

from __future__ import annotations

from dataclasses import dataclass

from distill_ray.pipeline.estimating.hardware import GIB
from distill_ray.pipeline.estimating.memory import VLLM_OVERHEAD, EngineSetup, TrainingSetup
from distill_ray.pipeline.estimating.remedies import engine_remedies, training_remedies
from distill_ray.pipeline.estimating.sizes import ModelSize


@dataclass(frozen=True, slots=True)
class Fit:
    """One model on one kind of GPU. Bytes are of the fullest GPU."""

    who: str
    where: str
    parts: dict[str, float]
    available: float | None
    """None: on CPUs, whose memory is not looked at."""

    says: str
    remedies: list[str]
    """Ways that would fit; empty where it does, or where none was found."""

    is_refused: bool = False
    """Whatever room there is: it would not start, or be of no use."""

    @property
    def needed(self) -> float:
        """Sum of the parts."""
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        """Whether there is room, and nothing else in the way."""
        return not self.is_refused and (self.available is None or self.needed <= self.available)


def on_cpu(who: str, size: ModelSize, cpus: float) -> Fit:
    """A model without a GPU."""
    weights = {"weights": float(size.parameters * 4)}
    where = "1 CPU" if cpus == 1 else f"{cpus:g} CPUs"
    return Fit(who, where, weights, None, "the memory of CPUs is not looked at", [])


def engine_fit(setup: EngineSetup, tokens: float, shared: float, longest: int, who: str, plan_key: str) -> Fit:
    """One replica of an engine.

    Args:
        setup: the engine.
        tokens: mean length of a request with its answer.
        shared: tokens that all requests begin with.
        longest: tokens of the longest sampled request with its longest answer.
        who: its dotted key.
        plan_key: that of its hardware.
    """
    parts = {
        "weights": setup.weights,
        f"one sequence of {setup.max_model_len:,} tokens": setup.sequence(setup.max_model_len),
        "overhead": VLLM_OVERHEAD,
    }
    says = f"{setup.concurrent(tokens, shared)} sequences of {tokens:,.0f} tokens at once"
    if longest > setup.max_model_len:
        says += (
            f"; the longest sampled prompt and a whole answer are {longest:,} tokens, max_model_len is "
            f"{setup.max_model_len:,}: such rows are cut off or rejected"
        )
    if not setup.fits:
        says = "does not fit"
    where = f"{setup.num_gpus} x {setup.gpu.name}"
    remedies = [] if setup.fits else engine_remedies(setup, key=who, plan_key=plan_key, longest=longest)
    is_refused = False
    heads = setup.size.num_heads
    if heads % setup.tensor:  # https://docs.vllm.ai/en/latest/serving/parallelism_scaling.html
        is_refused, says = (
            True,
            f"vLLM does not start: {heads} attention heads cannot be divided by {setup.tensor} GPUs",
        )
        remedies = [f"{who}.gpus: {tensor * setup.pipeline}" for tensor in _around(setup.tensor, heads)]
    elif tokens > setup.max_model_len:
        is_refused = True
        says = f"a request with its answer is {tokens:,.0f} tokens on average, max_model_len is {setup.max_model_len:,}"
        remedies = [f"{who}.engine_kwargs.max_model_len: {longest} at least (the longest sampled request)"]
    return Fit(who, where, parts, setup.available, says, remedies, is_refused)


def _around(tensor: int, heads: int) -> list[int]:
    """The next numbers of GPUs, below and above, that divide the heads."""
    divisors = [number for number in range(1, heads + 1) if heads % number == 0]
    return [max(n for n in divisors if n < tensor), *[n for n in divisors if n > tensor][:1]]


def training_fit(setup: TrainingSetup, longest: int, plan_key: str) -> Fit:
    """One worker of the training.

    Args:
        setup: the training.
        longest: tokens of the longest sampled example.
        plan_key: dotted key of its hardware.
    """
    kind = "LoRA" if setup.lora else "all weights"
    says = f"{kind}, ZeRO {setup.zero_stage}, {setup.max_tokens_per_batch:,} tokens a batch"
    if setup.gradient_checkpointing:
        says += ", checkpointed"
    if setup.offload_optimizer:
        says += f"; {setup.optimizer_bytes / setup.workers / GIB:.1f} GiB of CPU memory a worker"
    if not setup.fits:
        says = f"does not fit ({says})"
    where = f"{setup.workers} x {setup.gpu.name}"
    remedies = [] if setup.fits else training_remedies(setup, plan_key=plan_key, longest=longest)
    return Fit("train", where, setup.parts, setup.available, says, remedies)
