"""What a run's config says, in words."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from distill_ray.config import FilesDataConfig, NoEngineConfig, RunConfig

# What the student learned, by recipe; another package's speaks for itself.
LEARNED = {
    "context": "to answer without the context",
    "self_critique": "to give at once what its critique and revision led to",
    "step_by_step": "the labels, with rationales",
}


def learned(config: RunConfig, metrics: Mapping[str, Any]) -> str:
    """What the student learned: "X learned ..."."""
    return "the labels" if metrics.get("gold_only") else LEARNED.get(config.recipe.type, "its answers")


def without_place(name: str) -> str:
    """A model or file for the eyes of others: without the folder or bucket that holds it; hub ids stay whole."""
    is_place = "://" in name or os.path.isabs(name)
    return name.rstrip("/").rsplit("/", 1)[-1] if is_place else name


def teacher(config: RunConfig) -> str:
    """Who answered."""
    if not config.recipe.asks_teacher or isinstance(config.teacher, NoEngineConfig):
        return "answers that were in the data"
    return f"{without_place(config.teacher.model)} ({config.teacher.type})"


def source(config: RunConfig) -> list[str]:
    """Where the queries come from, in words."""
    data = config.data
    if not isinstance(data, FilesDataConfig):
        return [f"{data.count} queries wanted, written by the teacher"]
    entries = [*_listed(data.source), *_listed(data.validation), *_listed(data.test)]
    return [entry if isinstance(entry, str) else f"{entry.dataset} ({entry.split})" for entry in entries]


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def changed(section: BaseModel) -> str:
    """What the config says beyond the defaults, in words."""
    changed = section.model_dump(mode="json", exclude_defaults=True)
    return ", ".join(f"{name} {value}" for name, value in changed.items()) or "defaults"
