"""`distill-ray plan` as a command: what it counts, refuses, prefers and writes. No Ray is started."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distill_ray.config import RunConfig, load_config, parse_config
from distill_ray.demo.prepare import prepare_demo
from distill_ray.pipeline.estimating.estimate import Estimate, estimate
from distill_ray.pipeline.estimating.training import TRAINING_START_S
from distill_ray.pipeline.folder import RunFolder
from distill_ray.pipeline.generate import generated_with
from distill_ray.pipeline.run import write_origin
from distill_ray.records import Message
from tests.unit.big_models import QWEN_7B, make_folder

Command = Callable[..., tuple[int, str]]

ROWS = 40


@pytest.fixture
def big(tmp_path: Path) -> dict[str, Any]:
    """A config of a large teacher and student over forty rows."""
    rows = [{"text": f"Where is house number {i}?"} for i in range(ROWS)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = str(make_folder(tmp_path / "7b", QWEN_7B))
    return {
        "name": "big",
        "recipe": {"type": "context", "context": {"text": "Answer with one word. " * 20}},
        "data": {"source": str(tmp_path / "rows.jsonl"), "holdout": 0.2},
        "teacher": {
            "type": "vllm",
            "model": model,
            "replicas": {"min": 1, "max": 4},
            "sampling": {"max_tokens": 100},
            "engine_kwargs": {"max_model_len": 4096},
        },
        "student": {"model": model, "lora": {"rank": 16}},
        "train": {"max_tokens_per_batch": 2048, "gradient_checkpointing": True},
    }


def changed(raw: dict[str, Any], **sections: dict[str, Any]) -> RunConfig:
    """The config with some keys of some sections replaced."""
    return parse_config({**raw, **{name: {**raw.get(name, {}), **section} for name, section in sections.items()}})


def written(raw: dict[str, Any], tmp_path: Path) -> str:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(raw))
    return str(path)


def figure(found: Estimate, name: str) -> Any:
    [one] = [figure for figure in found.figures if name in figure.name]
    return one


# -- the command -----------------------------------------------------------------------------------------------------


def test_the_demo_is_planned_without_ray_or_gpu(tmp_path: Path, run: Command) -> None:
    prepare_demo(tmp_path / "input", num_rows=120, overrides=[])
    config = str(tmp_path / "input" / "config.yaml")
    status, said = run("plan", config, "--json", str(tmp_path / "plan.json"))
    assert status == 0
    assert not ray.is_initialized()
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["rows_in"] == 520  # and 400 of the held-out file
    assert [stage["name"] for stage in plan["stages"]] == ["generate", "train", "evaluate"]
    assert plan["stages"][0]["calls"] == 520
    assert {stage["gpu"] for stage in plan["stages"]} == {"CPU"}
    assert plan["total"]["at_max"]["money"] == 0
    assert plan["total"]["at_max"]["wall_s"] > 0
    assert "520 rows (test 400" in said
    assert f"check {config}" in said  # what comes next


def test_what_does_not_fit_is_refused_with_what_would(tmp_path: Path, run: Command, big: dict[str, Any]) -> None:
    config = written(big, tmp_path)
    given = ("--set", "plan.teacher.gpu=L4", "--set", "teacher.engine_kwargs.max_model_len=131072")
    status, said = run("plan", config, *given, "--json", str(tmp_path / "plan.json"))
    assert status == 2
    assert "does not fit: teacher on 1 x L4 needs" in said
    assert "next:" not in said
    plan = json.loads((tmp_path / "plan.json").read_text())
    [teacher] = [fit for fit in plan["fits"] if fit["who"] == "teacher"]
    assert not teacher["fits"]
    assert plan["stages"][0]["at_max"] == {"replicas": 4, "wall_s": None, "gpu_hours": None, "money": None}
    keys = [remedy.split()[0].rstrip(":") for remedy in teacher["remedies"]]
    assert keys == [
        "teacher.gpus",
        "plan.teacher.gpu",
        "teacher.engine_kwargs.max_model_len",
        "teacher.model",
    ]
    for remedy in teacher["remedies"][:3]:  # each of them by itself, as it is said
        key, value = remedy.split()[:2]
        status, said = run("plan", config, *given, "--set", f"{key.rstrip(':')}={value}")
        assert status == 0, (remedy, said)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("teacher.gpus=3", "vLLM does not start: 28 attention heads cannot be divided by 3 GPUs. Instead:"),
        ("teacher.engine_kwargs.max_model_len=64", "tokens on average, max_model_len is 64. Instead:"),
    ],
    ids=["heads", "length"],
)
def test_what_would_not_work_however_much_room_there_is_is_refused_with_what_would(
    tmp_path: Path, run: Command, big: dict[str, Any], override: str, message: str
) -> None:
    config = written(big, tmp_path)
    status, said = run("plan", config, "--set", override, "--json", str(tmp_path / "plan.json"))
    assert (status, message in " ".join(said.split())) == (2, True), said
    [teacher] = [fit for fit in json.loads((tmp_path / "plan.json").read_text())["fits"] if fit["who"] == "teacher"]
    assert teacher["remedies"]
    for remedy in teacher["remedies"]:
        key, value = remedy.split()[:2]
        status, said = run("plan", config, "--set", f"{key.rstrip(':')}={value}")
        assert status == 0, (remedy, said)


def test_what_would_make_a_training_fit_does(tmp_path: Path, run: Command, big: dict[str, Any]) -> None:
    config = written(big, tmp_path)
    given = ("--set", "student.lora=null", "--set", "train.max_tokens_per_batch=16384")
    status, said = run("plan", config, *given, "--json", str(tmp_path / "plan.json"))
    assert status == 2, said
    fits = json.loads((tmp_path / "plan.json").read_text())["fits"]
    [training] = [fit for fit in fits if fit["who"] == "train"]
    assert len(training["remedies"]) > 1
    for remedy in training["remedies"]:
        ways = remedy.partition(" (")[0].replace(" and ", ", ").split(", ")
        sets = [part for way in ways for part in ("--set", way.replace(": ", "=", 1))]
        status, said = run("plan", config, *given, *sets)
        assert status == 0, (remedy, said)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("plan.teacher.gpu=B17", "plan.teacher.gpu: no GPU `B17` in the table; Known: L4, A10G,"),
        ("plan.teacher.gpus=2", "plan.teacher.gpus: unknown key (value 2); did you mean `gpu`?"),
        ("plan.sample_rows=0", "plan.sample_rows"),
        ("teacher.model=./nowhere", "teacher.model: no model at"),
        ("teacher.engine_kwargs.max_model_len=banana", "engine_kwargs.max_model_len: a number above 0 is needed (got"),
    ],
    ids=["gpu", "key", "sample", "model", "length"],
)
def test_bad_input_is_one_clear_message(
    tmp_path: Path, run: Command, big: dict[str, Any], override: str, message: str
) -> None:
    status, said = run("plan", written(big, tmp_path), "--set", override)
    assert (status, message in said) == (2, True), said


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path, run: Command, big: dict[str, Any]) -> None:
    status, said = run("plan", written(big, tmp_path), "--json", str(tmp_path / "no" / "plan.json"))
    assert (status, "plan.json: cannot write it" in said) == (2, True), said


# -- what it counts --------------------------------------------------------------------------------------------------


def test_rows_tokens_and_money_add_up(big: dict[str, Any]) -> None:
    hardware = {"gpu": "H100", "price_per_hour": 2.0}
    speeds = {"prompt_tokens_per_second": 100.0, "completion_tokens_per_second": 10.0}
    found = estimate(changed(big, plan={"teacher": {**hardware, **speeds}, "completion_tokens": 20}))
    generate = found.stages[0]
    assert (generate.rows, generate.calls, generate.completion_tokens) == (ROWS, ROWS, ROWS * 20)
    start = figure(found, "teacher: seconds until").value
    seconds = generate.prompt_tokens / 100 + generate.completion_tokens / 10
    assert generate.at_min.wall_s == pytest.approx(start + seconds)
    assert generate.at_max.wall_s == pytest.approx(start + seconds / 4)
    assert generate.at_max.gpu_hours == pytest.approx((4 * start + seconds) / 3600)
    assert generate.at_max.money == pytest.approx(2.0 * (4 * start + seconds) / 3600)
    assert found.totals[1].money == pytest.approx(sum(stage.at_max.money or 0 for stage in found.stages))


def test_rows_with_the_same_prompt_share_a_call_and_unusable_ones_have_none(
    big: dict[str, Any], tmp_path: Path
) -> None:
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"text": "Where is house number 0?"}\n{"text": ""}\n')
    found = estimate(changed(big))
    assert (found.rows_in, found.unusable, found.stages[0].rows, found.stages[0].calls) == (42, 1, 41, 40)


def test_the_sample_is_spread_and_the_same_every_time(big: dict[str, Any]) -> None:
    config = changed(big, plan={"sample_rows": 7})
    first, second = estimate(config), estimate(config)
    assert first == second
    assert first.sampled == 7
    whole = estimate(changed(big))
    assert whole.sampled == ROWS
    assert first.stages[0].prompt_tokens == pytest.approx(whole.stages[0].prompt_tokens, rel=0.01)


@pytest.mark.parametrize("teacher", [{"type": "fake"}, {"type": "openai", "model": "some"}], ids=lambda t: t["type"])
def test_a_teacher_without_a_model_here_needs_no_gpu(big: dict[str, Any], teacher: dict[str, Any]) -> None:
    found = estimate(parse_config({**big, "teacher": teacher}))
    assert found.stages[0].at_max.gpu_hours == 0
    assert [fit.who for fit in found.fits] == ["student", "train"]
    is_api = teacher["type"] == "openai"
    assert found.stages[0].at_max.money == (None if is_api else 0)
    assert any("4 characters" in note for note in found.notes) == is_api
    assert any("price is not given" in note for note in found.notes) == is_api


def test_an_encoder_decoder_can_be_planned(big: dict[str, Any], tiny_t5: Path) -> None:
    found = estimate(changed(big, student={"model": str(tiny_t5)}, evaluate={"engine": "hf"}))
    assert found.stages[-2].name == "train"
    assert found.stages[-2].at_max.money
    assert [fit.fits for fit in found.fits] == [True, True, True]


@pytest.mark.parametrize("speed", [1.0, 1e6])
def test_a_judge_that_is_slower_than_the_teacher_is_said(big: dict[str, Any], speed: float) -> None:
    engine = {"type": "openai", "model": "judge"}
    recipe = {"type": "self_critique", "reward": {"type": "judge", "engine": engine}}
    prices = {"price_per_million_prompt_tokens": 1, "price_per_million_completion_tokens": 1}
    judge = {**prices, "completion_tokens_per_second": speed}
    found = estimate(parse_config({**big, "recipe": recipe, "plan": {"judge": judge}}))
    assert [stage.name for stage in found.stages] == ["generate", "rewards", "train", "evaluate"]
    rewards = found.stages[1]
    assert rewards.calls == 2 * ROWS
    assert rewards.at_max.money == pytest.approx((rewards.prompt_tokens + rewards.completion_tokens) / 1e6)
    assert any("slower than the teacher" in note for note in found.notes) == (speed == 1)
    assert (found.stages[0].at_max.wall_s == found.stages[0].at_min.wall_s) == (speed == 1)


def test_what_needs_no_gpu_costs_the_price_that_is_given_and_else_nothing(big: dict[str, Any]) -> None:
    raw = {**big, "teacher": {**big["teacher"], "gpus": 0}, "student": {"model": "demo"}}
    assert estimate(parse_config(raw)).totals[0].money == 0
    plan = {"teacher": {"price_per_hour": 2.0}, "student": {"price_per_hour": 0.5}}
    found = estimate(parse_config({**raw, "plan": plan}))
    assert [stage.name for stage in found.stages] == ["generate", "train", "evaluate"]
    assert all(stage.at_max.gpu_hours == 0 for stage in found.stages)
    prices = (2.0, 0.5, 0.5)
    for stage, price in zip(found.stages, prices, strict=True):
        for cost in (stage.at_min, stage.at_max):
            assert cost.money == pytest.approx(cost.replicas * (cost.wall_s or 0) / 3600 * price)
    given = [figure for figure in found.figures if "USD per hour" in figure.name]
    assert [(figure.value, figure.origin) for figure in given] == [(2.0, "given"), (0.5, "given"), (0.5, "given")]


def test_who_judges_the_evaluation_is_planned(big: dict[str, Any]) -> None:
    prices = {"price_per_million_prompt_tokens": 1, "price_per_million_completion_tokens": 1}
    evaluate = {"metrics": ["win_rate"], "max_rows": 3}
    judge = {"judge": {"type": "openai", "model": "judge"}}
    found = estimate(changed(big, evaluate={**evaluate, **judge}, plan={"judge": prices}))
    assert [stage.name for stage in found.stages] == ["generate", "train", "evaluate", "judge"]
    verdicts = found.stages[-1]
    assert (verdicts.rows, verdicts.calls) == (3, 6)  # each pair in both orders
    assert verdicts.completion_tokens == pytest.approx(6 * 0.5 * 512)
    assert verdicts.at_max.money == pytest.approx((verdicts.prompt_tokens + verdicts.completion_tokens) / 1e6)
    by_teacher = estimate(changed(big, evaluate=evaluate))
    assert by_teacher.stages[-1].gpu == by_teacher.stages[0].gpu
    assert [fit.who for fit in by_teacher.fits] == [fit.who for fit in found.fits]
    assert by_teacher.totals[0].money == pytest.approx(sum(stage.at_min.money or 0 for stage in by_teacher.stages))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=5, deadline=None)
@given(few=st.integers(1, ROWS), more=st.integers(1, ROWS), samples=st.integers(1, 4))
def test_more_rows_and_samples_never_cost_less(big: dict[str, Any], few: int, more: int, samples: int) -> None:
    few, more = sorted((few, more))
    # The same length for all rows, so that a mean over other rows is no other mean.
    same = {"query": "the same length {{ text | length }}"}
    config = changed(big, teacher={"sampling": {"n": samples, "max_tokens": 100}}, recipe=same)
    less, all_of_it = (estimate(config, limit=limit).totals[1] for limit in (few, more))
    assert (less.gpu_hours or 0) <= (all_of_it.gpu_hours or 0) + 1e-9
    assert (less.money or 0) <= (all_of_it.money or 0) + 1e-9


# -- what was measured -----------------------------------------------------------------------------------------------


def trial(config: RunConfig, root: Path, **manifest: Any) -> RunFolder:
    """A run folder as a finished trial leaves it."""
    folder = RunFolder(root)
    write_origin(config, folder)
    messages: list[Message] = [{"role": "user", "content": "Where is house number 3?"}]
    examples = [{"split": "train", "messages": messages, "completion": "There."}] * 3
    folder.write_table(pa.Table.from_pylist(examples), "examples", "00000.parquet")
    folder.append_metrics(*({"step": i, "tokens_per_second": speed} for i, speed in enumerate((10.0, 300.0, 500.0))))
    figures = {
        "generation_complete": True,
        "generated_with": generated_with(config),
        "rows_in": 20,
        "num_examples": 18,
        "teacher_calls": 20,
        "teacher_calls_replayed": 0,
        "prompt_tokens": 2000,
        "completion_tokens": 140,
        "engines": 2,
        "seconds": {"generate_work": 5.0, "engine_start": 33.0},
    }
    folder.update_manifest({**figures, **manifest})
    return folder


def test_what_a_trial_measured_comes_before_what_is_given(big: dict[str, Any], tmp_path: Path) -> None:
    plan = {"completion_tokens": 50, "student": {"train_tokens_per_second": 7.0}}
    config = changed(big, plan=plan, train={"workers": 2})
    given = estimate(config)
    assert (figure(given, "tokens of an answer").value, figure(given, "train: tokens").value) == (50, 7)
    found = estimate(config, run=trial(config, tmp_path / "trial"))
    answer, speed = figure(found, "tokens of an answer"), figure(found, "answers per second")
    assert (answer.value, answer.origin) == (7, "measured")  # 140 tokens of 20 answers
    assert (speed.value, speed.origin) == (2, "measured")  # 20 answers in 5 s by 2 engines
    assert figure(found, "train: tokens per second").value == 150  # the median of the steps, of each of two workers
    generate = found.stages[0]
    assert generate.at_min.wall_s == pytest.approx(33 + ROWS / 2)
    assert generate.completion_tokens == ROWS * 7


def test_the_speed_of_a_worker_is_measured_by_the_workers_there_were(big: dict[str, Any], tmp_path: Path) -> None:
    config = changed(big, train={"workers": {"min": 1, "max": 4}})
    folder = trial(config, tmp_path / "trial")
    folder.delete("metrics.jsonl")
    folder.append_metrics(*({"step": i, "tokens_per_second": 300.0, "workers": 2} for i in range(3)))
    assert figure(estimate(config, run=folder), "train: tokens per second").value == 150


def test_a_training_is_planned_with_the_fewest_workers_and_with_all(big: dict[str, Any]) -> None:
    two, four = (estimate(changed(big, train={"workers": count})) for count in (2, 4))
    between = estimate(changed(big, train={"workers": {"min": 2, "max": 4}}))
    [train] = [stage for stage in between.stages if stage.name == "train"]
    [of_four] = [stage for stage in four.stages if stage.name == "train"]
    assert (train.at_min.replicas, train.at_max) == (2, of_four.at_max)
    start, all_of_them, fewest = TRAINING_START_S, train.at_max.wall_s, train.at_min.wall_s
    assert all_of_them is not None
    assert fewest == pytest.approx(start + 2 * (all_of_them - start))
    assert between.fits[-1] == two.fits[-1]  # each of the fewest holds most


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        ({"generation_complete": False}, "no finished generation"),
        ({"generated_with": "another"}, "no finished generation"),
        ({"engines": 0}, "does not say how many engines"),
        ({"teacher_calls": 0, "teacher_calls_replayed": 20}, "does not say how many engines"),
    ],
    ids=["unfinished", "another-config", "no-engines", "all-replayed"],
)
def test_what_cannot_be_taken_from_a_trial_is_said(
    big: dict[str, Any], tmp_path: Path, manifest: dict[str, Any], message: str
) -> None:
    config = changed(big)
    found = estimate(config, run=trial(config, tmp_path / "trial", **manifest))
    assert any(message in note for note in found.notes), found.notes
    assert figure(found, "teacher: completion tokens per second").origin == "estimated"


def test_a_speed_of_another_gpu_is_not_taken(big: dict[str, Any], tmp_path: Path) -> None:
    folder = trial(changed(big, plan={"teacher": {"gpu": "L4"}}), tmp_path / "trial")
    found = estimate(changed(big, plan={"teacher": {"gpu": "H100"}}), run=folder)
    assert any("it ran on other GPUs" in note for note in found.notes)
    assert figure(found, "tokens of an answer").origin == "measured"
    assert figure(found, "teacher: completion tokens per second").origin == "estimated"


def test_the_trial_is_named_on_the_command_line(tmp_path: Path, run: Command, big: dict[str, Any]) -> None:
    path = written(big, tmp_path)
    folder = trial(load_config(path), tmp_path / "trial")
    status, said = run("plan", path, "--run-dir", folder.root)
    assert (status, f"measured: {folder.root}" in said) == (0, True), said
    status, said = run("plan", path, "--run-dir", str(tmp_path / "nothing"))
    assert (status, "not a run folder" in said) == (2, True), said
