"""What only a GPU can show: bf16 training under NCCL, and vLLM's engine on CUDA. Skipped where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from distill_ray.demo.prepare import prepare_demo
from distill_ray.pipeline.folder import RunFolder
from distill_ray.pipeline.run import run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine"),
]


def test_the_demo_runs_on_a_gpu_in_bf16(tmp_path: Path) -> None:
    settings = ["teacher.gpus=1", "train.gpus_per_worker=1", "train.precision=bf16", "evaluate.max_rows=100"]
    config = prepare_demo(tmp_path / "input", num_rows=600, overrides=settings)
    metrics = run(config, RunFolder(tmp_path))
    assert metrics["student_after"]["exact_match"] > 0.5 > metrics["student_before"]["exact_match"]
