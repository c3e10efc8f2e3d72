"""Clusters of several raylets on this machine, jobs submitted to them, and one that grows by its own autoscaler."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray

from benchmarks.clusters import Cluster, Node, fixed, growing
from distill_ray.demo import language_rows
from distill_ray.pipeline.folder import RunFolder
from tests.integration.running_service import free_port, until

ROOT = Path(__file__).parents[2]
RAY = str(Path(sys.executable).parent / "ray")
STAGE = "distill-ray/stage"
CONTEXT = {"type": "context", "context": {"text": "Answer."}, "query": "{{ text }}"}


@pytest.fixture(scope="module")
def short_folder() -> Iterator[Path]:
    """Ray's sockets allow no long path."""
    folder = Path(tempfile.mkdtemp(prefix="cl", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def submit(
    cluster: Cluster, job: str, *arguments: str, named: str | None = None, ships: bool = True
) -> subprocess.CompletedProcess[str]:
    """As the docstrings in jobs/ say; one with a name is not waited for.

    Pretend nodes share a disk, on which each would unpack what is shipped anew.
    """
    command = [RAY, "job", "submit", "--address", cluster.job_server]
    command += ["--no-wait", "--submission-id", named] if named is not None else []
    command += ["--runtime-env", "jobs/runtime_env.yaml"] if ships else []
    command += ["--", "python", f"jobs/{job}.py" if ships else str(ROOT / "jobs" / f"{job}.py"), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)


def said(done: subprocess.CompletedProcess[str]) -> str:
    """In one line, as a terminal's width breaks it anywhere."""
    return " ".join((done.stdout + done.stderr).split())


def write_config(path: Path, num_rows: int = 60, **sections: Any) -> Path:
    rows = [{"text": f"number {n}", "split": "validation" if n % 10 == 0 else "train"} for n in range(num_rows)]
    path.with_suffix(".jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    raw = {"recipe": CONTEXT, "data": {"source": str(path.with_suffix(".jsonl"))}, **sections}
    path.write_text(json.dumps(raw))
    return path


# -- a cluster that grows ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def growing_cluster(short_folder: Path) -> Iterator[Cluster]:
    types = {
        "cpu": Node(cpus=2, labels={STAGE: "cpu"}),
        "teacher": Node(cpus=2, gpus=1, labels={STAGE: "teacher"}),
        "student": Node(cpus=4, gpus=4, labels={STAGE: "student"}, most=1),
    }
    with growing(short_folder / "g", Node(), types, jobs=True) as cluster:
        yield cluster


def nodes_of(cluster: Cluster) -> Counter[str]:
    """How many nodes of each type there are, but the head."""
    return Counter(labels[STAGE] for labels in cluster.labels() if STAGE in labels)


@contextmanager
def watched(cluster: Cluster) -> Iterator[list[Counter[str]]]:
    """What nodes there were, as they came and went."""
    seen: list[Counter[str]] = []
    stop = threading.Event()

    def look() -> None:
        while not stop.wait(0.5):
            now = nodes_of(cluster)
            if not seen or seen[-1] != now:
                seen.append(now)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        stop.set()
        thread.join()


def test_teacher_nodes_come_with_the_work_and_go_after_it(growing_cluster: Cluster, tmp_path: Path) -> None:
    teacher = {"type": "fake", "gpus": 1, "latency_s": 1.0, "max_concurrency": 10, "node_labels": {STAGE: "teacher"}}
    config = write_config(
        tmp_path / "config.json",
        200,
        teacher={**teacher, "replicas": {"min": 1, "max": 2}},
        generate={"rows_per_partition": 20},
    )
    assert not nodes_of(growing_cluster)
    with watched(growing_cluster) as seen:
        done = submit(growing_cluster, "generate", str(config), "--run-dir", str(tmp_path / "run"), ships=False)
        assert done.returncode == 0, said(done)
        until(lambda: not nodes_of(growing_cluster))
    assert "the cluster starts nodes for" in said(done)
    assert max(now["teacher"] for now in seen) == 2
    assert not any(now["cpu"] or now["student"] for now in seen), seen  # what nobody asked for did not come
    assert RunFolder(tmp_path / "run").manifest()["rows_with_examples"] == 200


def test_a_node_that_no_type_offers_is_named_to_who_submitted(growing_cluster: Cluster, tmp_path: Path) -> None:
    teacher = {"type": "fake", "gpus": 1, "node_labels": {STAGE: "nobody"}}
    config = write_config(tmp_path / "config.json", teacher=teacher)
    done = submit(growing_cluster, "generate", str(config), "--run-dir", str(tmp_path / "run"), ships=False)
    assert done.returncode != 0
    assert f"1 GPUs (teacher.gpus) on a node with {STAGE}=nobody" in said(done)
    assert "its autoscaler knows no type of node for it" in said(done)
    assert not nodes_of(growing_cluster)


# -- several raylets ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_nodes(short_folder: Path) -> Iterator[Cluster]:
    """A head that does no work, and two nodes of two CPUs."""
    with fixed(short_folder / "f", Node(), [Node(cpus=2), Node(cpus=2)], jobs=True) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def run_on_two_nodes(two_nodes: Cluster, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Config and folder of a run, stage by stage; engines and training workers need both nodes."""
    folder = tmp_path_factory.mktemp("run")
    rows = [{"text": row["text"], "split": "train" if n % 5 else "test"} for n, row in enumerate(language_rows(40))]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = folder / "config.json"
    raw = {
        "recipe": {
            "type": "context",
            "context": {"file": str(ROOT / "distill_ray" / "demo" / "instruction.md")},
            "query": "{{ text }}",
            "parse": {"regex": r"Final Answer: (\w+)"},
        },
        "data": {"source": str(folder / "rows.jsonl")},
        "generate": {"rows_per_partition": 10},
        "teacher": {"type": "hf", "model": "demo", "cpus": 2, "replicas": 2, "sampling": {"max_tokens": 64}},
        "student": {"model": "demo"},
        "train": {
            "max_steps": 2,
            "workers": 2,
            "cpus_per_worker": 2,
            "gradient_accumulation": 2,
            "max_tokens_per_batch": 256,
        },
        "evaluate": {"engine": "hf"},
    }
    config.write_text(json.dumps(raw))
    for stage in ("generate", "train", "evaluate"):
        done = submit(two_nodes, stage, str(config), "--run-dir", str(folder / "run"))
        assert done.returncode == 0, said(done)
    return config, folder / "run"


@pytest.mark.slow
def test_engines_and_training_workers_span_nodes(run_on_two_nodes: tuple[Path, Path]) -> None:
    _, folder = run_on_two_nodes
    engines = list((folder / "logs").glob("engine-*.log"))
    assert len(engines) == 2  # each takes a node's two CPUs
    manifest = RunFolder(folder).manifest()
    assert manifest["rows_in"] == manifest["rows_with_examples"] + manifest["rows_rejected"] == 40
    assert manifest["train"]["steps"] == 2
    assert "student_after" in RunFolder(folder).read_json("eval", "metrics.json")


@pytest.mark.slow
def test_the_whole_run_as_one_job_finds_its_stages_done(
    two_nodes: Cluster, run_on_two_nodes: tuple[Path, Path]
) -> None:
    config, folder = run_on_two_nodes
    done = submit(two_nodes, "run", str(config), "--run-dir", str(folder))
    assert done.returncode == 0, said(done)
    assert "teacher calls 0, replayed 40" in said(done)
    assert "train: already done with this configuration" in said(done)


@pytest.mark.slow
def test_four_workers_on_two_nodes_take_the_steps_of_two(
    two_nodes: Cluster, run_on_two_nodes: tuple[Path, Path], tmp_path: Path
) -> None:
    config, folder = run_on_two_nodes
    shutil.copytree(folder, tmp_path / "run")
    settings = ["train.workers=4", "train.cpus_per_worker=1", "train.gradient_accumulation=1"]
    overrides = [word for setting in settings for word in ("--set", setting)]
    done = submit(two_nodes, "train", str(config), "--run-dir", str(tmp_path / "run"), *overrides)
    assert done.returncode == 0, said(done)
    before, after = (_curve(run) for run in (folder, tmp_path / "run"))
    assert [line["tokens"] for line in after] == [line["tokens"] for line in before]
    for two, four in zip(before, after, strict=True):
        assert four["loss"] == pytest.approx(two["loss"], rel=1e-4)


def _curve(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def test_what_is_wrong_with_a_job_reaches_who_submitted_it(two_nodes: Cluster, tmp_path: Path) -> None:
    config = write_config(tmp_path / "config.json", teacher={"type": "fake", "gpus": 1})
    done = submit(two_nodes, "generate", str(config), "--run-dir", str(tmp_path / "run"))
    assert done.returncode != 0
    assert "teacher.replicas: 1 need 1 CPUs (teacher.cpus) and 1 GPUs (teacher.gpus) each" in said(done)
    assert "The cluster has 3 nodes" in said(done)
    assert "started without an autoscaler" in said(done)
    assert "Traceback" not in said(done)


def generate(config: Path, run: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "distill_ray", "generate", str(config), "--run-dir", str(run)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)


def test_a_package_that_a_node_lacks_is_named(two_nodes: Cluster, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Lacks:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] == 'distill_ray':\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Lacks())\n"
    )
    lacking = two_nodes.add(Node(cpus=1, labels={STAGE: "lacking"}), {"PYTHONPATH": str(tmp_path)})
    config = write_config(tmp_path / "config.json", teacher={"type": "fake", "node_labels": {STAGE: "lacking"}})
    done = generate(config, tmp_path / "run")
    os.killpg(lacking.pid, 9)
    assert done.returncode != 0
    assert "a worker process cannot import `distill_ray`: install it on every node" in said(done)


PRETEND = """
import json, sys
from ray._raylet import GcsClient
gcs = GcsClient(address=sys.argv[1])
said = json.loads(gcs.internal_kv_get(b"CLUSTER_METADATA", b"cluster"))
said["python_version"] = sys.argv[2]
gcs.internal_kv_put(b"CLUSTER_METADATA", json.dumps(said).encode(), True, b"cluster")
"""


def test_another_python_than_the_clusters_is_named(two_nodes: Cluster, tmp_path: Path) -> None:
    def has(version: str) -> None:
        """Make the cluster say so."""
        subprocess.run([sys.executable, "-c", PRETEND, f"127.0.0.1:{two_nodes.port}", version], check=True)

    has("3.10.1")
    try:
        done = generate(write_config(tmp_path / "config.json", teacher={"type": "fake"}), tmp_path / "run")
    finally:
        has(platform.python_version())
    assert done.returncode != 0
    assert f"The cluster was started with: Ray: {ray.__version__} Python: 3.10.1 This process" in said(done)
    assert "use the cluster's versions here, or submit a job" in said(done)
    assert "Traceback" not in said(done)


def test_the_service_and_the_flywheel_are_jobs_too(two_nodes: Cluster, tmp_path: Path) -> None:
    port = free_port()
    student = {"type": "fake", "answer": "{{ query }}", "cpus": 0.1}
    serve = {
        "folder": str(tmp_path / "service"),
        "port": port,
        "student": student,
        "router": {"replicas": 2, "cpus": 1.5},
    }
    config = write_config(tmp_path / "config.json", name="jobs", teacher={"type": "fake", "cpus": 0.1}, serve=serve)
    started = submit(two_nodes, "serve", str(config), named="house")
    assert started.returncode == 0, said(started)
    url = f"http://127.0.0.1:{port}"
    try:
        body = {"messages": [{"role": "user", "content": "hello"}]}
        until(lambda: status(url)["num_routers"] == 2)  # one on each node
        answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)
        assert answer.json()["choices"][0]["message"]["content"] == "hello"
        until(lambda: status(url)["figures"]["spool_bytes"] == 0)
        cycle = submit(two_nodes, "flywheel", str(config))
        assert cycle.returncode == 0, said(cycle)
        snapshot = json.loads((tmp_path / "service" / "cycles" / "0001" / "snapshot.json").read_text())
        assert (snapshot["outcome"], snapshot["new_pairs"]) == ("too_few", 1)  # what the service's job collected
    finally:
        subprocess.run(
            [RAY, "job", "stop", "--address", two_nodes.job_server, "house"], capture_output=True, check=True
        )


def status(url: str) -> dict[str, Any]:
    return httpx.get(f"{url}/status.json", timeout=60).raise_for_status().json()


# -- a node that dies ------------------------------------------------------------------------------------------------


def test_a_node_that_dies_under_a_generation_costs_no_row(two_nodes: Cluster, tmp_path: Path) -> None:
    """Whichever it is but the driver's: what counts the rows is on that one. Five engines fill the nodes' five CPUs."""
    teacher = {"type": "fake", "cpus": 1, "latency_s": 0.5, "max_concurrency": 5, "replicas": 5}
    config = write_config(tmp_path / "config.json", 300, teacher=teacher, generate={"rows_per_partition": 10})
    extra = two_nodes.add(Node(cpus=1))
    command = [sys.executable, "-m", "distill_ray", "generate", str(config), "--run-dir", str(tmp_path / "run")]
    with open(tmp_path / "said", "wb") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output)
    done = tmp_path / "run" / "done"
    until(lambda: done.exists() and len(list(done.glob("*.json"))) >= 6)
    os.killpg(extra.pid, 9)
    assert process.wait(600) == 0, (tmp_path / "said").read_text()
    folder = RunFolder(tmp_path / "run")
    ids = [i for table in folder.read_tables("examples", columns=["row_id"]) for i in table["row_id"].to_pylist()]
    assert len(ids) == len(set(ids)) == 300
    assert folder.manifest()["rows_rejected"] == 0
