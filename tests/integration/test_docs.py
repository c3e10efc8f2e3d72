"""The commands of the docs, run as they stand there: one after the other, in a folder where their names are so.

What is mapped is what the docs leave open: placeholders in capitals. The teacher is the fake engine, the student the
demo's, trained for a few steps. A command that is not run stands in NOT_RUN, with the reason.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

from distill_ray.config.serve import StoreConfig
from distill_ray.demo.prepare import prepare_demo
from distill_ray.serving.collecting.store import make_store
from distill_ray.serving.routing.bundle import read_manifest
from distill_ray.serving.routing.bundles import Bundles
from tests.docs_commands import PAGES, ROOT, Command, commands, variants
from tests.unit.pair_maker import pair
from tests.unit.small_bundle import write_small_bundle

CONFIG = {
    "name": "mine",
    "recipe": {
        "type": "context",
        "context": {"file": "instruction.md"},
        "parse": {"regex": r"Final Answer: (\w+)"},
    },
    "data": {"source": "queries.jsonl", "holdout": 0.3, "validation_holdout": 0.1, "id": "id"},
    "teacher": {"type": "fake", "answer": "Short words.\nFinal Answer: de", "cpus": 0.5},
    "student": {"model": "demo"},
    "train": {"max_steps": 3, "max_tokens_per_batch": 1024, "cpus_per_worker": 0.5, "threads_per_worker": 1},
    "evaluate": {"reference": "label", "engine": "hf", "max_tokens": 8, "metrics": ["exact_match"]},
}
NUM_ROWS = 40
OTHER = "b" * 12  # a second bundle


@dataclass(frozen=True)
class Step:
    """A command of the docs, and what it says here."""

    text: str
    says: str
    means: Mapping[str, str] = field(default_factory=dict)
    """What its placeholders are here."""

    folder: str = "."
    before: Callable[[Path], None] = lambda world: None


# -- the world of the docs -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, embedder_cache: Path) -> Path:
    """A folder where the demo was begun, and a service of the same config is to be."""
    folder = tmp_path_factory.mktemp("docs")
    prepare_demo(folder / "runs" / "demo" / "input", num_rows=NUM_ROWS)
    (folder / "runs" / "demo" / "input" / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    shutil.copytree(folder / "runs" / "demo" / "input", folder, dirs_exist_ok=True)
    for name in ("starter", "starter-2"):
        (folder / name).mkdir()
    return folder


def another_run(world: Path) -> None:
    shutil.copytree(world / "runs" / "mine", world / "runs" / "other")


def a_trial(world: Path) -> None:
    (world / "runs" / "trial").symlink_to("mine")


def collected(world: Path) -> None:
    questions = {"Wo ist der Bahnhof?": "shop", "I am Jane Doe.": "shop", "Guten Tag": "lab"}
    pairs = [pair(question, "de", owner=owner) for question, owner in questions.items()]
    make_store(StoreConfig(), world / "services" / "mine").add(pairs)


def a_bundle_before(world: Path) -> None:
    """The run's own is in service, and there is another one, with the same embedder."""
    bundle = world / "runs" / "mine" / "bundle"
    bundles = Bundles(world / "services" / "mine" / "bundles")
    bundles.promote(bundles.install(bundle))
    identity = read_manifest(bundle).embedder_identity
    write_small_bundle(world / "runs" / "next" / "bundle", version=OTHER, embedder_identity=identity)


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "distill_ray", *words]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900, check=False
    )


# -- the walk --------------------------------------------------------------------------------------------------------

RUN_MINE = "distill-ray run runs/my-input/config.yaml --run-dir runs/mine"
WALK = [
    Step("distill-ray doctor", "built-in demo model"),
    Step("distill-ray init --recipe NAME", "check config.yaml", {"NAME": "step_by_step"}, "starter"),
    Step("distill-ray init --recipe rationales_from_file", "wrote: config.yaml", folder="starter-2"),
    # README: your own model, prompt and data
    Step("cp -r runs/demo/input runs/my-input", ""),
    Step("distill-ray check runs/my-input/config.yaml", f"{NUM_ROWS} first rows read, 0 of them unusable"),
    Step("distill-ray preview runs/my-input/config.yaml -n 5", "Final Answer: de"),
    Step("distill-ray plan runs/my-input/config.yaml", f"{NUM_ROWS} rows"),
    Step(f"{RUN_MINE} --limit 200", f"rows in {NUM_ROWS} = with examples {NUM_ROWS} + rejected 0; teacher calls"),
    Step(RUN_MINE, f"teacher calls 0, replayed {NUM_ROWS}"),
    Step("distill-ray ask runs/mine 'Wo ist der Bahnhof?'", "\n"),
    # runs, data
    Step("distill-ray report runs/mine", "wrote: runs/mine/report.html"),
    Step("distill-ray report runs/mine runs/other --out compared.html", "wrote: compared.html", before=another_run),
    Step("distill-ray export RUN FILE.jsonl", "wrote: out.jsonl", {"RUN": "runs/mine", "FILE.jsonl": "out.jsonl"}),
    Step("distill-ray export RUN FOLDER --format dataset", "test ", {"RUN": "runs/mine", "FOLDER": "dataset"}),
    # cluster, operations
    Step("distill-ray plan config.yaml --run-dir runs/trial", "runs/trial", before=a_trial),
    Step("distill-ray keys add config.yaml OWNER", "dr-", {"OWNER": "bob"}),
    # serving, with what a service would have collected
    Step("distill-ray calibrate runs/mine", "wrote: runs/mine/bundle"),
    Step("distill-ray serve config.yaml --write serve.yaml", "next:  serve deploy serve.yaml"),
    Step("distill-ray keys add config.yaml alice", "dr-"),
    Step("distill-ray keys list config.yaml", "alice"),
    Step("distill-ray keys remove config.yaml alice", "removed 1 from services/mine/keys.jsonl"),
    Step("distill-ray promote config.yaml runs/next/bundle", f"current: {OTHER} (before: ", before=a_bundle_before),
    Step("distill-ray rollback config.yaml", f"(before: {OTHER})"),
    Step("distill-ray rollback config.yaml none", "current: none (the teacher answers everything)"),
    Step("distill-ray pairs list config.yaml --owner shop", "pairs 3, 2 of them chosen", before=collected),
    Step("distill-ray pairs export config.yaml pairs.jsonl", "3 pairs of services/mine/pairs"),
    Step("distill-ray pairs export config.yaml pairs.parquet --format parquet", "wrote: pairs.parquet"),
    Step("distill-ray pairs delete config.yaml --contains 'Jane Doe' --dry-run", "would delete 1 of 3 pairs"),
    Step("distill-ray pairs delete config.yaml --owner shop", "deleted 2 pairs; 1 are left"),
    # flywheel
    Step("distill-ray status config.yaml", "bundle in service: none, the teacher answers everything"),
    Step("distill-ray flywheel run config.yaml", "nothing to do yet"),
]


@pytest.mark.parametrize("step", WALK, ids=lambda step: step.text)
def test_a_command_of_the_docs_does_what_they_say(step: Step, world: Path) -> None:
    step.before(world)
    program, *words = [step.means.get(word, word) for word in shlex.split(step.text)]
    if program == "cp":
        subprocess.run([program, *words], cwd=world, check=True)
        return
    done = run(world / step.folder, *words)
    assert done.returncode == 0, done.stderr
    assert step.says in done.stdout + done.stderr


# -- that nothing is left out ----------------------------------------------------------------------------------------

NOT_RUN = {
    "distill-ray calibrate --replay pairs.csv": "half a minute; tests/unit/test_recorded.py does it",
    "distill-ray calibrate RUN": "the same as runs/mine",
    "distill-ray calibrate runs/demo": "the same as runs/mine",
    "distill-ray check config.yaml": "the same as runs/my-input/config.yaml",
    "distill-ray check CONFIG --run-dir s3://...": "needs a bucket; tests/integration/test_object_store.py has one",
    "distill-ray flywheel run /srv/support.yaml": "the path of another machine",
    "distill-ray flywheel run config.yaml --every 24h": "until Ctrl-C; tests/unit/test_flywheel_cli.py does it",
    "distill-ray init --recipe prompt_distillation": "as with the other names",
    "distill-ray plan config.yaml": "the same as runs/my-input/config.yaml",
    "distill-ray rollback config.yaml VERSION": "as with `none`; tests/unit/test_serve_cli.py does it",
    "distill-ray run CONFIG --run-dir DIR": "the same as runs/mine",
    "distill-ray serve config.yaml": "until Ctrl-C; tests/integration/test_service.py does it",
    "distill-ray serve config.yaml --bundle runs/mine/bundle": "until Ctrl-C, too",
    "distill-ray serve runs/demo/input/config.yaml --bundle runs/demo/bundle": "until Ctrl-C, too",
}


def test_every_command_of_the_docs_is_run_or_has_a_reason_not_to_be() -> None:
    found = [each for page in PAGES for command in commands(page) for each in variants(command)]
    named = {each.text for each in found}
    ours = [each for each in found if each.program == "distill-ray" and (each.is_line or not is_a_name(each))]
    walked = {step.text for step in WALK}
    assert [str(each) for each in ours if each.text not in walked | NOT_RUN.keys()] == []
    assert walked - named == set()
    assert NOT_RUN.keys() - named == set()


def is_a_name(command: Command) -> bool:
    """Of a command, as in "`distill-ray train` goes on"."""
    return all(re.fullmatch("[a-z]+", word) for word in command.words)
