"""Figures of a training on their way to people, where they cannot be written for a while. Ray is not started."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from distill_ray.errors import RunFolderError
from distill_ray.pipeline.folder import RunFolder
from distill_ray.pipeline.training import train_metrics
from distill_ray.pipeline.training.train_metrics import MetricsInbox, metrics_inbox


class Handle:
    """An actor of this very process, whose calls are done at once."""

    def __init__(self) -> None:
        self.actor = MetricsInbox()
        self.is_alive = True
        self.put = SimpleNamespace(remote=self.actor.put)
        self.take = SimpleNamespace(remote=self.actor.take)

    def options(self, **asked_for: Any) -> Handle:
        return self

    def remote(self) -> Handle:
        return self


@pytest.fixture
def handle(monkeypatch: pytest.MonkeyPatch) -> Handle:
    made = Handle()
    monkeypatch.setattr(ray, "remote", lambda actor_class: made)
    monkeypatch.setattr(ray, "get", lambda done: done)
    monkeypatch.setattr(ray, "kill", lambda inbox: setattr(inbox, "is_alive", False))
    monkeypatch.setattr(train_metrics, "beside_the_driver", dict)
    monkeypatch.setattr(train_metrics, "POLL_S", 0.01)
    return made


class Display:
    """Stands in for `Progress`; says when a step is shown."""

    total = 0

    def __init__(self) -> None:
        self.shown = [threading.Event() for _ in range(4)]

    def update(self, step: int, **figures: Any) -> None:
        self.shown[step].set()


class FullDisk(RunFolder):
    """A run folder that cannot be written at first."""

    is_full = True
    refusals = 0

    def append_metrics(self, *records: Any) -> None:
        if self.is_full:
            self.refusals += 1
            raise RunFolderError("no space left")
        super().append_metrics(*records)


def figures(step: int) -> dict[str, Any]:
    return {"step": step, "loss": 1.0 / step, "tokens_per_second": 10.0}


def test_figures_that_cannot_be_written_are_shown_and_written_later(tmp_path: Path, handle: Handle) -> None:
    folder, display = FullDisk(tmp_path / "run"), Display()
    with metrics_inbox(folder, display, tensorboard=False) as inbox:  # type: ignore[arg-type]
        for step in (1, 2):
            inbox.put.remote(figures(step))
            assert display.shown[step].wait(20), "nobody polls any more"
        folder.is_full = False
        inbox.put.remote(figures(3))
    assert folder.refusals > 1
    lines = [json.loads(line) for line in folder.read_bytes("metrics.jsonl").splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert not handle.is_alive


def test_figures_that_can_never_be_written_are_an_error_once_their_actor_has_ended(
    tmp_path: Path, handle: Handle
) -> None:
    with (
        pytest.raises(RunFolderError, match="no space left"),
        metrics_inbox(FullDisk(tmp_path / "run"), Display(), tensorboard=False) as inbox,  # type: ignore[arg-type]
    ):
        inbox.put.remote(figures(1))
    assert not handle.is_alive
