"""The steps from the store to what is learnt: nothing that a student was trained on shows how good it is."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from distill_ray.config import parse_config
from distill_ray.errors import FlywheelError
from distill_ray.flywheel import cycle as machine
from distill_ray.flywheel.cycle import run_cycle
from distill_ray.flywheel.cycles import StepName
from distill_ray.flywheel.work import Work
from distill_ray.serving.collecting.pairs import Pair
from distill_ray.serving.collecting.store.base import Selection
from distill_ray.serving.collecting.store.lance import LanceStore
from distill_ray.serving.routing.bundles import NOTHING, Bundles
from tests.unit.pair_maker import pair
from tests.unit.small_bundle import write_small_bundle
from tests.unit.test_cycle import RAW
from tests.unit.test_flywheel_bad_input import EASY
from tests.unit.test_splitting import text

A = "a" * 12


class Service:
    """A service whose cycles train nothing: their student's bundle has none of the collected pairs in its index."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = LanceStore(str(folder / "pairs"), "pairs")
        self.bundles = Bundles(folder / "bundles")
        self.bundles.install(write_small_bundle(folder / "made" / A, version=A))

    def run(self, pairs: list[Pair], **flywheel: Any) -> None:
        self.store.add(pairs)
        flywheel = {"min_pairs": 20, "gate": {"min_pairs": 1}, **flywheel}
        run_cycle(parse_config({**RAW, "calibrate": EASY, "flywheel": flywheel}), str(self.folder))

    def splits(self, number: int) -> dict[str, str]:
        table = pq.read_table(self.folder / "cycles" / f"{number:04d}" / "split.parquet")
        return dict(zip(table["pair_id"].to_pylist(), table["split"].to_pylist(), strict=True))

    def dropped(self, number: int) -> dict[str, str]:
        table = pq.read_table(self.folder / "cycles" / f"{number:04d}" / "dropped.parquet")
        return dict(zip(table["pair_id"].to_pylist(), table["reason"].to_pylist(), strict=True))


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Service:
    found = Service(tmp_path)

    def promote(work: Work) -> dict[str, Any]:
        work.bundles.promote(A, work.lease.token)
        return {"outcome": "promoted", "version": A}

    scripted: dict[StepName, Callable[[Work], dict[str, Any]]] = {
        "train": lambda work: {"outcome": "go_on", "current": work.bundles.current()},
        "gate": lambda work: {"outcome": "go_on"},
        "bundle": lambda work: {"outcome": "go_on", "version": A, "moves": 0},
        "promote": promote,
    }
    for step, does in scripted.items():
        monkeypatch.setitem(machine._DO, step, does)
    monkeypatch.setattr(machine, "connected", contextlib.nullcontext)
    monkeypatch.setattr(machine, "write_gate_page", lambda *_: None)
    return found


def questions(start: int, count: int, suffix: str = "") -> list[Pair]:
    return [pair(text(number) + suffix, f"answer {number % 3}") for number in range(start, start + count)]


TRAINED = {"train", "validation"}


def test_what_the_student_in_service_was_trained_on_is_never_held_out_though_no_index_has_it(service: Service) -> None:
    first = questions(0, 60)
    service.run(first, holdout=0.2)
    used = service.splits(1)
    trained = {each.pair_id for each in first if used[each.pair_id] in TRAINED}
    near = {each.pair_id: other.pair_id for each, other in zip(questions(0, 60, "!"), first, strict=True)}
    service.run([*questions(0, 60, "!"), *questions(100, 40)], holdout=0.9)
    now = service.splits(2)
    assert len(trained) > 20
    assert {now[pair_id] for pair_id in trained} == {"train"}
    assert {now[pair_id] for pair_id, other in near.items() if other in trained} == {"train"}
    assert {now[pair_id] for pair_id, other in near.items() if other not in trained} == {"held_out"}
    others = [now[each.pair_id] for each in questions(100, 40)]
    assert others.count("held_out") > 25


def test_it_counts_as_known_too_where_the_rules_of_today_would_drop_it(service: Service) -> None:
    first = questions(0, 40)
    service.run(first, holdout=0.2)
    trained = {pair_id for pair_id, split in service.splits(1).items() if split in TRAINED}
    longer = [pair(text(number) + "!", "a longer answer") for number in range(40)]
    service.run(longer, holdout=0.9, clean={"min_chars": 10})
    found = service.splits(2)
    assert set(service.dropped(2).values()) == {"too_short"}
    assert not trained & found.keys()
    near = [new.pair_id for new, old in zip(longer, first, strict=True) if old.pair_id in trained]
    assert {found[pair_id] for pair_id in near} == {"train"}


def test_what_only_a_student_learnt_that_was_gone_back_from_may_be_held_out(service: Service) -> None:
    service.run(questions(0, 40), holdout=0.2)
    trained = {pair_id for pair_id, split in service.splits(1).items() if split in TRAINED}
    service.bundles.rollback(NOTHING)
    service.run(questions(100, 30), holdout=0.9)
    assert any(service.splits(2)[pair_id] == "held_out" for pair_id in trained)


def test_what_was_deleted_since_is_nowhere(service: Service) -> None:
    first = questions(0, 40)
    service.run(first, holdout=0.2)
    gone = [each.pair_id for each in first[:10]]
    service.store.delete(Selection(ids=tuple(gone)))
    service.run(questions(100, 30))
    assert not service.splits(2).keys() & set(gone)


def test_a_lost_table_of_splits_never_opens_what_was_held_out(service: Service) -> None:
    service.run(questions(0, 40))
    (service.folder / "cycles" / "0001" / "split.parquet").unlink()
    with pytest.raises(FlywheelError, match=r"0001/split\.parquet: missing, and split\.json is there"):
        service.run(questions(100, 30))
    assert not (service.folder / "cycles" / "0002").exists()
