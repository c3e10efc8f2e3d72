"""How many workers train where there is room for fewer, and a checkpoint of another number. Ray is not started."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import ray.train

from distill_ray.config import parse_config
from distill_ray.errors import ConfigError, TrainingError
from distill_ray.pipeline import capacity
from distill_ray.pipeline.training.gang import Gang, available_gang
from distill_ray.pipeline.training.resharding import is_sharded_otherwise, make_universal
from tests.unit.test_capacity import node


def gang_on(cpus: float, workers: Any, patch: pytest.MonkeyPatch) -> Gang:
    patch.setattr(capacity.ray, "nodes", lambda: [node(cpus)])
    patch.delenv("RAY_ADDRESS", raising=False)
    raw = {
        "recipe": {"type": "context", "context": {"text": "."}, "query": "q"},
        "data": {"source": "x"},
        "teacher": {"type": "fake"},
        "train": {"workers": workers, "gpus_per_worker": 0},
    }
    return available_gang(parse_config(raw))


@pytest.mark.parametrize(
    ("cpus", "workers", "count", "said"),
    [
        (9, 4, 4, ""),
        (9, {"min": 1, "max": 4}, 4, ""),
        (3, {"min": 1, "max": 4}, 2, "train: 2 of 4 workers have room; each does twice as much per step\n"),
        (5, {"min": 2, "max": 6}, 3, "train: 3 of 6 workers have room; each does twice as much per step\n"),
        (1, {"min": 1, "max": 7}, 1, "train: 1 of 7 workers has room; each does 7 times as much per step\n"),
    ],
    ids=["all of a number", "all of a range", "not three of four", "three of six", "one of a prime"],
)
def test_the_most_workers_that_divide_all_of_them_and_have_room_start_and_it_is_said(
    cpus: float,
    workers: Any,
    count: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert gang_on(cpus, workers, monkeypatch) == Gang(count, use_gpu=False)
    assert capfd.readouterr().err == said


@pytest.mark.parametrize(
    ("cpus", "workers", "fewest"),
    [(3, 4, 4), (1, {"min": 2, "max": 4}, 2), (4, {"min": 3, "max": 7}, 7)],
    ids=["a number", "a range", "a prime"],
)
def test_too_little_room_for_the_fewest_workers_is_an_error(
    cpus: float, workers: Any, fewest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=rf"^train\.workers: {fewest} with train\.cpus_per_worker 1 need {fewest} "):
        gang_on(cpus, workers, monkeypatch)


def checkpoint_of(folder: Path, *names: str) -> ray.train.Checkpoint:
    (folder / "state").mkdir()
    for name in ("mp_rank_00_model_states.pt", *names):
        (folder / "state" / name).touch()
    return ray.train.Checkpoint.from_directory(folder)


def test_a_checkpoint_is_converted_for_another_number_of_workers_and_for_no_other(tmp_path: Path) -> None:
    names = [f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(2)]
    of_two = checkpoint_of(tmp_path, *names)
    assert [is_sharded_otherwise(of_two, "state", count) for count in (1, 2, 4)] == [True, False, True]


def test_a_checkpoint_without_shards_is_loaded_by_any_number_of_workers(tmp_path: Path) -> None:
    assert not is_sharded_otherwise(checkpoint_of(tmp_path), "state", 4)
    assert not is_sharded_otherwise(None, "state", 4)


def test_a_checkpoint_that_cannot_be_converted_is_said_with_both_ways_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint_of(tmp_path, *(f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(3)))
    failed = subprocess.CompletedProcess([], 1, "", "Traceback\nOSError: No space left on device\n")
    monkeypatch.setattr(subprocess, "run", lambda *arguments, **options: failed)
    with pytest.raises(TrainingError, match=r"of 3 workers .*No space left.* room for 3, or delete checkpoints/"):
        make_universal(tmp_path / "state", tmp_path / "made")
