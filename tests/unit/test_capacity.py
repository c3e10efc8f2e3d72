"""What stages ask of nodes, and what is said where it will never come. Ray is not started: its nodes are given."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill_ray.config import RunConfig, VllmEngineConfig, parse_config
from distill_ray.errors import ClusterError, ConfigError
from distill_ray.pipeline import capacity
from distill_ray.pipeline.capacity import (
    Need,
    engine_options,
    of_one_actor,
    placement_groups_removed,
    require,
    require_first,
    room,
    student_gpus,
    teacher_needs,
)
from distill_ray.pipeline.evaluate import required_gpus

AUTOSCALER = capacity._autoscaler  # as it is: most tests say themselves what it finds
HERE = {"ray.io/node-id": "f00"}


def node(cpus: float, gpus: float = 0.0, **labels: str) -> dict[str, Any]:
    return {"Alive": True, "Resources": {"CPU": cpus, "GPU": gpus}, "Labels": {**HERE, **labels}}


def need(count: int, cpus: float = 1.0, gpus: float = 0.0, *, key: str = "teacher.replicas", **kwargs: Any) -> Need:
    return Need(key, count, {"CPU": ("teacher.cpus", cpus), "GPU": ("teacher.gpus", gpus)}, **kwargs)


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    monkeypatch.setattr(capacity.ray, "nodes", lambda: found)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return found


@pytest.fixture
def fixed_cluster(nodes: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """One without an autoscaler, whose nodes are `nodes`; placement groups stay pending."""

    class Pending:
        def wait(self, seconds: float) -> bool:
            return False

    monkeypatch.setenv("RAY_ADDRESS", "there")
    monkeypatch.setattr(capacity, "_autoscaler", lambda: capacity._Autoscaler(can_grow=False, starts_nodes=False))
    monkeypatch.setattr(capacity, "_group", lambda bundles, labels: Pending())
    monkeypatch.setattr(capacity.ray.util, "remove_placement_group", lambda group: None)
    return nodes


def test_what_fits_is_not_talked_about(nodes: list[dict[str, Any]]) -> None:
    nodes += [node(4, 1), {**node(64, 8), "Alive": False}]
    require(need(4), need(0, 100), need(1, 0.0, 1.0, key="train.workers"))
    with pytest.raises(ConfigError):
        require(need(5))


def test_a_machine_with_too_little_is_told_what_and_what_to_lower(nodes: list[dict[str, Any]]) -> None:
    nodes.append(node(2))
    with pytest.raises(ConfigError) as caught:
        require(need(1, 1.0, 8.0))
    assert str(caught.value) == (
        "teacher.replicas: 1 with teacher.gpus 8 need 8 GPUs and this machine has 0; lower teacher.replicas or "
        "teacher.gpus (0 runs on the CPU)"
    )


def test_a_machine_with_too_few_cpus_beside_its_gpus_is_told_so(nodes: list[dict[str, Any]]) -> None:
    nodes.append(node(4, 4))
    require(need(1, 1.0, 4.0, spread=True))
    with pytest.raises(ConfigError) as caught:
        require(need(1, 2.0, 4.0, spread=True))
    assert str(caught.value) == (
        "teacher.replicas: 1 with teacher.cpus 2 need 5 CPUs (1 CPU for each further GPU) and this machine has 4; "
        "lower teacher.replicas or teacher.cpus"
    )
    nodes[:] = [node(2, 4)]
    with pytest.raises(ConfigError, match=r"1 with serve\.teacher\.gpus 4 need 4 CPUs \(1 CPU for each further GPU\)"):
        require(Need("serve.teacher.replicas", 1, {"GPU": ("serve.teacher.gpus", 4.0)}, spread=True))


def test_what_fits_alone_and_not_together_is_said_so(nodes: list[dict[str, Any]]) -> None:
    nodes.append(node(4))
    reward = Need("recipe.reward.replicas", 2, {"CPU": ("recipe.reward.cpus", 1.5)})
    require(need(2))
    require(reward)
    with pytest.raises(ConfigError, match=r"^recipe\.reward\.replicas: 2 .*cpus 1\.5 beside teacher\.replicas"):
        require(need(2), reward)


def test_a_label_is_nothing_that_one_machine_has(nodes: list[dict[str, Any]]) -> None:
    nodes.append(node(64, 8))
    with pytest.raises(ConfigError, match="asks for a node with stage=teacher, and this machine has no such label"):
        require(need(1, labels={"stage": "teacher"}))


def test_a_node_has_room_or_not_whatever_the_sum_is(fixed_cluster: list[dict[str, Any]]) -> None:
    fixed_cluster += [node(4, 1, stage="teacher"), node(4, 1, stage="teacher"), node(32)]
    require(need(2, 4.0, 1.0, labels={"stage": "teacher"}))
    require(need(1, 1.0, 2.0, spread=True))  # a GPU here and one there
    with pytest.raises(ClusterError) as caught:
        require(need(1, 1.0, 2.0))
    assert str(caught.value) == (
        "teacher.replicas: 1 need 1 CPUs (teacher.cpus) and 2 GPUs (teacher.gpus) each. The cluster has 3 nodes (2 "
        "with 4 CPUs, 1 GPUs (stage=teacher); 1 with 32 CPUs), and nothing is added to it: it was started without an "
        "autoscaler"
    )
    with pytest.raises(ClusterError, match="on a node with stage=student"):
        require(need(1, labels={"stage": "student"}))
    with pytest.raises(ClusterError, match=r"3 GPUs \(teacher.gpus\), and 1 CPU for each further GPU, each\. The clu"):
        require(need(1, 1.0, 3.0, spread=True))


def test_the_first_way_with_room_is_taken_and_the_last_is_the_one_that_an_error_is_about(
    nodes: list[dict[str, Any]],
) -> None:
    nodes.append(node(5))
    four, two, one = need(4, 2.0), need(2, 2.0), need(1, 2.0)
    assert require_first(four, two, one) is two
    assert require_first(one) is one
    with pytest.raises(ConfigError, match=r"^teacher\.replicas: 3 with teacher\.cpus 2"):
        require_first(four, need(3, 2.0))


def test_a_cluster_that_does_not_grow_is_taken_as_it_is(fixed_cluster: list[dict[str, Any]]) -> None:
    fixed_cluster += [node(3), node(3)]  # one of two CPUs on each, whatever the sum is
    assert require_first(need(4, 2.0), need(2, 2.0), need(1, 2.0)).count == 2
    with pytest.raises(ClusterError, match="1 need 4 CPUs"):
        require_first(need(2, 4.0), need(1, 4.0))


def test_a_cluster_that_grows_is_asked_for_the_most_first(
    fixed_cluster: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its autoscaler starts up to three nodes, of one place each."""
    asked: list[int] = []

    class Gang:
        def __init__(self, count: int) -> None:
            self.count, self.id = count, self
            asked.append(count)

        def wait(self, seconds: float) -> bool:
            return False

        def hex(self) -> str:
            return f"gang-of-{self.count}"

    refusing = capacity._Autoscaler(can_grow=True, starts_nodes=True, rounds=1, refused="gang-of-8 gang-of-4")
    rounds = iter(range(1, 100))
    monkeypatch.setattr(capacity, "_autoscaler", lambda: dataclasses.replace(refusing, rounds=next(rounds)))
    monkeypatch.setattr(capacity, "_group", lambda bundles, labels: Gang(len(bundles)))
    assert require_first(*(need(count) for count in (8, 4, 2, 1))).count == 2
    assert asked == [8, 4, 2]


def test_a_cluster_that_grows_is_asked_for_all_that_a_stage_needs_at_once(
    fixed_cluster: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    class Gang:
        def __init__(self, bundles: Any, labels: Any) -> None:
            asked.append((bundles, labels))

        def wait(self, seconds: float) -> bool:
            return True

    monkeypatch.setattr(capacity, "_group", Gang)
    fixed_cluster.append(node(1))
    here, there = need(1), need(2, 1.0, 1.0, key="recipe.reward.replicas", labels={"stage": "reward"})
    require(here, there)
    [(bundles, labels)] = asked
    assert bundles == [{"CPU": 1.0}, *[{"CPU": 1.0, "GPU": 1.0}] * 2]
    assert labels == [{}, *[{"stage": "reward"}] * 2]


def test_a_cluster_is_told_what_it_has_no_node_for_or_all_that_has_none_together(
    fixed_cluster: list[dict[str, Any]],
) -> None:
    fixed_cluster.append(node(4))
    teacher, reward = need(1, 3.0), need(1, 2.0, key="recipe.reward.replicas")
    with pytest.raises(
        ClusterError, match=r"^teacher\.replicas: 1 need 3 .* each; recipe\.reward\.replicas: 1 need 2 "
    ):
        require(teacher, reward)
    with pytest.raises(ClusterError, match=r"^recipe\.reward\.replicas: 1 need 2 CPUs .* and 1 GPUs"):
        require(teacher, need(1, 2.0, 1.0, key="recipe.reward.replicas"))


def test_a_young_cluster_is_not_taken_for_one_without_an_autoscaler(
    fixed_cluster: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    reports = iter([None, None, capacity._Autoscaler(can_grow=True, starts_nodes=False)])
    monkeypatch.setattr(capacity, "_autoscaler", AUTOSCALER)
    monkeypatch.setattr(capacity, "_reported", lambda: next(reports))
    monkeypatch.setattr(capacity, "LOOK_S", 0.0)
    assert room(need(1), 10) == 10
    monkeypatch.setattr(capacity, "_reported", lambda: None)
    monkeypatch.setattr(capacity, "REPORT_S", 0.0)
    assert room(need(1), 10) == 0


def test_room_counts_what_is_there_beside_others(nodes: list[dict[str, Any]]) -> None:
    nodes.append(node(8))
    assert room(need(1, 2.0), 10) == 4
    assert room(need(1, 2.0), 3) == 3
    assert room(need(1, 2.0), 10, [need(3, 1.0, key="recipe.reward")]) == 2


def test_a_cluster_that_grows_has_room_for_all(
    fixed_cluster: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert room(need(1, 2.0), 10) == 0
    monkeypatch.setattr(capacity, "_autoscaler", lambda: capacity._Autoscaler(can_grow=True, starts_nodes=False))
    assert room(need(1, 2.0), 10) == 10


@given(
    sizes=st.lists(st.tuples(st.integers(0, 16), st.integers(0, 4)), max_size=5),
    cpus=st.integers(1, 4),
    gpus=st.integers(0, 2),
    most=st.integers(0, 12),
)
def test_there_is_room_for_as_many_as_may_be_required_and_for_no_more(
    sizes: list[tuple[int, int]], cpus: int, gpus: int, most: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(capacity.ray, "nodes", lambda: [node(*size) for size in sizes])
        patch.delenv("RAY_ADDRESS", raising=False)
        count = room(need(1, cpus, gpus), most)
        require(need(count, cpus, gpus))
        assert count <= most
        if count < most:
            nodes = capacity._nodes()
            fits = sum(min(n.resources["CPU"] // cpus, n.resources["GPU"] // gpus if gpus else 99) for n in nodes)
            assert count == fits


def test_an_engine_asks_for_its_labels_on_its_node_and_on_all_of_several() -> None:
    raw = {"recipe": {"type": "context", "context": {"text": "."}, "query": "q"}, "data": {"source": "x"}}
    one = parse_config({**raw, "teacher": {"type": "vllm", "gpus": 1, "node_labels": {"stage": "teacher"}}})
    assert engine_options(one.teacher, 1) == {"num_cpus": 1.0, "num_gpus": 1, "label_selector": {"stage": "teacher"}}
    four = parse_config({**raw, "teacher": {"type": "vllm", "gpus": 4, "cpus": 2, "replicas": 2}})
    bundles = teacher_needs(four)[0].bundles
    assert bundles == ([{"GPU": 1.0, "CPU": 2.0}] + [{"GPU": 1.0, "CPU": 1.0}] * 3) * 2


def test_a_placement_group_ends_with_the_block_whose_engine_it_was_made_for(monkeypatch: pytest.MonkeyPatch) -> None:
    removed: list[int] = []
    made = iter(range(9))
    monkeypatch.setattr(capacity, "_group", lambda bundles, labels: next(made))
    monkeypatch.setattr(capacity.ray.util, "remove_placement_group", removed.append)
    engine = VllmEngineConfig(gpus=2)
    with placement_groups_removed():
        options = engine_options(engine, 2)
        with placement_groups_removed(), ThreadPoolExecutor(1) as ray_data:
            of_one_actor(engine_options(engine, 2))
            ray_data.submit(of_one_actor, options).result()  # of the outer block, wherever it is called
        assert removed == [0]
    assert removed == [0, 1]


def student(model: str = "small", **train: Any) -> RunConfig:
    raw = {"recipe": {"context": {"text": "."}}, "data": {"source": "x"}, "teacher": {"type": "fake"}}
    return parse_config({**raw, "student": {"model": model}, "train": train})


ITS_NODES = {"node_labels": {"stage": "student"}}


def test_a_student_runs_on_a_gpu_where_its_own_nodes_have_one(fixed_cluster: list[dict[str, Any]]) -> None:
    fixed_cluster += [node(8, stage="student"), node(8, 1, stage="teacher")]
    assert [student_gpus(student(**labels)) for labels in ({}, ITS_NODES)] == [1, 0]
    assert student_gpus(student("demo")) == 0


@pytest.mark.parametrize("gpus", [0, 1])
def test_a_student_runs_on_what_the_config_says(gpus: int, fixed_cluster: list[dict[str, Any]]) -> None:
    fixed_cluster.append(node(8, 1 - gpus))
    assert [student_gpus(student(model, gpus_per_worker=gpus)) for model in ("small", "demo")] == [gpus, gpus]


@pytest.mark.parametrize(("refused", "gpus"), [("", 1), ("gpu", 0)], ids=["has a type of node", "has none"])
def test_a_cluster_at_rest_is_asked_for_a_students_gpu(
    refused: str, gpus: int, fixed_cluster: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    class Group:
        def __init__(self, *bundles_and_labels: Any) -> None:
            self.id = self
            asked.append(bundles_and_labels)

        def wait(self, seconds: float) -> bool:
            return False

        def hex(self) -> str:
            return "gpu"

    resting = capacity._Autoscaler(can_grow=True, starts_nodes=not refused, refused=refused)
    monkeypatch.setattr(capacity, "_autoscaler", lambda: resting)
    monkeypatch.setattr(capacity, "_group", Group)
    fixed_cluster.append(node(2))
    assert student_gpus(student("demo")) == 0
    assert not asked
    assert student_gpus(student(**ITS_NODES)) == gpus
    assert asked == [([{"GPU": 1.0}], [{"stage": "student"}])]


def test_evaluation_asks_for_what_its_nodes_have_and_says_what_they_have_not(
    fixed_cluster: list[dict[str, Any]],
) -> None:
    fixed_cluster += [node(8, stage="student"), node(8, 1, stage="teacher")]
    assert required_gpus(student(gpus_per_worker=0, **ITS_NODES)) == 0
    with pytest.raises(ClusterError, match=r"^evaluate\.engine: 1 need .* 1 GPUs \(train\.gpus_per_worker\) on a node"):
        required_gpus(student(gpus_per_worker=1, **ITS_NODES))
