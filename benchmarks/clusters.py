"""Ray clusters of several nodes on this machine, as real processes on loopback; for benchmarks and integration tests.

    fixed      a head, and a raylet for each further node
    growing    a head whose autoscaler (v2, with the pretend provider that Ray ships) starts and ends raylets by demand

GPUs are pretend ones: Ray counts them, and nothing can run on them. Inside the block `RAY_ADDRESS` and what
authenticates are in the environment, so commands started there use the cluster.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import httpx

START_S = 300.0
END_S = 5.0  # Ray would drain for half a minute
# By its class: under its name Ray looks for a file of defaults that the wheel lacks.
PROVIDER = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
HEAD_ID = "f" * 51 + "00000"  # as Ray's pretend provider has it


@dataclass(frozen=True)
class Node:
    """What a node offers."""

    cpus: int = 0
    gpus: int = 0
    labels: Mapping[str, str] = field(default_factory=dict)
    most: int = 4
    """Nodes of this type, where they come and go."""

    @property
    def arguments(self) -> list[str]:
        """Of `ray start`."""
        labels = [f"--labels={','.join(f'{k}={v}' for k, v in self.labels.items())}"] if self.labels else []
        return [f"--num-cpus={self.cpus}", f"--num-gpus={self.gpus}", *labels]


@dataclass
class Cluster:
    """A running cluster."""

    folder: Path
    port: int
    dashboard: int
    workers: list[subprocess.Popen[bytes]] = field(default_factory=list)
    """Of a fixed one: `ray start` of each node but the head, leader of a process group."""

    @property
    def job_server(self) -> str:
        """Address for `ray job submit`."""
        return f"http://127.0.0.1:{self.dashboard}"

    def labels(self) -> list[Mapping[str, str]]:
        """Of the nodes that are alive, each with its own. The cluster needs a job server."""
        header = {"Authorization": f"Bearer {os.environ['RAY_AUTH_TOKEN']}"}
        answer = httpx.get(f"{self.job_server}/api/v0/nodes?detail=true", headers=header, timeout=60).raise_for_status()
        nodes = answer.json()["data"]["result"]["result"]
        return [node["labels"] or {} for node in nodes if node["state"] == "ALIVE"]

    def add(self, node: Node, environment: Mapping[str, str] = MappingProxyType({})) -> subprocess.Popen[bytes]:
        """One more node, with this in the environment of its workers."""
        name = f"worker-{len(self.workers)}"
        own = [f"--temp-dir={self.folder / name}", *node.arguments]  # as on a machine of its own
        command = ["--address", f"127.0.0.1:{self.port}", "--node-ip-address=127.0.0.1", *own]
        worker = _start(command, self.folder / f"{name}.log", environment)
        self.workers.append(worker)
        return worker


@contextlib.contextmanager
def fixed(folder: Path, head: Node, workers: Sequence[Node] = (), *, jobs: bool = False) -> Iterator[Cluster]:
    """A head and raylets that stay.

    Args:
        folder: for Ray's files; short, as its sockets allow no long path.
        head: the node on which the cluster's own processes run.
        workers: the others.
        jobs: with a job server.
    """
    with _cluster(folder, head, {}, [], jobs=jobs) as cluster:
        for node in workers:
            cluster.add(node)
        yield cluster


@contextlib.contextmanager
def growing(
    folder: Path, head: Node, types: Mapping[str, Node], *, idle_s: float = 5.0, jobs: bool = False
) -> Iterator[Cluster]:
    """A head, and nodes of these types as they are needed; gone when they were idle for so long."""
    port = free_port()
    config = {
        "cluster_name": "pretend",
        "max_workers": sum(node.most for node in types.values()),
        "idle_timeout_minutes": idle_s / 60,
        "upscaling_speed": 8.0,
        "provider": {
            "type": "external",
            "module": PROVIDER,
            "head_node_id": HEAD_ID,
            "gcs_address": f"127.0.0.1:{port}",
            "launch_multiple": True,
            "disable_node_updaters": True,  # it starts Ray itself
            "disable_launch_config_check": True,
        },
        "head_node_type": "ray.head.default",
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": head.cpus}, "node_config": {}, "max_workers": 0},
            **{
                name: {
                    "resources": {"CPU": node.cpus, "GPU": node.gpus},
                    "labels": dict(node.labels),
                    "node_config": {},
                    "min_workers": 0,
                    "max_workers": node.most,
                }
                for name, node in types.items()
            },
        },
        # Ray reads these too, and has no defaults for this provider.
        **{key: {} for key in ("auth", "docker", "file_mounts")},
        **{key: [] for key in ("initialization_commands", "setup_commands", "cluster_synced_files", "rsync_exclude")},
        **{key: [] for key in ("head_setup_commands", "head_start_ray_commands", "rsync_filter")},
        **{key: [] for key in ("worker_setup_commands", "worker_start_ray_commands")},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "types.json").write_text(json.dumps(config))
    environment = {
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    }
    more = [f"--autoscaling-config={folder / 'types.json'}"]
    with _cluster(folder, head, environment, more, jobs=jobs, port=port) as cluster:
        yield cluster


@contextlib.contextmanager
def _cluster(
    folder: Path, head: Node, environment: Mapping[str, str], more: Sequence[str], *, jobs: bool, port: int = 0
) -> Iterator[Cluster]:
    """Its processes end with it."""
    folder.mkdir(parents=True, exist_ok=True)
    cluster = Cluster(folder, port or free_port(), free_port())
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    os.environ.update(token)
    server = [f"--include-dashboard={'true' if jobs else 'false'}", "--dashboard-host=127.0.0.1"]
    command = ["--head", "--node-ip-address=127.0.0.1", f"--port={cluster.port}", f"--temp-dir={folder / 'ray'}",
               f"--dashboard-port={cluster.dashboard}", *server, *head.arguments, *more]  # fmt: skip
    process = None
    try:
        process = _start(command, folder / "head.log", environment)
        os.environ["RAY_ADDRESS"] = f"127.0.0.1:{cluster.port}"
        yield cluster
    finally:
        for name in ("RAY_ADDRESS", *token):
            os.environ.pop(name, None)
        for started in [*cluster.workers, *([process] if process is not None else [])]:
            _end(started)


def _start(arguments: Sequence[str], log: Path, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    ray = str(Path(sys.executable).parent / "ray")
    command = [
        ray,
        "start",
        "--block",
        "--disable-usage-stats",
        f"--dashboard-agent-listen-port={free_port()}",
        *arguments,
    ]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # a job's `python` is this one
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=output,
            start_new_session=True,
            env={**os.environ, **environment, "RAY_raylet_start_wait_time_s": f"{START_S:.0f}", "PATH": path},
        )
    deadline = time.monotonic() + START_S
    while "Ray runtime started" not in log.read_text():
        if process.poll() is not None or time.monotonic() > deadline:
            _end(process)
            raise RuntimeError(log.read_text())
        time.sleep(0.2)
    return process


def _end(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(END_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # what it left
    process.wait()


def free_port() -> int:
    """Above those that Ray gives to its workers, below those that the kernel gives to connections meanwhile."""
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
