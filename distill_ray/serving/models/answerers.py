"""Who answers, by the config: a remote server, or a model in this cluster."""

from __future__ import annotations

from distill_ray.config import OpenAIEngineConfig, RunConfig, SamplingConfig
from distill_ray.engines import make_engine
from distill_ray.serving.backends import Backend, RemoteBackend, student_server
from distill_ray.serving.models.deployed import DeployedBackend
from distill_ray.serving.names import AppNames
from distill_ray.serving.routing.manifest import Manifest


def teacher_of(config: RunConfig, names: AppNames) -> Backend:
    """Who answers what the student does not."""
    _, engine = config.service_teacher
    if isinstance(engine, OpenAIEngineConfig):
        return RemoteBackend(engine)
    return DeployedBackend(names.teacher, make_engine(engine).identity)


def sampling_of(config: RunConfig) -> SamplingConfig | None:
    """What `serve.teacher` says about it; None: nothing."""
    teacher = config.serve.teacher
    return teacher.sampling if teacher is not None and "sampling" in teacher.model_fields_set else None


def student_of(config: RunConfig, manifest: Manifest, names: AppNames) -> Backend:
    """Who runs a bundle's student."""
    server = student_server(config, manifest.student)
    if server is not None:
        return RemoteBackend(server)
    return DeployedBackend(names.student(manifest.version), f"student {manifest.version}")


def judge_of(config: RunConfig, teacher: Backend) -> Backend:
    """Who compares answers in a running service: the judge of calibration where it is a URL, else the teacher."""
    judge = config.calibrate.judge
    return RemoteBackend(judge) if isinstance(judge, OpenAIEngineConfig) else teacher
