"""The bounds against definitions and scipy's own test; the promise of the chosen threshold by simulation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from distill_ray.serving.calibration.guarantee import (
    Count,
    expected_p_value,
    interval,
    num_needed,
    num_needed_without_error,
    num_passing,
    upper_bound,
)

counts = st.integers(1, 500).flatmap(lambda num: st.tuples(st.integers(0, num), st.just(num)))
levels = st.sampled_from([0.8, 0.9, 0.95, 0.99])


@given(counts, levels)
def test_the_interval_is_scipys(count: tuple[int, int], confidence: float) -> None:
    bad, num = count
    reference = stats.binomtest(bad, num).proportion_ci(confidence, method="exact")
    assert interval(bad, num, confidence) == pytest.approx((reference.low, reference.high), abs=1e-9)


@given(counts, levels)
def test_the_upper_bound_is_the_rate_at_which_so_few_errors_are_just_improbable(
    count: tuple[int, int], confidence: float
) -> None:
    bad, num = count
    bound = upper_bound(bad, num, confidence)
    reference = stats.binomtest(bad, num, alternative="less").proportion_ci(confidence, method="exact")
    assert bound == pytest.approx(reference.high, abs=1e-9)
    if bad < num:
        assert stats.binom.cdf(bad, num, bound) == pytest.approx(1 - confidence, rel=1e-6)


@given(counts, levels, st.sampled_from([0.01, 0.05, 0.2]))
def test_a_rule_passes_exactly_where_the_binomial_test_rejects(
    count: tuple[int, int], confidence: float, budget: float
) -> None:
    bad, num = count
    p_value = stats.binomtest(bad, num, budget, alternative="less").pvalue
    assert expected_p_value(bad / num, num, budget) == pytest.approx(p_value, rel=1e-6, abs=1e-12)
    if abs(p_value - (1 - confidence)) > 1e-9:
        assert (num_passing([Count(num, num, bad)], budget, confidence) == 1) == (p_value <= 1 - confidence)


@pytest.mark.parametrize("size", [1, 2, 3, 10])
@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
@pytest.mark.parametrize("num", [30, 59, 200])
def test_groups_that_are_bad_in_part_void_the_bound_no_more_often_than_whole_ones(
    size: int, confidence: float, num: int
) -> None:
    """Half of the groups have several members, which are bad independently of one another or all together."""
    rng, rounds, budget = np.random.default_rng(0), 4000, 0.05
    together = rng.binomial(num // 2, budget, rounds)
    bads = together + rng.binomial((num - num // 2) * size, budget, rounds) / size
    failed = int((np.array([upper_bound(bad, num, confidence) for bad in bads]) < budget).sum())
    assert stats.binomtest(failed, rounds, 1 - confidence, alternative="greater").pvalue > 0.001, failed / rounds


def test_nothing_measured_shows_nothing() -> None:
    assert upper_bound(0, 0, 0.95) == 1.0
    assert interval(0, 0, 0.95) == (0.0, 1.0)
    assert Count(10, 0, 0).error is None
    assert num_passing([Count(10, 0, 0)], 0.05, 0.95) == 0


def test_testing_stops_at_the_first_rule_that_fails() -> None:
    good, bad = Count(200, 100, 0), Count(200, 100, 30)
    assert num_passing([good, good, bad, good], 0.05, 0.95) == 2
    assert num_passing([bad, good, good], 0.05, 0.95) == 0
    assert num_passing([good, good], 0.05, 0.95) == 2


def test_59_requests_without_an_error_show_5_percent() -> None:
    """The "rule of three": 3 / n. Tables give 59 for 95 % and 5 %, 299 for 1 %, 90 for 99 % and 5 %."""
    for budget, confidence, expected in ((0.05, 0.95, 59), (0.01, 0.95, 299), (0.05, 0.99, 90)):
        assert num_needed_without_error(budget, confidence) == expected == num_needed(0.0, budget, confidence)
        assert upper_bound(0, expected, confidence) <= budget < upper_bound(0, expected - 1, confidence)


@pytest.mark.parametrize("error", [0.005, 0.01, 0.02, 0.03, 0.045])
def test_the_number_needed_is_the_least_that_is_enough(error: float) -> None:
    needed = num_needed(error, 0.05, 0.95)
    assert needed is not None
    assert expected_p_value(error, needed, 0.05) <= 0.05 < expected_p_value(error, needed - 1, 0.05)


def test_no_number_is_enough_for_a_student_that_is_not_within_the_budget() -> None:
    assert num_needed(0.05, 0.05, 0.95) is None
    assert num_needed(0.3, 0.05, 0.95) is None


def test_the_budget_is_kept_with_the_confidence_asked_for() -> None:
    """300 calibrations of a score whose true error rate at each threshold is known.

    A request's score is uniform, and the student is worse with probability 0.2 (1 - score): at a threshold t the error
    rate is 0.1 (1 - t), within 5 % from t = 0.5 on. The choice may be wrong in 10 % of the calibrations; beside it
    stands the habit of taking the loosest threshold whose measured rate is within the budget, which is wrong far more
    often: so this test can tell them apart.
    """
    rng = np.random.default_rng(7)
    budget, confidence, num, rounds = 0.05, 0.9, 1000, 300
    thresholds = np.linspace(0.8, 0.0, 41)
    wrong = naive_wrong = chosen = 0
    for _ in range(rounds):
        scores = rng.random(num)
        is_bad = rng.random(num) < 0.2 * (1 - scores)
        found = [Count(num, int((scores >= t).sum()), int(is_bad[scores >= t].sum())) for t in thresholds]
        passing = num_passing(found, budget, confidence)
        if passing:
            chosen += 1
            wrong += 0.1 * (1 - thresholds[passing - 1]) > budget
        naive = [t for t, count in zip(thresholds, found, strict=True) if (count.error or 0.0) <= budget]
        naive_wrong += 0.1 * (1 - min(naive, default=1.0)) > budget
    allowed = 1 - confidence
    assert wrong / rounds <= allowed + 3 * np.sqrt(allowed * confidence / rounds)
    assert naive_wrong / rounds > 3 * allowed
    assert chosen / rounds > 0.5, "and yet it lets the student answer"
