"""When second looks lead to something: never more often than promised, soon where the student has become worse."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from distill_ray.serving.calibration.anytime import STRETCH, exceeded_since, highest_bound
from distill_ray.serving.watching.drift import LEAST_LEFT, WINDOW, Action, DriftWatch

BUDGET, CONFIDENCE = 0.05, 0.95
looks = st.lists(st.tuples(st.floats(0, 1), st.booleans()), max_size=120)


def watch(bad: np.ndarray, scores: np.ndarray | None = None, **kwargs: float) -> DriftWatch:
    found = DriftWatch(BUDGET, CONFIDENCE, **kwargs)
    for number, is_bad in enumerate(bad):
        found.add(0.9 if scores is None else float(scores[number]), good=not is_bad)
    return found


def first_action(bad: np.ndarray, scores: np.ndarray | None = None) -> tuple[int, Action] | None:
    """After how many looks something is to be done. They stay to be done, so this may be searched for."""
    low, high = 0, len(bad) + 1
    while high - low > 1:
        middle = (low + high) // 2
        is_due = watch(bad[:middle], None if scores is None else scores[:middle]).due() is not None
        low, high = (low, middle) if is_due else (middle, high)
    action = watch(bad[:high], None if scores is None else scores[:high]).due() if high <= len(bad) else None
    return None if action is None else (high, action)


# -- how often it is wrong ---------------------------------------------------------------------------------------------


def at_the_budget(random: np.random.Generator) -> np.ndarray:
    return random.random(WINDOW) < BUDGET


def in_bursts_at_the_budget(random: np.random.Generator) -> np.ndarray:
    """Long quiet times, then up to the budget: the mean is never above it."""
    rates = np.repeat(random.choice([0.0, 0.01, BUDGET], WINDOW // 50), 50)
    return random.random(WINDOW) < rates


def after_a_bad_one_none(random: np.random.Generator) -> np.ndarray:
    """Not independent: whatever came before, the next one is bad with the budget's probability at most."""
    bad = random.random(WINDOW) < BUDGET
    bad[1:] &= ~bad[:-1]
    return bad


@pytest.mark.parametrize("kind", [at_the_budget, in_bursts_at_the_budget, after_a_bad_one_none])
def test_a_student_that_keeps_its_budget_is_acted_upon_no_more_often_than_promised(kind: object) -> None:
    random, runs = np.random.default_rng(0), 400
    acted = sum(watch(kind(random)).due() is not None for _ in range(runs))  # type: ignore[operator]
    assert binomtest(acted, runs, 1 - CONFIDENCE, alternative="greater").pvalue > 0.01, acted


def test_what_falls_out_of_sight_buys_no_second_chance_of_a_false_alarm() -> None:
    random, runs, num = np.random.default_rng(1), 100, 4 * WINDOW
    acted = 0
    for _ in range(runs):
        drawn, found = random.random(num) < BUDGET, DriftWatch(BUDGET, CONFIDENCE)
        is_due = False
        for number, is_bad in enumerate(drawn):
            found.add(0.9, good=not is_bad)
            is_due = is_due or (number % (WINDOW // 2) == 0 and found.due() is not None)
        assert found.num_looks < WINDOW + STRETCH
        acted += is_due or found.due() is not None
    assert binomtest(acted, runs, 1 - CONFIDENCE, alternative="greater").pvalue > 0.01, acted


@given(looks)
def test_what_is_to_be_done_stays_to_be_done_until_it_is_done(given: list[tuple[float, bool]]) -> None:
    found, was_due = DriftWatch(BUDGET, CONFIDENCE), False
    for score, good in given:
        found.add(score, good=good)
        is_due = found.due() is not None
        assert is_due or not was_due
        was_due = is_due


@given(st.lists(st.booleans(), max_size=250), st.sampled_from([0.05, 0.2, 0.5]))
def test_the_bound_is_over_the_budget_just_when_something_is_to_be_done(bad: list[bool], mean: float) -> None:
    values = np.array(bad, dtype=float)
    bound = highest_bound(values, 0.05)
    assert 0.0 <= bound <= 1.0
    if abs(bound - mean) > 1e-6:
        assert (exceeded_since(values, mean, 0.05) is not None) == (bound > mean)


# -- how soon it is right ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("quiet", "rate", "within"), [(0, 0.5, 15), (0, 0.2, 120), (0, 0.1, 700), (500, 0.2, 220), (900, 0.5, 45)]
)
def test_a_student_that_became_worse_is_found_out(quiet: int, rate: float, within: int) -> None:
    random = np.random.default_rng(2)
    took = []
    for _ in range(40):
        bad = np.concatenate([random.random(quiet) < 0.02, random.random(1000) < rate])
        found = first_action(bad[: WINDOW + STRETCH - 1])
        took.append(found[0] - quiet if found is not None else 10**6)
    assert np.median(took) < within, took
    assert min(took) > 0


def test_the_stretch_that_shows_it_begins_where_it_became_worse() -> None:
    bad = np.zeros(700, dtype=bool)
    bad[600:] = np.arange(100) % 2 == 0
    found = first_action(bad)
    assert found is not None
    assert found[1].looks < 100 + STRETCH
    assert found[1].bound > BUDGET


# -- what is done ------------------------------------------------------------------------------------------------------


def test_the_threshold_rises_to_where_the_student_is_good_still() -> None:
    random = np.random.default_rng(3)
    scores = random.uniform(0.6, 1.0, 400)
    bad = (scores < 0.75) & (random.random(400) < 0.3)
    found = first_action(bad, scores)
    assert found is not None
    num, action = found
    assert action.what == "raise"
    assert action.threshold is not None
    assert 0.7 < action.threshold < 0.8
    assert action.bad / action.looks > action.bound > BUDGET
    left = bad[:num][scores[:num] >= action.threshold]
    assert len(left) >= LEAST_LEFT
    assert left.mean() <= BUDGET


def test_what_was_good_for_long_says_where_the_student_may_still_be() -> None:
    scores = np.array([0.95] * 300 + [0.6] * 300 + [0.7] * 20)
    bad = np.arange(620) >= 600
    action = watch(bad, scores).due()
    assert action is not None
    assert (action.what, action.threshold) == ("raise", 0.95)
    bad[-1], scores[-1] = True, 0.95  # the bad stretch has some of these
    action = watch(bad, scores).due()
    assert action is not None
    assert action.what == "rollback"


def test_where_no_threshold_helps_the_bundle_is_gone_back_from_at_once() -> None:
    random = np.random.default_rng(4)
    found = first_action(random.random(200) < 0.5, random.uniform(0.6, 1.0, 200))
    assert found is not None
    assert (found[1].what, found[1].threshold) == ("rollback", None)


def test_a_few_good_ones_at_the_top_prove_nothing() -> None:
    scores = np.array([0.6] * 30 + [0.95] * (LEAST_LEFT - 1))
    bad = scores < 0.9
    action = watch(bad, scores).due()
    assert action is not None
    assert action.what == "rollback"
    one_more = watch(np.append(bad, False), np.append(scores, 0.95)).due()
    assert one_more is not None
    assert (one_more.what, one_more.threshold) == ("raise", 0.95)


def test_after_the_threshold_rose_looks_count_anew_and_the_second_break_is_the_last() -> None:
    found = watch(np.array([True] * 30))
    found.raised(0.8)
    assert (found.num_looks, found.agreement, found.due()) == (0, None, None)
    for _ in range(50):
        found.add(0.7, good=False)  # would not go to the student any more
    assert found.num_looks == 0
    for _ in range(30):
        found.add(0.8, good=False)
    action = found.due()
    assert action is not None
    assert action.what == "rollback"


@given(looks, st.none() | st.floats(0, 1))
def test_whoever_is_killed_goes_on_with_what_was_known(given: list[tuple[float, bool]], floor: float | None) -> None:
    found, again = (DriftWatch(BUDGET, CONFIDENCE, floor) for _ in range(2))
    for score, good in given:
        found.add(score, good=good)
    again.restore(json.loads(json.dumps(found.to_json())))
    assert again.to_json() == found.to_json()
    assert (again.due(), again.agreement) == (found.due(), found.agreement)


def test_agreement_has_a_bound() -> None:
    found = watch(np.arange(400) % 10 == 0)
    assert found.agreement == pytest.approx(0.9)
    assert 0.9 < found.agreement_bound < 0.97
    assert DriftWatch(BUDGET, CONFIDENCE).agreement_bound == 1.0
