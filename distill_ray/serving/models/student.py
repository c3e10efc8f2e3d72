"""What runs a bundle's student, with the paths of the node that it runs on. No Ray."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill_ray.config import HfEngineConfig, RunConfig, VllmEngineConfig
from distill_ray.config.engine import BaseEngineConfig
from distill_ray.errors import ConfigError
from distill_ray.serving.backends import student_server
from distill_ray.serving.routing.bundle import read_manifest
from distill_ray.serving.routing.bundles import Bundles


@dataclass(frozen=True, slots=True)
class InstalledStudent:
    """The student of an installed bundle, for a replica on whatever node."""

    config: RunConfig
    """The whole YAML."""

    bundles: str
    """Where they are."""

    version: str

    def engine(self) -> BaseEngineConfig:
        """What runs it, from files on this node. Takes as long as `Bundles.path`, and raises as that."""
        return student_engine(self.config, Bundles(self.bundles).path(self.version))


async def engine_here(what: BaseEngineConfig | InstalledStudent) -> Any:
    """The engine of a replica, on the node where it is: a `BaseEngineConfig`."""
    return await asyncio.to_thread(what.engine) if isinstance(what, InstalledStudent) else what


def student_engine(config: RunConfig, folder: Path) -> BaseEngineConfig:
    """What runs the student of the bundle in `folder`.

    Raises:
        BundleError: it cannot be read.
        ConfigError: that engine cannot run this student.
    """
    spec = read_manifest(folder).student
    server = student_server(config, spec)
    if server is not None:
        return server
    engine = config.serve.student
    if engine is None:
        engine = HfEngineConfig() if spec.is_encoder_decoder else VllmEngineConfig(gpus=config.teacher.num_gpus and 1)
    if spec.is_encoder_decoder and isinstance(engine, VllmEngineConfig):
        raise ConfigError("serve.student: vLLM runs no encoder-decoder models, and this student is one; take type hf")
    if not isinstance(engine, VllmEngineConfig | HfEngineConfig):
        return engine
    student = str(folder / "student")
    values: dict[str, Any] = {
        "model": spec.base if spec.kind == "adapter" else student,
        "adapter": student if spec.kind == "adapter" else None,
        "revision": spec.revision,
        "trust_remote_code": spec.trust_remote_code,
        "chat_template": str(folder / spec.chat_template) if spec.chat_template else None,
        "chat_template_kwargs": spec.chat_template_kwargs,
        "sampling": spec.sampling,
        "gpus": engine.num_gpus,
    }
    if isinstance(engine, VllmEngineConfig):
        values["engine_kwargs"] = {**config.student.engine_kwargs, **engine.engine_kwargs}
    return engine.model_copy(update=values)
