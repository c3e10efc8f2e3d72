"""What looks lead to: thresholds, going back, events and files; and that it survives its keeper."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest

from distill_ray.config.serve import DriftConfig
from distill_ray.errors import BundleError, RunFolderError, StoreError
from distill_ray.serving.events import Events
from distill_ray.serving.metrics import Metrics
from distill_ray.serving.routing.bundles import NOTHING, Bundles
from distill_ray.serving.watching import overseer as overseer_module
from distill_ray.serving.watching.overseer import Overseer, read_floors
from distill_ray.serving.watching.second_look import Look
from tests.unit.small_bundle import write_small_bundle

A, B, C, RAW = "a" * 12, "b" * 12, "c" * 12, "d" * 12
MEASURED = {"metric": "exact_match", "error_budget": 0.05, "confidence": 0.95}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bundles, installed and never changed."""
    folder = tmp_path_factory.mktemp("made")
    bundles = Bundles(folder / "bundles")
    for version in (A, B, C, RAW):
        summary = MEASURED if version != RAW else {"share": 0.8}
        bundles.install(write_small_bundle(folder / version, version=version, summary=summary))
    return Path(bundles.url)


class Keeper:
    """What an overseer has around it. `again` is the keeper after a kill."""

    def __init__(self, folder: Path, made: Path, *current: str) -> None:
        self.folder = folder
        (folder / "bundles").mkdir()
        for installed in made.iterdir():
            (folder / "bundles" / installed.name).symlink_to(installed)
        self.bundles = Bundles(folder / "bundles")
        for version in current:
            self.bundles.promote(version)
        self.settled: list[list[str]] = []
        self.numbers = itertools.count(1)
        self.again()

    def again(self, config: DriftConfig | None = DriftConfig()) -> None:  # noqa: B008 (frozen)
        self.events, self.metrics = Events(self.folder / "events.jsonl"), Metrics()
        self.overseer = Overseer(config, self.folder, self.bundles, self.settle, self.events, self.metrics)

    def settle(self) -> None:
        self.settled.append(self.bundles.versions())

    def look(self, version: str, *, good: bool, score: float = 0.9, kind: Any = "drift", tokens: int = 10) -> Look:
        return Look(next(self.numbers), kind, version, good, score, tokens, 1000.0)

    def hear(self, *looks: Look, router: str = "r1") -> None:
        self.overseer.hear(router, looks)
        self.overseer.round()

    def drift(self, version: str, num: int = 60, *, below: float = 2.0) -> None:
        """Looks of which all below a score are bad."""
        chance = random.Random(1)
        scores = [chance.uniform(0.6, 1.0) for _ in range(num)]
        self.hear(*(self.look(version, good=score >= below, score=score) for score in scores))

    def written(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "events.jsonl").read_text().splitlines()]

    def what(self) -> list[str]:
        return [event["what"] for event in self.written()]

    def count(self, name: str, **labels: str) -> float | None:
        return self.metrics.registry.get_sample_value(f"distill_{name}", labels)


@pytest.fixture
def keeper(tmp_path: Path, made: Path) -> Keeper:
    return Keeper(tmp_path, made, A, B)


# -- what is done ----------------------------------------------------------------------------------------------------


def test_the_threshold_rises_and_then_the_bundle_is_gone_back_from(keeper: Keeper) -> None:
    keeper.drift(B, below=0.7)
    floor = read_floors(keeper.folder)[B]
    assert 0.6 < floor < 0.75
    assert keeper.bundles.current() == B
    assert keeper.count("drift_actions_total", action="raise") == 1
    event = keeper.written()[-1]
    assert event["what"] == "threshold_raised"
    assert (event["version"], event["threshold"], event["budget"]) == (B, floor, 0.05)
    assert event["bad"] <= event["looks"]
    assert event["bound"] > 0.05
    assert f"the threshold of {B} rises from 0.500 to {floor:.3f}" in event["text"]
    keeper.drift(B)
    assert keeper.bundles.current() == A
    assert keeper.settled == [[A]]
    assert keeper.count("drift_actions_total", action="rollback") == 1
    event = keeper.written()[-1]
    assert (event["what"], event["version"], event["current"], event["by"]) == ("rolled_back", B, A, "drift")
    assert "answers looked at again were worse than the teacher's" in event["text"]
    keeper.overseer.round()
    assert keeper.what() == ["promoted", "threshold_raised", "rolled_back"]  # the move is told once
    assert read_floors(keeper.folder) == {}  # whoever promotes it again begins anew


def test_where_nothing_was_before_the_teacher_answers_everything(tmp_path: Path, made: Path) -> None:
    keeper = Keeper(tmp_path, made, A)
    keeper.drift(A)
    assert keeper.bundles.current() is None
    assert keeper.written()[-1]["current"] is None
    assert "back to the teacher, which answers everything" in keeper.written()[-1]["text"]


def test_a_bundle_before_that_is_damaged_is_no_place_to_go_back_to(
    keeper: Keeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    rollback = Bundles.rollback

    def refuses(self: Bundles, version: str | None = None, *, only_from: str | None = None) -> str | None:
        if version is None:
            raise BundleError("damaged")
        return rollback(self, version, only_from=only_from)

    monkeypatch.setattr(Bundles, "rollback", refuses)
    keeper.drift(B)
    assert keeper.bundles.current() is None


def test_what_changed_for_all_bundles_takes_all_of_them_out(keeper: Keeper) -> None:
    keeper.drift(B)
    keeper.drift(A)
    assert keeper.bundles.current() is None
    assert keeper.settled == [[A], []]


def test_looks_at_another_bundle_than_the_current_one_lead_to_nothing(keeper: Keeper) -> None:
    keeper.drift(A)
    keeper.drift(C)
    assert keeper.bundles.versions() == [A, B]
    assert read_floors(keeper.folder) == {}
    assert keeper.what() == ["promoted"]


def test_a_bundle_that_was_promoted_meanwhile_stays(keeper: Keeper, monkeypatch: pytest.MonkeyPatch) -> None:
    back = Overseer._move_back

    def late(self: Overseer, version: str) -> str | None:
        keeper.bundles.promote(C)
        return back(self, version)

    monkeypatch.setattr(Overseer, "_move_back", late)
    with pytest.raises(BundleError, match="not current any more"):
        keeper.drift(B)
    assert keeper.bundles.versions() == [A, B, C]
    monkeypatch.undo()
    keeper.overseer.round()
    assert keeper.bundles.versions() == [A, B, C]
    assert keeper.what() == ["promoted", "promoted"]


def test_a_store_that_is_away_delays_no_rollback(keeper: Keeper, monkeypatch: pytest.MonkeyPatch) -> None:
    def away() -> None:
        raise StoreError("away")

    monkeypatch.setattr(keeper.overseer, "_settle", away)
    keeper.drift(B)
    assert keeper.bundles.current() == A
    assert keeper.what()[-1] == "rolled_back"


def test_what_could_not_be_done_is_done_as_soon_as_it_can(keeper: Keeper, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise RunFolderError("no space")

    keeper.overseer.round()
    monkeypatch.setattr(keeper.overseer._folder, "write_json", full)
    for _ in range(2):
        with pytest.raises(RunFolderError):
            keeper.drift(B, below=0.7)
    assert keeper.bundles.current() == B
    monkeypatch.undo()
    keeper.overseer.round()
    assert read_floors(keeper.folder).keys() == {B}


def test_bundles_that_were_never_measured_and_services_that_do_not_look_are_left_alone(
    tmp_path: Path, made: Path
) -> None:
    keeper = Keeper(tmp_path, made, A, RAW)
    keeper.drift(RAW)
    assert keeper.overseer.status() is None
    keeper.bundles.promote(B)
    keeper.again(None)
    keeper.drift(B)
    assert keeper.bundles.current() == B
    assert keeper.overseer.status() is None


# -- what is known ---------------------------------------------------------------------------------------------------


def test_a_keeper_that_is_killed_goes_on_where_it_was(keeper: Keeper, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overseer_module, "SAVE_S", 0.0)
    keeper.hear(*(keeper.look(B, good=number % 3 > 0) for number in range(8)))
    assert keeper.bundles.current() == B
    known = keeper.overseer.status()
    keeper.again()
    keeper.overseer.round()
    assert keeper.overseer.status() == known
    for _ in range(4):
        keeper.hear(keeper.look(B, good=False), router="r2")
    assert keeper.bundles.current() == A


def test_after_the_threshold_rose_a_killed_keeper_knows_that_the_next_break_is_the_last(keeper: Keeper) -> None:
    keeper.drift(B, below=0.7)
    floor = read_floors(keeper.folder)[B]
    (keeper.folder / "drift.json").unlink()  # killed before it was written
    keeper.again()
    keeper.overseer.round()
    status = keeper.overseer.status()
    assert status is not None
    assert (status["floor"], status["looks"]) == (floor, 0)
    keeper.hear(*(keeper.look(B, good=score < 0.9, score=score) for score in [0.5] * 40 + [0.95] * 30), router="r2")
    assert keeper.bundles.current() == A


@pytest.mark.parametrize("content", ["{", "[]", '{"bbbbbbbbbbbb": {"looks": 7}}', '{"bbbbbbbbbbbb": null}'])
def test_a_damaged_file_of_looks_begins_anew(keeper: Keeper, content: str) -> None:
    (keeper.folder / "drift.json").write_text(content)
    keeper.again()
    keeper.hear(keeper.look(B, good=True))
    status = keeper.overseer.status()
    assert status is not None
    assert status["looks"] == 1


def test_a_report_that_arrives_twice_counts_once(keeper: Keeper) -> None:
    looks = [keeper.look(B, good=True) for _ in range(5)]
    keeper.hear(*looks[:3])
    keeper.hear(*looks)
    status = keeper.overseer.status()
    assert status is not None
    assert status["looks"] == 5
    keeper.hear(*looks, router="r2")  # another router counts on its own
    status = keeper.overseer.status()
    assert status is not None
    assert status["looks"] == 10


def test_what_is_known_of_a_bundle_goes_when_it_is_gone_back_from(
    keeper: Keeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overseer_module, "SAVE_S", 0.0)
    keeper.drift(B, below=0.7)
    keeper.bundles.rollback()
    keeper.hear(keeper.look(A, good=True))
    assert read_floors(keeper.folder) == {}
    assert json.loads((keeper.folder / "drift.json").read_text()).keys() == {A}
    keeper.bundles.promote(B)
    keeper.hear(keeper.look(B, good=True))
    status = keeper.overseer.status()
    assert status is not None
    assert (status["looks"], status["floor"]) == (1, None)


def test_the_status_and_the_gauges_say_how_it_stands(keeper: Keeper) -> None:
    keeper.overseer.round()
    assert keeper.count("agreement", version=B) is None
    keeper.hear(*(keeper.look(B, good=number % 20 > 0) for number in range(40)))
    status = keeper.overseer.status()
    assert status is not None
    assert (status["looks"], status["budget"], status["confidence"]) == (40, 0.05, 0.95)
    assert keeper.count("agreement", version=B) == status["agreement"] == pytest.approx(0.95)
    assert keeper.count("agreement_bound", version=B) == status["agreement_bound"] > 0.95
    keeper.bundles.promote(C)
    keeper.overseer.round()
    assert keeper.count("agreement", version=B) is None


# -- moves of others, and candidates ---------------------------------------------------------------------------------


def test_moves_that_somebody_else_made_are_told_once_also_those_during_an_absence(keeper: Keeper) -> None:
    for _ in range(2):
        keeper.overseer.round()
    keeper.bundles.promote(C)
    keeper.again()
    keeper.overseer.round()
    keeper.bundles.rollback()
    keeper.overseer.round()
    keeper.bundles.rollback(NOTHING)
    keeper.again()
    keeper.overseer.round()
    keeper.again()
    keeper.overseer.round()
    told = [(e["what"], e["version"], e["current"]) for e in keeper.written()]
    assert told == [("promoted", B, B), ("promoted", C, C), ("rolled_back", C, B), ("rolled_back", B, None)]
    assert [e["text"] for e in keeper.written()][1:3] == [
        f"{C} is current, after {B}",
        f"from {C} back to {B}, by hand",
    ]


def test_looks_at_a_candidate_are_lines_of_its_file_and_nothing_more(keeper: Keeper) -> None:
    keeper.again(None)
    keeper.hear(*(keeper.look(C, good=good, kind="shadow", tokens=tokens) for good, tokens in ((True, 0), (False, 12))))
    keeper.hear(keeper.look(C, good=True, kind="shadow"), keeper.look(RAW, good=True, kind="shadow"))
    lines = [json.loads(line) for line in (keeper.folder / f"shadow-{C}.jsonl").read_text().splitlines()]
    assert lines == [
        {"time": 1000.0, "good": True, "tokens": 0},
        {"time": 1000.0, "good": False, "tokens": 12},
        {"time": 1000.0, "good": True, "tokens": 10},
    ]
    assert len((keeper.folder / f"shadow-{RAW}.jsonl").read_text().splitlines()) == 1
    assert keeper.bundles.versions() == [A, B]


# -- events ----------------------------------------------------------------------------------------------------------


def test_the_last_events_come_first_and_half_a_line_is_none(tmp_path: Path) -> None:
    events = Events(tmp_path / "service" / "events.jsonl")
    assert events.last(5) == []
    for number in range(5):
        events.add("promoted", A, f"number {number}", number=number)
    path = tmp_path / "service" / "events.jsonl"
    path.write_text(path.read_text() + '{"time": "2026')
    assert [event["number"] for event in events.last(3)] == [4, 3, 2]
    assert events.last(1)[0].keys() == {"time", "what", "version", "number", "text"}


def test_of_a_long_history_the_end_is_read(tmp_path: Path) -> None:
    events = Events(tmp_path / "events.jsonl")
    for number in range(400):
        events.add("promoted", A, "x" * 300, number=number)
    assert [event["number"] for event in events.last(2)] == [399, 398]
    assert 100 < len(events.last(1000)) < 400


def test_a_full_disk_stops_nobody_from_doing_what_an_event_tells_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    Events(tmp_path / "file" / "events.jsonl").add("promoted", A, "what happened")
    assert "what happened" in caplog.text
