"""A package of the user's own, really installed, through the real command: its parts run inside Ray's workers too."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from distill_ray.pipeline.folder import RunFolder

ROOT = Path(__file__).parents[2]
CONFIG: dict[str, Any] = {
    "recipe": {"type": "best_of", "samples": 4, "reward": {"type": "endings", "best": 2}},
    "data": {"source": "queries.toml"},
    "teacher": {"type": "parrot", "cpus": 0.5},
}


def generate(
    config: Path, folder: Path, *path: Path, overrides: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "distill_ray", "generate", str(config), "--run-dir", str(folder)]
    command += [part for override in overrides for part in ("--set", override)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [ROOT, *path]))}
    environment.pop("RAY_ADDRESS", None)
    return subprocess.run(
        command, env=environment, cwd=config.parent, capture_output=True, text=True, timeout=900, check=False
    )


@pytest.fixture
def config(tmp_path: Path) -> Path:
    rows = [f'[[rows]]\ntext = "query {i}"\n' for i in range(30)] + ['[[rows]]\ntext = ""\n']
    (tmp_path / "queries.toml").write_text("".join(rows))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    return tmp_path / "config.yaml"


def test_recipe_engine_reward_and_reader_of_another_package_make_the_examples(
    config: Path, tmp_path: Path, example_plugin: Path
) -> None:
    done = generate(config, tmp_path / "run", example_plugin)
    assert done.returncode == 0, done.stderr
    assert "rows in 31 = with examples 30 + rejected 1, empty_query 1" in done.stdout
    assert "teacher calls 120, replayed 0" in done.stdout
    folder = RunFolder(tmp_path / "run")
    examples = [record for table in folder.read_tables("examples") for record in table.to_pylist()]
    assert {e["completion"] for e in examples} == {f"query {i}!!" for i in range(30)}  # of 0 to 3 marks, the best
    assert {(e["teacher"], e["reward_after"]) for e in examples} == {("demo@!", 0.0)}
    assert all(e["messages"] == [{"role": "user", "content": e["completion"].rstrip("!")}] for e in examples)
    assert folder.manifest()["versions"]["best-of"] == "1.2"

    # The stored config is a config; another reward asks nobody again, and the fingerprint knows of it.
    stored = Path(folder.path("config.yaml"))
    again = generate(stored, tmp_path / "run", example_plugin, overrides=("recipe.reward.best=3",))
    assert again.returncode == 0, again.stderr
    assert "teacher calls 0, replayed 120" in again.stdout
    examples = [record for table in folder.read_tables("examples") for record in table.to_pylist()]
    assert {e["completion"] for e in examples} == {f"query {i}!!!" for i in range(30)}


def test_without_the_package_the_command_says_what_there_is(config: Path, tmp_path: Path) -> None:
    done = generate(config, tmp_path / "run")
    assert done.returncode == 2
    assert "recipe.type: unknown (got 'best_of'); known: context, step_by_step, self_critique" in done.stderr


def test_a_recipe_that_breaks_is_named_with_its_error_and_the_log_with_its_traceback(
    config: Path, tmp_path: Path, example_plugin: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(example_plugin, broken)
    code = (broken / "best_of.py").read_text()
    broken_line = "raise ValueError('this recipe knows no rows')"
    (broken / "best_of.py").write_text(code.replace("assert engines.reward is not None", broken_line))
    done = generate(config, tmp_path / "run", broken)
    assert done.returncode == 1
    [message] = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    log = tmp_path / "run" / "logs" / "driver.log"
    assert f"ValueError: this recipe knows no rows; its traceback is in {log}." in message
    assert "retry" not in message
    assert f"    {broken_line}\n" in log.read_text()
