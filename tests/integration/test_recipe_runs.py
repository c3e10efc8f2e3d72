"""The recipes' starters, judges with an engine of their own, and a kill in the third turn; on a real Ray.

Beside test_recipes.py, which takes each recipe on vLLM to a trained student. Here teachers are fake or plain
transformers, so that a run takes seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from distill_ray.config import RunConfig, load_config, parse_config
from distill_ray.demo import film_rows
from distill_ray.errors import ConfigError
from distill_ray.pipeline.check import check, check_resources
from distill_ray.pipeline.folder import RunFolder
from distill_ray.pipeline.generate import generate
from distill_ray.pipeline.helpers import batched_scorer, start_helpers
from distill_ray.pipeline.judging import judge_wins
from distill_ray.pipeline.ledger import Ledger
from distill_ray.pipeline.reporting.report import write_report
from distill_ray.records import Answered
from tests.unit.scripted_server import Reply, ScriptedServer

pytestmark = pytest.mark.usefixtures("local_ray")

STARTERS = sorted((Path(__file__).parents[2] / "distill_ray" / "recipes" / "configs").glob("*.yaml"))


def records(folder: RunFolder, kind: str) -> list[dict[str, Any]]:
    return [record for table in folder.read_tables(kind) for record in table.to_pylist()]


# -- the starters ----------------------------------------------------------------------------------------------------

NUM_ROWS = 24
# One set of overrides for all of them: the demo's models, and a small file with every column that one of them reads.
OVERLAY = [
    "data.source=rows.jsonl",
    "data.alongside={answer: [rationales.json]}",
    "data.holdout=0.25",
    "teacher.model=demo",
    "teacher.gpus=0",
    "teacher.cpus=0.5",
    "student.model=demo",
]
REWARDS = {
    "classifier": ["model=demo-sentiment", "labels={negative: 0, positive: 1}", "cpus=0.5"],
    "entities": ["model=demo-names", "cpus=0.5"],
}
# And for running them: one teacher that says what each of them looks for.
ANSWER = (
    "{% if 'double brackets' in query %}[[{{ 9 if 'wonderful' in query else 3 }}]]"
    "{% elif query.startswith('Write') %}A wonderful film, and the lead actor was brilliant."
    "{% else %}{{ query }} was boring and Anna Keller was weak. The answer is ( 1 + 2 ).\nFinal Answer: de{% endif %}"
)


def overlaid(starter: Path, folder: Path, *more: str) -> RunConfig:
    """A starter in a folder of its own with the overlay, as `--set` would put it."""
    rows = [
        {"text": f"The film number {i}", "input": f"What is {i} + 1?", "label": f"( {i} + 1 )"} for i in range(NUM_ROWS)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "rationales.json").write_text(json.dumps([f"We add. The answer is ({i} + 1)." for i in range(NUM_ROWS)]))
    (folder / "instruction.md").write_text("Answer briefly.")
    (folder / "config.yaml").write_text(starter.read_text())
    reward = yaml.safe_load(starter.read_text())["recipe"].get("reward", {}).get("type")
    rewards = [f"recipe.reward.{override}" for override in REWARDS.get(reward, [])]
    return load_config(folder / "config.yaml", [*OVERLAY, *rewards, *more])


@pytest.mark.parametrize("starter", STARTERS, ids=lambda path: path.stem)
def test_every_starter_passes_check_with_the_demos_models(starter: Path, tmp_path: Path) -> None:
    lines = list(check(overlaid(starter, tmp_path)))
    found = [line.split()[0].rstrip(":") for line in lines]
    assert found in (
        ["recipe", "data", "teacher", "student", "Ray"],
        ["recipe", "data", "teacher", "reward", "student", "Ray"],
    )
    assert f"data: {NUM_ROWS} first rows read, 0 of them unusable" in lines


@pytest.mark.parametrize(
    "starter",
    [path for path in STARTERS if path.stem not in ("soft_targets", "rationales_from_file")],
    ids=lambda path: path.stem,
)
def test_every_starter_generates_examples(starter: Path, tmp_path: Path) -> None:
    """`soft_targets` needs vLLM (test_recipes.py), `rationales_from_file` has a test of its own below."""
    teacher = yaml.safe_dump({"type": "fake", "answer": ANSWER, "cpus": 0.5}, default_flow_style=True)
    config = overlaid(starter, tmp_path, f"teacher={teacher}")
    folder = RunFolder(tmp_path / "run")
    result = generate(config, folder)
    assert (result.rows_with_examples, result.rows_rejected) == (NUM_ROWS, 0), result.rejects
    figures = folder.manifest()["recipe_figures"]
    if config.recipe.type == "self_critique":
        assert figures["revisions"]["accepted"] == NUM_ROWS
        assert figures["revisions"]["reward_after"]["mean"] > figures["revisions"]["reward_before"]["mean"]
    if starter.stem == "prompt_distillation":
        assert {e["completion"] for e in records(folder, "examples")} == {"de"}


def test_the_starter_with_rationales_from_a_file_asks_nobody_and_reports_how_good_they_are(tmp_path: Path) -> None:
    [starter] = [path for path in STARTERS if path.stem == "rationales_from_file"]
    config, folder = overlaid(starter, tmp_path), RunFolder(tmp_path / "run")
    result = generate(config, folder)
    assert (result.teacher_calls, result.rows_with_examples) == (0, NUM_ROWS)
    assert folder.manifest()["recipe_figures"]["labels"] == {
        "compared": NUM_ROWS,
        "same": 0,  # (3 + 1) is not spelt as ( 3 + 1 )
        "same_or_equal": NUM_ROWS,
        "without_label": 0,
    }
    write_report(folder, config)
    assert (
        f"{NUM_ROWS} of {NUM_ROWS} (100 %) with equations that come to the same."
        in folder.read_bytes("report.md").decode()
    )


# -- judges ----------------------------------------------------------------------------------------------------------


def judged(folder: Path, engine: dict[str, Any], mode: str, num_rows: int = 8) -> RunConfig:
    """Drafts and revisions by a fake teacher; half of the revisions are good ones."""
    rows = [{"id": f"r{i}", "film": f"film {i}", "word": ("good", "bad")[i % 2]} for i in range(num_rows)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return parse_config(
        {
            "recipe": {
                "type": "self_critique",
                "query": "Review {{ film }}.",
                "revision_request": "A {{ word }} review of {{ film }}.",
                "reward": {"type": "judge", "mode": mode, "engine": engine, "max_tokens": 24},
            },
            "data": {"source": "rows.jsonl", "id": "id", "holdout": 0, "validation_holdout": 0},
            "teacher": {"type": "fake", "answer": "{{ query }}", "cpus": 0.5},
            "generate": {"max_reject_frac": 1.0},
        },
        base=folder,
    )


@pytest.mark.parametrize("mode", [pytest.param("rating", marks=pytest.mark.slow), "comparison"])
def test_whatever_a_real_judge_says_every_row_is_scored_or_a_counted_reject(mode: str, tmp_path: Path) -> None:
    config = judged(tmp_path, {"type": "hf", "model": "demo", "cpus": 0.5}, mode)
    folder = RunFolder(tmp_path / "run")
    result = generate(config, folder)
    assert result.rows_in == result.rows_with_examples + result.rows_rejected == 8
    assert set(result.rejects) <= {"no_reward", "not_accepted"}
    assert result.teacher_calls == 8 * (3 + 2)  # draft, critique, revision; two questions to the judge
    assert [name for name in folder.list("logs") if name.startswith("judge-")]  # a process of its own
    figures = folder.manifest()["recipe_figures"]["revisions"]
    assert figures["chains"] == figures["scored"] == 8 - result.rejects.get("no_reward", 0)
    again = generate(config, folder)
    assert (again.teacher_calls, again.teacher_calls_replayed) == (0, 40)


USAGE = {"prompt_tokens": 100, "completion_tokens": 7}


def judgement(body: dict[str, Any]) -> Reply:
    """Ratings and verdicts of somebody who likes good revisions better than drafts, and drafts better than bad ones."""
    prompt = body["messages"][-1]["content"]
    worth = lambda text: 8 if "A good" in text else 2 if "A bad" in text else 5  # noqa: E731
    if "Answer B:" in prompt:
        _, _, answers = prompt.partition("Answer A:")
        a, _, b = answers.partition("Answer B:")
        said = "I think it is [[A]]." if worth(a) > worth(b) else "I think it is [[B]]."
    else:
        said = f"I give it [[{worth(prompt)}]]."
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": said}}
    return Reply(body={"id": "x", "object": "chat.completion", "choices": [choice], "usage": USAGE})


@pytest.mark.parametrize(
    ("mode", "good", "bad"), [("rating", (5.0, 8.0), (5.0, 2.0)), ("comparison", (0.0, 1.0), (1.0, 0.0))]
)
def test_acceptance_follows_the_judge(
    mode: str, good: tuple[float, float], bad: tuple[float, float], tmp_path: Path
) -> None:
    with ScriptedServer(chat=judgement) as server:
        engine = {"type": "openai", "model": "m", "base_url": server.base_url, "api_key_env": None, "cpus": 0.5}
        folder = RunFolder(tmp_path / "run")
        result = generate(judged(tmp_path, engine, mode), folder)
        assert len(server.chats) == 2 * 8
        assert {chat["temperature"] for chat in server.chats} == {0.0}
    assert result.rejects == {"not_accepted": 4}
    accepted = records(folder, "examples")
    assert {e["row_id"] for e in accepted} == {"r0", "r2", "r4", "r6"}
    assert {(e["reward_before"], e["reward_after"]) for e in accepted} == {good}
    rejected = [json.loads(r["row"]) for r in records(folder, "rejects")]
    assert {row["id"] for row in rejected} == {"r1", "r3", "r5", "r7"}
    assert {(row["reward_before"], row["reward_after"]) for row in rejected} == {bad}


def kill(folder: RunFolder, role: str) -> None:
    """Kill the process of this role, which its log names."""
    [log] = [name for name in folder.list("logs") if name.startswith(f"{role}-")]
    os.kill(int(log.removeprefix(f"{role}-").removesuffix(".log")), signal.SIGKILL)


def test_win_rates_of_an_evaluation_are_asked_for_once(tmp_path: Path) -> None:
    answers = [("A good one", "A bad one"), ("A bad one", "A good one"), ("the same", "the same")]
    messages = [{"role": "user", "content": "q"}]
    rows = [{"messages": messages, "student_after": student, "teacher_answer": other} for student, other in answers]
    with ScriptedServer(chat=judgement) as server:
        engine = {"type": "openai", "model": "m", "base_url": server.base_url, "api_key_env": None, "cpus": 0.5}
        raw = judged(tmp_path, {"type": "fake"}, "rating").model_dump(exclude_none=True)
        config = parse_config({**raw, "evaluate": {"metrics": ["win_rate"], "judge": engine}})
        for _ in range(2):
            judge_wins(config, RunFolder(tmp_path / "run"), rows)
            assert [row["win"] for row in rows] == [1.0, 0.0, 0.5]
            assert len(server.chats) == 2  # what the first row asks is what the second one asks, the other way round
            spent = RunFolder(tmp_path / "run").manifest()["spent"]["judge"]
            assert spent["calls"] == 2  # paid once, however often it is evaluated
            assert (spent["prompt_tokens"], spent["completion_tokens"]) == (200, 14)
            assert spent["replica_seconds"] <= spent["seconds"]


def test_a_judge_whose_process_dies_is_started_again_and_asked_again(tmp_path: Path) -> None:
    folder, once = RunFolder(tmp_path / "run"), iter([True])

    def judge_and_kill(body: dict[str, Any]) -> Reply:
        if len(server.chats) >= 5 and next(once, False):
            kill(folder, "judge")
        return judgement(body)

    with ScriptedServer(chat=judge_and_kill, latency_s=0.05) as server:
        engine = {"type": "openai", "model": "m", "base_url": server.base_url, "api_key_env": None, "cpus": 0.5}
        result = generate(judged(tmp_path, engine, "rating"), folder)
    assert result.rejects == {"not_accepted": 4}
    assert len([name for name in folder.list("logs") if name.startswith("judge-")]) == 2


def test_a_reward_model_whose_process_dies_is_started_again_and_asked_again(tmp_path: Path) -> None:
    reward = {"type": "classifier", "model": "demo-sentiment", "labels": {"negative": 0, "positive": 1}, "cpus": 0.5}
    raw = judged(tmp_path, {"type": "fake"}, "rating").model_dump(exclude_none=True)
    config, folder = parse_config({**raw, "recipe": {**raw["recipe"], "reward": reward}}), RunFolder(tmp_path / "run")
    scorer = batched_scorer(config.recipe.reward, start_helpers(config, folder))  # type: ignore[union-attr]
    answer = Answered(({"role": "user", "content": "Review it."},), "A wonderful film.")

    async def score_around_a_kill() -> list[float]:
        before = await scorer.score(answer)
        kill(folder, "reward")
        return [before, await scorer.score(answer)]

    before, after = asyncio.run(score_around_a_kill())
    assert before == after


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (
            {"type": "judge", "engine": {"type": "hf", "model": "demo", "gpus": 64}},
            r"recipe\.reward\.engine: 1 with recipe\.reward\.engine\.gpus 64 need 64 GPUs",
        ),
        (
            {"type": "entities", "model": "demo-names", "replicas": 1000},
            r"recipe\.reward\.replicas: 1000 with recipe\.reward\.cpus 1 need 1000 CPUs",
        ),
        (
            {"type": "entities", "model": "demo-names", "cpus": float(os.cpu_count() or 1)},
            r"recipe\.reward\.replicas: 1 with recipe\.reward\.cpus \d+ beside teacher\.replicas need [\d.]+ CPUs",
        ),
    ],
)
def test_a_reward_that_the_machine_has_no_room_for_is_refused_and_not_waited_for(
    reward: dict[str, Any], message: str, tmp_path: Path
) -> None:
    raw = judged(tmp_path, {"type": "fake"}, "rating").model_dump(exclude_none=True)
    config = parse_config({**raw, "recipe": {**raw["recipe"], "reward": reward}})
    with pytest.raises(ConfigError, match=message):
        check_resources(config)
    with pytest.raises(ConfigError, match=message):
        generate(config, RunFolder(tmp_path / "run"))


# -- a kill in the third turn ----------------------------------------------------------------------------------------

NUM_FILMS = 16


def num_kept(folder: RunFolder) -> int:
    """Calls in the ledgers of all partitions."""
    names = {name.removesuffix(".parquet") for name in folder.list("calls")}
    try:
        return sum(len(Ledger(folder, name)) for name in names)
    except FileNotFoundError:  # segments were just merged
        return 0


@pytest.mark.slow
def test_a_row_that_is_killed_in_its_third_turn_goes_on_there(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in film_rows(NUM_FILMS)))
    raw = {
        "recipe": {
            "type": "self_critique",
            "query": "Write a short review of the film {{ film }}.",
            "reward": {"type": "length"},
            "refusals": [],
        },
        "data": {"source": str(tmp_path / "rows.jsonl"), "id": "id"},
        # In batches of a quarter of the rows, first come first served: all drafts, all critiques, then revisions.
        "teacher": {"type": "hf", "model": "demo", "batch_size": 4, "sampling": {"max_tokens": 60}},
        "generate": {"max_reject_frac": 1.0},
    }
    (tmp_path / "config.yaml").write_text(json.dumps(raw))
    run_dir = tmp_path / "run"
    folder = RunFolder(run_dir)
    command = [
        sys.executable,
        "-m",
        "distill_ray",
        "generate",
        str(tmp_path / "config.yaml"),
        "--run-dir",
        str(run_dir),
    ]
    # A Ray of its own: not the one of these tests, whose address the environment may name.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    output = subprocess.DEVNULL
    process = subprocess.Popen(command, stdout=output, stderr=output, env=environment, start_new_session=True)
    deadline = time.monotonic() + 900
    while num_kept(folder) < 2 * NUM_FILMS:
        assert process.poll() is None, "it ended before it was killed"
        assert time.monotonic() < deadline, "no third turn after three minutes"
        time.sleep(0.02)
    # The engine's process too: it would outlive its driver by a second or two, and finish the turn meanwhile.
    everything = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for each in everything:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
    process.wait()
    psutil.wait_procs(everything, timeout=60)
    kept = num_kept(folder)
    assert 2 * NUM_FILMS <= kept < 3 * NUM_FILMS
    assert not folder.list("done")

    result = generate(parse_config(raw), folder)
    assert result.rows_in == result.rows_with_examples + result.rows_rejected == NUM_FILMS
    assert (result.teacher_calls, result.teacher_calls_replayed) == (3 * NUM_FILMS - kept, kept)
    assert num_kept(folder) == 3 * NUM_FILMS  # each turn of each row once
    ids = [record["row_id"] for kind in ("examples", "rejects") for record in records(folder, kind)]
    assert sorted(ids) == sorted(row["id"] for row in film_rows(NUM_FILMS))
