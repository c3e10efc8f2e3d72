"""The order of a cycle: what is done once, what is done again, how it ends. Its steps are scripted here."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from distill_ray.config import RunConfig, parse_config
from distill_ray.errors import FlywheelError, StoreError
from distill_ray.flywheel import cycle as machine
from distill_ray.flywheel.cycle import run_cycle
from distill_ray.flywheel.cycles import STEPS, Cycles, StepName
from distill_ray.flywheel.status import show_status
from distill_ray.flywheel.work import Work
from distill_ray.serving.routing.bundles import Bundles

RAW: dict[str, Any] = {
    "name": "mine",
    "recipe": {"type": "context", "context": {"text": "Answer."}, "query": "{{ text }}"},
    "data": {"source": "q.jsonl"},
    "teacher": {"type": "fake"},
}

TABLES: dict[StepName, tuple[str, ...]] = {
    "snapshot": ("snapshot",),
    "clean": ("kept", "dropped"),
    "split": ("pairs", "split"),
}


class Killed(BaseException):
    """As if the process had ended here."""


class Script:
    """Steps that note that they were done, and do what the test wants."""

    def __init__(self) -> None:
        self.done: list[StepName] = []
        self.does: dict[StepName, Callable[[], dict[str, Any]]] = {}

    def step(self, name: StepName) -> Callable[[Work], dict[str, Any]]:
        def do(work: Work) -> dict[str, Any]:
            result = self.does.get(name, lambda: {})()
            self.done.append(name)
            for table in TABLES.get(name, ()):
                work.cycle.files.write_table(pa.table({"pair_id": ["x"], "split": ["train"]}), f"{table}.parquet")
            extra = {"until": 1, "current": work.bundles.current()} if name in ("snapshot", "train") else {}
            return {"outcome": "promoted" if name == "promote" else "go_on", "number": name, **extra, **result}

        return do


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Script:
    return scripted(monkeypatch)


def scripted(monkeypatch: pytest.MonkeyPatch) -> Script:
    found = Script()
    monkeypatch.setattr(machine, "_DO", {name: found.step(name) for name in STEPS})
    monkeypatch.setattr(machine, "connected", contextlib.nullcontext)
    monkeypatch.setattr(machine, "write_gate_page", lambda *_: None)
    return found


def config(**flywheel: Any) -> RunConfig:
    return parse_config({**RAW, "flywheel": flywheel})


def raising(error: BaseException) -> Callable[[], dict[str, Any]]:
    def do() -> dict[str, Any]:
        raise error

    return do


def test_a_cycle_does_all_its_steps_in_order_and_the_next_one_is_another(tmp_path: Path, script: Script) -> None:
    ended = run_cycle(config(), str(tmp_path))
    assert (ended.outcome, ended.step, ended.number) == ("promoted", "promote", 1)
    assert script.done == list(STEPS)
    assert run_cycle(config(), str(tmp_path)).number == 2


@settings(max_examples=25, deadline=None)
@given(kills=st.lists(st.sampled_from(STEPS), max_size=6))
def test_wherever_it_is_killed_it_goes_on_there_and_does_nothing_twice(
    kills: list[StepName], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = str(tmp_path_factory.mktemp("service"))
    with pytest.MonkeyPatch.context() as monkeypatch:
        script = scripted(monkeypatch)
        for step in kills:
            script.does = {step: raising(Killed())}
            with contextlib.suppress(Killed):
                assert run_cycle(config(), folder).number == 1
                break  # it was past that step
        script.does = {}
        ended = run_cycle(config(), folder)
    assert script.done[: len(STEPS)] == list(STEPS)
    assert ended.number == (1 if len(script.done) == len(STEPS) else 2)


def test_an_error_of_a_step_leaves_the_cycle_where_it_is(tmp_path: Path, script: Script) -> None:
    script.does["gate"] = raising(StoreError("away"))
    with pytest.raises(StoreError, match="away"):
        run_cycle(config(), str(tmp_path))
    assert Cycles(tmp_path).all()[0].outcome is None
    del script.does["gate"]
    assert run_cycle(config(), str(tmp_path)).number == 1
    assert script.done.count("train") == 1


@pytest.mark.parametrize(
    ("changed", "again"),
    [
        ({"clean": {"min_chars": 3}}, "clean"),
        ({"holdout": 0.4}, "split"),
        ({"lora": None}, "train"),
        ({"gate": {"margin": 0.1}}, "gate"),
        ({"shadow": {"share": 0.5}}, "promote"),
        ({"min_pairs": 7, "keep_bundles": 3}, "promote"),
    ],
)
def test_what_the_config_changes_is_done_again_with_all_that_follows(
    tmp_path: Path, script: Script, changed: dict[str, Any], again: StepName
) -> None:
    script.does["promote"] = raising(Killed())
    with pytest.raises(Killed):
        run_cycle(config(), str(tmp_path))
    script.does, script.done = {}, []
    assert run_cycle(config(**changed), str(tmp_path)).number == 1
    first = "shadow" if "shadow" in changed else again
    assert script.done == list(STEPS[STEPS.index(first) :])


def test_too_few_pairs_leave_no_trail_of_empty_cycles(tmp_path: Path, script: Script) -> None:
    script.does["snapshot"] = lambda: {"outcome": "too_few", "why": ["3 new pairs"]}
    for _ in range(3):
        ended = run_cycle(config(), str(tmp_path))
        assert (ended.number, ended.outcome, ended.why) == (1, "too_few", ["3 new pairs"])
    script.does = {}
    assert run_cycle(config(), str(tmp_path)).number == 1


@pytest.mark.parametrize(("step", "outcome"), [("gate", "refused"), ("bundle", "unclear"), ("promote", "overtaken")])
def test_a_cycle_that_ends_early_is_over(tmp_path: Path, script: Script, step: StepName, outcome: str) -> None:
    script.does[step] = lambda: {"outcome": outcome, "why": ["because"]}
    ended = run_cycle(config(), str(tmp_path))
    assert (ended.outcome, ended.step, ended.why) == (outcome, step, ["because"])
    assert script.done == list(STEPS[: STEPS.index(step) + 1])
    assert run_cycle(config(), str(tmp_path)).number == 2


def test_text_and_weights_go_when_a_cycle_is_over_and_its_results_stay(tmp_path: Path, script: Script) -> None:
    def write() -> dict[str, Any]:
        [cycle] = Cycles(tmp_path).all()
        for name in ("examples", "checkpoints", "student", "calls", "logs"):
            cycle.run.write_bytes(b"x", name, "file")
        return {}

    script.does["train"] = write
    run_cycle(config(), str(tmp_path))
    folder = tmp_path / "cycles" / "0001"
    assert sorted(path.name for path in (folder / "run").iterdir() if not path.name.startswith(".")) == ["logs"]
    assert {path.name for path in folder.iterdir()} == {f"{step}.json" for step in STEPS} | {
        "run",
        "snapshot.parquet",
        "dropped.parquet",
        "split.parquet",
    }


def test_a_second_runner_is_told_who_is_at_work(tmp_path: Path, script: Script) -> None:
    def inside() -> dict[str, Any]:
        with pytest.raises(FlywheelError, match="another run of the flywheel is at work"):
            run_cycle(config(), str(tmp_path))
        return {}

    script.does["train"] = inside
    assert run_cycle(config(), str(tmp_path)).outcome == "promoted"


def test_every_run_has_a_newer_lease_and_fences_the_bundles_with_it(tmp_path: Path, script: Script) -> None:
    bundles = Bundles(tmp_path / "bundles")
    run_cycle(config(), str(tmp_path))
    first = bundles.fenced()
    run_cycle(config(), str(tmp_path))
    assert bundles.fenced() > first > 0


# -- files that somebody or some disk lost -----------------------------------------------------------------------------


def changed(**changes: Any) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        content = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))

    return change


def to_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def to_text(text: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        path.write_text(text)

    return change


LOSSES: list[tuple[str, Callable[[Path], None], str]] = [
    ("snapshot.json", Path.unlink, "missing, and clean.json is there"),
    ("gate.json", Path.unlink, "missing, and bundle.json is there"),
    ("split.parquet", Path.unlink, "missing, and split.json is there"),
    ("snapshot.parquet", Path.unlink, "missing, and snapshot.json is there"),
    ("promote.json", Path.unlink, "missing, and the cycle was over"),
    ("snapshot.json", to_text("{"), "damaged (Expecting property name"),
    ("snapshot.json", to_text(""), "damaged (Expecting value"),
    ("snapshot.json", to_text("[]"), "not what this version of distill-ray writes (no JSON object)"),
    ("snapshot.json", to_text("{}"), "not what this version of distill-ray writes (no `outcome`)"),
    ("snapshot.json", changed(until=None), "not what this version of distill-ray writes (no `until`)"),
    ("snapshot.json", changed(made_from=None), "not what this version of distill-ray writes (no `made_from`)"),
    ("gate.json", changed(seconds=None), "not what this version of distill-ray writes (no `seconds`)"),
    ("gate.json", changed(seconds="long"), "not what this version of distill-ray writes (seconds 'long')"),
    ("promote.json", changed(outcome="maybe"), "not what this version of distill-ray writes (outcome 'maybe')"),
    (
        "promote.json",
        changed(outcome=["promoted"]),
        "not what this version of distill-ray writes (outcome ['pro",
    ),
    ("snapshot.json", to_folder, "damaged (Is a directory)"),
]


def content_of(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.mark.parametrize(("file", "lose", "why"), LOSSES)
@pytest.mark.parametrize("is_last", [True, False])
def test_a_cycle_that_lost_a_file_is_neither_begun_again_nor_passed_over(
    tmp_path: Path, script: Script, file: str, lose: Callable[[Path], None], why: str, is_last: bool
) -> None:
    for _ in range(1 if is_last else 2):
        run_cycle(config(), str(tmp_path))
    script.done = []
    lose(tmp_path / "cycles" / "0001" / file)
    before = content_of(tmp_path / "cycles")
    with pytest.raises(FlywheelError) as told:
        run_cycle(config(), str(tmp_path))
    assert f"{tmp_path}/cycles/0001/{file}: {why}" in str(told.value)
    assert "Put it back from a backup; without one, move the folder 0001 out of" in str(told.value)
    assert "\n" not in str(told.value)
    assert script.done == []
    assert content_of(tmp_path / "cycles") == before


@pytest.mark.parametrize("content", [b"", b"PAR1 no more", None])
def test_a_damaged_table_of_what_was_held_out_is_named_with_the_way_on(
    tmp_path: Path, script: Script, content: bytes | None
) -> None:
    run_cycle(config(), str(tmp_path))
    [cycle] = Cycles(tmp_path).all()
    table = pa.table({"something": ["else"]})
    if content is None:
        cycle.files.write_table(table, "split.parquet")
    else:
        cycle.files.write_bytes(content, "split.parquet")
    with pytest.raises(FlywheelError, match=r"cycles/0001/split\.parquet: damaged \(.+\); a cycle's files") as told:
        cycle.table("split", ["pair_id", "split"])
    assert "generate" not in str(told.value)


@pytest.mark.parametrize("step", STEPS)
def test_files_that_a_kill_leaves_when_steps_are_dropped_have_no_gap(
    tmp_path: Path, script: Script, step: StepName, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed at each deletion on the way from the last step to the first, and gone on with."""
    script.does["promote"] = raising(Killed())
    with pytest.raises(Killed):
        run_cycle(config(), str(tmp_path))
    [cycle] = Cycles(tmp_path).all()
    cycle.write("promote", {**cycle.needed("shadow"), "outcome": "promoted"})
    deleted: list[str] = []

    def killed_at(*parts: str) -> None:
        deleted.extend(parts)
        (cycle.folder / parts[0]).unlink()
        if parts == (f"{step}.json",):
            raise Killed

    monkeypatch.setattr(cycle.files, "delete", killed_at)
    with pytest.raises(Killed):
        cycle.drop_from("snapshot")
    assert list(cycle.results()) == list(STEPS[: STEPS.index(step)])
    script.does = {}
    assert run_cycle(config(), str(tmp_path)).number == 1


@pytest.mark.parametrize("step", ["snapshot", "clean", "split"])
def test_a_kill_while_a_cycle_of_too_few_pairs_is_begun_again_leaves_one_that_begins_again(
    tmp_path: Path, script: Script, step: StepName
) -> None:
    script.does["split"] = lambda: {"outcome": "too_few", "why": ["no pair is left to learn from"]}
    assert run_cycle(config(), str(tmp_path)).outcome == "too_few"
    [cycle] = Cycles(tmp_path).all()
    cycle.drop_from(step)
    script.does, script.done = {}, []
    assert run_cycle(config(), str(tmp_path)).outcome == "promoted"
    assert script.done == list(STEPS[1:] if step == "clean" else STEPS)  # a snapshot alone is still one


@pytest.mark.parametrize("name", ["cycles", "cycles/0001"])
def test_a_file_where_the_folder_of_a_cycle_belongs_is_named(tmp_path: Path, script: Script, name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    with pytest.raises(FlywheelError, match=rf"{name}: a file where a folder of the flywheel belongs; move it away"):
        run_cycle(config(), str(tmp_path))
    with pytest.raises(FlywheelError, match=rf"{name}: a file where a folder of the flywheel belongs; move it away"):
        show_status(config(), str(tmp_path), Console(quiet=True))


def test_the_status_of_a_cycle_that_lost_a_file_is_the_error(tmp_path: Path, script: Script) -> None:
    run_cycle(config(), str(tmp_path))
    show_status(config(), str(tmp_path), Console(quiet=True))
    (tmp_path / "cycles" / "0001" / "clean.json").unlink()
    with pytest.raises(FlywheelError, match=r"clean\.json: missing, and split\.json is there"):
        show_status(config(), str(tmp_path), Console(quiet=True))
