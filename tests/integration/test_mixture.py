"""A teacher of several engines on a real Ray: who answers what, what a new member costs, and what its death costs."""

from __future__ import annotations

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from distill_ray.config import RunConfig, parse_config
from distill_ray.errors import EngineUnavailable
from distill_ray.pipeline.check import check
from distill_ray.pipeline.folder import RunFolder
from distill_ray.pipeline.generate import generate
from distill_ray.pipeline.preview import preview
from tests.unit.scripted_server import Reply, ScriptedServer, answer_chat

pytestmark = pytest.mark.usefixtures("local_ray")

NUM_ROWS = 200
TURNS = 3  # draft, critique, revision


def member(server: ScriptedServer, model: str, weight: float, **engine: Any) -> dict[str, Any]:
    url = {"type": "openai", "model": model, "base_url": server.base_url, "api_key_env": None}
    return {"weight": weight, "engine": {**url, "cpus": 0.2, **engine}}


def config_of(folder: Path, members: list[dict[str, Any]], **changes: Any) -> RunConfig:
    rows = [{"id": f"r{i}", "text": f"film {i}"} for i in range(NUM_ROWS)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    raw = {
        "recipe": {"type": "self_critique", "query": "Review {{ text }}.", "reward": {"type": "length"}},
        "data": {"source": "rows.jsonl", "id": "id"},
        "teacher": {"type": "mixture", "members": members},
        "generate": {"max_reject_frac": 1.0},
    }
    return parse_config({**raw, **changes}, base=folder)


def asked(server: ScriptedServer) -> list[str]:
    """The film of each request that came."""
    return [chat["messages"][0]["content"] for chat in server.chats]


def examples(folder: RunFolder) -> dict[str, str]:
    """row -> the model that its example names."""
    return {r["row_id"]: r["teacher"] for t in folder.read_tables("examples") for r in t.to_pylist()}


def test_each_row_stays_with_one_member_and_a_new_member_pays_only_for_what_it_takes(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    with ScriptedServer() as big, ScriptedServer() as small, ScriptedServer() as third:
        two = [member(big, "big", 3), member(small, "small", 1)]
        first = generate(config_of(tmp_path, two), folder)
        assert (first.rows_in, first.teacher_calls) == (NUM_ROWS, NUM_ROWS * TURNS)
        counts = Counter(asked(big)), Counter(asked(small))
        assert set(counts[0]) & set(counts[1]) == set()
        assert set((counts[0] + counts[1]).values()) == {TURNS}
        assert abs(len(counts[0]) - 0.75 * NUM_ROWS) < 28  # four and a half standard deviations
        before = examples(folder)
        assert len(before) == first.rows_with_examples
        assert set(before.values()) == {"big", "small"}
        assert folder.manifest()["engines"] == 2

        again = generate(config_of(tmp_path, two), folder)
        assert (again.teacher_calls, again.teacher_calls_replayed) == (0, NUM_ROWS * TURNS)

        three = [member(third, "third", 2), *two]
        more = generate(config_of(tmp_path, three), folder)
        taken = Counter(asked(third))
        assert set(taken.values()) == {TURNS}
        assert more.teacher_calls == len(taken) * TURNS
        assert abs(len(taken) - NUM_ROWS / 3) < 30
        assert (len(big.chats), len(small.chats)) == (counts[0].total(), counts[1].total())
        after = examples(folder)
        assert {row for row, model in after.items() if model != before.get(row)} == {
            row for row, model in after.items() if model == "third"
        }
    # Taken back: nobody is asked, and everybody's rows are their own again.
    assert generate(config_of(tmp_path, two), folder).teacher_calls == 0
    assert examples(folder) == before


def test_two_servers_of_one_model_share_its_rows_and_its_answers(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    with ScriptedServer() as one, ScriptedServer() as other:
        generate(config_of(tmp_path, [member(one, "m", 1), member(other, "m", 1)]), folder)
        assert abs(len(set(asked(one))) - NUM_ROWS / 2) < 32
        assert set(asked(one)) & set(asked(other)) == set()
        alone = generate(config_of(tmp_path, [member(other, "m", 1)]), folder)
        assert (alone.teacher_calls, set(examples(folder).values())) == (0, {"m"})


def test_a_member_whose_process_dies_is_started_again_and_no_row_is_lost(tmp_path: Path) -> None:
    """The fifth answer's engine is killed by its own server, which knows the process by its log."""
    folder = RunFolder(tmp_path / "run")
    killed: list[int] = []

    def kill(body: dict[str, Any]) -> Reply:
        if len(frail.chats) == 5 and not killed:
            killed.append(kill_member(folder, "member-1"))
        return answer_chat(body)

    with ScriptedServer() as steady, ScriptedServer(chat=kill, latency_s=0.05) as frail:
        result = generate(config_of(tmp_path, [member(steady, "a", 1), member(frail, "b", 1)]), folder)
    assert killed
    assert (result.teacher_calls, result.rejects.get("engine_error")) == (NUM_ROWS * TURNS, None)
    assert len([name for name in folder.list("logs") if name.startswith("member-1-")]) == 2


def kill_member(folder: RunFolder, role: str) -> int:
    [log] = [name for name in folder.list("logs") if name.startswith(f"{role}-")]
    pid = int(log.removeprefix(f"{role}-").removesuffix(".log"))
    os.kill(pid, signal.SIGKILL)
    return pid


def test_a_member_that_cannot_be_reached_ends_the_run_with_its_url(tmp_path: Path) -> None:
    with ScriptedServer() as there, ScriptedServer() as gone:
        members = [member(there, "a", 1), member(gone, "b", 1, max_retries=0)]
    with ScriptedServer() as there:
        members[0] = member(there, "a", 1)
        with pytest.raises(EngineUnavailable, match=r"127\.0\.0\.1"):
            generate(config_of(tmp_path, members), RunFolder(tmp_path / "run"))


def test_check_and_preview_look_at_every_member(tmp_path: Path) -> None:
    fakes = [{"weight": w, "engine": {"type": "fake", "answer": f"{w} {{{{ query }}}}", "cpus": 0.5}} for w in (3, 1)]
    config = config_of(tmp_path, fakes)
    lines = list(check(config))
    assert "teacher.members.0.engine `fake`" in lines
    assert "teacher.members.1.engine `fake`" in lines
    assert "teacher: each row is answered by one member: 75 % demo, 25 % demo" in lines
    console = Console(file=io.StringIO(), width=100, force_terminal=False)
    preview(config, 12, console)
    shown = console.file.getvalue()
    assert "3 Review film" in shown
    assert "1 Review film" in shown


def test_members_write_the_queries_together(tmp_path: Path) -> None:
    def write(body: dict[str, Any]) -> Reply:
        marks = [hashlib.blake2b(f"{i}{json.dumps(body)}".encode(), digest_size=24).hexdigest() for i in range(2)]
        return answer_chat(body, content="\n".join(f"{i}. What is {mark}?" for i, mark in enumerate(marks, start=1)))

    data = {"type": "synthesize", "count": 24, "topics": ["numbers"], "per_call": 2}
    folder = RunFolder(tmp_path / "run")
    with ScriptedServer(chat=write) as one, ScriptedServer(chat=write) as other:
        members = [member(one, "a", 1), member(other, "b", 1)]
        recipe = {"type": "context", "context": {"text": "."}}
        config = config_of(tmp_path, members, data=data, recipe=recipe)
        first = generate(config, folder)
        written = folder.manifest()["queries"]
        assert (first.rows_in, written["written"]) == (24, 24)
        assert written["calls"] + first.teacher_calls == len(one.chats) + len(other.chats)
        for server in (one, other):
            assert [chat for chat in server.chats if "numbers" in chat["messages"][-1]["content"]]
        assert generate(config, folder).teacher_calls == 0
        assert written["calls"] + first.teacher_calls == len(one.chats) + len(other.chats)


def test_members_hold_their_own_gpus_and_give_them_back() -> None:
    """Ray with pretend GPUs, in a process of its own: a pool of single ones, and one engine on two."""
    script = """
import json, tempfile, time, ray
from distill_ray.config import parse_config
from distill_ray.pipeline.cluster import connected
from distill_ray.pipeline.folder import RunFolder
from distill_ray.pipeline.teacher import engine_counts, member_actors, total_retries
ray.init(address="local", num_cpus=8, num_gpus=5, include_dashboard=False, log_to_driver=False)
single = {"type": "fake", "gpus": 1, "replicas": {"min": 1, "max": 9}}
double = {"type": "vllm", "model": "demo", "gpus": 2, "engine_kwargs": {"tensor_parallel_size": 2}}
config = parse_config({
    "recipe": {"type": "context", "context": {"text": "."}},
    "data": {"source": "."},
    "teacher": {"type": "mixture", "members": [{"engine": single}, {"engine": double}]},
})

def free(wanted):
    for _ in range(100):
        found = ray.available_resources().get("GPU", 0)
        if found == wanted:
            break
        time.sleep(0.1)
    return found

counts = engine_counts(config, 99, [])
with connected(), member_actors(config, RunFolder(tempfile.mkdtemp()), counts) as pools:
    print(json.dumps([counts, [len(pool) for pool in pools], total_retries(pools), free(0)]))
print(json.dumps(free(5)))
"""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == ["[[3, 1], [3, 1], 0, 0]", "5.0"], done.stderr[-3000:]
