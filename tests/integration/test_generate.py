"""The generation stage on a real Ray with the fake engine: resume, replay, what a change re-pays, and failures."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from distill_ray.config import RunConfig, parse_config
from distill_ray.errors import ConfigError, EngineUnavailable, TooManyRejects
from distill_ray.pipeline.check import check
from distill_ray.pipeline.evaluate import require_these_examples
from distill_ray.pipeline.folder import RunFolder
from distill_ray.pipeline.generate import generate
from distill_ray.pipeline.preview import preview
from distill_ray.pipeline.reporting.report import write_report

pytestmark = pytest.mark.usefixtures("local_ray")


def write_rows(path: Path, numbers: range) -> None:
    path.write_text("".join(json.dumps({"id": f"r{i}", "text": f"query {i}"}) + "\n" for i in numbers))


def config_of(source: Path, context: str = "Answer.", **changes: Any) -> RunConfig:
    raw: dict[str, Any] = {
        "recipe": {"type": "context", "context": {"text": context}},
        "data": {"source": str(source), "id": "id"},
        "teacher": {"type": "fake", "answer": "{{ system }}: {{ query }}"},
    }
    for key, value in changes.items():
        raw.setdefault(key, {}).update(value)
    return parse_config(raw)


def examples(folder: RunFolder) -> list[dict[str, Any]]:
    return [record for table in folder.read_tables("examples") for record in table.to_pylist()]


def test_a_run_keeps_its_books_and_a_rerun_pays_nothing(tmp_path: Path) -> None:
    source = tmp_path / "queries.jsonl"
    write_rows(source, range(200))
    with source.open("a") as file:
        file.write("{broken\n" + json.dumps({"id": "empty", "text": " "}) + "\n")
    folder = RunFolder(tmp_path / "run")
    first = generate(config_of(source), folder)
    assert (first.rows_in, first.rows_with_examples, first.rows_rejected) == (202, 200, 2)
    assert first.rejects == {"unreadable_row": 1, "empty_query": 1}
    assert (first.teacher_calls, first.teacher_calls_replayed) == (200, 0)
    manifest = folder.manifest()
    assert manifest["rows_in"] == 202
    assert manifest["seconds"]["generate"] > 0
    rejects = [record for table in folder.read_tables("rejects") for record in table.to_pylist()]
    assert {r["reason"]: r["stage"] for r in rejects} == {"unreadable_row": "read", "empty_query": "read"}
    again = generate(config_of(source), folder)
    assert (again.teacher_calls, again.teacher_calls_replayed) == (0, 200)
    assert folder.manifest()["rows_with_examples"] == 200


def test_adding_rows_pays_only_for_them_and_touches_only_their_partitions(tmp_path: Path) -> None:
    source = tmp_path / "queries.jsonl"
    write_rows(source, range(100))
    folder = RunFolder(tmp_path / "run")
    config = config_of(source, generate={"rows_per_partition": 5})
    generate(config, folder)
    files = {p.name: p.stat().st_mtime_ns for p in Path(folder.path("examples")).iterdir()}
    write_rows(source, range(102))
    more = generate(config, folder)
    assert more.teacher_calls == 2
    changed = {p.name for p in Path(folder.path("examples")).iterdir() if files[p.name] != p.stat().st_mtime_ns}
    assert 1 <= len(changed) <= 2
    assert len(examples(folder)) == 102


def test_a_changed_context_is_paid_again_and_a_changed_parse_is_not(tmp_path: Path) -> None:
    source = tmp_path / "queries.jsonl"
    write_rows(source, range(50))
    folder = RunFolder(tmp_path / "run")
    generate(config_of(source), folder)
    parsed = generate(config_of(source, recipe={"parse": {"after": ": "}}), folder)
    assert (parsed.teacher_calls, parsed.teacher_calls_replayed) == (0, 50)
    assert {e["completion"] for e in examples(folder)} == {f"query {i}" for i in range(50)}
    other = generate(config_of(source, context="Reply."), folder)
    assert other.teacher_calls == 50
    assert all(e["completion"].startswith("Reply.:") for e in examples(folder))


def test_one_actor_and_two_give_the_same_files(tmp_path: Path) -> None:
    source = tmp_path / "queries.jsonl"
    write_rows(source, range(150))
    outcomes = []
    for replicas in (1, 2):
        folder = RunFolder(tmp_path / f"run-{replicas}")
        generate(config_of(source, teacher={"replicas": replicas, "cpus": 0.5}), folder)
        outcomes.append(sorted(map(json.dumps, examples(folder))))
    assert outcomes[0] == outcomes[1]


def test_engines_are_added_up_to_the_maximum_while_there_is_a_queue(tmp_path: Path) -> None:
    source = tmp_path / "queries.jsonl"
    write_rows(source, range(240))
    folder = RunFolder(tmp_path / "run")
    teacher = {"replicas": {"min": 1, "max": 2}, "cpus": 0.5, "latency_s": 0.4, "max_concurrency": 4}
    generate(config_of(source, teacher=teacher, generate={"rows_per_partition": 10}), folder)
    assert len(folder.list("logs", suffix=".log")) == 2  # one of each engine's process
    assert len(examples(folder)) == 240


def test_preview_shows_prompt_raw_answer_and_what_the_student_learns(tmp_path: Path) -> None:
    source = tmp_path / "queries.jsonl"
    write_rows(source, range(3))
    with source.open("a") as file:
        file.write(json.dumps({"id": "empty", "text": " "}) + "\n")
    raw = config_of(source, context="Be brief.", teacher={"answer": "Thinking. Final Answer: {{ query }} [bold]"})
    config = parse_config(raw.model_dump() | {"recipe": raw.recipe.model_dump() | {"parse": {"after": "Answer: "}}})
    output = io.StringIO()
    preview(config, 4, Console(file=output, width=100))
    lines = [line.strip("│ \n") for line in output.getvalue().splitlines()]
    for line in ("Be brief.", "query 0", "Thinking. Final Answer: query 0 [bold]", "query 0 [bold]"):
        assert line in lines
    assert "rejected queries.jsonl:4: empty_query" in output.getvalue()


def test_a_terminal_shows_our_panel_and_nothing_of_ray(tmp_path: Path) -> None:
    source = tmp_path / "queries.jsonl"
    write_rows(source, range(60))
    config = tmp_path / "config.yaml"
    config.write_text(config_of(source, teacher={"latency_s": 0.2, "max_concurrency": 4}).model_dump_json())
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "distill_ray", "generate", str(config), "--run-dir", str(tmp_path / "run")]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}  # of this process
    terminal = {"TERM": "xterm-256color", "COLUMNS": "80", "LINES": "24"}
    process = subprocess.Popen(command, stdout=theirs, stderr=theirs, env=inherited | terminal)
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # what a terminal says when its last writer has gone
        while piece := os.read(ours, 65536):
            shown += piece
    os.close(ours)
    assert process.wait(600) == 0, shown
    assert b"60 / 60 rows" in shown
    for noise in (b"Running Dataset", b"MapBatches", b"[36m(", b"ray.io"):
        assert noise not in shown


def test_more_samples_later_pay_only_for_the_new_ones(tmp_path: Path) -> None:
    source = tmp_path / "queries.jsonl"
    write_rows(source, range(30))
    folder = RunFolder(tmp_path / "run")
    generate(config_of(source), folder)
    three = generate(config_of(source, teacher={"sampling": {"n": 3}}), folder)
    assert (three.teacher_calls, three.teacher_calls_replayed) == (60, 30)
    assert len(examples(folder)) == 90


def test_what_may_pass_later_is_tried_again_on_the_next_run(tmp_path: Path) -> None:
    source = tmp_path / "queries.jsonl"
    write_rows(source, range(60))
    folder = RunFolder(tmp_path / "run")
    budget = generate(config_of(source, generate={"max_teacher_tokens": 1}), folder)
    assert budget.rows_in == budget.rows_with_examples + budget.rows_rejected == 60
    rest = generate(config_of(source), folder)
    assert rest.rows_with_examples == 60
    assert rest.teacher_calls + rest.teacher_calls_replayed == 60


def test_too_many_rejects_end_the_run_with_one_clear_message(tmp_path: Path) -> None:
    source = tmp_path / "queries.jsonl"
    write_rows(source, range(100))
    with pytest.raises(TooManyRejects) as caught:
        generate(config_of(source, teacher={"empty_rate": 0.6}), RunFolder(tmp_path / "run"))
    message = str(caught.value)
    assert "max_reject_frac 0.1" in message
    assert "empty_answer" in message
    assert "Traceback" not in message
    assert "DataContext" not in message  # Ray Data's advice, not ours


def test_an_engine_that_does_not_let_us_in_is_one_clear_message(tmp_path: Path) -> None:
    source = tmp_path / "queries.jsonl"
    write_rows(source, range(10))
    with pytest.raises(EngineUnavailable) as caught:
        generate(config_of(source, teacher={"unavailable": True}), RunFolder(tmp_path / "run"))
    assert "Traceback" not in str(caught.value)


def test_killing_the_engine_actor_loses_and_doubles_nothing(tmp_path: Path) -> None:
    source = tmp_path / "queries.jsonl"
    write_rows(source, range(400))
    folder = RunFolder(tmp_path / "run")
    config = config_of(source, teacher={"latency_s": 0.05, "max_concurrency": 8}, generate={"rows_per_partition": 100})
    killed: list[int] = []

    def kill_once() -> None:
        logs = Path(folder.path("logs"))
        deadline = time.monotonic() + 600
        while time.monotonic() < deadline and not killed:
            time.sleep(0.1)
            if len(list(Path(folder.path("calls")).glob("*/*.arrow"))) > 3:
                pid = int(next(logs.glob("engine-*.log")).stem.partition("-")[2])
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)

    killer = threading.Thread(target=kill_once)
    killer.start()
    result = generate(config, folder)
    killer.join()
    assert killed
    ids = [e["row_id"] for e in examples(folder)]
    assert sorted(ids) == sorted(f"r{i}" for i in range(400))
    assert result.rows_with_examples == 400
    assert result.teacher_calls_replayed > 0


def test_a_teacher_that_asks_for_gpus_of_a_machine_without_them_is_told_so_at_once(tmp_path: Path) -> None:
    source = tmp_path / "queries.jsonl"
    write_rows(source, range(3))
    teacher = {"type": "vllm", "model": "demo", "gpus": 64}
    config = parse_config({**config_of(source).model_dump(include={"recipe", "data"}), "teacher": teacher})
    with pytest.raises(ConfigError, match=r"teacher.gpus 64 need 64 GPUs .* \(0 runs on the CPU"):
        generate(config, RunFolder(tmp_path / "run"))
    with pytest.raises(ConfigError, match=r"teacher\.gpus 64 need 64 GPUs"):
        preview(config, 1, Console(file=io.StringIO()))


def test_an_engine_of_several_gpus_sits_in_a_placement_group_with_one_bundle_each() -> None:
    """Ray with pretend GPUs, in a process of its own: what vLLM's own Ray executor then finds there."""
    script = """
import json, ray
from distill_ray.config import parse_config
from distill_ray.pipeline.capacity import of_one_actor
from distill_ray.pipeline.cluster import connected
from distill_ray.pipeline.teacher import worker_resources
ray.init(address="local", num_cpus=4, num_gpus=4, include_dashboard=False, log_to_driver=False)

@ray.remote
def look():
    group = ray.util.get_current_placement_group()
    return group.bundle_specs, ray.get(child.remote())

@ray.remote(num_cpus=1, num_gpus=1)
def child():  # as one of vLLM's workers
    return ray.util.get_current_placement_group() is not None

teacher = {"type": "vllm", "model": "demo", "gpus": 4, "engine_kwargs": {"pipeline_parallel_size": 2}}
recipe = {"type": "context", "context": {"text": "."}}
config = parse_config({"recipe": recipe, "data": {"source": "."}, "teacher": teacher})
with connected():
    options = of_one_actor(worker_resources(config))
    print(json.dumps(ray.get(look.options(**options).remote())))
"""
    bundles, workers_share_it = last_line(script)
    assert bundles == [{"GPU": 1.0, "CPU": 1.0}] * 4
    assert workers_share_it


def test_a_stage_gives_back_the_gpus_of_its_engines_while_the_run_goes_on(tmp_path: Path) -> None:
    """Ray with pretend GPUs, and a fake engine where vLLM's would be: engines of Ray Data, and one by itself."""
    write_rows(tmp_path / "queries.jsonl", range(20))
    script = """
import json, ray
from ray.util import placement_group_table

def without_vllm():
    from distill_ray import engines
    from distill_ray.config.engine import FakeEngineConfig
    from distill_ray.engines import fake
    fake.Pretender = lambda config: fake.FakeEngine(FakeEngineConfig(sampling=config.sampling))
    engines.ENGINE_CLASSES["vllm"] = ("distill_ray.engines.fake", "Pretender")

from distill_ray.config import parse_config
from distill_ray.pipeline.asking import ask_all
from distill_ray.pipeline.cluster import connected
from distill_ray.pipeline.folder import RunFolder
from distill_ray.pipeline.generate import generate
without_vllm()
environment = {"worker_process_setup_hook": without_vllm}
ray.init(address="local", num_cpus=4, num_gpus=4, include_dashboard=False, log_to_driver=False, runtime_env=environment)

def states():
    return [group["state"] for group in placement_group_table().values()]

config = parse_config({
    "recipe": {"type": "context", "context": {"text": "."}},
    "data": {"source": "queries.jsonl", "id": "id"},
    "teacher": {"type": "vllm", "model": "demo", "gpus": 4, "max_concurrency": 8},
})
folder = RunFolder("run")
with connected():
    found = [generate(config, folder).rows_with_examples, states()]
    found += [ask_all(config.teacher, folder, "asked", [[{"role": "user", "content": "hello"}]], "judge"), states()]
print(json.dumps(found))
"""
    after_one, after_both = ["REMOVED"], ["REMOVED"] * 2
    assert last_line(script, cwd=tmp_path) == [20, after_one, ["hello"], after_both]


def last_line(script: str, cwd: Path | None = None) -> Any:
    """The JSON that a script with a Ray of its own prints last."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False, cwd=cwd
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_check_says_what_it_found_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "queries.jsonl"
    write_rows(source, range(3))
    found = list(check(config_of(source)))
    assert [line.split(" ")[0].rstrip(":") for line in found] == ["recipe", "data", "teacher", "student", "Ray"]
    with pytest.raises(ConfigError, match=r"train\.workers: 1000 .* need 1000 CPUs"):
        list(check(config_of(source, train={"workers": 1000})))


def test_a_generation_that_is_stopped_leaves_no_figures_of_an_earlier_one(tmp_path: Path) -> None:
    source = tmp_path / "queries.jsonl"
    write_rows(source, range(10))
    folder = RunFolder(tmp_path / "run")
    generate(config_of(source), folder)
    assert folder.manifest()["rows_in"] == 10
    with pytest.raises(EngineUnavailable):
        generate(config_of(source, context="Other.", teacher={"unavailable": True}), folder)
    manifest = folder.manifest()
    assert manifest["generation_complete"] is False
    assert "rows_in" not in manifest
    with pytest.raises(ConfigError, match="generated with another recipe, teacher or data"):
        require_these_examples(config_of(source), folder)
    write_report(folder, config_of(source))
    assert "stopped before its end" in folder.read_bytes("report.md").decode()
    assert generate(config_of(source), folder).rows_in == 10
    require_these_examples(config_of(source), folder)


@pytest.mark.parametrize("content", [b"{}", b'{"rows_sha": "x"}'])
def test_a_marker_that_is_not_whole_means_its_partition_is_done_again(tmp_path: Path, content: bytes) -> None:
    source = tmp_path / "queries.jsonl"
    write_rows(source, range(20))
    folder = RunFolder(tmp_path / "run")
    generate(config_of(source), folder)
    folder.write_bytes(content, "done", "00000.json")
    again = generate(config_of(source), folder)
    assert (again.rows_with_examples, again.teacher_calls) == (20, 0)
