"""A pair that was deleted leaves the verdicts of cycles: no word of it is left in their folders, or in a bundle."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from distill_ray.cli import main
from distill_ray.config.serve import StoreConfig
from distill_ray.flywheel import forgetting
from distill_ray.flywheel.bundling import without_texts
from distill_ray.flywheel.cycles import Cycle
from distill_ray.flywheel.forgetting import forget
from distill_ray.flywheel.page import write_gate_page
from distill_ray.serving.collecting.pairs import Pair
from distill_ray.serving.collecting.store import PairStore, Selection, make_store
from tests.unit.pair_maker import pair
from tests.unit.test_gate_page import CLUSTERS, MANIFEST, results

LOST, MIDDLE, OTHER = pair("xyzzy-lost", owner="jane"), pair("xyzzy-middle", owner="jane"), pair("stays", owner="otto")


def row(shown: Pair, text: str) -> dict[str, Any]:
    said = {name: f"{text} {name}" for name in ("teacher", "candidate", "current")}
    return {"pair_id": shown.pair_id, "text": text, "set": "new", "is_regression": True, **said}


@pytest.fixture
def store(tmp_path: Path) -> PairStore:
    store = make_store(StoreConfig(), tmp_path)
    store.add([LOST, MIDDLE, OTHER])
    return store


@pytest.fixture
def cycle(tmp_path: Path) -> Cycle:
    """A cycle that is over, whose verdict shows texts of all three."""
    cycle = Cycle(tmp_path / "cycles" / "0001")
    steps = results(0.8, 0.95, worst=[row(LOST, "xyzzy-lost"), row(OTHER, "stays")])
    middle = dataclasses.replace(CLUSTERS[0], name="xyzzy-middle")
    steps["gate"]["clusters"] = [
        {"pair_id": MIDDLE.pair_id, **dataclasses.asdict(middle)},
        {"pair_id": OTHER.pair_id, **dataclasses.asdict(CLUSTERS[1])},
    ]
    cycle.run.write_json(MANIFEST, "manifest.json")
    steps["snapshot"]["until"] = 1
    for step, result in steps.items():
        cycle.files.write_json(result, f"{step}.json")
    for table in ("snapshot", "dropped", "split"):
        cycle.files.write_table(pa.table({"pair_id": [LOST.pair_id]}), f"{table}.parquet")
    write_gate_page(cycle, "gate", steps["gate"])
    return cycle


def with_its_text(service: Path) -> set[str]:
    files = [file for file in (service / "cycles").rglob("*") if file.is_file()]
    return {file.name for file in files if b"xyzzy" in file.read_bytes()}


def test_what_was_deleted_leaves_the_verdict_and_its_page_and_the_rest_stays(
    tmp_path: Path, store: PairStore, cycle: Cycle
) -> None:
    before = cycle.needed("gate")
    forget(tmp_path, store)
    assert cycle.needed("gate") == before
    assert with_its_text(tmp_path) == {"gate.json", "gate.html"}
    store.delete(Selection(owner="jane"))
    forget(tmp_path, store)
    assert with_its_text(tmp_path) == set()
    after, page = cycle.needed("gate"), (cycle.folder / "gate.html").read_text()
    assert [each["pair_id"] for each in after["worst"]] == [OTHER.pair_id]
    assert [each["name"] for each in after["clusters"]] == ["(deleted)", CLUSTERS[1].name]
    changed = {"worst", "clusters"}
    assert {k: v for k, v in after.items() if k not in changed} == {k: v for k, v in before.items() if k not in changed}
    for shown in ("stays teacher", "(deleted)", CLUSTERS[1].name):
        assert shown in page


def test_a_kill_between_page_and_figures_is_made_good_by_the_next_time(
    tmp_path: Path, store: PairStore, cycle: Cycle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    store.delete(Selection(owner="jane"))
    with monkeypatch.context() as inner:
        inner.setattr(forgetting, "write_gate_page", killed)
        with pytest.raises(KeyboardInterrupt):
            forget(tmp_path, store)
    forget(tmp_path, store)
    assert with_its_text(tmp_path) == set()


def test_a_cycle_that_is_not_over_is_left_to_its_run(tmp_path: Path, store: PairStore, cycle: Cycle) -> None:
    """What its next steps are made from may not change under them."""
    cycle.files.write_json({**cycle.needed("gate"), "outcome": "go_on"}, "gate.json")
    store.delete(Selection(owner="jane"))
    forget(tmp_path, store)
    assert with_its_text(tmp_path) == {"gate.json", "gate.html"}
    cycle.write("bundle", {"outcome": "unclear", "why": ["x"]} | {"made_from": "x", "seconds": 1.0, "version": "1"})
    cycle.files.write_json({**cycle.needed("bundle"), "threshold": 2.0, "share": 0.0, "error": None}, "bundle.json")
    forget(tmp_path, store)
    assert with_its_text(tmp_path) == set()


def test_pairs_delete_reaches_the_cycles(
    tmp_path: Path, store: PairStore, cycle: Cycle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(
        'recipe: {type: context, context: {text: Answer.}, query: "{{ text }}"}\n'
        f"data: {{source: q.jsonl}}\nteacher: {{type: fake}}\nserve: {{folder: {tmp_path}}}\n"
    )
    monkeypatch.setattr(sys, "argv", ["distill-ray", "pairs", "delete", str(config), "--owner", "jane"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert not caught.value.code
    assert "deleted 2 pairs" in capsys.readouterr().out
    assert with_its_text(tmp_path) == set()


def test_the_copy_in_the_bundle_has_ids_and_no_text(cycle: Cycle) -> None:
    found = without_texts(cycle.needed("gate"))
    assert b"xyzzy" not in found
    assert json.loads(found)["worst"][0] == {"pair_id": LOST.pair_id, "set": "new"}
    assert json.loads(found)["clusters"][0]["pair_id"] == MIDDLE.pair_id
