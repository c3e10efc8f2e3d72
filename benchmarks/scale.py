"""How generation scales past this machine: with an engine that answers as slowly as a GPU would, and computes nothing.

    python benchmarks/scale.py replicas --out scale.json   # 1 to 32 engines on pretend GPUs: rows/s over ideal
    python benchmarks/scale.py rows                        # 1 M rows, the driver killed half-way and started again
    python benchmarks/scale.py requests                    # what a run asks of an object store, by kind
    python benchmarks/scale.py nodes --plot nodes.svg      # pretend GPU nodes that come with a job and go after it

replicas: each engine answers 10 rows a second (64 in flight, 6.4 s each), so that the cores here are not what limits 32
of them. Speed is taken between a quarter and three quarters of the rows, when all engines are at work. With more
--rows-per-s the cores become the limit: there the curve bends.

rows: 256 in flight per engine and no waiting, so the cores here are the limit: what is measured is the driver's memory,
the speed of planning, and how long a second start takes until it asks for new rows. With --calls 3 each row is a draft,
a critique and a revision.

requests: an S3 server on loopback that counts. Two runs of different length give what each partition costs.

Real raylets on loopback; GPUs and nodes are pretend ones.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from werkzeug.serving import make_server

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.clusters import Cluster, Node, fixed, growing
from distill_ray.pipeline.folder import RunFolder

IN_FLIGHT = 64  # of one engine
STAGE = "distill-ray/stage"
OFTEN = """
from distill_ray.pipeline import progress
progress.LINE_EVERY_S = 0.5  # else a line at each tenth: too seldom to take a speed from
from distill_ray.cli import main
main()
"""


@dataclass
class Driver:
    """`distill-ray generate` at work, and what was seen of it."""

    process: subprocess.Popen[str]
    started: float = field(default_factory=time.monotonic)
    rows: list[tuple[float, int]] = field(default_factory=list)
    """(seconds, rows done) of each line that it prints."""
    new: list[tuple[float, int]] = field(default_factory=list)
    """(seconds, calls paid for)."""
    memory: list[tuple[float, float]] = field(default_factory=list)
    """(seconds, resident MiB)."""
    cpu_s: float = 0.0

    @classmethod
    def start(cls, config: Path, run: str | Path) -> Driver:
        """Start it, and two threads that watch."""
        command = [sys.executable, "-c", OFTEN, "generate", str(config), "--run-dir", str(run)]
        driver = cls(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True))
        threading.Thread(target=driver._listen, daemon=True).start()
        threading.Thread(target=driver._watch, daemon=True).start()
        return driver

    def _listen(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            now = time.monotonic() - self.started
            if found := re.match(r"generate: ([\d,]+)/[\d,]+ rows.*?, calls ([\d,]+)", line):
                self.rows.append((now, int(found[1].replace(",", ""))))
                self.new.append((now, int(found[2].replace(",", ""))))
            elif "error" in line:
                print(line, file=sys.stderr)

    def _watch(self) -> None:
        try:
            own = psutil.Process(self.process.pid)
            while self.process.poll() is None:
                if resident := own.memory_info().rss:  # none of one that was just killed
                    self.memory.append((time.monotonic() - self.started, resident / 2**20))
                self.cpu_s = sum(own.cpu_times()[:2])
                time.sleep(0.5)
        except psutil.NoSuchProcess:
            return

    def finish(self) -> float:
        """Wait for a good end; returns seconds from the start."""
        if self.process.wait(7200) != 0:
            raise SystemExit("the run failed")
        return time.monotonic() - self.started

    def until(self, so: Callable[[], bool]) -> None:
        """Wait for something to be so."""
        while not so():
            if self.process.poll() is not None:
                raise SystemExit("the run ended first")
            time.sleep(0.05)

    def speed(self, num_rows: int) -> float:
        """Rows per second between a quarter and three quarters of them."""
        middle = [(t, n) for t, n in self.rows if num_rows / 4 <= n <= num_rows * 3 / 4]
        if len(middle) < 2:
            raise SystemExit(f"{num_rows} rows are done too quickly to say how quickly; take more")
        (t0, n0), (t1, n1) = middle[0], middle[-1]
        return (n1 - n0) / (t1 - t0)

    def memory_at(self, *shares: float) -> list[int]:
        """Resident MiB when so many of all seconds have passed."""
        return [round(self.memory[int(share * (len(self.memory) - 1))][1]) for share in shares]


RECIPES = {
    1: {"type": "context", "context": {"text": "Answer."}, "query": "{{ text }}"},
    3: {"type": "self_critique", "query": "{{ text }}", "accept": {"type": "always"}},
}
"""By calls per row."""


def write_config(folder: Path, num_rows: int, rows_per_partition: int, teacher: dict[str, Any], calls: int = 1) -> Path:
    """Rows and a config (JSON is YAML)."""
    with pq.ParquetWriter(folder / "rows.parquet", pa.schema([("text", pa.string())])) as writer:
        for start in range(0, num_rows, 100_000):
            texts = [f"number {n} of the rows" for n in range(start, min(num_rows, start + 100_000))]
            writer.write_table(pa.table({"text": texts}))
    raw = {
        "recipe": RECIPES[calls],
        "data": {"source": str(folder / "rows.parquet")},
        "teacher": {"type": "fake", "cpus": 0.01, **teacher},
        "generate": {
            "rows_per_partition": rows_per_partition,
            "flush_s": 5.0,  # as on a store
            "max_reject_frac": 1.0,  # what is answered does not matter
        },
    }
    (folder / "config.json").write_text(json.dumps(raw))
    return folder / "config.json"


# -- more engines ------------------------------------------------------------------------------------------------------


def measure_replicas(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """See the module docstring."""
    found = []
    rate = options.rows_per_s
    for replicas in options.replicas:
        num_rows = int(replicas * rate * options.seconds)
        base = folder / f"r{replicas}"
        base.mkdir()
        slow = {"gpus": 1, "latency_s": IN_FLIGHT / rate, "max_concurrency": IN_FLIGHT, "replicas": replicas}
        config = write_config(base, num_rows, int(10 * rate), slow)
        with fixed(base / "c", Node(cpus=2, gpus=replicas)) as cluster:
            driver = Driver.start(config, base / "run")
            driver.until(lambda driver=driver, half=num_rows / 2: bool(driver.rows) and driver.rows[-1][1] >= half)
            in_store = object_store_use(cluster)
            psutil.cpu_percent()
            seconds = driver.finish()
            busy = psutil.cpu_percent()
        figures = RunFolder(base / "run").manifest()
        found.append(
            {
                "replicas": replicas,
                "rows_per_s_each": rate,
                "rows": num_rows,
                "of_ideal": round(driver.speed(num_rows) / (replicas * rate), 3),
                "first_engine_s": figures["seconds"]["engine_start"],
                "seconds": round(seconds, 1),
                "driver_cpu_share": round(driver.cpu_s / seconds, 3),
                "driver_MiB": driver.memory_at(0.25, 1.0),
                "cores_busy_second_half": round(busy / 100, 2),
                "object_store": in_store,
                "files_per_minute": round(sum(1 for _ in (base / "run").rglob("*.*")) / seconds * 60),
            }
        )
        print(json.dumps(found[-1]), flush=True)
        shutil.rmtree(base)
    return {"replicas": found}


def object_store_use(cluster: Cluster) -> str:
    """What Ray says that objects take, of how much."""
    ray = str(Path(sys.executable).parent / "ray")
    command = [ray, "status", "--address", f"127.0.0.1:{cluster.port}"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"(\S+) object_store_memory", said)
    assert found is not None, said
    return found[1]


# -- more rows ---------------------------------------------------------------------------------------------------------


def measure_rows(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """See the module docstring."""
    num_rows = options.rows
    quick = {"max_concurrency": 256, "replicas": 2}
    config = write_config(folder, num_rows, options.rows_per_partition, quick, options.calls)
    with fixed(folder / "c", Node(cpus=2)):
        first = Driver.start(config, folder / "run")
        first.until(lambda: bool(first.rows))
        planned = RunFolder(folder / "run").read_json("rows", "plan.json")
        planning_s = first.rows[0][0]
        first.until(lambda: first.rows[-1][1] >= num_rows / 2)
        first.process.kill()
        first.process.wait()
        before = first.rows[-1][1]
        time.sleep(5)  # until its actors are gone
        second = Driver.start(config, folder / "run")
        second.until(lambda: bool(second.new) and second.new[-1][1] > 0)
        restart_s = next(t for t, n in second.new if n > 0)
        second.finish()
    folder_ = RunFolder(folder / "run")
    ids = [i for table in folder_.read_tables("examples", columns=["row_id"]) for i in table["row_id"].to_pylist()]
    files = Counter(path.parent.name for path in (folder / "run").glob("*/*") if path.is_file())
    return {
        "rows": {
            "rows": num_rows,
            "calls_per_row": options.calls,
            "partitions": planned["num_partitions"],
            "lost": num_rows - len(set(ids)),
            "doubled": len(ids) - len(set(ids)),
            "until_first_line_s": round(planning_s, 1),
            "rows_per_s": round(first.speed(num_rows // 2)),
            "killed_at": before,
            "driver_MiB": {"first": first.memory_at(0.1, 0.5, 1.0), "second": second.memory_at(0.1, 0.5, 1.0)},
            "driver_cpu_share": round(first.cpu_s / first.memory[-1][0], 3),
            "restart_s": round(restart_s, 1),
            "files": dict(files),
            "bytes": sum(path.stat().st_size for path in (folder / "run").rglob("*") if path.is_file()),
        }
    }


# -- what is asked of a store ------------------------------------------------------------------------------------------


@contextmanager
def counting_store() -> Iterator[Counter[str]]:
    """An S3 server on loopback, in the environment; requests by kind."""
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app

    app = DomainDispatcherApplication(create_backend_app)
    asked: Counter[str] = Counter()

    def counting(environ: dict[str, Any], start_response: Any) -> Any:
        is_list = "list-type" in environ.get("QUERY_STRING", "")
        asked["LIST" if is_list else environ["REQUEST_METHOD"]] += 1
        return app(environ, start_response)

    server = make_server("127.0.0.1", 0, counting, threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    own = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    os.environ.update(own)
    httpx.put(f"http://127.0.0.1:{server.port}/bucket", headers={"Authorization": "AWS test:test"})
    try:
        yield asked
    finally:
        server.shutdown()
        for name in own:
            del os.environ[name]


def measure_requests(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """See the module docstring."""
    counted = []
    with counting_store() as asked, fixed(folder / "c", Node(cpus=2)):
        for partitions in options.partitions:
            base = folder / f"p{partitions}"
            base.mkdir()
            config = write_config(base, partitions * 50, 50, {"max_concurrency": 64, "replicas": 2})
            for turn in ("new", "again"):
                asked.clear()
                Driver.start(config, f"s3://bucket/p{partitions}").finish()
                counted.append({"partitions": partitions, "run": turn, **asked})
                print(json.dumps(counted[-1]), flush=True)
    per_partition = {}
    for turn in ("new", "again"):
        few, many = (line for line in counted if line["run"] == turn)
        more = many["partitions"] - few["partitions"]
        kinds = (few.keys() | many.keys()) - {"partitions", "run"}
        per_partition[turn] = {k: round((many.get(k, 0) - few.get(k, 0)) / more, 2) for k in sorted(kinds)}
    return {"requests": {"counted": counted, "per_partition": per_partition}}


# -- nodes that come and go --------------------------------------------------------------------------------------------


def measure_nodes(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """See the module docstring."""
    slow = {"gpus": 1, "latency_s": 1.0, "max_concurrency": 10, "node_labels": {STAGE: "teacher"}}
    config = write_config(folder, 1200, 100, {**slow, "replicas": {"min": 1, "max": 4}})
    types = {"teacher": Node(cpus=2, gpus=1, labels={STAGE: "teacher"})}
    seen: list[tuple[float, int]] = []
    with growing(folder / "c", Node(), types, jobs=True) as cluster:
        began = time.monotonic()
        seen.append((0.0, num_nodes(cluster)))
        driver = Driver.start(config, folder / "run")
        while driver.process.poll() is None or seen[-1][1]:
            seen.append((time.monotonic() - began, num_nodes(cluster)))
            time.sleep(0.5)
        work_s = driver.finish()
    if options.plot is not None:
        plot_nodes(seen, driver.rows, options.plot)
    changes = [seen[0], *(now for before, now in itertools.pairwise(seen) if now[1] != before[1])]
    return {"nodes": {"changes": [[round(t, 1), n] for t, n in changes], "job_s": round(work_s, 1)}}


def num_nodes(cluster: Cluster) -> int:
    """Alive nodes with a pretend GPU."""
    return sum(STAGE in labels for labels in cluster.labels())


def plot_nodes(nodes: list[tuple[float, int]], rows: list[tuple[float, int]], path: Path) -> None:
    """Nodes and rows over time."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    with plt.rc_context({"svg.hashsalt": "distill-ray", "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure, axes = plt.subplots(figsize=(6.4, 2.6), layout="constrained")
        axes.step(*zip(*nodes, strict=True), where="post", color="#0b6e4f")
        axes.set_xlabel("seconds since the job was started")
        axes.set_ylabel("GPU nodes", color="#0b6e4f")
        axes.set_yticks(range(max(n for _, n in nodes) + 1))
        right = axes.twinx()
        right.plot(*zip(*rows, strict=True), color="#888888")
        right.set_ylabel("rows done", color="#666666")
        for side in (axes, right):
            side.spines["top"].set_visible(False)
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)


PARTS = {
    "replicas": measure_replicas,
    "rows": measure_rows,
    "requests": measure_requests,
    "nodes": measure_nodes,
}


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--replicas", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--seconds", type=float, default=80.0, help="replicas: of ideal work in each")
    parser.add_argument("--rows-per-s", type=float, default=10.0, help="replicas: of each engine")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--calls", type=int, choices=RECIPES, default=1, help="rows: per row")
    parser.add_argument("--rows-per-partition", type=int, default=2000)
    parser.add_argument("--partitions", type=int, nargs=2, default=[10, 40])
    parser.add_argument("--plot", type=Path, help="nodes: an SVG of it")
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="sc", dir="/tmp"))  # Ray's sockets allow no long path
    try:
        result = PARTS[options.part](folder, options)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps(result))
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
