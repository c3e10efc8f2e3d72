"""Nearest trained requests: exact where it says so, near enough where not, and never of another kind."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill_ray.errors import BundleError
from distill_ray.serving.routing.index import NearestIndex

DIM = 16


def unit_vectors(num: int, seed: int = 0, dim: int = DIM) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((num, dim), dtype=np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def clustered(num: int, seed: int = 0) -> np.ndarray:
    """Around a hundred centres, as requests are."""
    noise = 0.3 * unit_vectors(num, seed + 1)
    vectors = unit_vectors(100, seed)[np.random.default_rng(seed).integers(100, size=num)] + noise
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def brute_force(vectors: np.ndarray, fingerprints: list[str], query: np.ndarray, wanted: str, k: int) -> np.ndarray:
    similarities = [float(v @ query) for v, f in zip(vectors, fingerprints, strict=True) if f == wanted]
    return np.array(sorted(similarities, reverse=True)[:k])


@given(
    fingerprints=st.lists(st.sampled_from("abc"), max_size=40),
    wanted=st.sampled_from("abcd"),
    k=st.integers(0, 50),
    seed=st.integers(0, 2**31),
)
def test_a_search_finds_the_nearest_of_the_same_kind(fingerprints: list[str], wanted: str, k: int, seed: int) -> None:
    vectors = unit_vectors(len(fingerprints), seed)
    query = unit_vectors(1, seed + 1)[0]
    similarities, rows = NearestIndex.build(vectors, fingerprints).search(query, wanted, k)
    assert (similarities.dtype, rows.dtype) == (np.float32, np.int64)
    np.testing.assert_allclose(similarities, brute_force(vectors, fingerprints, query, wanted, k), atol=1e-6)
    assert all(fingerprints[row] == wanted for row in rows)
    assert len(set(rows)) == len(rows)
    np.testing.assert_allclose(vectors[rows] @ query, similarities, atol=1e-6)


@settings(max_examples=20)
@given(st.lists(st.sampled_from("abc"), max_size=60), st.integers(0, 30), st.integers(0, 2**31))
def test_what_is_loaded_finds_what_was_saved(
    tmp_path_factory: pytest.TempPathFactory, fingerprints: list[str], exact_up_to: int, seed: int
) -> None:
    built = NearestIndex.build(unit_vectors(len(fingerprints), seed), fingerprints, exact_up_to=exact_up_to)
    folder = tmp_path_factory.mktemp("index")
    built.save(folder)
    loaded = NearestIndex.load(folder)
    assert (len(loaded), loaded.dim) == (len(fingerprints), DIM)
    query = unit_vectors(1, seed + 1)[0]
    for fingerprint in "abcd":
        for ours, theirs in zip(loaded.search(query, fingerprint, 5), built.search(query, fingerprint, 5), strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_an_index_without_rows_has_no_neighbours() -> None:
    index = NearestIndex.build(np.empty((0, DIM), dtype=np.float32), [])
    similarities, rows = index.search(unit_vectors(1)[0], "a", 8)
    assert len(index) == len(similarities) == len(rows) == 0


@pytest.fixture(scope="module")
def large() -> tuple[np.ndarray, list[str], NearestIndex]:
    """4,000 rows of one kind, which is more than are searched one by one here, and 1,000 of another."""
    vectors = clustered(5_000)
    fingerprints = ["many"] * 4_000 + ["few"] * 1_000
    return vectors, fingerprints, NearestIndex.build(vectors, fingerprints, exact_up_to=2_000)


def test_a_large_index_nearly_always_finds_the_nearest(large: tuple[np.ndarray, list[str], NearestIndex]) -> None:
    vectors, fingerprints, index = large
    queries = clustered(5_500)[5_000:]
    for fingerprint, least in [("many", 0.98), ("few", 1.0)]:
        own = vectors[np.array(fingerprints) == fingerprint]
        best = [index.search(query, fingerprint, 8)[0][0] for query in queries]
        assert np.mean(np.isclose(best, (queries @ own.T).max(axis=1), atol=1e-6)) >= least
        assert all(fingerprints[row] == fingerprint for row in index.search(queries[0], fingerprint, 100)[1])


def test_the_same_question_asked_a_thousand_times_hides_no_other() -> None:
    """Equal vectors are each other's nearest, and a graph could be left with islands of them."""
    distinct = unit_vectors(100)
    index = NearestIndex.build(np.repeat(distinct, 50, axis=0), ["a"] * 5_000, exact_up_to=2_000)
    best = [index.search(vector, "a", 1)[0] for vector in distinct]
    assert np.mean([len(found) == 1 and found[0] > 0.999 for found in best]) >= 0.98


def test_many_threads_find_what_one_finds(large: tuple[np.ndarray, list[str], NearestIndex]) -> None:
    _, _, index = large
    queries = unit_vectors(200, seed=5)
    expected = [[index.search(query, kind, 4)[1] for query in queries] for kind in ("many", "few")]
    found: dict[int, list] = {}

    def search(thread: int) -> None:
        found[thread] = [[index.search(query, kind, 4)[1] for query in queries] for kind in ("many", "few")]

    threads = [threading.Thread(target=search, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(6):
        np.testing.assert_array_equal(found[number], expected)


@pytest.mark.parametrize(
    "vectors",
    [
        unit_vectors(3)[:2],
        unit_vectors(3) * 1.1,
        unit_vectors(3) * [[1], [1], [np.nan]],
        unit_vectors(3)[0],
    ],
    ids=["too few", "not of unit length", "nan", "one vector"],
)
def test_wrong_vectors_are_refused(vectors: np.ndarray) -> None:
    with pytest.raises(ValueError, match="vector"):
        NearestIndex.build(vectors, ["a", "a", "b"])


def test_a_query_of_another_dimension_is_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(8,\) for an index of 16 dimensions"):
        NearestIndex.build(unit_vectors(3), ["a"] * 3).search(unit_vectors(1, dim=8)[0], "a", 1)


@pytest.mark.parametrize("name", ["groups.arrow", "flat.faiss", "graph-0.faiss"])
def test_a_damaged_or_foreign_file_is_named(tmp_path: Path, name: str) -> None:
    fingerprints = ["many"] * 6 + ["few"] * 2
    NearestIndex.build(unit_vectors(8), fingerprints, exact_up_to=5).save(tmp_path / "index")
    NearestIndex.build(unit_vectors(10), ["many"] * 7 + ["few"] * 3, exact_up_to=5).save(tmp_path / "other")
    file = tmp_path / "index" / name
    whole = file.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", (tmp_path / "other" / name).read_bytes()):
        file.write_bytes(damaged)
        with pytest.raises(BundleError, match=r"index: cannot read this index .*calibrate again"):
            NearestIndex.load(tmp_path / "index")
    file.unlink()
    with pytest.raises(BundleError, match=name):
        NearestIndex.load(tmp_path / "index")


def test_an_index_of_another_version_is_refused(tmp_path: Path) -> None:
    NearestIndex.build(unit_vectors(3), ["a"] * 3).save(tmp_path)
    file = tmp_path / "groups.arrow"
    file.write_bytes(file.read_bytes().replace(b"distill_ray.index", b"distill_ray.other"))
    with pytest.raises(BundleError, match="another version"):
        NearestIndex.load(tmp_path)
