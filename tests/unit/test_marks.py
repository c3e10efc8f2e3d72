"""Which pairs count as learnt: always those that the pointer says, wherever the one who moved it was killed."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill_ray.serving.collecting.marks import settle
from distill_ray.serving.collecting.store.base import ALL, Selection
from distill_ray.serving.collecting.store.lance import LanceStore
from distill_ray.serving.routing.bundle import ENTRIES_SCHEMA, write_bundle
from distill_ray.serving.routing.bundles import NOTHING, Bundles
from distill_ray.serving.routing.conversation import request_key
from distill_ray.serving.routing.index import NearestIndex
from tests.unit.pair_maker import pairs
from tests.unit.small_bundle import WordEmbedder, body, manifest

A, B, C = "a" * 12, "b" * 12, "c" * 12
PAIRS = pairs(12)
IDS = [each.pair_id for each in PAIRS]
LEARNT = {A: IDS[:4], B: IDS[2:8], C: IDS[6:10]}


def bundle_of(folder: Path, version: str, ids: list[str]) -> Path:
    texts = [f"request {name}" for name in ids]
    kinds = [request_key(body(text), []).fingerprint for text in texts]
    columns = {"example_id": ids, "text": texts, "fingerprint": kinds, "outcome": [0.9] * len(ids)}
    student = folder / f"student-{version}"
    student.mkdir(parents=True)
    (student / "model.safetensors").write_bytes(b"weights")
    return write_bundle(
        folder / version,
        manifest(version=version),
        student=student,
        index=NearestIndex.build(WordEmbedder().embed(texts), kinds),
        entries=pa.table(columns).cast(ENTRIES_SCHEMA),
        reports={},
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bundles")
    return {version: bundle_of(folder, version, [*ids, "r1/answer/0"]) for version, ids in LEARNT.items()}


@pytest.fixture
def store(tmp_path: Path) -> LanceStore:
    found = LanceStore(str(tmp_path), "pairs")
    found.add(PAIRS)
    return found


@pytest.fixture
def bundles(tmp_path: Path, made: dict[str, Path]) -> Bundles:
    found = Bundles(tmp_path / "installed")
    for folder in made.values():
        found.install(folder)
    return found


def marks(store: LanceStore) -> dict[str, str]:
    batches = store.scan(Selection(indexed=True), ["pair_id", "indexed_by"])
    return {record["pair_id"]: record["indexed_by"] for batch in batches for record in batch.to_pylist()}


def expected(bundles: Bundles) -> dict[str, str]:
    """The first bundle on the way here that learnt a pair has its mark."""
    found: dict[str, str] = {}
    for version in bundles.versions():
        for pair_id in LEARNT[version]:
            found.setdefault(pair_id, version)
    return found


def test_pairs_are_marked_when_their_bundle_is_promoted_and_not_before(store: LanceStore, bundles: Bundles) -> None:
    assert settle(bundles, store) == (0, 0)
    bundles.promote(A)
    assert marks(store) == {}
    assert settle(bundles, store) == (4, 0)
    assert marks(store) == dict.fromkeys(IDS[:4], A)
    assert settle(bundles, store) == (0, 0)


def test_going_back_takes_back_only_what_the_later_bundle_brought(store: LanceStore, bundles: Bundles) -> None:
    for version in (A, B):
        bundles.promote(version)
    settle(bundles, store)
    assert marks(store) == {**dict.fromkeys(IDS[:4], A), **dict.fromkeys(IDS[4:8], B)}
    bundles.rollback()
    assert settle(bundles, store) == (0, 4)
    assert marks(store) == dict.fromkeys(IDS[:4], A)
    bundles.rollback(NOTHING)
    settle(bundles, store)
    assert marks(store) == {}
    assert store.count(ALL) == len(PAIRS)


def test_a_move_while_marks_are_made_is_settled_too(
    store: LanceStore, bundles: Bundles, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundles.promote(A)
    mark = LanceStore.mark_indexed

    def promoted_meanwhile(self: LanceStore, ids: list[str], version: str) -> int:
        monkeypatch.undo()
        bundles.promote(B)
        assert settle(bundles, self) == (8, 0)  # somebody else is faster
        bundles.rollback(NOTHING)
        return mark(self, ids, version)

    monkeypatch.setattr(LanceStore, "mark_indexed", promoted_meanwhile)
    settle(bundles, store)
    assert (bundles.current(), marks(store)) == (None, {})


moves = st.lists(st.tuples(st.sampled_from([A, B, C, "back", NOTHING]), st.booleans()), min_size=1, max_size=8)


@settings(max_examples=15, deadline=None)
@given(moves=moves)
def test_whatever_moves_went_unsettled_the_next_settling_makes_marks_and_pointer_agree(
    moves: list[tuple[str, bool]], made: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("service")
    store, bundles = LanceStore(str(folder), "pairs"), Bundles(folder / "installed")
    store.add(PAIRS)
    for each in made.values():
        bundles.install(each)
    for move, is_settled in moves:
        if move not in ("back", NOTHING):
            bundles.promote(move)
        elif bundles.versions()[1:] or (move == NOTHING and bundles.versions()):
            bundles.rollback(None if move == "back" else move)
        if is_settled:
            settle(bundles, store)
    settle(bundles, store)
    found, wanted = marks(store), expected(bundles)
    assert found.keys() == wanted.keys()
    assert set(found.values()) <= set(bundles.versions())
