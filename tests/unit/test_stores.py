"""One contract for every store of pairs. Qdrant through its client's in-process mode: no server can be had here.

Not covered: a real Qdrant server (its payload indexes, its limits, its outages beyond a refused connection).
"""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
from qdrant_client import QdrantClient

from distill_ray.config.serve import StoreConfig
from distill_ray.errors import ConfigError, StoreError
from distill_ray.serving.collecting.answer import Answer
from distill_ray.serving.collecting.pairs import PAIR_SCHEMA, Pair
from distill_ray.serving.collecting.store import (
    Deletion,
    Lease,
    PairStore,
    Selection,
    Where,
    existing_store,
    make_store,
)
from distill_ray.serving.collecting.store.base import owner_hash
from distill_ray.serving.collecting.store.qdrant import QdrantStore
from tests.unit.pair_maker import pair, pairs

Open = Callable[[], PairStore]
STORES = ("lance", "qdrant")


def opener(kind: str, folder: Path) -> Open:
    """Opens the same store each time, as several processes do."""
    if kind == "lance":
        return lambda: make_store(StoreConfig(), folder)
    client = QdrantClient(":memory:")
    return lambda: QdrantStore(client, "pairs", has_payload_indexes=False)


@pytest.fixture(params=STORES)
def open_store(request: pytest.FixtureRequest, tmp_path: Path) -> Open:
    return opener(request.param, tmp_path)


@pytest.fixture
def store(open_store: Open) -> PairStore:
    return open_store()


def rows(store: PairStore, where: Selection = Selection()) -> list[dict[str, Any]]:  # noqa: B008 (frozen)
    found = [row for batch in store.scan(where) for row in batch.to_pylist()]
    return sorted(found, key=lambda row: row["messages"])


def ids(store: PairStore, where: Selection = Selection()) -> set[str]:  # noqa: B008
    return {row["pair_id"] for row in rows(store, where)}


def test_an_empty_store_answers_everything(store: PairStore) -> None:
    assert store.count() == store.snapshot() == store.count(Selection(contains="x")) == 0
    assert rows(store) == store.deletions() == []
    assert store.mark_indexed(["a"], "v1") == store.unmark_indexed("v1") == store.add([]) == 0
    assert store.delete(Selection(owner="nobody")) == 0
    assert store.lease() == Lease()
    store.compact()


def test_a_pair_comes_back_as_it_was_from_another_process(open_store: Open) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    first = pair("a 'quoted' \"question\"\n\u2028", embedding=None, bundle=None)
    second = pair("b", said=Answer("", "tool_calls", tool_calls=(call,)))
    assert open_store().add([first, second]) == 2
    one, other = rows(open_store())
    for found, kept in ((one, first), (other, second)):
        columns = set(PAIR_SCHEMA.names) - {"batch", "indexed", "indexed_by", "embedding"}
        assert {name: found[name] for name in columns} == {name: getattr(kept, name) for name in columns}
        assert (found["batch"], found["indexed"], found["indexed_by"]) == (1, False, None)
    assert one["embedding"] is None
    assert second.embedding is not None
    assert other["embedding"] == second.embedding.tolist()


def test_a_batch_has_the_columns_asked_for_with_their_types(store: PairStore) -> None:
    store.add(pairs(5))
    batches = list(store.scan(columns=["pair_id", "embedding", "batch"], batch_rows=2))
    assert sum(batch.num_rows for batch in batches) == 5
    assert max(batch.num_rows for batch in batches) <= 2
    for batch in batches:
        assert [(f.name, f.type) for f in batch.schema] == [
            (name, PAIR_SCHEMA.field(name).type) for name in ("pair_id", "embedding", "batch")
        ]


def test_adding_twice_stores_once_and_changes_nothing(open_store: Open) -> None:
    store = open_store()
    kept = pairs(3)
    assert store.add([*kept, kept[0]]) == 3
    store.mark_indexed([kept[0].pair_id], "v1")
    before = rows(store)
    assert store.add([pair("question 0", "another answer"), *kept[1:]]) == 0
    assert open_store().add(kept) == 0
    assert rows(store) == before
    assert before[0]["completion"] == "answer 0"


def test_selections_say_what_they_say(store: PairStore) -> None:
    store.add([pair("Apple", owner="a"), pair("Pear", "cafe\u0301", owner="b")])
    store.add([pair("Plum", owner="it's", body={"tools": [{"name": "juicer"}]})])
    apple, pear, plum = (row["pair_id"] for row in rows(store))
    store.mark_indexed([apple], "v1")
    expected = {
        Selection(owner="b"): {pear},
        Selection(owner="it's"): {plum},
        Selection(ids=(apple, "no such")): {apple},
        Selection(ids=()): set(),
        Selection(indexed=True): {apple},
        Selection(indexed=False, until=1): {pear},
        Selection(contains="APPLE"): {apple},
        Selection(contains="caf\u00e9"): {pear},
        Selection(contains="juicer"): {plum},
        Selection(contains="P", owner="b"): {pear},
        Selection(contains="%"): set(),
    }
    for where, found in expected.items():
        assert ids(store, where) == found, where
        assert store.count(where) == len(found), where


def test_contains_finds_what_json_writes_in_another_way(store: PairStore) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"name": "J\\u00fcrgen \\"X\\""}'}}
    store.add([pair('say "hi"\nto me'), pair("b", said=Answer("", "tool_calls", tool_calls=(call,)))])
    assert store.count(Selection(contains='"hi"\nto')) == 1
    assert store.count(Selection(contains='j\u00fcrgen "x"')) == 1


def test_a_deleted_pair_stays_deleted_when_it_is_sent_again(open_store: Open) -> None:
    writer, person = open_store(), open_store()
    kept = pairs(4)
    writer.add(kept[:3])
    assert person.delete(Selection(ids=(kept[0].pair_id, kept[3].pair_id))) == 1  # the last one is still in a spool
    assert person.delete(Selection(contains="question 1")) == 1
    assert writer.add(kept) == 0
    assert ids(writer) == ids(person) == {kept[2].pair_id}


def test_deleting_an_owner_covers_what_waits_and_not_what_comes_later(store: PairStore) -> None:
    kept = pairs(3, owner="a")
    store.add([*kept[:2], pair("b", owner="b")])
    assert store.delete(Selection(owner="a")) == 2
    assert store.add(kept) == 0
    new = dataclasses.replace(kept[2], created=time.time_ns())
    assert store.add([new]) == 1
    assert ids(store, Selection(owner="a")) == {new.pair_id}


def test_a_deletion_is_recorded_without_text_or_names(store: PairStore) -> None:
    store.add(pairs(2, owner="Ann"))
    store.delete(Selection(contains="question 1"))
    store.delete(Selection(owner="Ann"))
    first, second = store.deletions()
    assert (first.kind, first.num, len(first.pair_ids), first.owner_hash) == ("contains", 1, 1, None)
    assert (second.kind, second.num, second.owner_hash) == ("owner", 1, owner_hash("Ann"))
    assert first.deleted < second.deleted
    assert "question" not in repr([first, second])
    assert "Ann" not in repr([first, second])


def test_deleting_everything_by_mistake_is_refused(store: PairStore) -> None:
    store.add(pairs(1))
    with pytest.raises(ValueError, match="select something"):
        store.delete(Selection())
    assert store.count() == 1


def test_a_pair_deleted_while_it_is_added_is_gone(open_store: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    writer, person = open_store(), open_store()
    writer.add(pairs(1))
    late = pair("late")
    insert = writer._insert

    def insert_after_a_deletion(table: Any) -> int:
        person.delete(Selection(ids=(late.pair_id,)))
        return insert(table)

    monkeypatch.setattr(writer, "_insert", insert_after_a_deletion)
    assert writer.add([late]) == 0
    assert late.pair_id not in ids(writer)


def test_an_owners_pair_that_is_added_while_the_owner_is_deleted_is_gone_and_recorded(
    open_store: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer, person = open_store(), open_store()
    writer.add([pair("early")])
    late = pair("late")
    log = person._log

    def log_after_an_addition(deletion: Deletion) -> None:
        writer.add([late])  # too late for the look, too early for the record
        log(deletion)

    monkeypatch.setattr(person, "_log", log_after_an_addition)
    assert person.delete(Selection(owner="shop")) == 2
    assert writer.count() == 0
    assert late.pair_id in {pair_id for deletion in person.deletions() for pair_id in deletion.pair_ids}


def test_a_deletion_that_was_killed_is_finished_by_compaction(
    open_store: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store()
    store.add(pairs(3))
    killed = open_store()
    monkeypatch.setattr(killed, "_remove", lambda ids: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        killed.delete(Selection(contains="question 1"))
    assert store.count() == 3
    store.compact()
    assert store.count() == 2
    assert store.count(Selection(contains="question 1")) == 0


def test_the_first_mark_stays_and_a_rollback_takes_back_only_its_own(store: PairStore) -> None:
    store.add(pairs(4))
    all_ids = [row["pair_id"] for row in rows(store)]
    assert store.mark_indexed(all_ids[:2], "v1") == 2
    assert store.mark_indexed(all_ids[:2], "v1") == 0
    assert store.mark_indexed([*all_ids[1:3], "no such"], "v2") == 1
    assert [row["indexed_by"] for row in rows(store)] == ["v1", "v1", "v2", None]
    assert store.unmark_indexed("v2") == 1
    assert [row["indexed_by"] for row in rows(store)] == ["v1", "v1", None, None]
    assert [row["indexed"] for row in rows(store)] == [True, True, False, False]


def test_a_snapshot_keeps_out_what_comes_later_and_what_is_deleted(open_store: Open) -> None:
    store = open_store()
    old, gone, new = pairs(3)
    store.add([old, gone])
    snapshot = store.snapshot()
    open_store().add([new])  # another writer, after a restart
    store.delete(Selection(ids=(gone.pair_id,)))
    store.compact()
    assert ids(store, Selection(until=snapshot)) == {old.pair_id}
    assert ids(store, Selection(until=store.snapshot())) == {old.pair_id, new.pair_id}


def test_the_number_of_a_batch_is_not_given_again(open_store: Open) -> None:
    store = open_store()
    store.add([pair("gone")])
    snapshot = store.snapshot()
    store.delete(Selection(contains="gone"))
    open_store().add([pair("new")])
    assert ids(store, Selection(until=snapshot)) == set()
    assert store.count() == 1


def test_a_store_is_there_from_its_first_pair_on_and_looking_makes_none(open_store: Open) -> None:
    store = open_store()
    assert (store.exists(), store.count(), store.snapshot(), store.lease()) == (False, 0, 0, Lease())
    assert not store.exists()
    store.add(pairs(1))
    store.delete(Selection(ids=(next(iter(ids(store))),)))
    assert open_store().exists()


def test_a_lease_comes_back_as_it_was_from_another_process(open_store: Open) -> None:
    taken = Lease(2**40, 2**41, "it's \u2028", Where("h\u00f6st", "m", 7, 2**50, "2026-01-01", "/srv/'a' \"b\""))
    assert open_store().swap_lease(Lease(), taken)
    assert open_store().lease() == taken


def test_a_lease_is_swapped_for_what_was_seen_and_for_nothing_else(open_store: Open) -> None:
    one, other = open_store(), open_store()
    mine, his = Lease(1, 0, "mine"), Lease(1, 0, "his")
    assert not one.swap_lease(Lease(1, 1, "nobody"), mine)
    assert one.lease() == Lease()
    assert one.swap_lease(Lease(), mine)
    assert not other.swap_lease(Lease(), his)
    assert one.swap_lease(Lease(), mine)  # as by somebody who did not hear that his swap came through
    assert other.lease() == mine
    assert other.swap_lease(mine, Lease(2, 0, "his"))
    assert not one.swap_lease(mine, Lease(1, 1, "mine"))


class Histories(RuleBasedStateMachine):
    """Any order of everything, against a dict. Two handles: the writer's, and that of a person."""

    known = Bundle("known")
    make: Open

    @initialize()
    def begin(self) -> None:
        self.writer, self.person = self.make(), self.make()
        self.pairs: dict[str, str | None] = {}  # id -> bundle
        self.snapshots: list[tuple[int, set[str]]] = []
        self.gone: set[str] = set()
        self.leases = [Lease()]

    @rule(target=known, numbers=st.lists(st.integers(0, 12), max_size=4))
    def add(self, numbers: list[int]) -> list[str]:
        fresh = [pair(f"question {n}", owner=f"owner {n % 3}") for n in numbers]
        new = {each.pair_id for each in fresh} - self.pairs.keys() - self.gone
        assert self.writer.add(fresh) == len(new)
        self.pairs.update(dict.fromkeys(new))
        return [each.pair_id for each in fresh]

    @rule(chosen=known)
    def delete(self, chosen: list[str]) -> None:
        if chosen:
            assert self.person.delete(Selection(ids=tuple(chosen))) == len(set(chosen) & self.pairs.keys())
            self.gone |= set(chosen)
            for each in chosen:
                self.pairs.pop(each, None)

    @rule(chosen=known, bundle=st.sampled_from(["v1", "v2"]))
    def mark(self, chosen: list[str], bundle: str) -> None:
        new = {each for each in chosen if each in self.pairs and self.pairs[each] is None}
        assert self.person.mark_indexed(list(dict.fromkeys(chosen)), bundle) == len(new)
        self.pairs.update(dict.fromkeys(new, bundle))

    @rule(bundle=st.sampled_from(["v1", "v2"]))
    def unmark(self, bundle: str) -> None:
        own = {each for each, by in self.pairs.items() if by == bundle}
        assert self.person.unmark_indexed(bundle) == len(own)
        self.pairs.update(dict.fromkeys(own))

    @rule()
    def compact(self) -> None:
        self.writer.compact()

    @rule()
    def restart(self) -> None:
        self.writer = self.make()

    @rule(by_writer=st.booleans(), back=st.integers(0, 3), is_new=st.booleans())
    def swap_lease(self, by_writer: bool, back: int, is_new: bool) -> None:
        before = self.leases[max(0, len(self.leases) - 1 - back)]
        newest = self.leases[-1]
        after = Lease(newest.token + is_new, 0 if is_new else newest.beat + 1, f"holder {len(self.leases)}")
        assert (self.writer if by_writer else self.person).swap_lease(before, after) == (before == newest)
        if before == newest:
            self.leases.append(after)

    @rule()
    def take_snapshot(self) -> None:
        self.snapshots.append((self.person.snapshot(), set(self.pairs)))

    @rule()
    def compare(self) -> None:
        assert {row["pair_id"]: row["indexed_by"] for row in rows(self.person)} == self.pairs
        assert self.writer.count(Selection(indexed=True)) == sum(by is not None for by in self.pairs.values())
        assert self.writer.lease() == self.person.lease() == self.leases[-1]
        for until, then in self.snapshots:
            assert ids(self.person, Selection(until=until)) == then & self.pairs.keys()


@pytest.mark.parametrize("kind", STORES)
def test_any_history_leaves_what_a_dict_would_hold(kind: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    class OnThisStore(Histories):
        def __init__(self) -> None:
            super().__init__()
            self.make = opener(kind, tmp_path_factory.mktemp("store"))

        def teardown(self) -> None:
            self.compare()

    run_state_machine_as_test(OnThisStore, settings=settings(max_examples=12, stateful_step_count=25, deadline=None))


# -- each store's own ------------------------------------------------------------------------------------------------


def test_lance_leaves_nothing_of_a_deleted_pair_on_the_disk(tmp_path: Path) -> None:
    def found() -> list[Path]:
        files = [file for file in tmp_path.rglob("*") if file.is_file()]
        return [file for file in files if b"xyzzy-secret" in file.read_bytes()]

    store = make_store(StoreConfig(), tmp_path)
    store.add([*pairs(30), pair("xyzzy-secret")])  # so few that compaction alone would leave them where they are
    assert found()
    store.delete(Selection(contains="xyzzy-secret"))
    assert found() == []
    assert store.count() == 30


def test_lance_bears_a_writer_and_a_person_at_once(tmp_path: Path) -> None:
    """Each rewrites files under the other's feet; what comes of that is nobody's error, and no pair's loss."""
    writer, person = (make_store(StoreConfig(), tmp_path) for _ in range(2))
    writer.add([pair("first")])
    sent: list[Pair] = []

    def write() -> None:
        for number in range(40):
            batch = [pair(f"{number} {i}", owner=f"owner {number % 2}") for i in range(5)]
            assert writer.add(batch) == 5
            sent.extend(batch)
            if number % 8 == 0:
                writer.compact()

    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(write)
        while not writing.done():
            person.delete(Selection(contains="7 3"))
            person.mark_indexed([each.pair_id for each in sent[-3:]], "v1")
        writing.result()
    gone = {pair_id for deletion in person.deletions() for pair_id in deletion.pair_ids}
    assert gone
    assert ids(person) == {pair("first").pair_id, *(each.pair_id for each in sent)} - gone


def test_lance_is_a_table_that_lancedb_opens(tmp_path: Path) -> None:
    lancedb = pytest.importorskip("lancedb")
    make_store(StoreConfig(), tmp_path).add(pairs(2))
    assert lancedb.connect(tmp_path / "pairs").open_table("pairs").count_rows() == 2


@pytest.fixture
def _short_of_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distill_ray.serving.collecting.store.lance.RETRY_S", 0.05)


@pytest.mark.usefixtures("_short_of_patience")
def test_lance_refuses_a_table_of_another_version(tmp_path: Path) -> None:
    import lance
    import pyarrow as pa

    lance.write_dataset(pa.table({"pair_id": ["a"]}), tmp_path / "pairs" / "pairs.lance")
    with pytest.raises(StoreError, match="another version"):
        make_store(StoreConfig(), tmp_path).count()


@pytest.mark.usefixtures("_short_of_patience")
def test_a_store_that_is_away_is_an_error_of_ours_and_it_works_when_it_is_back(tmp_path: Path) -> None:
    (tmp_path / "pairs").write_text("a file where the folder belongs")
    store = make_store(StoreConfig(), tmp_path)
    with pytest.raises(StoreError, match="a file, where a folder of the store of pairs belongs"):
        store.add(pairs(1))
    (tmp_path / "pairs").unlink()
    assert store.add(pairs(1)) == 1


@pytest.mark.usefixtures("_short_of_patience")
@pytest.mark.parametrize("place", ["pairs", "pairs/pairs.lance"])
def test_a_file_where_the_folder_belongs_is_no_empty_store(tmp_path: Path, place: str) -> None:
    (tmp_path / place).parent.mkdir(exist_ok=True)
    (tmp_path / place).write_text("a file")
    store = make_store(StoreConfig(), tmp_path)
    for look in (store.count, store.snapshot, store.exists):
        with pytest.raises(StoreError, match=f"/{place}: a file, where a folder of the store of pairs belongs"):
            look()


@pytest.mark.usefixtures("_short_of_patience")
def test_a_table_of_lance_that_lost_its_versions_is_damaged_and_never_written_over(tmp_path: Path) -> None:
    make_store(StoreConfig(), tmp_path).add(pairs(3))
    shutil.move(tmp_path / "pairs" / "pairs.lance" / "_versions", tmp_path / "lost")
    store = make_store(StoreConfig(), tmp_path)
    for use in (store.count, store.exists, lambda: store.add(pairs(1))):
        with pytest.raises(StoreError, match=r"pairs\.lance: damaged: it has data and no _versions"):
            use()
    shutil.move(tmp_path / "lost", tmp_path / "pairs" / "pairs.lance" / "_versions")
    assert store.count() == 3


def test_a_store_at_a_given_address_has_to_be_there_for_whoever_only_looks(tmp_path: Path) -> None:
    config = StoreConfig(url=str(tmp_path / "nowhere"))
    with pytest.raises(StoreError, match=r"/nowhere: no pairs are stored there yet; is serve\.collect\.store right"):
        existing_store(config, tmp_path)
    assert list(tmp_path.iterdir()) == []
    make_store(config, tmp_path).add(pairs(2))
    assert existing_store(config, tmp_path).count() == 2
    assert existing_store(StoreConfig(), tmp_path / "service").count() == 0  # whose own folder may well be empty


def test_a_qdrant_server_that_is_away_is_an_error_of_ours() -> None:
    store = make_store(StoreConfig(type="qdrant", url="http://127.0.0.1:9"), "")
    with pytest.raises(StoreError, match="is the server"):
        store.add(pairs(1))


def test_a_key_of_qdrant_that_is_named_must_be_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QDRANT_KEY", raising=False)
    with pytest.raises(ConfigError, match="QDRANT_KEY is not set"):
        make_store(StoreConfig(type="qdrant", url="http://x:1", api_key_env="QDRANT_KEY"), "")
