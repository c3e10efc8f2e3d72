"""What stages ask Ray for, and whether it will ever come.

Ray waits without a word for what nobody has. So every stage says first what it needs (`Need`), and `require` answers:

    there are nodes for it                        -> the stage starts
    there are not, and none will be added         -> an error with what there is
    there are not, and the cluster's autoscaler   -> starts nodes: the stage starts too, and waits for them
                                                  -> has no type of node for it: an error

Whether a node is busy is not asked: what others use now comes free.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from distill_ray.config import RunConfig, VllmEngineConfig
from distill_ray.config.engine import DEMO_MODEL, BaseEngineConfig
from distill_ray.errors import ClusterError, ConfigError
from distill_ray.pipeline.progress import say

ANSWER_S = 50.0  # an autoscaler that has not begun to start a node by then will not
REPORT_S = 30.0  # of a cluster that was just started, after which whoever looks after its nodes has reported
LOOK_S = 0.5
FURTHER = "1 CPU for each further GPU"  # of an engine on several

_kept_groups: ContextVar[list[Any]] = ContextVar("placement groups of the engines that this block starts")


@dataclass(frozen=True)
class Need:
    """Actors that have to be there together for a stage to start."""

    key: str
    """Config key of their number."""

    count: int
    each: Mapping[str, tuple[str, float]]
    """Resource -> (config key, amount), of one of them."""

    labels: Mapping[str, str] = field(default_factory=dict)
    """Of the nodes that may hold them."""

    spread: bool = False
    """The GPUs of one of them may be on several nodes."""

    @property
    def has_further_gpus(self) -> bool:
        """Whether one of them is spread over several bundles."""
        return self.spread and self.each.get("GPU", ("", 0.0))[1] > 1

    @property
    def bundles(self) -> list[dict[str, float]]:
        """What has to be on one node, for all of them."""
        amounts = {resource: amount for resource, (_, amount) in self.each.items() if amount}
        if self.has_further_gpus:
            return gpu_bundles(int(amounts["GPU"]), amounts.get("CPU", 1.0)) * self.count
        return [amounts] * self.count if amounts else []


@dataclass(frozen=True)
class _Node:
    resources: dict[str, float]
    labels: Mapping[str, str]

    def __str__(self) -> str:
        parts = [f"{self.resources.get(name, 0):g} {name}s" for name in ("CPU", "GPU") if self.resources.get(name)]
        own = {name: value for name, value in self.labels.items() if not name.startswith("ray.io/node")}
        return " ".join([", ".join(parts) or "no CPU", *([f"({shown(own)})"] if own else [])])


def require(*needs: Need) -> None:
    """Say at once what will never come, be it for one of them or for all together.

    Raises:
        ConfigError: this machine has too little of something.
        ClusterError: so has the cluster, and nothing will be added to it.
    """
    if _fit(needs):
        return
    if os.environ.get("RAY_ADDRESS"):
        _ask_for_nodes(needs)
    else:
        alone = [need for need in needs if not _fit([need])]
        first = next(needs[:count] for count in range(1, len(needs) + 1) if not _fit(needs[:count]))
        raise ConfigError(_too_little_here(alone[:1] or first))


def require_first(*needs: Need) -> Need:
    """The first of these that will come: ways to do one thing, the best first. Raises as `require` does of the last."""
    *better, last = needs
    for need in better:
        with contextlib.suppress(ConfigError, ClusterError):
            require(need)
            return need
    require(last)
    return last


def room(need: Need, most: int, beside: Sequence[Need] = ()) -> int:
    """How many of these actors there will be room for, `most` at most; all of them where nodes can be added.

    Args:
        need: the actors; how many they are has no meaning here.
        most: as many as there is work for.
        beside: others, which are there already.
    """
    if os.environ.get("RAY_ADDRESS") and _autoscaler().can_grow:
        return most
    free = _nodes()
    for other in beside:
        for bundle in other.bundles:
            _placed(bundle, other.labels, free)
    one = dataclasses.replace(need, count=1).bundles
    return next((n for n in range(most) if not all(_placed(bundle, need.labels, free) for bundle in one)), most)


def _nodes() -> list[_Node]:
    return [_Node(dict(node["Resources"]), node.get("Labels") or {}) for node in ray.nodes() if node["Alive"]]


def _fit(needs: Sequence[Need]) -> bool:
    """Whether the nodes have room for all of them together, were nobody else there."""
    free = _nodes()
    return all(_placed(bundle, need.labels, free) for need in needs for bundle in need.bundles)


def _placed(bundle: Mapping[str, float], labels: Mapping[str, str], free: Sequence[_Node]) -> bool:
    """Whether a node has room for it; takes it from there."""
    for node in free:
        if all(node.labels.get(name) == value for name, value in labels.items()) and all(
            node.resources.get(name, 0.0) >= amount for name, amount in bundle.items()
        ):
            for name, amount in bundle.items():
                node.resources[name] -= amount
            return True
    return False


def _too_little_here(needs: Sequence[Need]) -> str:
    """Of one machine: which resource, who needs how much of it beside the others, and what to lower."""
    last, nodes = needs[-1], _nodes()
    if last.labels:
        return (
            f"{last.key}: asks for a node with {shown(last.labels)}, and this machine has no such label; leave "
            "node_labels out, or set RAY_ADDRESS to a cluster that has it"
        )
    for resource in dict.fromkeys(name for bundle in last.bundles for name in bundle):
        needed = sum(bundle.get(resource, 0.0) for need in needs for bundle in need.bundles)
        have = sum(node.resources.get(resource, 0.0) for node in nodes)
        if needed > have:
            resource_key, amount = last.each.get(resource) or last.each["GPU"]
            beside = f" beside {' and '.join(need.key for need in needs[:-1])}" if needs[:-1] else ""
            further = f" ({FURTHER})" if resource == "CPU" and last.has_further_gpus else ""
            return (
                f"{last.key}: {last.count} with {resource_key} {amount:g}{beside} need {needed:g} {resource}s{further} "
                f"and this machine has {have:g}; lower {last.key} or {resource_key}"
                + (" (0 runs on the CPU)" if resource == "GPU" else "")
            )
    raise AssertionError("it fits")


# -- a cluster that may grow ------------------------------------------------------------------------------------------


def _ask_for_nodes(needs: Sequence[Need]) -> None:
    """Ask the cluster's autoscaler, by one placement group; raises ClusterError where nothing comes of it."""
    before, lacking = _autoscaler(), [need for need in needs if not _fit([need])] or needs
    bundles = [(bundle, need.labels) for need in needs for bundle in need.bundles]
    group = _group([bundle for bundle, _ in bundles], [labels for _, labels in bundles])
    try:
        until = time.monotonic() + ANSWER_S
        while not group.wait(LOOK_S):
            found = _autoscaler()
            if not found.can_grow or group.id.hex() in found.refused or time.monotonic() > until:
                raise ClusterError(_nobody_has(lacking, found))
            if found.starts_nodes and (not found.rounds or found.rounds > before.rounds + 1):  # it has seen the group
                for need in lacking:
                    say(f"{need.key}: the cluster starts nodes for {_in_words(need)}")
                return
    finally:
        ray.util.remove_placement_group(group)


@dataclass(frozen=True)
class _Autoscaler:
    can_grow: bool
    starts_nodes: bool
    rounds: int = 0
    """How often it has looked; 0 where it does not say."""

    refused: str = ""
    """Names the placement groups for which it has no node."""


def _autoscaler() -> _Autoscaler:
    """What the cluster's autoscaler is at; waits for its first word where the cluster is young.

    The head of a cluster without one reports too, within seconds of its start.
    """
    until = time.monotonic() + REPORT_S
    while (found := _reported()) is None and time.monotonic() < until:
        time.sleep(LOOK_S)
    return found or _Autoscaler(can_grow=False, starts_nodes=False)


def _reported() -> _Autoscaler | None:
    """Version 2 says what it cannot fulfil; version 1 keeps that to itself."""
    from ray import _raylet  # nothing public says it
    from ray.core.generated import autoscaler_pb2

    raylet: Any = _raylet
    messages: Any = autoscaler_pb2
    client = raylet.GcsClient(address=ray.get_runtime_context().gcs_address)
    second = messages.GetClusterStatusReply.FromString(client.get_cluster_status()).autoscaling_state
    if second.autoscaler_state_version:
        refused = " ".join(request.details for request in second.infeasible_gang_resource_requests)
        starts_nodes = bool(second.pending_instance_requests or second.pending_instances)
        return _Autoscaler(True, starts_nodes, second.autoscaler_state_version, refused)
    report = json.loads(client.internal_kv_get(b"__autoscaling_status", None) or b"{}").get("autoscaler_report")
    if report is None:
        return None
    # Without an autoscaler each node is a type of its own, called node_<id>.
    can_grow = not all(str(name).startswith("node_") for name in report.get("active_nodes", {}))
    return _Autoscaler(can_grow, bool(report.get("pending_launches") or report.get("pending_nodes")))


def _nobody_has(needs: Sequence[Need], found: _Autoscaler) -> str:
    nodes = _nodes()
    there = Counter(map(str, nodes))
    has = "; ".join(f"{count} with {node}" for node, count in there.items())
    grows = (
        "its autoscaler knows no type of node for it, or has as many as it may; see available_node_types and "
        "max_workers in cluster.yaml, and `ray status`"
        if found.can_grow
        else "nothing is added to it: it was started without an autoscaler"
    )
    needed = "; ".join(f"{need.key}: {need.count} need {_in_words(need)} each" for need in needs)
    return f"{needed}. The cluster has {len(nodes)} nodes ({has}), and {grows}"


def _in_words(need: Need) -> str:
    parts = [f"{amount:g} {resource}s ({key})" for resource, (key, amount) in need.each.items() if amount]
    further = f", and {FURTHER}," if need.has_further_gpus else ""
    return " and ".join(parts) + further + (f" on a node with {shown(need.labels)}" if need.labels else "")


def shown(labels: Mapping[str, str]) -> str:
    """For people: `a=b, c=d`."""
    return ", ".join(f"{name}={value}" for name, value in labels.items())


# -- what the stages ask for ------------------------------------------------------------------------------------------


def teacher_gpus(config: RunConfig, engine: BaseEngineConfig) -> int:
    """GPUs of one of its engines: none for a teacher that is named and not asked, as nothing of it is loaded."""
    return engine.num_gpus if config.asks_teacher else 0


def teacher_needs(config: RunConfig) -> list[Need]:
    """The engines that have to be there for a generation to start: the teacher's, or those of each of its members."""
    needs = []
    for key, engine in config.teachers.items():
        each = {"CPU": (f"{key}.cpus", engine.cpus), "GPU": (f"{key}.gpus", float(teacher_gpus(config, engine)))}
        is_spread = isinstance(engine, VllmEngineConfig)
        needs.append(Need(f"{key}.replicas", engine.replicas.min, each, engine.node_labels, is_spread))
    return needs


def engine_options(engine: BaseEngineConfig, num_gpus: int) -> dict[str, Any]:
    """What one engine actor asks Ray for.

    One GPU or none: the actor itself holds it. More: a placement group of one bundle per GPU, in which vLLM's own Ray
    executor puts one worker per bundle (`tensor_parallel_size` x `pipeline_parallel_size`); made anew for each actor,
    by the function under `ray_remote_args_fn`. It is there until the block of `placement_groups_removed` ends.
    """
    if num_gpus <= 1 or not isinstance(engine, VllmEngineConfig):
        return {"num_cpus": engine.cpus, "num_gpus": num_gpus, **on_nodes(engine.node_labels)}
    # Looked up here: Ray Data calls the function in a thread of its own, which does not know the block.
    group = partial(_in_placement_group, num_gpus, engine.cpus, engine.node_labels, _kept_groups.get())
    return {"num_gpus": 0, "ray_remote_args_fn": group}


@contextlib.contextmanager
def placement_groups_removed() -> Iterator[None]:
    """Afterwards the GPUs of engines on several are free: their groups do not go with their actors, but with the job.

    `cluster.connected` is such a block, so every stage gives back what it took.
    """
    groups: list[Any] = []
    outer = _kept_groups.set(groups)
    try:
        yield
    finally:
        _kept_groups.reset(outer)
        for group in groups:
            ray.util.remove_placement_group(group)


def of_one_actor(options: Mapping[str, Any]) -> dict[str, Any]:
    """`engine_options` for an actor that is started by itself, without Ray Data, which would call the function."""
    own = {name: value for name, value in options.items() if name != "ray_remote_args_fn"}
    return own | options.get("ray_remote_args_fn", dict)()


def on_nodes(labels: Mapping[str, str]) -> dict[str, Any]:
    """Option of a task or actor that may run on nodes with these labels only."""
    return {"label_selector": dict(labels)} if labels else {}


def beside_the_driver() -> dict[str, Any]:
    """Options of an actor without which the driver cannot go on: it ends with the driver's node, and with no other."""
    node = ray.get_runtime_context().get_node_id()
    return {"num_cpus": 0, "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False)}


def gpu_bundles(num_gpus: int, cpus: float) -> list[dict[str, float]]:
    """Of an engine on several GPUs; the first one has the engine's own CPUs."""
    return [{"GPU": 1.0, "CPU": cpus}] + [{"GPU": 1.0, "CPU": 1.0}] * (num_gpus - 1)


def _in_placement_group(num_gpus: int, cpus: float, labels: Mapping[str, str], kept: list[Any]) -> dict[str, Any]:
    kept.append(_group(gpu_bundles(num_gpus, cpus), [labels] * num_gpus))
    strategy = PlacementGroupSchedulingStrategy(
        kept[-1],
        placement_group_bundle_index=0,
        placement_group_capture_child_tasks=True,
    )
    return {"num_cpus": cpus, "scheduling_strategy": strategy}


def _group(bundles: list[dict[str, float]], labels: Sequence[Mapping[str, str]]) -> Any:
    """A placement group; `labels` are those of the nodes that may hold each bundle."""
    selectors: Any = [dict(own) for own in labels] if any(labels) else None
    return ray.util.placement_group(bundles, strategy="PACK", bundle_label_selector=selectors)


def student_gpus(config: RunConfig) -> int:
    """GPUs of a process that trains or runs the student.

    As the config says; else none for the built-in model, and one where its nodes have any or will: a cluster at rest
    is asked for one.
    """
    if config.train.gpus_per_worker is not None:
        return config.train.gpus_per_worker
    if config.student.model == DEMO_MODEL:
        return 0
    key = "train.gpus_per_worker"
    try:
        require(Need(key, 1, {"GPU": (key, 1.0)}, config.train.node_labels))
    except (ConfigError, ClusterError):
        return 0
    return 1
