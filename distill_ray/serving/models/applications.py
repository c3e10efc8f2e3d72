"""What becomes a Serve application, and how it grows."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from ray import serve

from distill_ray.config import OpenAIEngineConfig, RunConfig, VllmEngineConfig
from distill_ray.config.engine import BaseEngineConfig, Replicas
from distill_ray.config.serve import ScalingConfig
from distill_ray.errors import ConfigError
from distill_ray.pipeline.capacity import on_nodes
from distill_ray.pipeline.folder import RunFolder
from distill_ray.serving.models.engine import EngineModel
from distill_ray.serving.models.student import InstalledStudent, student_engine
from distill_ray.serving.models.vllm import VllmModel
from distill_ray.serving.names import AppNames
from distill_ray.serving.routing.bundle import read_manifest
from distill_ray.serving.routing.bundles import Bundles

# ray.serve._private.deployment_state, of replicas "to be scheduled"
_UNPLACED = re.compile(r"required for each replica: (?P<needed>.+?), total resources available: (?P<free>\{.*?\})")


def application(
    config: BaseEngineConfig,
    role: str,
    folder: RunFolder,
    scaling: ScalingConfig,
    installed: InstalledStudent | None = None,
) -> serve.Application:
    """The Serve application of a model.

    Args:
        config: the engine.
        role: "teacher" or "student-VERSION"; names its log.
        folder: the service's, for logs.
        scaling: when replicas are added.
        installed: the student that this is the engine of, where it is one.
    """
    options: dict[str, Any] = {
        "name": role,
        "max_ongoing_requests": max(256, 2 * scaling.target_ongoing),  # the rest waits in the router
        "graceful_shutdown_timeout_s": 5.0,
        "health_check_period_s": 5.0,
        "health_check_timeout_s": 60.0,  # an engine that computes is not dead
        **scaled(config.replicas, scaling),
    }
    actor: dict[str, Any] = {"num_cpus": config.cpus}
    if not isinstance(config, VllmEngineConfig):
        actor |= {"num_gpus": config.num_gpus, **on_nodes(config.node_labels)}
    else:
        bundles: list[dict[str, float]] = [{"CPU": config.cpus}, *({} for _ in range(config.num_gpus - 1))]
        options["placement_group_bundles"] = [b | ({"GPU": 1} if config.num_gpus else {}) for b in bundles]
        options["placement_group_strategy"] = "PACK"
        if config.node_labels:
            options["placement_group_bundle_label_selector"] = [dict(config.node_labels)] * len(bundles)
    model = VllmModel if isinstance(config, VllmEngineConfig) else EngineModel
    deployment: Any = serve.deployment(model, ray_actor_options=actor, **options)
    return deployment.bind(installed or config, role, folder)


def scaled(replicas: Replicas, scaling: ScalingConfig) -> dict[str, Any]:
    """Options of a deployment. Ray's own defaults never add a replica to a model (ray-project/ray#59681)."""
    if replicas.min == replicas.max:
        return {"num_replicas": replicas.min}
    return {
        "autoscaling_config": {
            "min_replicas": replicas.min,
            "max_replicas": replicas.max,
            "target_ongoing_requests": scaling.target_ongoing,
            "upscale_delay_s": scaling.upscale_delay_s,
            "downscale_delay_s": scaling.downscale_delay_s,
        }
    }


def why_failed(status: Any) -> str | None:
    """What Serve's controller says of an application of which a deployment failed, in a line; None: of none."""
    for name, deployment in status.deployments.items():
        if "FAILED" in deployment.status or "UNHEALTHY" in deployment.status:
            lines = [line.strip() for line in deployment.message.splitlines() if line.strip()]
            return f"{name}: {lines[-1] if lines else deployment.status}"
    return None


def why_waiting(status: Any) -> str | None:
    """For what Serve's controller has waited half a minute and more; None: it has not."""
    for name, deployment in status.deployments.items():
        if found := _UNPLACED.search(deployment.message):
            return (
                f"{name} waits for a place: a replica needs {found['needed']}, and the cluster has {found['free']} free"
            )
    return None


def require_runnable(config: RunConfig, folder: Path) -> None:
    """Raises ConfigError: what the config says cannot run the student of the bundle in `folder`, or not so."""
    engine, spec = student_engine(config, folder), read_manifest(folder).student
    if spec.kind == "remote" and spec.api_key_env is not None and not os.environ.get(spec.api_key_env):
        raise ConfigError(
            f"{folder}: its student is {spec.base} at {spec.base_url}, and the environment variable "
            f"{spec.api_key_env}, with the key, is not set; run `export {spec.api_key_env}=...` first"
        )
    if config.serve.cascade is not None and not isinstance(engine, VllmEngineConfig | OpenAIEngineConfig):
        raise ConfigError(
            f"serve.cascade: it looks at the log-probabilities of the student's tokens, and the `{engine.type}` engine "
            "serves none; leave serve.cascade out"
        )


def student_application(
    config: RunConfig, bundles: Bundles, version: str, names: AppNames, logs: RunFolder
) -> serve.Application | None:
    """The student of an installed bundle; None: it is a server somewhere else. Raises as `student_engine`."""
    engine = student_engine(config, bundles.path(version, with_student=False))
    if isinstance(engine, OpenAIEngineConfig):
        return None
    installed = InstalledStudent(config, bundles.url, version)
    return application(engine, names.student(version), logs, config.serve.scaling, installed)
