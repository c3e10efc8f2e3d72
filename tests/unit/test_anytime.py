"""Bounds that hold at any time: how often they fail, and what they cost against an exact one for a single look."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from distill_ray.serving.calibration.anytime import difference_bound, lower_bound, upper_bound

ALPHA = 0.05
values = st.lists(st.floats(0, 1), max_size=60)


@pytest.mark.parametrize("horizon", [None, 80])
@pytest.mark.parametrize("mean", [0.5, 0.9, 0.98])
def test_it_fails_no_more_often_than_it_says_however_often_it_is_asked(mean: float, horizon: int | None) -> None:
    random = np.random.default_rng(0)
    runs, looks = 200, (10, 20, 40, 80, 160, 320)
    failed = 0
    for _ in range(runs):
        drawn = (random.random(looks[-1]) < mean).astype(float)
        failed += any(lower_bound(drawn[:look], ALPHA, horizon) > mean for look in looks)
    assert binomtest(failed, runs, ALPHA, alternative="greater").pvalue > 0.01, failed


@pytest.mark.parametrize(("good", "count"), [(95, 100), (190, 200), (970, 1000), (500, 1000)])
def test_it_costs_little_against_the_exact_bound_of_a_single_look(good: int, count: int) -> None:
    drawn = np.random.default_rng(1).permutation(np.repeat([1.0, 0.0], [good, count - good]))
    exact = binomtest(good, count).proportion_ci(1 - 2 * ALPHA, method="exact").low
    found = lower_bound(drawn, ALPHA, horizon=count)
    assert found < good / count
    assert good / count - found < 1.6 * (good / count - exact)


def test_more_of_the_same_makes_it_tighter() -> None:
    bounds = [lower_bound(np.tile([1.0, 1.0, 1.0, 0.0], n), ALPHA) for n in (5, 25, 125, 625)]
    assert bounds == sorted(bounds)
    assert 0.6 < bounds[-1] < 0.75


def test_what_is_not_known_is_not_claimed() -> None:
    assert lower_bound(np.array([]), ALPHA) == 0.0
    assert lower_bound(np.ones(1), ALPHA) < 0.5
    assert upper_bound(np.array([]), ALPHA) == 1.0
    assert difference_bound(np.array([]), np.array([]), ALPHA) == -1.0


@given(values)
def test_a_lower_bound_is_below_and_an_upper_one_above_the_mean(drawn: list[float]) -> None:
    array = np.array(drawn)
    assert 0.0 <= lower_bound(array, ALPHA) <= (array.mean() if drawn else 0.0) + 1e-9
    assert (array.mean() if drawn else 1.0) - 1e-9 <= upper_bound(array, ALPHA) <= 1.0


def test_of_two_that_are_equal_neither_is_better_and_a_better_one_is_found() -> None:
    random = np.random.default_rng(2)
    current = (random.random(600) < 0.8).astype(float)
    better = np.maximum(current, (random.random(600) < 0.6).astype(float))
    assert -0.06 < difference_bound(current, current, ALPHA, horizon=600) < 0.0
    assert 0.0 < difference_bound(better, current, ALPHA, horizon=600) < (better - current).mean()
    assert difference_bound(current, better, ALPHA, horizon=600) < -0.1


@pytest.mark.parametrize("wrong", [[1.5], [-0.1], [float("nan")]])
def test_a_value_outside_is_refused(wrong: list[float]) -> None:
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        lower_bound(np.array(wrong), ALPHA)
