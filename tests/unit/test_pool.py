"""Which pairs a cycle starts with: all that nobody has learnt, held out or set aside."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from distill_ray.flywheel.cycles import Cycle, Outcome, StepName
from distill_ray.flywheel.pool import kept_records, key_of, pool, read_pairs, share_of, trained_for, turns_of, used_as
from distill_ray.serving.collecting.store import Selection
from distill_ray.serving.collecting.store.lance import LanceStore
from distill_ray.serving.routing.conversation import request_key
from tests.unit.pair_maker import pair, pairs

A, B = "a" * 12, "b" * 12
PAIRS = pairs(20)
IDS = [each.pair_id for each in PAIRS]


@pytest.fixture
def store(tmp_path: Path) -> LanceStore:
    found = LanceStore(str(tmp_path / "pairs"), "pairs")
    for start in (0, 10):
        found.add(PAIRS[start : start + 10])
    return found


def cycle(
    folder: Path, number: int, outcome: Outcome, ids: list[str], held_out: list[str], until: int = 1, version: str = A
) -> Cycle:
    made = Cycle(folder / f"{number:04d}")
    made.files.write_table(pa.table({"pair_id": ids}), "snapshot.parquet")
    splits = ["held_out" if i in held_out else "train" for i in ids]
    made.files.write_table(pa.table({"pair_id": ids, "split": splits, "group": range(len(ids))}), "split.parquet")
    done = {"outcome": "go_on", "made_from": "x", "seconds": 0.1}
    results: dict[StepName, dict[str, Any]] = {
        "snapshot": {"until": until},
        "clean": {},
        "split": {},
        "train": {"current": None},
        "gate": {},
        "bundle": {"version": version, "outcome": outcome},
    }
    for step, result in results.items():
        made.write(step, {**done, **result})
    return made


def test_without_a_cycle_before_all_pairs_are_new(store: LanceStore) -> None:
    found = pool(store, [], again=False)
    assert (found.until, found.ids, found.num_new, found.num_set_aside) == (2, sorted(IDS), 20, 0)


def test_what_is_learnt_or_held_out_is_not_taken_again(store: LanceStore, tmp_path: Path) -> None:
    store.mark_indexed(IDS[:4], "a" * 12)
    before = cycle(tmp_path, 1, "promoted", IDS[:10], IDS[4:7])
    found = pool(store, [before], again=False)
    assert set(found.ids) == set(IDS[7:])
    assert found.num_new == 10


@pytest.mark.parametrize("again", [False, True])
def test_what_a_refused_cycle_took_is_set_aside_until_somebody_asks_for_it(
    store: LanceStore, tmp_path: Path, again: bool
) -> None:
    refused = cycle(tmp_path, 1, "refused", IDS[:10], IDS[4:7])
    found = pool(store, [refused], again=again)
    assert set(found.ids) == set(IDS if again else IDS[10:])
    assert found.num_set_aside == (0 if again else 10)


def test_pairs_of_a_cycle_that_could_not_tell_wait_for_the_next_but_are_not_new(
    store: LanceStore, tmp_path: Path
) -> None:
    unclear = cycle(tmp_path, 1, "unclear", IDS[:10], IDS[4:7])
    found = pool(store, [unclear], again=False)
    assert set(found.ids) == set(IDS) - set(IDS[4:7])
    assert found.num_new == 10
    assert used_as([unclear], ["held_out"]) == set(IDS[4:7])


def test_what_was_held_out_of_a_refused_cycle_measures_nothing_later(tmp_path: Path) -> None:
    refused = cycle(tmp_path, 1, "refused", IDS[:10], IDS[4:7])
    promoted = cycle(tmp_path, 2, "promoted", IDS[10:], IDS[12:13])
    assert used_as([refused, promoted], ["held_out"]) == {IDS[12]}


def test_in_another_store_or_one_that_was_made_anew_all_is_new_whatever_the_numbers_of_its_batches(
    store: LanceStore, tmp_path: Path
) -> None:
    others = [each.pair_id for each in pairs(9, owner="another store")]
    before = cycle(tmp_path, 1, "promoted", others, others[:3], until=500)
    assert pool(store, [before], again=False).num_new == 20
    again = cycle(tmp_path, 2, "promoted", IDS[:15], IDS[:3], until=500)  # of a store put back from a backup
    assert pool(store, [before, again], again=False).num_new == 5


def test_what_the_students_on_the_way_to_the_current_one_were_trained_on_is_known(tmp_path: Path) -> None:
    first = cycle(tmp_path, 1, "promoted", IDS[:5], IDS[:2], version=A)
    by_hand = cycle(tmp_path, 2, "refused", IDS[5:9], IDS[5:6], version=B)
    assert trained_for([first, by_hand], [A]) == set(IDS[2:5])
    assert trained_for([first, by_hand], [A, B]) == {*IDS[2:5], *IDS[6:9]}
    assert trained_for([first, by_hand], []) == set()


def test_deleted_pairs_are_just_not_there(store: LanceStore) -> None:
    store.delete(Selection(ids=tuple(IDS[:3])))
    assert [each.pair_id for each in read_pairs(store, sorted(IDS), [])] == sorted(IDS[3:])


def test_a_pair_is_read_with_the_fingerprint_of_todays_config(store: LanceStore) -> None:
    messages = [{"role": "system", "content": "It is 2026-11-21."}, {"role": "user", "content": "hello"}]
    dated = pair("hello", messages=messages, body={"response_format": {"type": "json_object"}})
    store.add([dated])
    ignore = [r"\d{4}-\d\d-\d\d"]
    [found] = read_pairs(store, [dated.pair_id], ignore)
    body = {"messages": messages, "response_format": {"type": "json_object"}}
    assert found.fingerprint == request_key(body, ignore).fingerprint == key_of(dated, ignore).fingerprint
    [record] = kept_records([found], ignore)
    assert record["text"] == "hello"
    assert json.loads(record["messages"]) == messages


def test_a_conversation_is_what_a_student_knows_as_one() -> None:
    messages = [
        {"role": "developer", "content": "be short"},
        {"role": "user", "content": [{"type": "text", "text": "?"}]},
    ]
    assert turns_of(json.dumps(messages)) == [
        {"role": "system", "content": "be short"},
        {"role": "user", "content": "?"},
    ]


def test_a_draw_belongs_to_its_parts_and_is_even() -> None:
    drawn = [share_of(0, number) for number in range(2000)]
    assert drawn == [share_of(0, number) for number in range(2000)]
    assert min(drawn) >= 0
    assert max(drawn) < 1
    assert sum(each < 0.25 for each in drawn) == pytest.approx(500, abs=80)
    assert share_of(1, 0) != share_of(0, 0)
