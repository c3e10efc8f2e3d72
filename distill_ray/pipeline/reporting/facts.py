"""What a run folder holds that a report speaks of, each file read once, when it is first asked for."""

from __future__ import annotations

import json
from functools import cached_property
from typing import Any

from distill_ray.config import RunConfig
from distill_ray.errors import RunFolderError
from distill_ray.pipeline.folder import RunFolder


class Facts:
    """A run: its config and its files.

    Args:
        folder: of the run.
        config: of the run.
    """

    def __init__(self, folder: RunFolder, config: RunConfig) -> None:
        self.folder, self.config = folder, config

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """`manifest.json`."""
        return self.folder.manifest()

    @cached_property
    def metrics(self) -> dict[str, Any]:
        """`eval/metrics.json`; {} before the evaluation, and where it was of other examples or another student."""
        if not self._is_evaluated:
            return {}
        found = self.folder.read_json("eval", "metrics.json")
        if missing := {"num_rows", "student_after", "prompt_tokens_before", "prompt_tokens_after"} - found.keys():
            raise self.folder.damaged(KeyError(*sorted(missing)), "eval", "metrics.json")
        return found

    @cached_property
    def predictions(self) -> list[dict[str, Any]]:
        """The rows of `eval/predictions.parquet`; none where there are no metrics."""
        if not self._is_evaluated:
            return []
        try:
            return self.folder.read_table("eval", "predictions.parquet").to_pylist()
        except FileNotFoundError as error:
            raise RunFolderError(
                f"{self.folder.path('eval', 'predictions.parquet')}: missing, beside metrics.json; run `distill-ray "
                "evaluate` again"
            ) from error

    @cached_property
    def _is_evaluated(self) -> bool:
        if not self.folder.exists("eval", "metrics.json"):
            return False
        evaluated = self.manifest.get("evaluated")
        now = {"generated_with": self.manifest.get("generated_with"), "trained_from": self.train.get("fingerprint")}
        return evaluated is None or evaluated == now

    @property
    def train(self) -> dict[str, Any]:
        """The manifest's section of the training; {} before it."""
        return self.manifest.get("train") or {}

    @cached_property
    def training_points(self) -> dict[int, dict[str, Any]]:
        """What `metrics.jsonl` has of each step of the training, in order.

        After a restart some steps were done twice: the later record counts. Steps beyond the last one are of an
        earlier and longer training in the same folder.
        """
        points: dict[int, dict[str, Any]] = {}
        is_there = self.folder.exists("metrics.jsonl")
        for line in self.folder.read_bytes("metrics.jsonl").splitlines() if is_there else []:
            try:
                record = json.loads(line)
            except ValueError:
                continue  # the line that was being written when the run was killed
            if record.get("stage") == "train" and isinstance(record.get("step"), int):
                points.setdefault(record["step"], {}).update(record)
        last_step = self.train.get("steps")
        return {step: points[step] for step in sorted(points) if last_step is None or step <= last_step}
