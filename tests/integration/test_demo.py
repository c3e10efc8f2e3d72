"""The whole chain on the demo: vLLM teacher, DeepSpeed student, vLLM student, report, ask. One run, many looks."""

from __future__ import annotations

import asyncio
import json
import math
import re
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import openai
import pyarrow.parquet as pq
import pytest
import yaml

from distill_ray.demo.prepare import prepare_demo
from distill_ray.pipeline.ask import stream_answer
from distill_ray.pipeline.folder import RunFolder
from distill_ray.pipeline.run import run, stored_config
from distill_ray.records import EXAMPLE_SCHEMA, REJECT_SCHEMA
from distill_ray.serving.calibration.calibrate import calibrate
from distill_ray.serving.routing.bundles import Bundles
from distill_ray.serving.routing.conversation import request_key
from distill_ray.serving.routing.embedder import load_embedder
from distill_ray.serving.routing.manifest import NEVER
from distill_ray.serving.routing.router import decide
from tests.integration.running_service import Service, serving, until

SETTINGS = [
    "train.workers=2",
    "train.cpus_per_worker=0.5",
    "train.epochs=3",
    "train.max_tokens_per_batch=256",
    "evaluate.engine=hf",  # calibration asks the student on vLLM
    "evaluate.max_rows=100",
    "student.engine_kwargs={max_model_len: 512}",
]


@pytest.fixture(scope="module")
def demo_run(local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunFolder, dict[str, Any]]:
    base = tmp_path_factory.mktemp("demo")
    config = prepare_demo(base / "input", num_rows=1200, overrides=SETTINGS)
    folder = RunFolder(base)
    return folder, run(config, folder)


def test_the_student_learns_without_the_context_what_the_teacher_does_with_it(
    demo_run: tuple[RunFolder, dict[str, Any]],
) -> None:
    _, metrics = demo_run
    assert metrics["teacher"]["exact_match"] >= 0.9
    assert metrics["student_before"]["exact_match"] <= 0.15
    assert metrics["student_after"]["exact_match"] >= 0.9 * metrics["teacher"]["exact_match"]
    assert metrics["student_after"]["loss"] < metrics["student_before"]["loss"]
    assert metrics["prompt_tokens_before"] > 5 * metrics["prompt_tokens_after"]


def test_the_metrics_file_keeps_its_contract(demo_run: tuple[RunFolder, dict[str, Any]]) -> None:
    folder, metrics = demo_run
    assert folder.read_json("eval", "metrics.json") == metrics
    assert metrics["num_rows"] == 100
    for who in ("teacher", "student_before", "student_after"):
        low, value, high = (metrics[who][f"exact_match{end}"] for end in ("_low", "", "_high"))
        assert 0 <= low <= value <= high <= 1


def test_the_manifest_keeps_its_contract(demo_run: tuple[RunFolder, dict[str, Any]]) -> None:
    manifest = demo_run[0].manifest()
    assert manifest["rows_in"] == manifest["rows_with_examples"] + manifest["rows_rejected"]
    assert manifest["teacher_calls"] == manifest["rows_in"]
    assert manifest["teacher_calls_replayed"] == 0
    assert manifest["prompt_tokens"] > manifest["completion_tokens"] > 0
    assert {"generate", "train", "evaluate"} <= manifest["seconds"].keys()
    assert {"ray", "torch", "transformers", "deepspeed"} <= manifest["versions"].keys()


def test_examples_and_rejects_have_their_schemas(demo_run: tuple[RunFolder, dict[str, Any]]) -> None:
    folder, _ = demo_run
    for name, schema in (("examples", EXAMPLE_SCHEMA), ("rejects", REJECT_SCHEMA)):
        for file in folder.list(name, suffix=".parquet"):
            assert pq.read_schema(folder.path(name, file)).equals(schema)
    rows = [record for table in folder.read_tables("examples") for record in table.to_pylist()]
    assert all(len(row["completion"]) == 2 and len(row["messages"]) == 1 for row in rows)


def test_the_learning_curve_is_written_and_falls(demo_run: tuple[RunFolder, dict[str, Any]]) -> None:
    folder, _ = demo_run
    lines = [json.loads(line) for line in folder.read_bytes("metrics.jsonl").splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[-1] < losses[0] / 5
    assert list(Path(folder.path("logs", "tensorboard")).rglob("events.*"))


def test_the_report_tells_what_happened(demo_run: tuple[RunFolder, dict[str, Any]]) -> None:
    report = demo_run[0].read_bytes("report.md").decode()
    for part in ("## Result", "## Rows", "## Training", "## Who is taken for whom", "distill-ray"):
        assert part in report


def test_the_student_answers_in_plain_transformers_by_the_code_on_its_card(
    demo_run: tuple[RunFolder, dict[str, Any]],
) -> None:
    folder, _ = demo_run
    [code] = re.findall(r"```python\n(.*?)```", folder.read_bytes("student", "README.md").decode(), flags=re.DOTALL)
    code = code.replace('question = "..."', 'question = "Wo ist der Bahnhof?"')
    done = subprocess.run([sys.executable, "-c", code], cwd=folder.root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "de"


def test_the_examples_load_as_their_card_says(demo_run: tuple[RunFolder, dict[str, Any]], tmp_path: Path) -> None:
    folder, _ = demo_run
    examples: Any = datasets.load_dataset(folder.path("examples"), split="examples", cache_dir=str(tmp_path))
    assert len(examples) == folder.manifest()["num_examples"]
    assert f"| train | {examples['split'].count('train'):,} |" in folder.read_bytes("examples", "README.md").decode()


def test_ask_streams_the_answer_that_the_evaluation_saw(demo_run: tuple[RunFolder, dict[str, Any]]) -> None:
    folder, _ = demo_run
    predictions = folder.read_table("eval", "predictions.parquet").to_pylist()
    evaluated = next(p for p in predictions if p["student_after"] == p["reference"])  # a sure one: engines round apart

    async def answer() -> str:
        return "".join([piece async for piece in stream_answer(folder, evaluated["query"], 16, 0.0)])

    assert asyncio.run(answer()).strip() == evaluated["student_after"]


def test_a_second_run_finds_everything_done(demo_run: tuple[RunFolder, dict[str, Any]]) -> None:
    from distill_ray.config import load_config
    from distill_ray.pipeline.generate import generate
    from distill_ray.pipeline.training.train import train

    folder, _ = demo_run
    config = load_config(folder.path("config.yaml"))
    before = folder.read_bytes("student", "model.safetensors")
    assert generate(config, folder).teacher_calls == 0
    train(config, folder)
    assert folder.read_bytes("student", "model.safetensors") == before


def test_the_terminal_hears_nothing_of_vllm_and_ray(demo_run: tuple[RunFolder, dict[str, Any]]) -> None:
    folder, _ = demo_run
    logs = "".join(Path(p).read_text(errors="replace") for p in Path(folder.path("logs")).glob("engine-*.log"))
    assert "vllm" in logs.lower()


def test_the_run_becomes_a_bundle_that_decides_as_it_was_measured(
    demo_run: tuple[RunFolder, dict[str, Any]], tmp_path: Path
) -> None:
    folder, _ = demo_run
    config = stored_config(folder, ["evaluate.engine=vllm"])
    found = calibrate(config, folder)  # of 400 held-out rows 100 were evaluated; the student is asked for the rest
    figures = json.loads((found.folder / "calibration.json").read_text())
    assert found.is_new
    assert figures["pairs"] == 400
    assert figures["pairs_good"] >= 380
    assert figures["share"] > 0.5
    assert figures["select"]["error_upper"] <= figures["error_budget"] == 0.05
    asked_before = folder.read_bytes("eval", "more_answers.json")
    assert not calibrate(config, folder).is_new
    assert folder.read_bytes("eval", "more_answers.json") == asked_before

    bundles = Bundles(tmp_path / "bundles")
    bundles.promote(bundles.install(found.folder))
    embedder = load_embedder(found.manifest.embedder)
    bundle = bundles.load(bundles.current() or "", embedder.identity)
    assert bundle.context[0]["content"] == (folder.local("input", "instruction.md").read_text()).strip()
    text = bundle.text(0)
    key = request_key({"messages": [{"role": "user", "content": text}]}, bundle.manifest.ignore)
    vector = embedder.embed([text])[0]
    decision = decide(bundle, key, vector)
    assert (decision.route, decision.neighbours[0][0]) == ("student", 0)
    assert decision.similarity == pytest.approx(1.0, abs=1e-3)
    asked = {"messages": [{"role": "system", "content": "Other."}, {"role": "user", "content": text}]}
    assert decide(bundle, request_key(asked, []), vector).route == "teacher"
    stronger = calibrate(stored_config(folder, ["evaluate.engine=vllm", "calibrate.error_budget=0.001"]), folder)
    assert stronger.is_new
    assert stronger.manifest.version != found.manifest.version
    assert stronger.manifest.threshold == NEVER, "400 pairs cannot show one in a thousand"


@pytest.mark.slow
def test_the_bundle_is_served_with_real_models_on_both_sides(
    demo_run: tuple[RunFolder, dict[str, Any]], tmp_path: Path
) -> None:
    folder, _ = demo_run
    raw = yaml.safe_load(folder.read_bytes("config.yaml"))
    raw["teacher"] |= {"cpus": 0.5}
    raw["serve"] = {
        "folder": str(tmp_path / "service"),
        "student": {"type": "vllm", "gpus": 0, "cpus": 0.5, "engine_kwargs": {"max_model_len": 512}},
        "headers": True,
        "pass_fields": ["add_generation_prompt", "continue_final_message"],
    }
    held_out = folder.read_table("eval", "predictions.parquet").to_pylist()[:20]
    bundle = calibrate(stored_config(folder, ["evaluate.engine=vllm"]), folder).folder
    with serving(tmp_path, raw, "--bundle", str(bundle)) as service:
        until(lambda: service.status()["student_up"])
        _answers_what_it_was_trained_on(service, held_out)
        _speaks_the_openai_api(service, held_out[0]["query"])
        _survives_the_death_of_the_students_engine(service, held_out)


def _answers_what_it_was_trained_on(service: Service, held_out: list[dict[str, Any]]) -> None:
    answers = [service.ask(row["query"]) for row in held_out]
    assert {answer.status_code for answer in answers} == {200}
    routes = Counter(answer.headers["x-distill-route"] for answer in answers)
    assert routes["student"] > len(answers) / 2, routes
    said = [answer.json()["choices"][0]["message"]["content"] for answer in answers]
    assert sum(a == row["reference"] for a, row in zip(said, held_out, strict=True)) >= 0.85 * len(said)
    other = service.ask("x", messages=[{"role": "system", "content": "Be rude."}, {"role": "user", "content": "Hi"}])
    assert (other.headers["x-distill-route"], other.headers["x-distill-reason"]) == ("teacher", "other_fingerprint")


def _speaks_the_openai_api(service: Service, query: str) -> None:
    client = openai.OpenAI(base_url=service.url + "/v1", api_key="x", max_retries=0)
    messages: Any = [{"role": "user", "content": query}]
    for model in ("teacher", "student"):  # the teacher reasons first; what it comes to is what clients see
        whole = client.chat.completions.create(model=model, messages=messages, temperature=0)
        stream = client.chat.completions.create(model=model, messages=messages, temperature=0, stream=True)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
        assert text == whole.choices[0].message.content
        assert len(text) == 2
        assert whole.usage is not None
    ask: Any = partial(client.chat.completions.create, model="student", messages=messages)
    several = ask(n=3, temperature=1.0, seed=1)
    assert len(several.choices) == 3
    assert [c.message.content for c in several.choices] == [
        c.message.content for c in ask(n=3, temperature=1.0, seed=1).choices
    ]
    logprobs = ask(logprobs=True, top_logprobs=2, max_tokens=2).choices[0].logprobs.content
    assert all(len(token.top_logprobs) == 2 and token.logprob <= 0 for token in logprobs)
    assert ask(max_tokens=1).choices[0].finish_reason == "length"
    constrained = ask(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": ["ok"]}}})
    assert constrained.choices[0].message.content == '"ok"'
    both = {"add_generation_prompt": True, "continue_final_message": True}  # vLLM refuses that late
    for wrong in ({"max_tokens": 10**6}, {"tools": [{"type": "function", "function": {"name": "f"}}]}, both):
        with pytest.raises(openai.BadRequestError):
            ask(extra_body=wrong)
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model="auto", prompt="")
    assert service.ask(query).headers["x-distill-route"] == "student", "a wrong request takes it from nobody"


def _survives_the_death_of_the_students_engine(service: Service, held_out: list[dict[str, Any]]) -> None:
    [student] = service.replicas("demo-student")
    for engine in student.children(recursive=True):
        engine.kill()
    answers = [service.ask(row["query"]) for row in held_out]
    assert {answer.status_code for answer in answers} == {200}, [answer.text for answer in answers]
    assert answers[-1].headers["x-distill-route"] == "teacher"
