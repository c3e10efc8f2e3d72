"""A bundle out of what is known of a student: the requests it learnt, and how it does on others.

trained, measured, outcomes -> vectors -> fit | select | report (`study`) -> folder (`bundle`)
"""

from __future__ import annotations

import importlib.metadata
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa

from distill_ray.config import ContextRecipeConfig, RunConfig
from distill_ray.errors import BundleError
from distill_ray.records import Message
from distill_ray.serving.calibration.curve import curve_svg
from distill_ray.serving.calibration.measured import Measured, Trained
from distill_ray.serving.calibration.study import Study, study
from distill_ray.serving.calibration.vectors import is_short, vectors_of
from distill_ray.serving.routing.bundle import (
    ENTRIES_SCHEMA,
    check_files,
    folder_hashes,
    read_manifest,
    utc_now,
    version_of,
    write_bundle,
)
from distill_ray.serving.routing.embedder import Embedder, load_embedder
from distill_ray.serving.routing.manifest import Manifest, StudentSpec

SUMMARY = (
    *("metric", "good_from", "error_budget", "drift_budget", "confidence"),
    *("pairs", "kind", "share", "error", "error_low", "error_high", "why"),
)


@dataclass(frozen=True)
class Calibrated:
    """What one calibration came to."""

    folder: Path
    manifest: Manifest
    is_new: bool
    """False: the same as before, and kept."""


@dataclass(frozen=True)
class Basis:
    """All that a bundle is made from, beside the config."""

    student: Path | None
    """Folder with weights and tokenizer; None for a remote student."""

    spec: StudentSpec
    context: list[Message]
    trained: list[Trained]
    measured: list[Measured]
    good_P: np.ndarray
    """Whether the student's answer to each measured request is as good as the teacher's. bool."""

    agree_P: np.ndarray
    """The same where the teacher's answer is what is right, as it is for a running service. bool."""

    split: str
    """What was measured, in a word."""

    more: str
    """How to get more of what was measured."""

    tokens: Mapping[str, float]
    """Mean tokens of a request, where known: teacher_prompt, teacher_completion, student_prompt."""

    data: str
    """Tag of the examples."""

    origin: list[Any] = field(default_factory=list)
    """What else tells it from others, as JSON values."""

    reports: Mapping[str, bytes] = field(default_factory=dict)
    """Further files of the bundle."""


def calibrating_embedder(config: RunConfig) -> Embedder:
    """The service's embedder, on all cores. Raises EmbedderError: it does not load."""
    return load_embedder(config.serve.embedder.model_copy(update={"threads": os.cpu_count() or 1}))


def make_bundle(config: RunConfig, embedder: Embedder, basis: Basis, target: Path) -> Calibrated:
    """Study, and write the bundle. One that is there already and made from the same is kept.

    Raises:
        BundleError: it cannot be written.
    """
    version = _version(config, embedder, basis)
    kept = _same(target, version)
    if kept is not None:
        return Calibrated(target, kept, is_new=False)
    trained = [each for each in basis.trained if is_short(each.key, embedder)]
    is_short_P = np.array([is_short(each.key, embedder) for each in basis.measured], dtype=bool)
    measured = [each for each, short in zip(basis.measured, is_short_P, strict=True) if short]
    found = study(
        config.calibrate,
        config.serve.guard,
        config.serve.prices,
        vectors_of([each.key for each in trained], embedder),
        vectors_of([each.key for each in measured], embedder),
        basis.good_P[is_short_P],
        embedder,
        tokens=basis.tokens,
        agree_P=basis.agree_P[is_short_P],
    )
    tokens = {f"{name}_tokens": value for name, value in basis.tokens.items()}
    why = f"{found.figures['why']} ({basis.more})" if found.figures["missing_pairs"] else found.figures["why"]
    figures = {"split": basis.split, "too_long": int((~is_short_P).sum()), **found.figures, "why": why, **tokens}
    manifest = Manifest(
        version=version,
        name=config.name,
        created=utc_now(),
        made_with=importlib.metadata.version("distill-ray"),
        context=cast(list[dict[str, str]], basis.context),
        parse=config.recipe.parse if isinstance(config.recipe, ContextRecipeConfig) else None,
        student=basis.spec,
        teacher=config.teacher.model,
        teacher_sampling=config.teacher.sampling,
        embedder=config.serve.embedder,
        embedder_identity=embedder.identity,
        ignore=list(config.serve.fingerprint.ignore),
        neighbours=config.calibrate.neighbours,
        model=found.rule.model,
        threshold=found.rule.threshold,
        far=found.rule.far,
        guard=found.rule.guard,
        summary={name: figures[name] for name in SUMMARY} | tokens,
        data=basis.data,
    )
    write_bundle(
        target,
        manifest,
        student=basis.student,
        index=found.index,
        entries=_entries(trained, found),
        reports={**_reports(config, version, figures, found), **basis.reports},
    )
    return Calibrated(target, manifest, is_new=True)


def _version(config: RunConfig, embedder: Embedder, basis: Basis) -> str:
    """Hash of all that a bundle is made from: weights, requests, outcomes, and every key that has a part in it."""
    serve = config.serve
    return version_of(
        importlib.metadata.version("distill-ray"),
        folder_hashes(basis.student) if basis.student is not None else {},
        basis.origin,
        basis.spec.model_dump(mode="json"),
        list(basis.context),
        config.recipe.model_dump(mode="json", include={"parse"}),
        [config.name, config.teacher.model, config.teacher.sampling.model_dump(mode="json")],
        config.calibrate.model_dump(mode="json"),
        [serve.guard, list(serve.fingerprint.ignore), serve.prices.model_dump(), embedder.identity],
        serve.embedder.model_dump(mode="json"),
        [[each.example_id, each.key.fingerprint, each.key.text] for each in basis.trained],
        [[each.row_id, each.key.fingerprint, each.key.text] for each in basis.measured],
        [basis.good_P.tolist(), basis.agree_P.tolist()],
        Path(config.student.chat_template).read_text(encoding="utf-8") if config.student.chat_template else None,
    )


def _same(target: Path, version: str) -> Manifest | None:
    """The bundle that is there, if it is whole and made from the same."""
    try:
        manifest = read_manifest(target)
        check_files(target, manifest)
    except BundleError:
        return None
    return manifest if manifest.version == version else None


# -- files -------------------------------------------------------------------------------------------------------------


def _entries(trained: Sequence[Trained], found: Study) -> pa.Table:
    columns = {
        "example_id": [each.example_id for each in trained],
        "text": [each.key.text for each in trained],
        "fingerprint": [each.key.fingerprint for each in trained],
        "outcome": found.outcomes_N.astype(np.float32),
    }
    return pa.table(columns).cast(ENTRIES_SCHEMA)


def _reports(config: RunConfig, version: str, figures: dict[str, Any], found: Study) -> dict[str, bytes]:
    reports = {
        "calibration.json": _json({"version": version, **figures}),
        "curve.json": _json({"version": version, "points": found.curve}),
        "curve.svg": curve_svg(found.curve, found.rule.threshold, config.calibrate.error_budget),
    }
    if config.student.chat_template is not None:
        reports["chat_template.jinja"] = Path(config.student.chat_template).read_bytes()
    return reports


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()
