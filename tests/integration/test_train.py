"""The whole training stage on a local Ray with a two-layer model: what it writes, and that it survives kills.

Starting a training costs seconds and computing almost nothing, so tests share runs: `trained` is the reference curve.
Not covered here: GPUs and bf16 (tests/gpu), several machines.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Set
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from distill_ray.config.run import RunConfig, parse_config
from distill_ray.errors import ConfigError, TrainingError
from distill_ray.pipeline.cluster import connected
from distill_ray.pipeline.folder import RunFolder
from distill_ray.pipeline.training.train import train
from distill_ray.records import Example, Split, examples_table
from distill_ray.student.batches import plan_epoch
from distill_ray.student.tokens import Tokens

ROOT = Path(__file__).resolve().parents[2]
NUM_ROWS = 160
ALPHA = 0.7
TRAIN = {
    "epochs": 2,
    "learning_rate": 3e-3,
    "max_tokens_per_batch": 256,
    "max_length": 128,
    "validate_every": 15,
    "cpus_per_worker": 0.5,
    "threads_per_worker": 1,
}


@pytest.fixture(scope="module", autouse=True)
def _ray() -> Iterator[None]:
    with connected():
        yield


def make_config(model: Path, **changes: Any) -> RunConfig:
    student = {"model": str(model), **changes.pop("student", {})}
    return parse_config(
        {
            "recipe": {"type": "context", "context": {"text": "-"}, "query": "-"},
            "data": {"source": "-"},
            "teacher": {"type": "fake"},
            "student": student,
            "train": {**TRAIN, **changes},
        }
    )


def make_examples(count: int, split: Split) -> Iterator[Example]:
    rng = random.Random(split)
    for i in range(count):
        word = "".join(rng.choices("abcdef", k=rng.randint(2, 30)))
        messages: list[Any] = [{"role": "user", "content": word}]
        yield Example(f"{split}-{i:03}", split, messages, word[0].upper(), task="label", weight=ALPHA)
        yield Example(f"{split}-{i:03}", split, messages, word[::-1], task="rationale", weight=1 - ALPHA)


def make_folder(path: Path) -> RunFolder:
    folder = RunFolder(path)
    too_long = Example("long", "train", [{"role": "user", "content": "x" * 500}], "y")
    folder.write_table(examples_table([*make_examples(NUM_ROWS, "train"), too_long]), "examples", "00000.parquet")
    folder.write_table(examples_table(make_examples(20, "validation")), "examples", "00001.parquet")
    return folder


def curve(folder: RunFolder) -> dict[int, tuple[float, float]]:
    """Loss and gradient norm of every step; the last line of a step counts."""
    lines = [json.loads(line) for line in folder.read_bytes("metrics.jsonl").splitlines()]
    return {line["step"]: (line["loss"], line["grad_norm"]) for line in lines if "loss" in line}


def step_by_step_loss(folder: RunFolder, model: Path) -> float:
    """Of the first step, by plain transformers: alpha x mean of the labels + (1 - alpha) x mean of the rationales."""
    from transformers import AutoModelForCausalLM

    [place] = [path for path in folder.local("train").glob("tokens-*") if path.is_dir()]
    tokens = Tokens(place / "train")
    lengths, rows = tokens.lengths_E, tokens.rows_E
    [first, *_] = plan_epoch(lengths, rows, max_tokens=TRAIN["max_tokens_per_batch"], num_parts=2, seed=0, epoch=0)
    student = AutoModelForCausalLM.from_pretrained(model).eval()
    sums = {"label": [0.0, 0], "rationale": [0.0, 0]}
    for example in first:
        ids = torch.from_numpy(tokens.ids(example).astype("int64"))[None]
        labels = ids.clone()
        labels[:, : tokens.prompt_tokens_E[example]] = -100
        count = int(tokens.completion_tokens_E[example])
        task = tokens.task_names[tokens.tasks_E[example]]
        with torch.no_grad():
            sums[task][0] += student(input_ids=ids, labels=labels).loss.item() * count
        sums[task][1] += count
    label, rationale = (total / count for total, count in sums.values())
    return ALPHA * label + (1 - ALPHA) * rationale


def test_the_first_loss_is_that_of_distilling_step_by_step(
    trained: tuple[RunFolder, dict[str, Any]], tiny_model: Path
) -> None:
    """Here with gradient accumulation; two workers are held against it below, T5 in test_recipes.py."""
    folder, _ = trained
    assert curve(folder)[1][0] == pytest.approx(step_by_step_loss(folder, tiny_model), abs=1e-5)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> tuple[RunFolder, dict[str, Any]]:
    folder = make_folder(tmp_path_factory.mktemp("trained"))
    return folder, train(make_config(tiny_model, gradient_accumulation=2), folder)


def test_a_run_writes_student_figures_and_metrics(trained: tuple[RunFolder, dict[str, Any]]) -> None:
    folder, figures = trained
    assert figures["examples"] == 2 * NUM_ROWS
    assert figures["validation_examples"] == 40
    manifest = folder.manifest()
    assert manifest["train"] == figures
    assert manifest["seconds"]["train"] == figures["seconds"]
    steps = curve(folder)
    assert sorted(steps) == list(range(1, figures["steps"] + 1))
    first, last = steps[1][0], steps[figures["steps"]][0]
    assert last < 0.8 * first
    validations = [
        line["validation_loss"]
        for text in folder.read_bytes("metrics.jsonl").splitlines()
        if "validation_loss" in (line := json.loads(text))
    ]
    assert figures["validation_loss"] == min(validations)
    assert any(folder.local("logs", "tensorboard").iterdir())


def test_the_student_is_a_plain_transformers_model_with_the_kept_loss(
    trained: tuple[RunFolder, dict[str, Any]],
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, _ = trained
    student = folder.local("student")
    model = AutoModelForCausalLM.from_pretrained(student)
    tokenizer = AutoTokenizer.from_pretrained(student)
    assert tokenizer.chat_template
    assert model.config.use_cache
    assert {p.name for p in student.iterdir()} >= {"model.safetensors", "config.json", "generation_config.json"}
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": "abc"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    assert model.generate(**inputs, max_new_tokens=4, do_sample=False).shape[1] > inputs["input_ids"].shape[1]


def test_what_is_too_long_is_a_counted_reject(trained: tuple[RunFolder, dict[str, Any]]) -> None:
    folder, figures = trained
    (reject,) = folder.read_table("train", "rejects.parquet").to_pylist()
    assert figures["rejects"] == 1
    assert (reject["row_id"], reject["stage"], reject["reason"]) == ("long", "train", "too_long_to_train")
    assert "train.max_length is 128" in reject["detail"]


def test_a_finished_run_is_not_trained_again(
    trained: tuple[RunFolder, dict[str, Any]], tiny_model: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder, figures = trained
    before = folder.read_bytes("metrics.jsonl")
    assert train(make_config(tiny_model, gradient_accumulation=2), folder) == figures
    assert folder.read_bytes("metrics.jsonl") == before
    assert "already done" in capfd.readouterr().err


@pytest.mark.slow
def test_two_workers_with_zero_3_take_the_same_steps_as_one_with_accumulation(
    trained: tuple[RunFolder, dict[str, Any]],
    tiny_model: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    folder = make_folder(tmp_path)
    train(make_config(tiny_model, workers=2, deepspeed={"zero_stage": 3}), folder)
    output = capfd.readouterr()
    assert output.out == ""
    assert all(line.startswith("train: ") for line in output.err.splitlines()), output.err
    two, one = curve(folder), curve(trained[0])
    assert len(two) == len(one)
    assert two[1][0] == pytest.approx(step_by_step_loss(folder, tiny_model), abs=1e-5)
    for step in range(1, 21):  # rounding apart, which training then magnifies
        assert two[step] == pytest.approx(one[step], abs=2e-5, rel=2e-5)


@pytest.mark.slow
def test_where_one_of_two_workers_has_room_it_takes_the_steps_of_both(
    trained: tuple[RunFolder, dict[str, Any]], tiny_model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Of its steps, those of two workers are held against it above."""
    folder = make_folder(tmp_path)
    figures = train(make_config(tiny_model, workers={"min": 1, "max": 2}, cpus_per_worker=all_cpus()), folder)
    assert "train: 1 of 2 workers has room; each does twice as much per step" in capfd.readouterr().err
    assert figures["workers"] == folder.manifest()["train"]["workers"] == 1
    assert curve(folder) == curve(trained[0])


@pytest.mark.parametrize(
    ("before", "zero_stage", "student"),
    [
        (2, 2, {}),
        (1, 2, {}),
        (2, 3, {"lora": {"rank": 4}}),
    ],
    ids=["2 then 1", "1 then 2", "2 then 1, ZeRO 3, adapters"],
)
@pytest.mark.slow
def test_a_killed_command_goes_on_with_another_number_of_workers(
    trained: tuple[RunFolder, dict[str, Any]],
    tiny_model: Path,
    tmp_path: Path,
    before: int,
    zero_stage: int,
    student: dict[str, Any],
) -> None:
    def config_for(num_workers: int) -> RunConfig:
        return make_config(
            tiny_model,
            workers={"min": 1, "max": 2},
            cpus_per_worker=0.5 if num_workers == 2 else all_cpus(),
            deepspeed={"zero_stage": zero_stage},
            student=student,
        )

    run = tmp_path / "run"
    folder = make_folder(run)
    config = tmp_path / "config.yaml"
    config.write_text(config_for(before).model_dump_json(exclude_none=True))
    command = [sys.executable, "-m", "distill_ray", "train", str(config), "--run-dir", str(run)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    wait_for_checkpoint(run, lambda: process.poll() is None)
    process.send_signal(signal.SIGKILL)
    process.wait()

    after = 3 - before
    assert train(config_for(after), folder)["workers"] == after
    lines = [json.loads(line) for line in folder.read_bytes("metrics.jsonl").splitlines()]
    ran = [(line["step"], line["workers"]) for line in lines if "loss" in line]
    resumed_at = next(step for step, workers in ran if workers == after) - 1
    assert resumed_at > 0

    whole = trained[0]
    if student:
        whole = make_folder(tmp_path / "whole")
        train(config_for(before), whole)
    went_on, expected = curve(folder), curve(whole)
    assert {step for step in expected if step > resumed_at} <= went_on.keys()
    for step in went_on.keys() & set(range(1, resumed_at + 11)):  # rounding apart, which training then magnifies
        assert went_on[step] == pytest.approx(expected[step], abs=2e-5, rel=2e-5)


def all_cpus() -> float:
    """What one worker asks for where a second one has no room."""
    return ray.cluster_resources()["CPU"]


def test_adapters_are_merged_into_a_student_that_equals_base_and_adapter(tiny_model: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder = make_folder(tmp_path)
    train(make_config(tiny_model, max_steps=4, student={"lora": {"rank": 4, "merge": True}}), folder)
    student = folder.local("student")
    merged = AutoModelForCausalLM.from_pretrained(student)
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    ids = torch.arange(10, 20)[None]
    before = base(ids).logits
    assert json.loads((student / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        tiny_model
    )
    adapted = PeftModel.from_pretrained(base, student / "adapter")(ids).logits
    torch.testing.assert_close(merged(ids).logits, adapted, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(before, adapted)


def test_an_interrupted_and_then_killed_command_is_resumed_with_exactly_the_same_curve(
    trained: tuple[RunFolder, dict[str, Any]], tiny_model: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    folder = make_folder(run)
    config = tmp_path / "config.yaml"
    config.write_text(make_config(tiny_model, gradient_accumulation=2).model_dump_json(exclude_none=True))
    command = [sys.executable, "-m", "distill_ray", "train", str(config), "--run-dir", str(run)]

    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    wait_for_checkpoint(run, lambda: process.poll() is None)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 130, errors
    assert "run the same command again" in errors
    assert "Traceback" not in errors
    assert not (run / "student").exists()

    first = checkpoints(run)
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    wait_for_checkpoint(run, lambda: process.poll() is None, beside=first)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (run / "student").exists()

    train(make_config(tiny_model, gradient_accumulation=2), folder)
    # kill -9 of the driver may cost the figures of its last half second, and nothing else.
    before, after = curve(trained[0]), curve(folder)
    assert after.items() <= before.items()
    assert len(before) - len(after) <= 3
    assert max(after) == max(before)


@pytest.mark.slow
def test_a_killed_worker_is_replaced_and_goes_on_with_exactly_the_same_curve(
    trained: tuple[RunFolder, dict[str, Any]], tiny_model: Path, tmp_path: Path
) -> None:
    folder = make_folder(tmp_path)
    thread = threading.Thread(target=train, args=(make_config(tiny_model, gradient_accumulation=2), folder))
    thread.start()
    wait_for_checkpoint(tmp_path, thread.is_alive)
    (worker,) = descendants("RayTrainWorker")
    os.kill(worker, signal.SIGKILL)
    thread.join()
    assert (tmp_path / "student" / "config.json").exists()
    assert curve(folder) == curve(trained[0])


def test_a_loss_that_is_not_finite_stops_at_once_with_one_clear_message(tiny_model: Path, tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    with pytest.raises(TrainingError, match=r"the loss became (nan|inf) at step \d+.*rows .*train-.*learning_rate"):
        train(make_config(tiny_model, learning_rate=1e30, warmup_ratio=0.0), folder)
    assert not folder.exists("student")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"max_length": 8}, TrainingError, r"nothing to train on: all \d+ examples are longer than 8 tokens"),
        ({"workers": 1000}, ConfigError, "1000 with train.cpus_per_worker 0.5 need 500 CPUs"),
        ({"student": {"model": "./nowhere"}}, ConfigError, "no model at"),
    ],
)
def test_what_cannot_work_is_said_before_a_worker_starts(
    tiny_model: Path, tmp_path: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        train(make_config(tiny_model, **changes), make_folder(tmp_path))


def test_examples_that_are_missing_are_noticed(tiny_model: Path, tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    folder.update_manifest({"num_examples": 1000})
    with pytest.raises(TrainingError, match="examples where 1000 were generated; run `distill-ray generate` again"):
        train(make_config(tiny_model), folder)


def test_no_training_examples_is_an_error_that_names_the_next_command(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="run `distill-ray generate` first"):
        train(make_config(tiny_model), RunFolder(tmp_path))


def checkpoints(path: Path) -> set[Path]:
    """Those that are there, once Ray Train knows of one."""
    known = list(path.glob("checkpoints/*/checkpoint_manager_snapshot.json"))
    return set(path.glob("checkpoints/*/step-*")) if known else set()


def wait_for_checkpoint(path: Path, is_running: Any, *, beside: Set[Path] = frozenset()) -> None:
    """Return as soon as Ray Train knows a checkpoint of the run that is not one of `beside`."""
    deadline = time.monotonic() + 900
    while not checkpoints(path) - beside:
        assert is_running(), "the training ended before it was killed"
        assert time.monotonic() < deadline, "no checkpoint after a quarter of an hour"
        time.sleep(0.02)


def descendants(name: str) -> list[int]:
    """Processes with this in their command line that descend from this one (other Rays may run beside us)."""
    parents, found = {}, []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
                if name in (entry / "cmdline").read_text():
                    found.append(int(entry.name))
            except OSError:  # ended meanwhile
                continue

    def is_ours(pid: int) -> bool:
        while pid > 1:
            if pid == os.getpid():
                return True
            pid = parents.get(pid, 0)
        return False

    return [pid for pid in found if is_ours(pid)]
