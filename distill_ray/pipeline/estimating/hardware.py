"""The table of GPUs, and the numbers of a config in its place.

Memory is what `torch.cuda.mem_get_info` calls total, which is below the name's number. Dense bf16 peaks (without
sparsity) and bandwidths are of NVIDIA's data sheets (SXM where there are several). Prices are guesses at what large
clouds list per GPU and hour on demand, in US dollars: sellers differ by a factor of three, so give your own.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from distill_ray.config import HardwareConfig
from distill_ray.errors import ConfigError

GIB = 2**30


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU, in bytes, operations per second and bytes per second."""

    name: str
    memory: float
    flops: float
    bandwidth: float
    price_per_hour: float
    is_list_price: bool = True


def _gpu(name: str, memory_gib: float, bf16_tflops: float, bandwidth_gb: float, price: float) -> Gpu:
    return Gpu(name, memory_gib * GIB, bf16_tflops * 1e12, bandwidth_gb * 1e9, price)


GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("L4", 22.0, 121, 300, 0.8),
        _gpu("A10G", 22.0, 70, 600, 1.2),
        _gpu("L40S", 44.4, 362, 864, 2.0),
        _gpu("A100-40GB", 39.4, 312, 1555, 2.7),
        _gpu("A100-80GB", 79.1, 312, 2039, 3.5),
        _gpu("H100", 79.1, 989, 3350, 5.0),
        _gpu("H200", 139.8, 989, 4800, 6.5),
    )
}


def gpu_of(config: HardwareConfig, *, key: str) -> Gpu:
    """The GPU that a section of `plan:` names, with the section's own numbers in place of the table's.

    Args:
        config: the section.
        key: its dotted key, for messages.

    Raises:
        ConfigError: a GPU that is not in the table, of which not all numbers are given.
    """
    given = {
        "memory_gb": config.memory_gb,
        "bf16_tflops": config.bf16_tflops,
        "bandwidth_gb_per_second": config.bandwidth_gb_per_second,
        "price_per_hour": config.price_per_hour,
    }
    known = GPUS.get(config.gpu)
    if known is None:
        missing = [name for name, value in given.items() if value is None]
        if missing:
            close = difflib.get_close_matches(config.gpu.upper(), GPUS, n=1)
            meant = f"did you mean {close[0]}? " if close else ""
            raise ConfigError(
                f"{key}.gpu: no GPU `{config.gpu}` in the table; {meant}Known: {', '.join(GPUS)}. For another one give "
                f"{', '.join(missing)} too"
            )
        known = Gpu(config.gpu, 0, 0, 0, 0)
    return Gpu(
        config.gpu,
        known.memory if config.memory_gb is None else config.memory_gb * GIB,
        known.flops if config.bf16_tflops is None else config.bf16_tflops * 1e12,
        known.bandwidth if config.bandwidth_gb_per_second is None else config.bandwidth_gb_per_second * 1e9,
        known.price_per_hour if config.price_per_hour is None else config.price_per_hour,
        config.price_per_hour is None,
    )
