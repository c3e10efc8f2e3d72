"""`distill-ray flywheel run` and `status`: rounds, exit statuses, what is said of pairs that wait."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lance
import pyarrow as pa
import pytest

from distill_ray.config import RunConfig
from distill_ray.errors import ConfigError, FlywheelError, Interrupted
from distill_ray.flywheel import cli, cycle
from distill_ray.flywheel.cycle import Ended
from distill_ray.flywheel.cycles import Cycle, Outcome
from distill_ray.serving.collecting.store.lance import LanceStore
from tests.unit.pair_maker import pairs
from tests.unit.test_cycle import RAW, TABLES

Run = Callable[..., tuple[int, str]]
SERVICE = Path("services/mine")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    SERVICE.mkdir(parents=True)
    write(20)


def write(min_pairs: Any) -> None:
    Path("config.yaml").write_text(json.dumps({**RAW, "flywheel": {"min_pairs": min_pairs}}))


class Rounds:
    """Cycles that end as the test wants, and pauses that take no time."""

    def __init__(self, *ends: Outcome | Exception) -> None:
        self.ends = list(ends)
        self.begun: list[tuple[int, bool]] = []
        self.in_pause: Callable[[int], None] = lambda number: None

    def cycle(self, config: RunConfig, service: str, *, again: bool) -> Ended:
        self.begun.append((config.flywheel.min_pairs, again))
        end = self.ends[len(self.begun) - 1]
        if isinstance(end, Exception):
            raise end
        return Ended(len(self.begun), end, "gate", ["because"], Path(service), None)

    def pause(self, seconds: float) -> None:
        if len(self.begun) == len(self.ends):
            raise KeyboardInterrupt
        self.in_pause(len(self.begun))


@pytest.fixture
def rounds(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Rounds]:
    def make(*ends: Outcome | Exception) -> Rounds:
        found = Rounds(*ends)
        monkeypatch.setattr(cycle, "run_cycle", found.cycle)
        monkeypatch.setattr(cli.time, "sleep", found.pause)
        return found

    return make


# -- rounds ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outcome", ["promoted", "refused", "unclear", "overtaken", "too_few"])
def test_a_cycle_that_came_to_its_end_is_no_failure(run: Run, rounds: Callable[..., Rounds], outcome: Outcome) -> None:
    rounds(outcome)
    status, said = run("flywheel", "run", "config.yaml")
    assert (status, said.startswith("cycle 1 "), said.count("because")) == (0, True, 1)


def test_only_the_first_of_many_cycles_takes_back_what_was_set_aside(run: Run, rounds: Callable[..., Rounds]) -> None:
    found = rounds(FlywheelError("away"), "unclear", "too_few", "too_few")
    assert run("flywheel", "run", "config.yaml", "--again", "--every", "24h")[0] == 130
    assert found.begun == [(20, True), (20, True), (20, False), (20, False)]


def test_each_round_reads_the_config_anew_and_waits_out_one_that_is_wrong(
    run: Run, rounds: Callable[..., Rounds]
) -> None:
    found = rounds("too_few", ConfigError("flywheel.evaluation: away for a minute"), "too_few")
    found.in_pause = lambda number: write(20 + number)
    status, said = run("flywheel", "run", "config.yaml", "--every", "1m")
    assert (status, found.begun) == (130, [(20, False), (21, False), (22, False)])
    assert "error: flywheel.evaluation: away for a minute the next run goes on from there" in said


def test_a_config_that_is_broken_between_two_rounds_is_waited_out(run: Run, rounds: Callable[..., Rounds]) -> None:
    found = rounds("too_few", "too_few")
    configs = iter(["many", 30])
    found.in_pause = lambda number: write(next(configs))
    status, said = run("flywheel", "run", "config.yaml", "--every", "1m")
    assert (status, found.begun) == (130, [(20, False), (30, False)])
    assert "error: config.yaml: flywheel.min_pairs: Input should be a valid integer" in said


def test_what_is_wrong_in_the_first_round_ends_the_command(run: Run, rounds: Callable[..., Rounds]) -> None:
    found = rounds(ConfigError("flywheel.trainer.api_key_env: not set"))
    assert run("flywheel", "run", "config.yaml", "--every", "1m")[0] == 2
    assert len(found.begun) == 1


def test_a_step_that_cannot_be_done_is_waited_out_or_ends_the_one_cycle(
    run: Run, rounds: Callable[..., Rounds]
) -> None:
    rounds(FlywheelError("away"))
    assert run("flywheel", "run", "config.yaml") == (1, "error: away")
    found = rounds(FlywheelError("away"), "too_few")
    assert run("flywheel", "run", "config.yaml", "--every", "1m")[0] == 130
    assert len(found.begun) == 2


def test_ctrl_c_in_a_cycle_ends_the_rounds_too(run: Run, rounds: Callable[..., Rounds]) -> None:
    found = rounds(Interrupted("stopped"), "too_few")
    assert run("flywheel", "run", "config.yaml", "--every", "24h") == (130, "stopped")
    assert len(found.begun) == 1


@pytest.mark.parametrize(
    ("time", "why"),
    [
        ("often", "not a time; write a number and s, m, h or d, such as 24h"),
        ("1e3s", "not a time; write a number and s, m, h or d, such as 24h"),
        ("24", "has no unit; write 24s, 24m, 24h or 24d"),
        ("0h", "has to be more than 0, and 365d at most"),
        ("366d", "has to be more than 0, and 365d at most"),
        ("99999999999999d", "has to be more than 0, and 365d at most"),
    ],
)
def test_a_pause_that_is_none_is_refused_before_the_first_cycle(
    run: Run, rounds: Callable[..., Rounds], time: str, why: str
) -> None:
    found = rounds("too_few")
    assert run("flywheel", "run", "config.yaml", "--every", time) == (2, f"error: --every {time}: {why}")
    assert not found.begun


# -- status ------------------------------------------------------------------------------------------------------------


def ended(outcome: Outcome, step: Any, why: str, until: int, *, new: int = 250) -> None:
    """A first cycle that ended so."""
    found = Cycle(SERVICE / "cycles" / "0001")
    for name in ("snapshot", "clean", "split", "train", "gate"):
        is_last = name == step
        result = {"outcome": outcome if is_last else "go_on", "why": [why] if is_last else [], "seconds": 1.0}
        for table in TABLES.get(name, ()):
            ids = pa.table({"pair_id": [each.pair_id for each in pairs(25)]})
            found.files.write_table(ids.append_column("split", pa.array(["train"] * 25)), f"{table}.parquet")
        more = {"until": until, "new_pairs": new, "current": None, "made_from": "x"}
        found.write(name, {**result, **more})
        if is_last:
            return


def test_status_says_how_many_pairs_are_there(run: Run) -> None:
    assert run("status", "config.yaml")[1].endswith(
        "next: 20 more pairs: 0 new pairs, and a cycle takes 20 (flywheel.min_pairs)"
    )
    LanceStore(str(SERVICE / "pairs"), "pairs").add(pairs(25))
    status, said = run("status", "config.yaml")
    assert (status, said.partition("next: ")[2]) == (
        0,
        "ready: 25 new pairs are there; `distill-ray flywheel run` begins a cycle",
    )


def test_status_tells_of_older_pairs_that_wait_and_how_to_begin_with_them(run: Run) -> None:
    store = LanceStore(str(SERVICE / "pairs"), "pairs")
    store.add(pairs(25))
    ended("unclear", "gate", "too little to tell", store.snapshot())
    assert run("status", "config.yaml")[1].endswith(
        "next: 20 more pairs: 0 new pairs, and a cycle takes 20 (flywheel.min_pairs); 25 older ones wait with them; "
        "`distill-ray flywheel run --again` begins now, with all of these"
    )


@pytest.mark.parametrize("step", ["clean", "split"])
def test_status_repeats_why_the_same_pairs_were_too_few_until_more_are_there(run: Run, step: str) -> None:
    store = LanceStore(str(SERVICE / "pairs"), "pairs")
    store.add(pairs(25))
    ended("too_few", step, "7 are held out", store.snapshot())
    assert run("status", "config.yaml")[1].endswith("next: more pairs: 7 are held out")
    store.add(pairs(30)[25:])
    assert "next: ready: 30 new pairs are there" in run("status", "config.yaml")[1]


def test_status_says_that_nothing_is_collected(run: Run) -> None:
    said = run("status", "config.yaml", "--set", "serve.collect.enabled=false")[1]
    assert said.endswith("(flywheel.min_pairs); serve.collect.enabled is false, so no more will come")


def test_status_of_a_store_that_cannot_be_used_shows_the_rest_and_fails_in_its_own_words(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    LanceStore(str(SERVICE / "pairs"), "pairs").add(pairs(1))

    def broken(*_: Any, **__: Any) -> Any:
        raise OSError(
            "LanceError(IO): failed to fill whole buffer, "
            "/rustc/48a229ceaefd4985c50990b14116b6d856af0985/library/core/src/ops/function.rs:250:5"
        )

    monkeypatch.setattr(lance, "dataset", broken)
    status, said = run("status", "config.yaml")
    assert status == 1
    assert "bundle in service: none" in said
    assert "cannot use the store of pairs (LanceError(IO): failed to fill whole buffer); check" in said
    assert "rustc" not in said
