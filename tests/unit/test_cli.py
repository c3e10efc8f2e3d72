"""The command: what it refuses before anything is paid for, what it writes, and what it says comes next.

All of these end before Ray is started. All kinds of bad input are in `test_bad_input.py`.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import sys
from pathlib import Path

import pytest

from distill_ray.cli import _wrote, main
from distill_ray.models import DEMO_MODEL_PATH
from distill_ray.pipeline.generate import Generation

CONFIG = """
name: bad
recipe: {type: context, context: {text: Answer.}, query: "{{ text }}"}
data: {source: SOURCE}
teacher: {type: fake}
"""


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["distill-ray", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    return int(caught.value.code or 0)


def write(folder: Path, name: str, content: bytes) -> Path:
    (folder / name).write_bytes(content)
    config = folder / "config.yaml"
    config.write_text(CONFIG.replace("SOURCE", name))
    return config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.epochs=none-at-all", "train.epochs"),
        ("data.source=missing.jsonl", "missing.jsonl"),
        ("recipe.context={file: missing.md}", "recipe.context.file"),
        ("recipe.query='{{ text'", "recipe.query"),
        ("recipe.query='{{ nothing }}'", "unknown column `nothing`"),
        ("student.model=./no/such/model", "student.model"),
        ("teacher={type: vllm, model: ./no/such/model}", "teacher.model"),
        ("teacher={type: openai, model: m, api_key_env: NO_SUCH_KEY}", "NO_SUCH_KEY"),
        ("teacher={type: vlm}", "teacher.type: unknown (got 'vlm'); did you mean `vllm`?"),
        ("data.source=5", "data.source: expected a file, a list of files or {dataset: NAME} (got 5)"),
        ("data.source=''", "data.source: names no file"),
        ("data.encoding=base64", "data.encoding: not an encoding of text"),
        ("train.learning_rate=.inf", "train.learning_rate"),
        ("recipe.query=''", "recipe.query: empty"),
        ("recipe.query=\"{% include '/etc/passwd' %}\"", "recipe.query: a template of the config cannot include"),
        ("recipe.query='{% for i in range(10**9) %}x{% endfor %}'", "recipe.query: not allowed in a template"),
        ("recipe.query='{{ text * 10**9 }}'", "the result of * is too big"),
        ("recipe.query='{{ 2 ** (10**9) }}{{ text }}'", "the result of ** is too big"),
        ("recipe.query='{{ 1/0 }}{{ text }}'", "none of the 1 first rows can be used, for example queries.jsonl:1"),
        ("recipe.query={{ text }}", "quote text that holds braces"),
    ],
)
def test_check_finds_what_is_wrong_before_anything_is_paid_for(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    override: str,
    message: str,
) -> None:
    config = write(tmp_path, "queries.jsonl", b'{"text": "hello"}\n')
    assert command(monkeypatch, "check", str(config), "--set", override) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_a_run_with_nothing_to_evaluate_on_is_refused_before_the_teacher_is_paid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write(tmp_path, "queries.jsonl", b'{"text": "hello"}\n')
    run = tmp_path / "run"
    assert command(monkeypatch, "run", str(config), "--run-dir", str(run), "--set", "data.holdout=0") == 2
    assert "nothing to evaluate on" in capsys.readouterr().err
    assert not run.exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {epochs: 1}\ntrain: {seed: 1}\n", "the key `train` is there twice"),
        ("train: {epochs: 1, epochs: 5}\n", "the key `epochs` is there twice"),
        ("train: &a {epochs: *a}\n", "an anchor of the YAML (&name) contains itself"),
    ],
)
def test_yaml_that_hides_a_setting_is_refused(
    text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write(tmp_path, "queries.jsonl", b'{"text": "hello"}\n')
    config.write_text(config.read_text() + text)
    assert command(monkeypatch, "check", str(config)) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_weights_that_run_code_when_they_are_read_are_refused(
    role: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    shutil.copytree(DEMO_MODEL_PATH, model)
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    config = write(tmp_path, "queries.jsonl", b'{"text": "hello"}\n')
    changes = ["--set", f"{role}.model={model}"] + (["--set", "teacher.type=hf"] if role == "teacher" else [])
    assert command(monkeypatch, "check", str(config), *changes) == 2
    assert f"{role}.model: {model} has no weights in safetensors" in capsys.readouterr().err


def test_the_next_command_can_be_pasted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "venv/bin/distill-ray")])
    monkeypatch.chdir(tmp_path)
    _wrote("runs/a b", "train", "c.yaml", "--set", "recipe.query={{ text }}")
    assert capsys.readouterr().out == (
        "wrote: runs/a b\nnext:  venv/bin/distill-ray train c.yaml --set 'recipe.query={{ text }}'\n"
    )


def test_init_writes_a_starter_and_never_over_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "mine" / "config.yaml"
    assert command(monkeypatch, "init", str(target), "--recipe", "step_by_step") == 0
    assert "type: step_by_step" in target.read_text()
    assert command(monkeypatch, "init", str(tmp_path / "critique.yaml"), "--recipe", "self_critique") == 0
    assert "type: self_critique" in (tmp_path / "critique.yaml").read_text()
    assert command(monkeypatch, "init", str(target)) == 2
    assert "is there already" in capsys.readouterr().err
    assert command(monkeypatch, "init", str(tmp_path / "x.yaml"), "--recipe", "magic") == 2
    assert "there are: context, " in capsys.readouterr().err


def test_the_version_is_printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"distill-ray {importlib.metadata.version('distill-ray')}\n"


@pytest.mark.parametrize(
    ("num_examples", "rejects", "expected", "unexpected"),
    [
        (3, {}, ["examples", "next:"], "warning"),
        (0, {"refused": 2, "cut_off": 1}, ["warning: not one example came of 3 rows (refused 2, cut_off 1)"], "next:"),
        (0, {"refused": 3}, ["rejects/*.parquet (reason, detail, row)"], "next:"),
        (0, {"token_budget": 3}, ["raise generate.max_teacher_tokens and run again"], "next:"),
    ],
)
def test_a_generation_without_an_example_does_not_lead_on_to_training(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    num_examples: int,
    rejects: dict[str, int],
    expected: list[str],
    unexpected: str,
) -> None:
    generation = Generation(3, num_examples, sum(rejects.values()), num_examples, rejects, 3, 0, 10, 10, 0, 0, 1.0)
    monkeypatch.setattr("distill_ray.pipeline.generate.generate", lambda *args, **keys: generation)
    config = write(tmp_path, "rows.jsonl", b'{"text": "a"}\n' * 3)
    assert command(monkeypatch, "generate", str(config), "--run-dir", str(tmp_path / "run")) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert all(text in shown for text in expected)
    assert unexpected not in shown


@pytest.mark.parametrize(
    "name", ["demo", "run", "generate", "train", "evaluate", "check", "preview", "report", "ask", "doctor"]
)
def test_every_command_has_a_help_page(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch, name, "--help") == 0
    assert "Usage" in capsys.readouterr().out


def test_doctor_finds_this_installation_complete(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch, "doctor") == 0
    assert "missing" not in capsys.readouterr().out


def test_a_run_folder_in_the_copy_that_a_ray_job_works_in_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_1a2b"
    copy.mkdir(parents=True)
    config = write(copy, "rows.jsonl", b'{"text": "a"}\n')
    monkeypatch.chdir(copy)
    assert command(monkeypatch, "generate", str(config)) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "in this Ray job's copy of the working folder, and goes with the job; give a bucket" in said
    assert not (copy / "runs").exists()


@pytest.mark.parametrize("is_writable", [True, False])
def test_a_bug_is_one_message_and_its_traceback_is_kept_or_said(
    is_writable: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> list[str]:
        raise ZeroDivisionError("a [bug]\nin two lines")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("distill_ray.doctor.examine", broken)
    name = f"distill-ray-crash-{os.getpid()}.log"
    if not is_writable:
        (tmp_path / name).mkdir()
    assert command(monkeypatch, "doctor") == 1
    said = capsys.readouterr().err
    assert "unexpected ZeroDivisionError: a [bug]\n" in said
    kept = (tmp_path / name).read_text() if is_writable else said
    assert "Traceback (most recent call last)" in kept
    assert ("Traceback" in said) is not is_writable
