"""How many workers train: all that are asked for, or as many as there is room for where the config allows fewer."""

from __future__ import annotations

from dataclasses import dataclass

from distill_ray.config.run import RunConfig
from distill_ray.pipeline.capacity import Need, require_first, student_gpus
from distill_ray.pipeline.progress import say


@dataclass(frozen=True, slots=True)
class Gang:
    """Workers that start together."""

    num_workers: int
    use_gpu: bool


def available_gang(config: RunConfig) -> Gang:
    """As many workers as there will be room for, and a line where they are fewer than asked for.

    Raises:
        ConfigError, ClusterError: there is too little even for the fewest.
    """
    train = config.train
    gpus = student_gpus(config)
    each = {"CPU": ("train.cpus_per_worker", train.cpus_per_worker), "GPU": ("train.gpus_per_worker", float(gpus))}
    found = require_first(*(Need("train.workers", count, each, train.node_labels) for count in train.workers.allowed))
    if found.count < train.workers.max:
        share = train.workers.max // found.count
        much = "twice" if share == 2 else f"{share} times"
        have = "has" if found.count == 1 else "have"
        say(f"train: {found.count} of {train.workers.max} workers {have} room; each does {much} as much per step")
    return Gang(found.count, use_gpu=gpus > 0)
