"""What goes wrong half-way: disks that fill up or turn read-only (on real mounts), a context that changes, a clock.

One message each, and nothing that was paid for is lost. What is wrong before is in `tests/unit/test_bad_input.py`.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from distill_ray.config import RunConfig, parse_config
from distill_ray.errors import ConfigError
from distill_ray.pipeline.folder import RunFolder, partition_name
from distill_ray.pipeline.generate import generate
from distill_ray.pipeline.ledger import Ledger

pytestmark = pytest.mark.usefixtures("local_ray")

NUM_ROWS = 60


def mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True, capture_output=True, text=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MB. Permission bits would not do: root ignores them."""
    place = tmp_path / "disk"
    place.mkdir()
    try:
        mount("-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place))
    except OSError as error:
        pytest.skip(f"there is no mount: {error}")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"nothing may be mounted here: {error.stderr.strip()}")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)  # a worker of Ray may have its log there still


@pytest.fixture
def command(disk: Path, tmp_path: Path) -> list[str]:
    """`generate` into that disk, from rows whose answers are 200 KB each and take two seconds in all."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": f"query-{i}"}) + "\n" for i in range(NUM_ROWS)))
    config = {
        "recipe": {"type": "context", "context": {"text": "Answer."}},
        "data": {"source": str(tmp_path / "rows.jsonl")},
        "teacher": {"type": "fake", "answer": "{{ query * 25000 }}", "latency_s": 0.1, "max_concurrency": 3},
    }
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    return [sys.executable, "-m", "distill_ray", "generate", str(tmp_path / "config.yaml"), "--run-dir", f"{disk}/run"]


def start(command: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Exit status, and what was said to a pipe and to people."""
    said, told = process.communicate(timeout=600)
    return process.returncode, said, told


def refused(process: subprocess.Popen[str], why: str) -> None:
    status, said, told = ended(process)
    progress, _, error = told.partition("error: ")
    assert (status, said) == (1, ""), told
    assert all(line.startswith("generate: ") for line in progress.splitlines()), told
    assert len(error.splitlines()) == 1, told
    assert why in error


def kept(disk: Path) -> int:
    """Calls in the ledger."""
    return sum(len(Ledger(RunFolder(disk / "run"), partition_name(index))) for index in range(4))


def goes_on(command: list[str], disk: Path, paid: int) -> None:
    status, said, told = ended(start(command))
    assert status == 0, told
    assert f"rows in {NUM_ROWS} = with examples {NUM_ROWS} + rejected 0" in said
    assert f"teacher calls {NUM_ROWS - paid}, replayed {paid}" in said
    assert kept(disk) == NUM_ROWS


def test_a_disk_that_fills_up_ends_the_run_and_what_was_paid_is_not_paid_again(disk: Path, command: list[str]) -> None:
    refused(start(command), "cannot write (No space left on device); check the disk's space")
    paid = kept(disk)
    assert 0 < paid < NUM_ROWS
    mount("-o", "remount,size=64m", str(disk))
    goes_on(command, disk, paid)


def test_a_folder_that_turns_read_only_ends_the_run_and_what_was_paid_is_not_paid_again(
    disk: Path, command: list[str]
) -> None:
    mount("-o", "remount,size=64m", str(disk))
    run = str(disk / "run")
    process = start(command)
    while process.poll() is None and len(list(disk.glob("run/calls/*/*.arrow"))) < 3:
        time.sleep(0.05)
    mount("--bind", run, run)  # the disk itself stays writable as long as somebody has a file of it open
    try:
        mount("-o", "remount,bind,ro", run)
        refused(process, "cannot write (Read-only file system); check the disk's space and the folder's permissions")
        paid = kept(disk)
        assert 0 < paid < NUM_ROWS
        refused(start(command), f"{run}: cannot use this run folder (Read-only file system); give one")
    finally:
        subprocess.run(["umount", "--lazy", run], check=True)
    goes_on(command, disk, paid)


def in_process(tmp_path: Path, **recipe: Any) -> RunConfig:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": f"query-{i}"}) + "\n" for i in range(NUM_ROWS)))
    teacher = {"type": "fake", "latency_s": 0.1, "max_concurrency": 3}
    raw = {"recipe": recipe or {"context": {"text": "Answer."}}, "data": {"source": "rows.jsonl"}, "teacher": teacher}
    return parse_config(raw, base=tmp_path)


def test_a_context_that_changes_while_the_teacher_is_asked_is_refused_and_free_once_it_is_back(tmp_path: Path) -> None:
    context, folder = tmp_path / "rules.md", RunFolder(tmp_path / "run")
    context.write_text("Answer.")
    config = in_process(tmp_path, context={"file": "rules.md"})
    change = threading.Thread(target=lambda: (until(lambda: folder.list("calls")), context.write_text("Be brief.")))
    change.start()
    with pytest.raises(ConfigError, match="changed while the teacher was asked, so nobody can say what examples/ were"):
        generate(config, folder)
    change.join()
    assert folder.manifest()["generation_complete"] is False
    context.write_text("Answer.")
    assert generate(config, folder).teacher_calls == 0


def test_a_clock_that_is_set_back_an_hour_half_way_changes_no_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, real = RunFolder(tmp_path / "run"), time.time
    monkeypatch.setattr(time, "time", lambda: real() - (3600 if folder.list("calls") else 0))
    generation = generate(in_process(tmp_path), folder)
    assert generation.rows_with_examples == NUM_ROWS
    assert all(0 <= seconds < 600 for seconds in [generation.seconds, *folder.manifest()["seconds"].values()])
    assert re.search(r"generate: 60/60 rows, .*elapsed \d+s", capsys.readouterr().err)


def until(found: Callable[[], object]) -> None:
    while not found():
        time.sleep(0.02)
