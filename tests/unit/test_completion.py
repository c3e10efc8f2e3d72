"""What TAB offers, asked for as a shell asks: with the protocol of bash."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from distill_ray.completion import config_keys, one_of, run_folders
from distill_ray.config import parse_config

ASK = "import sys; sys.argv[0] = 'distill-ray'; from distill_ray.cli import main; main()"


def tab(line: str, folder: Path) -> list[str]:
    """What bash is told for a line whose last word is to be completed."""
    question = {"_DISTILL_RAY_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(line.count(" "))}
    environment = {**os.environ, **question, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", ASK], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.stderr == ""
    return done.stdout.split()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("one", "two"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "config.yaml").touch()
    (tmp_path / "runs" / "not-one").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("distill-ray ge", ["generate"]),
        ("distill-ray flywheel r", ["run"]),
        ("distill-ray init --recipe s", ["safety", "sentiment", "soft_targets", "step_by_step", "self_critique"]),
        ("distill-ray train c.yaml --set train.ep", ["train.epochs=", "train.epochs=3"]),
        ("distill-ray pairs list c.yaml --set serve.guard", ["serve.guard=", "serve.guard=off", "serve.guard=strict"]),
        ("distill-ray ask runs/", ["runs/one", "runs/two"]),
        ("distill-ray train c.yaml --run-dir runs/t", ["runs/two"]),
        ("distill-ray export runs/one out --format ", ["messages", "dataset"]),
        ("distill-ray export runs/one out --split t", ["train", "test"]),
        ("distill-ray pairs export c.yaml out --format p", ["parquet"]),
        ("distill-ray check conf", []),  # the shell goes on with files
    ],
)
def test_tab_completes_what_can_be_known(line: str, expected: list[str], folder: Path) -> None:
    assert tab(line, folder) == expected


def test_run_folders_are_those_with_a_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert run_folders("") == ["runs/one", "runs/two"]
    assert run_folders("elsewhere/") == []
    monkeypatch.chdir(folder / "runs")
    assert run_folders("") == []


def test_keys_of_every_variant_are_offered_once_with_what_they_are_for() -> None:
    offers = config_keys("")
    keys = [key for key, _ in offers]
    assert len(keys) == len(set(keys))
    assert {"recipe.query=", "recipe.parse.regex=", "teacher.type=", "teacher.sampling.n=", "data.holdout="} <= {*keys}
    assert {"student.lora.rank=", "train.deepspeed.zero_stage=", "flywheel.min_pairs=", "serve.port="} <= {*keys}
    assert "passes over the data" in dict(offers)["train.epochs="].lower()


def test_a_default_that_is_offered_is_a_value_that_the_key_takes() -> None:
    raw = {"recipe": {"context": {"text": "-"}}, "data": {"source": "-"}, "teacher": {"type": "fake"}}
    for key, _ in config_keys("train.") + config_keys("evaluate.") + config_keys("generate."):
        if "." not in key.partition(".")[2]:
            values = [offer for offer, _ in config_keys(key) if offer != key]
            parse_config(raw, where="test", overrides=[value for value in values[:1] if "topk" not in value])


def test_a_value_is_completed_after_its_key() -> None:
    assert [offer for offer, _ in config_keys("serve.guard=s")] == ["serve.guard=strict"]
    assert config_keys("no.such.key") == config_keys("train.epochsx=") == []
    assert one_of("train", "test")("te") == ["test"]
