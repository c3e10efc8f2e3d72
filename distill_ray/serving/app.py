"""The service as Serve applications: routers and keeper in front, the teacher, a student for each bundle in service.

    NAME                    ingress: Router x replicas -> Keeper
    NAME-teacher            where the teacher is in this cluster
    NAME-student-VERSION    started by the keeper

`run` is `distill-ray serve`. `front` and `teacher` are what a Serve config file names (`serve_config`).
"""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve.api import RunTarget

from distill_ray.config import OpenAIEngineConfig, RunConfig, VllmEngineConfig, load_config
from distill_ray.errors import ConfigError, first_line
from distill_ray.pipeline.capacity import Need, on_nodes, require
from distill_ray.pipeline.folder import RunFolder
from distill_ray.serving.keeper import Keeper
from distill_ray.serving.models.applications import application, scaled, why_failed
from distill_ray.serving.names import AppNames
from distill_ray.serving.replica import Router

KEEPER_CPUS = 0.1


def front_application(config: RunConfig, folder: str) -> serve.Application:
    """Routers and keeper."""
    names, router = AppNames(config.name), config.serve.router
    keeper: Any = serve.deployment(
        Keeper,
        name="keeper",
        num_replicas=1,
        max_ongoing_requests=64,
        graceful_shutdown_wait_loop_s=0.5,
        ray_actor_options={"num_cpus": KEEPER_CPUS},
    )
    routers: Any = serve.deployment(
        Router,
        name="router",
        max_ongoing_requests=2 * (router.max_ongoing + router.max_queued) + 16,  # it says 503 itself, in words
        graceful_shutdown_timeout_s=20.0,
        graceful_shutdown_wait_loop_s=0.5,
        ray_actor_options={"num_cpus": router.cpus, **on_nodes(router.node_labels)},
        **scaled(router.replicas, config.serve.scaling),
    )
    return routers.bind(config, folder, names, keeper.bind(config, folder, names))


def teacher_application(config: RunConfig, folder: str) -> serve.Application | None:
    """The teacher; None: it is a server somewhere else."""
    _, engine = config.service_teacher
    if isinstance(engine, OpenAIEngineConfig):
        return None
    return application(engine, AppNames(config.name).teacher, RunFolder(folder), config.serve.scaling)


def cpus_needed(config: RunConfig) -> float:
    """What all parts reserve, three students included: the current one, the one before it, and a candidate."""
    serve_config = config.serve
    _, teacher = config.service_teacher
    engines = 0.0 if isinstance(teacher, OpenAIEngineConfig) else teacher.cpus * teacher.replicas.min
    student = serve_config.student
    if not isinstance(student, OpenAIEngineConfig):
        engines += 3 * (student.cpus * student.replicas.min if student is not None else 1.0)
    return engines + serve_config.router.cpus * serve_config.router.replicas.min + KEEPER_CPUS


def require_gpus(config: RunConfig) -> None:
    """Say at once what Ray would wait for without a word. Connected to Ray.

    Raises:
        ConfigError: this machine has not the GPUs that teacher or student ask for.
    """
    needs = []
    for key, engine in (config.service_teacher, ("serve.student", config.serve.student)):
        if engine is not None and not isinstance(engine, OpenAIEngineConfig):
            each = {"GPU": (f"{key}.gpus", float(engine.num_gpus))}
            is_spread = isinstance(engine, VllmEngineConfig)
            needs.append(Need(f"{key}.replicas", engine.replicas.min, each, engine.node_labels, is_spread))
    require(*needs)


def require_port(host: str, port: int) -> None:
    """Raises ConfigError: somebody listens there already, or the address is not this machine's."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except socket.gaierror as error:
            raise ConfigError(
                f"serve.host: {host} is no address of this machine ({error.strerror}); give one, such as 127.0.0.1"
            ) from error
        except OSError as error:
            raise ConfigError(
                f"serve.port: cannot listen on {host}:{port} ({error.strerror}); take another with --port"
            ) from error


def start(config: RunConfig, folder: str) -> None:
    """Bring the service up in the Ray that this process is connected to. Returns when it answers."""
    serve.start(
        http_options={"host": config.serve.host, "port": config.serve.port, "location": "HeadOnly"},
        logging_config={"log_level": "WARNING", "enable_access_log": False},
    )
    names = AppNames(config.name)
    targets = [RunTarget(front_application(config, folder), name=names.front, route_prefix="/")]
    teacher = teacher_application(config, folder)
    if teacher is not None:
        targets.append(RunTarget(teacher, name=names.teacher, route_prefix=None))
    serve.run_many(targets)


def stop(config: RunConfig) -> None:
    """Take the service down, when its routers have finished what they are at. Other applications of a cluster stay."""
    names = AppNames(config.name)
    with contextlib.suppress(Exception):  # a Ray of our own ends anyway, with whatever is left
        models = [name for name in serve.status().applications if name.startswith((names.teacher, names.student("")))]
        serve.delete(names.front)
        for name in models:
            serve.delete(name, _blocking=False)
        if os.environ.get("RAY_ADDRESS") and not set(serve.status().applications) - {*models, names.front}:
            serve.shutdown()


def why_not_up(error: RuntimeError) -> str:
    """What Serve's controller says of a deployment that failed, in a line."""
    try:
        applications = serve.status().applications
    except Exception:  # Serve itself is down
        return first_line(error)
    return next(filter(None, map(why_failed, applications.values())), first_line(error))


# -- for `serve deploy` ------------------------------------------------------------------------------------------------


def front(args: dict[str, Any]) -> serve.Application:
    """{config, folder, overrides} -> routers and keeper."""
    return front_application(load_config(args["config"], args["overrides"]), args["folder"])


def teacher(args: dict[str, Any]) -> serve.Application:
    """{config, folder, overrides} -> the teacher."""
    found = teacher_application(load_config(args["config"], args["overrides"]), args["folder"])
    if found is None:
        raise ConfigError("the teacher of this service is not in the cluster")
    return found


def serve_config(path: str, overrides: list[str], folder: str) -> dict[str, Any]:
    """The service as a config of Ray Serve, for `serve deploy`. The config is read again there, with its overrides."""
    config = load_config(path, overrides)
    names = AppNames(config.name)
    args = {"config": str(Path(path).resolve()), "folder": folder, "overrides": overrides}
    applications: list[dict[str, Any]] = [
        {"name": names.front, "route_prefix": "/", "import_path": "distill_ray.serving.app:front", "args": args}
    ]
    if teacher_application(config, folder) is not None:
        applications.append(
            {
                "name": names.teacher,
                "route_prefix": None,
                "import_path": "distill_ray.serving.app:teacher",
                "args": args,
            }
        )
    return {
        "http_options": {"host": config.serve.host, "port": config.serve.port},
        "logging_config": {"log_level": "WARNING", "enable_access_log": False},
        "applications": applications,
    }
