"""Calibrate: for which requests is the student as good as the teacher? A run folder becomes a bundle.

    run folder -> trained and measured requests (`measured`) -> outcomes (`comparing`)
        -> fit | select | report -> score (`fitting`) -> threshold (`study`) -> RUN/bundle (`bundle`)

Context, prompt form and parsing of the recipe go into the bundle, and requests are weighed by the router's own rule:
what was measured is what will be served.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa

from distill_ray.config import ContextRecipeConfig, RunConfig
from distill_ray.errors import BundleError, ConfigError, DistillError, RowError
from distill_ray.models import ChatTokenizer, is_encoder_decoder, prompts_of
from distill_ray.pipeline.evaluate import require_these_examples, student_engine
from distill_ray.pipeline.folder import RunFolder
from distill_ray.pipeline.progress import Progress
from distill_ray.pipeline.training.train import require_current_student, trained_fingerprint
from distill_ray.recipes import Recipe, make_recipe
from distill_ray.records import Message, Row
from distill_ray.serving.calibration.comparing import outcomes
from distill_ray.serving.calibration.curve import curve_svg
from distill_ray.serving.calibration.measured import Measured, Trained, measured_requests, trained_requests
from distill_ray.serving.calibration.study import Study, Vectors, study
from distill_ray.serving.routing.bundle import (
    ENTRIES_SCHEMA,
    check_files,
    folder_hashes,
    read_manifest,
    utc_now,
    version_of,
    write_bundle,
)
from distill_ray.serving.routing.conversation import RequestKey
from distill_ray.serving.routing.embedder import Embedder, load_embedder
from distill_ray.serving.routing.manifest import Manifest, PromptForm, StudentSpec

SENTINEL = "the Query itself 4f1c"
FOLDER = "bundle"  # of the run
EMBEDDED_AT_ONCE = 512


@dataclass(frozen=True)
class Calibrated:
    """What one calibration came to."""

    folder: Path
    manifest: Manifest
    is_new: bool
    """False: the same as before, and kept."""


def calibrate(config: RunConfig, folder: RunFolder) -> Calibrated:
    """Run the stage; safe to repeat: what did not change is kept.

    Raises:
        ConfigError: what the recipe does cannot be served with one context and one form of prompt.
        DistillError: no student, or no held-out request.
    """
    form, context = served_form(config)
    target = folder.local(FOLDER)
    if not folder.exists("student"):
        raise DistillError(f"{folder.root}: no student here yet; run `distill-ray train CONFIG --run-dir ...` first")
    require_these_examples(config, folder)
    require_current_student(config, folder)
    trained = trained_requests(config, folder)
    split, measured = measured_requests(config, folder)
    embedder = load_embedder(config.serve.embedder.model_copy(update={"threads": os.cpu_count() or 1}))
    good = outcomes(config, folder, measured, embedder)
    student = folder.local("student")
    spec = _student_spec(config, folder, form)
    version = _version(config, folder, embedder, spec, context, trained, measured, good)
    kept = _same(target, version)
    if kept is not None:
        return Calibrated(target, kept, is_new=False)
    trained = [each for each in trained if _is_short(each.key, embedder)]
    is_short_P = np.array([_is_short(each.key, embedder) for each in measured], dtype=bool)
    measured = [each for each, is_short in zip(measured, is_short_P, strict=True) if is_short]
    found = study(
        config.calibrate,
        config.serve.guard,
        config.serve.prices,
        _vectors([each.key for each in trained], embedder),
        _vectors([each.key for each in measured], embedder),
        good[is_short_P],
        embedder,
        tokens=_tokens(folder),
    )
    tokens = {f"{name}_tokens": value for name, value in _tokens(folder).items()}
    figures = {"split": split, "too_long": int((~is_short_P).sum()), **found.figures, **tokens}
    manifest = Manifest(
        version=version,
        name=config.name,
        created=utc_now(),
        made_with=importlib.metadata.version("distill-ray"),
        context=cast(list[dict[str, str]], context),
        parse=config.recipe.parse if isinstance(config.recipe, ContextRecipeConfig) else None,
        student=spec,
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
        data=str(folder.manifest().get("generated_with", "")),
    )
    write_bundle(
        target,
        manifest,
        student=student,
        index=found.index,
        entries=_entries(trained, found),
        reports=_reports(config, version, figures, found),
    )
    return Calibrated(target, manifest, is_new=True)


SUMMARY = ("metric", "error_budget", "confidence", "pairs", "kind", "share", "error", "error_low", "error_high", "why")


# -- how it is served --------------------------------------------------------------------------------------------------


def served_form(config: RunConfig) -> tuple[PromptForm, list[Message]]:
    """How the student is asked around a client's query, and the context that the teacher gets.

    Raises:
        ConfigError: each row has a context of its own, or the student's prompt needs more than the query.
    """
    recipe = make_recipe(config.recipe)
    context: list[Message] = []
    row = Row("served", "test", SENTINEL, {})
    if isinstance(config.recipe, ContextRecipeConfig):
        if config.recipe.context.column is not None:
            raise ConfigError(
                f"recipe.context.column: {config.recipe.context.column}: each row has a context of its own, and a "
                "service has one for all requests; take context.text or context.file"
            )
        context = recipe.teacher_messages(row)[:-1]
    return _form(recipe, row), context


def _form(recipe: Recipe, row: Row) -> PromptForm:
    try:
        *before, last = recipe.student_messages(row)
    except RowError as error:
        raise ConfigError(
            f"recipe: the student's prompt needs more of a row than its query ({error.detail}), and a client sends "
            "nothing else; use only {{ query }} in it"
        ) from error
    prefix, found, suffix = last["content"].partition(SENTINEL)
    if not found or SENTINEL in suffix or [m["role"] for m in before] not in ([], ["system"]):
        raise ConfigError(
            "recipe: the student's prompt is not some text, the query, some text; a service can ask it only so"
        )
    return PromptForm(system=before[0]["content"] if before else None, prefix=prefix, suffix=suffix)


def _student_spec(config: RunConfig, folder: RunFolder, form: PromptForm) -> StudentSpec:
    is_adapter = config.student.lora is not None and not config.student.lora.merge
    prompts = prompts_of(config.student, key="student.model")
    tokens = prompts.tokenizer.added_tokens_decoder.values() if isinstance(prompts, ChatTokenizer) else ()
    return StudentSpec(
        kind="adapter" if is_adapter else "full",
        base=config.student.model if is_adapter else None,
        revision=config.student.revision if is_adapter else None,
        is_encoder_decoder=is_encoder_decoder(config.student, key="student.model"),
        form=form,
        sampling=student_engine(config, folder).sampling,
        chat_template="chat_template.jinja" if config.student.chat_template is not None else None,
        chat_template_kwargs=config.student.chat_template_kwargs,
        control_tokens=sorted({token.content for token in tokens if token.special and token.content}),
        trust_remote_code=config.student.trust_remote_code,
    )


# -- what is the same --------------------------------------------------------------------------------------------------


def _version(
    config: RunConfig,
    folder: RunFolder,
    embedder: Embedder,
    spec: StudentSpec,
    context: Sequence[Message],
    trained: Sequence[Trained],
    measured: Sequence[Measured],
    good: np.ndarray,
) -> str:
    """Hash of all that a bundle is made from: weights, requests, outcomes, and every key that has a part in it."""
    serve = config.serve
    return version_of(
        importlib.metadata.version("distill-ray"),
        folder_hashes(folder.local("student")),
        trained_fingerprint(folder),
        spec.model_dump(mode="json"),
        list(context),
        config.recipe.model_dump(mode="json", include={"parse"}),
        [config.name, config.teacher.model, config.teacher.sampling.model_dump(mode="json")],
        config.calibrate.model_dump(mode="json"),
        [serve.guard, list(serve.fingerprint.ignore), serve.prices.model_dump(), embedder.identity],
        serve.embedder.model_dump(mode="json"),
        [[each.example_id, each.key.fingerprint, each.key.text] for each in trained],
        [[each.row_id, each.key.fingerprint, each.key.text] for each in measured],
        good.tolist(),
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


# -- vectors and files -------------------------------------------------------------------------------------------------


def _is_short(key: RequestKey, embedder: Embedder) -> bool:
    return key.problem is None and embedder.count_tokens(key.text) <= embedder.max_tokens


def _vectors(keys: Sequence[RequestKey], embedder: Embedder) -> Vectors:
    texts = [key.text for key in keys]
    vectors_ND = np.empty((len(texts), embedder.dim), dtype=np.float32)
    with Progress("embed", total=len(texts), unit="requests") as progress:
        for start in range(0, len(texts), EMBEDDED_AT_ONCE):
            part = slice(start, start + EMBEDDED_AT_ONCE)
            vectors_ND[part] = embedder.embed(texts[part])
            progress.update(min(part.stop, len(texts)))
    return Vectors(texts, [key.fingerprint for key in keys], vectors_ND)


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


def _tokens(folder: RunFolder) -> dict[str, float]:
    """Mean tokens of a request, the teacher's and the student's prompt. {} where nobody counted."""
    manifest = folder.manifest()
    calls = manifest.get("teacher_calls", 0) + manifest.get("teacher_calls_replayed", 0)
    if not calls or not folder.exists("eval", "metrics.json"):
        return {}
    return {
        "teacher_prompt": manifest["prompt_tokens"] / calls,
        "teacher_completion": manifest["completion_tokens"] / calls,
        "student_prompt": folder.read_json("eval", "metrics.json")["prompt_tokens_after"],
    }
