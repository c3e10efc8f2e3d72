"""The student in service as something to train on, or to ask.

| in service       | trained on as                                                          |
|------------------|------------------------------------------------------------------------|
| nothing, or base | `student.model`                                                        |
| all weights      | these; adapters are merged into them, so that a bundle stands by itself |
| adapters         | the same base with these adapters, which go on                          |
| a vendor's       | nothing here: only the vendor can go on from it                         |
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distill_ray.config import OpenAIEngineConfig, RunConfig, StudentConfig
from distill_ray.config.engine import BaseEngineConfig
from distill_ray.errors import ConfigError
from distill_ray.pipeline.evaluate import greedy, required_gpus, student_engine
from distill_ray.pipeline.folder import RunFolder
from distill_ray.serving.calibration.calibrate import student_spec
from distill_ray.serving.routing.bundle import read_manifest
from distill_ray.serving.routing.manifest import PromptForm, StudentSpec


def student_of_bundle(config: RunConfig, bundle: Path, place: str | None = None) -> StudentConfig:
    """The student of an installed bundle, without anything to train.

    Args:
        config: the whole YAML.
        bundle: its folder here; weights need not be in it.
        place: where any node finds it (`Bundles.place`); None: that folder.
    """
    spec = read_manifest(bundle).student
    place = place or str(bundle)
    weights = f"{place}/student"
    changes: dict[str, Any] = {
        "model": spec.base if spec.kind == "adapter" else weights,
        "revision": spec.revision,
        "adapter": weights if spec.kind == "adapter" else None,
        "lora": None,
        "chat_template": f"{place}/{spec.chat_template}" if spec.chat_template else None,
        "chat_template_kwargs": spec.chat_template_kwargs,
        "trust_remote_code": spec.trust_remote_code,
    }
    return config.student.model_copy(update=changes)


def student_to_train(config: RunConfig, current: Path | None, place: str | None = None) -> StudentConfig:
    """The student that a cycle trains.

    Args:
        config: the whole YAML.
        current: folder here of the bundle in service.
        place: see `student_of_bundle`.

    Raises:
        ConfigError: the student in service goes on from another base model than the config names, or is not here.
    """
    lora = config.flywheel.lora
    if current is None or config.flywheel.start_from == "base":
        return config.student.model_copy(update={"lora": lora})
    spec = read_manifest(current).student
    if spec.kind == "remote":
        raise ConfigError(
            f"flywheel.start_from: current: the student in service is {spec.base} at {spec.base_url}, and there are no "
            "weights of it here to go on from; begin anew with flywheel.start_from: base"
        )
    if spec.kind == "adapter" and (spec.base, spec.revision) != (config.student.model, config.student.revision):
        raise ConfigError(
            f"student.model: {config.student.model}@{config.student.revision or 'main'}, and the student in service "
            f"has its adapters on {spec.base}@{spec.revision or 'main'}; take that one back, or begin anew with "
            "flywheel.start_from: base"
        )
    student = student_of_bundle(config, current, place)
    if spec.kind == "full" and lora is not None:
        lora = lora.model_copy(update={"merge": True})
    return student.model_copy(update={"lora": lora})


def engine_of(config: RunConfig, student: StudentConfig, trained: RunFolder | None) -> BaseEngineConfig:
    """What answers for a student, greedily, as `evaluate` asks it.

    Args:
        config: the whole YAML.
        student: who.
        trained: run folder with its new weights; None: as it is.
    """
    engine = student_engine(config.model_copy(update={"student": student}), trained)
    return engine.model_copy(update={"gpus": required_gpus(config)})


def engine_of_bundle(config: RunConfig, bundle: Path, place: str | None = None) -> BaseEngineConfig:
    """What answers for the student of an installed bundle, greedily. See `student_of_bundle`."""
    spec = read_manifest(bundle).student
    if spec.kind == "remote":
        assert spec.base is not None
        assert spec.base_url is not None
        return remote_engine(config, spec.base, spec.base_url, spec.api_key_env)
    return engine_of(config, student_of_bundle(config, bundle, place), None)


def candidate_engine(config: RunConfig, trained: Mapping[str, Any], run: RunFolder) -> BaseEngineConfig:
    """What answers for the student that a cycle trained, greedily.

    Args:
        config: the whole YAML.
        trained: the result of the step that did.
        run: the cycle's run folder.
    """
    if "remote" in trained:
        remote = trained["remote"]
        return remote_engine(config, remote["base"], remote["base_url"], remote["api_key_env"])
    return engine_of(config, StudentConfig.model_validate(trained["student"]), run)


def candidate_spec(config: RunConfig, trained: Mapping[str, Any], form: PromptForm) -> StudentSpec:
    """What its bundle says of it. See `candidate_engine`."""
    sampling = greedy(config)
    if "remote" in trained:
        return StudentSpec(kind="remote", **trained["remote"], form=form, sampling=sampling)
    return student_spec(StudentConfig.model_validate(trained["student"]), form, sampling)


def remote_engine(config: RunConfig, model: str, base_url: str, api_key_env: str | None) -> BaseEngineConfig:
    """What answers for a student that a vendor runs."""
    return OpenAIEngineConfig(
        type="openai",
        model=model,
        base_url=base_url,
        api_key_env=api_key_env,
        sampling=greedy(config),
    )
