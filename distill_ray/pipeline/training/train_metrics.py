"""Figures of a training run on their way to people: worker 0 -> an inbox actor -> a thread of the driver.

The driver alone writes `metrics.jsonl`, TensorBoard's events and the display, so the workers need no access to them,
and a run that is killed loses at most the figures of the last half second. Steps that are run again after a resume
appear again in `metrics.jsonl`, with the same figures: the last line of a step counts. What cannot be written for a
while (a full disk, a store that is away) is kept and written later; only at the end is that an error.
"""

from __future__ import annotations

import contextlib
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
import ray.exceptions

from distill_ray.errors import RunFolderError
from distill_ray.pipeline.capacity import beside_the_driver
from distill_ray.pipeline.folder import RunFolder
from distill_ray.pipeline.progress import Progress

POLL_S = 0.5
STORE_FLUSH_S = 30.0  # a store has no append: each time, metrics.jsonl is written anew
TENSORBOARD_FIGURES = ("loss", "validation_loss", "learning_rate", "grad_norm", "tokens_per_second")


class MetricsInbox:
    """Actor: keeps figures from worker 0 until the driver fetches them."""

    def __init__(self) -> None:
        self._records: list[dict[str, Any]] = []

    def put(self, record: dict[str, Any]) -> None:
        """Add one record."""
        self._records.append(record)

    def take(self) -> list[dict[str, Any]]:
        """All records since the last call."""
        records, self._records = self._records, []
        return records


@contextlib.contextmanager
def metrics_inbox(folder: RunFolder, progress: Progress, *, tensorboard: bool) -> Iterator[Any]:
    """Handle of an inbox whose figures are written and shown while the block runs."""
    inbox: Any = ray.remote(MetricsInbox).options(**beside_the_driver()).remote()
    stop = threading.Event()
    with _tensorboard_writer(folder, enabled=tensorboard) as writer:
        sink = _Sink(folder, progress, writer)

        def poll() -> None:
            while not stop.wait(POLL_S):
                _drain(inbox, sink)

        thread = threading.Thread(target=poll, daemon=True)
        thread.start()
        try:
            yield inbox
        finally:
            stop.set()
            thread.join()
            _drain(inbox, sink)
            ray.kill(inbox)
            sink.flush()


def _drain(inbox: Any, sink: _Sink) -> None:
    records: list[dict[str, Any]] = []
    with contextlib.suppress(ray.exceptions.RayError):  # the cluster is going down; training itself reports that
        records = ray.get(inbox.take.remote())
    with contextlib.suppress(RunFolderError):  # the sink keeps them, and tries again the next time
        sink.add(records)


class _Sink:
    """Where figures end: metrics.jsonl, TensorBoard, the display."""

    def __init__(self, folder: RunFolder, progress: Progress, writer: Any) -> None:
        self._folder, self._progress, self._writer = folder, progress, writer
        self._shown: dict[str, str] = {}
        self._unwritten: list[dict[str, Any]] = []
        self._flushed = time.monotonic()

    def add(self, records: list[dict[str, Any]]) -> None:
        for record in records:
            if "total_steps" in record:
                self._begin(record["total_steps"], record["resumed_at"])
            else:
                self._step(record)
        if self._folder.is_local or time.monotonic() - self._flushed > STORE_FLUSH_S:
            self.flush()

    def flush(self) -> None:
        """Write what is not written yet. Raises RunFolderError: that cannot be written now, and is kept."""
        if self._unwritten:
            self._folder.append_metrics(*self._unwritten)
        self._unwritten, self._flushed = [], time.monotonic()

    def _begin(self, total_steps: int, resumed_at: int) -> None:
        self._progress.total = total_steps
        self._progress.update(resumed_at)
        if resumed_at:
            line = f"train: going on after step {resumed_at} of {total_steps}"
            self._progress.console.print(line, markup=False)

    def _step(self, record: dict[str, Any]) -> None:
        self._unwritten.append({"stage": "train", **record})
        for name in TENSORBOARD_FIGURES:
            if self._writer is not None and record.get(name) is not None:
                self._writer.add_scalar(f"train/{name}", record[name], record["step"])
        if "loss" in record:
            self._shown["loss"] = f"{record['loss']:.4f}"
            self._shown["tokens/s"] = f"{record['tokens_per_second']:,.0f}"
        if "validation_loss" in record:
            self._shown["validation_loss"] = f"{record['validation_loss']:.4f}"
        self._progress.update(record["step"], **self._shown)


@contextlib.contextmanager
def _tensorboard_writer(folder: RunFolder, *, enabled: bool) -> Iterator[Any]:
    """A writer of events to `logs/tensorboard`, or None. Events for a store are uploaded at the end."""
    if not enabled:
        yield None
        return
    from torch.utils.tensorboard import SummaryWriter

    with contextlib.ExitStack() as stack:
        local = str(folder.local("logs", "tensorboard")) if folder.is_local else None
        target = local or stack.enter_context(tempfile.TemporaryDirectory())
        with SummaryWriter(target) as writer:
            yield writer
        if local is None:
            folder.put(Path(target), "logs", "tensorboard")
