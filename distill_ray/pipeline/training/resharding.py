"""Going on with another number of workers than the one that wrote a checkpoint.

ZeRO cuts the optimizer's state, and in stage 3 the weights, into one shard per worker, and DeepSpeed loads them on as
many only. Its universal checkpoint is the same state whole, tensor by tensor, of which each worker takes its part:
https://www.deepspeed.ai/tutorials/universal-checkpointing/
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pyarrow.fs
import ray.train

from distill_ray.errors import TrainingError

SHARD = "_optim_states.pt"  # ending of DeepSpeed's files, one per worker; without ZeRO there is none


def is_sharded_otherwise(checkpoint: ray.train.Checkpoint | None, state: str, num_workers: int) -> bool:
    """Whether a checkpoint's folder `state` holds shards, and not of this many workers."""
    if checkpoint is None:
        return False
    assert checkpoint.filesystem is not None
    files = checkpoint.filesystem.get_file_info(pyarrow.fs.FileSelector(f"{checkpoint.path}/{state}"))
    return sum(file.base_name.endswith(SHARD) for file in files) not in (0, num_workers)


def make_universal(state: Path, target: Path) -> None:
    """Write DeepSpeed's state as a universal checkpoint. In a process of its own: it prints, and needs memory once.

    Raises:
        TrainingError: it cannot be converted.
    """
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    command += ["--input_folder", str(state), "--output_folder", str(target)]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        shards = len(list(state.glob(f"*{SHARD}")))
        why = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise TrainingError(
            f"the checkpoint of {shards} workers cannot be made one for another number of them ({why}); run again "
            f"where there is room for {shards}, or delete checkpoints/ to start anew"
        )
