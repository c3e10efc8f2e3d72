"""Metrics against hand numbers, and the bootstrap against scipy's."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from distill_ray.pipeline import metrics
from distill_ray.pipeline.metrics import confusion, exact_match, interval, token_f1


@pytest.mark.parametrize(
    ("answer", "expected", "score"),
    [("fr", "fr", 1), (" fr\n", "fr", 1), ("a  b", "a\nb", 1), ("Fr", "fr", 0), ("", "fr", 0), ("", " ", 1)],
)
def test_exact_match_ignores_only_white_space(answer: str, expected: str, score: float) -> None:
    assert exact_match(answer, expected) == score


@pytest.mark.parametrize(
    ("answer", "expected", "score"),
    [
        ("The cat sat.", "a CAT, sat", 1.0),
        ("cat", "cat sat", 2 / 3),  # precision 1, recall 1/2
        ("cat cat cat", "cat sat", 2 / 5),  # one word in common, counted once
        ("dog", "cat", 0.0),
        ("", "cat", 0.0),
        ("the", "a", 1.0),  # nothing is left of either
    ],
)
def test_token_f1_is_the_overlap_of_words(answer: str, expected: str, score: float) -> None:
    assert token_f1(answer, expected) == pytest.approx(score)


@given(st.text(), st.text())
def test_scores_lie_between_0_and_1_and_f1_is_symmetric(one: str, two: str) -> None:
    assert exact_match(one, one) == token_f1(one, one) == 1.0
    assert 0.0 <= token_f1(one, two) == token_f1(two, one) <= 1.0


@pytest.mark.parametrize("kind", ["labels", "losses"])
def test_the_interval_is_that_of_scipys_percentile_bootstrap(kind: str) -> None:
    generator = np.random.default_rng(7)
    values = (generator.random(200) < 0.8).astype(float) if kind == "labels" else generator.gamma(2.0, size=200)
    low, high = interval(values.tolist(), num_resamples=20_000, seed=1)
    reference = scipy.stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(2)
    ).confidence_interval
    width = reference.high - reference.low
    assert low == pytest.approx(reference.low, abs=0.05 * width)
    assert high == pytest.approx(reference.high, abs=0.05 * width)
    assert low < values.mean() < high


def test_the_interval_depends_on_the_seed_and_not_on_the_memory_it_may_use(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values = np.random.default_rng(0).random(51).tolist()
    whole = interval(values, num_resamples=500, seed=3)
    assert interval(values, num_resamples=500, seed=3) == whole
    assert interval(values, num_resamples=500, seed=4) != whole
    monkeypatch.setattr(metrics, "RESAMPLED_AT_ONCE", 151)
    assert interval(values, num_resamples=500, seed=3) == whole


@pytest.mark.parametrize("values", [[1.0], [0.5, 0.5, 0.5]])
def test_rows_that_are_all_alike_have_an_interval_without_width(values: list[float]) -> None:
    assert interval(values, num_resamples=100, seed=0) == (values[0], values[0])


def test_confusion_counts_who_is_taken_for_whom() -> None:
    found = confusion(["en", "fr ", "en", "no idea", "fr"], ["en", "fr", "fr", "fr", "fr"])
    assert found is not None
    assert found.labels == ["en", "fr"]
    assert found.counts == [[1, 0], [1, 2]]
    assert found.other == [0, 1]


@pytest.mark.parametrize(
    "expected",
    [
        ["one answer", "another one"],  # none repeats: free text
        ["same", "same"],  # nothing to confuse
        [f"label {i % 31}" for i in range(100)],  # too many
        ["long " * 20, "long " * 20, "short"],
    ],
)
def test_there_is_no_confusion_table_where_answers_are_not_labels(expected: list[str]) -> None:
    assert confusion(expected, expected) is None
