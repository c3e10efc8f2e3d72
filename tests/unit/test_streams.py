"""The short form of `make streams`: the budget is kept where that is hardest, and a watch sees what a bundle cannot."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binom

from benchmarks.streams import Served, cycle, held, run, shifted, topics, watch
from benchmarks.worlds import BESIDE, Mix, Topic, World
from distill_ray.serving.calibration import study
from distill_ray.serving.calibration.fitting import near_duplicate_groups

AT_BUDGET = topics(0.8995, 0.8995)  # whatever passes breaks the promise
KNOWN = Mix("known", topics(0.99, 0.99), held_out=400, trained=100)


@pytest.fixture(autouse=True)
def _few_polarity_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "PAIRS", study.PAIRS[:3])


@pytest.mark.parametrize(
    "mix",
    [
        Mix("independent", AT_BUDGET, held_out=120, trained=100, budget=0.1, confidence=0.8),
        Mix("bursts", AT_BUDGET, held_out=320, trained=100, budget=0.1, confidence=0.8, repeated=1.0, burst=8),
    ],
    ids=lambda mix: mix.name,
)
def test_the_true_error_is_over_the_budget_no_more_often_than_promised(mix: Mix) -> None:
    """Were every request of a burst one more piece of news, 10 of the 20 runs would be over it."""
    found = held(mix, [run(mix, seed, num_fresh=50) for seed in range(20)])
    assert found["rate"] == pytest.approx(1.0 - found["nothing_passes"])
    assert 0.0 < found["rate"] < 0.4
    assert found["p_value"] > 0.01


def test_what_is_counted_is_what_is_tested() -> None:
    outcomes = [Served(0.5, 0.2)] * 3 + [Served(0.5, 0.1)] * 5 + [Served(0.0, None)] * 2
    found = held(Mix("", AT_BUDGET, budget=0.1, confidence=0.8), outcomes)
    assert (found["over"], found["runs"], found["nothing_passes"]) == (3, 10, 0.2)
    assert (found["share"], found["error"]) == (pytest.approx(0.4), pytest.approx(0.1375))
    assert found["p_value"] == pytest.approx(sum(binom.pmf(over, 10, 0.2) for over in range(3, 11)))


# -- the worlds --------------------------------------------------------------------------------------------------------


def test_what_comes_in_bursts_is_nearly_the_same_and_shares_its_outcome_and_the_rest_is_not() -> None:
    mix = Mix("", topics(0.5, 0.5), held_out=200, repeated=0.3, burst=10)
    measured, good_P = World(mix.topics, 0).measure(mix, np.random.default_rng(0))
    groups_P = near_duplicate_groups(measured.texts)
    _, members_P, sizes_G = np.unique(groups_P, return_inverse=True, return_counts=True)
    assert sorted(sizes_G.tolist()) == [1] * 140 + [10] * 6
    rates_G = np.bincount(members_P, good_P) / sizes_G
    assert set(rates_G.tolist()) == {0.0, 1.0}


def test_topics_lie_where_they_are_said_to_and_others_do_not_move_them() -> None:
    before = World(topics(0.9, 0.8, beyond=0.1), 3)
    after = World((*topics(0.9, 0.8, beyond=0.1), Topic(2.0, 0.5, beside=0)), 3)
    centres = after._centres_TD
    assert np.array_equal(before._centres_TD, centres[:2])
    assert np.linalg.norm(centres, axis=1) == pytest.approx(1.0)
    assert centres[2] @ centres[0] == pytest.approx(BESIDE)
    _, good_N = after.draw(4000, np.random.default_rng(0))
    shares = {rate: float((good_N == rate).mean()) for rate in np.unique(good_N).tolist()}
    assert shares == pytest.approx({0.1: 0.25, 0.5: 0.5, 0.8: 0.125, 0.9: 0.125}, abs=0.03)


# -- shifts ------------------------------------------------------------------------------------------------------------


def test_a_student_that_becomes_worse_is_found_out_and_one_that_does_not_is_left_alone() -> None:
    world = World(KNOWN.topics, 0)
    bundle = cycle(KNOWN, world, np.random.default_rng(0))
    assert bundle is not None
    same = watch(bundle, KNOWN, world, np.random.default_rng(1))
    worse = watch(bundle, KNOWN, World(topics(0.6, 0.6), 0), np.random.default_rng(1))
    assert (same.actions, same.end) == ([], same.static)
    assert same.static.error == pytest.approx(0.01)
    assert worse.actions == ["rollback"]
    assert worse.static.error == pytest.approx(0.4)
    assert worse.requests < 5000
    assert worse.wrong == worse.wrong_in_all < 0.1 * worse.wrong_static
    assert worse.end == Served(0.0, None)
    found = shifted("", [same, worse])
    assert (found["over"], found["acted"], found["without_reason"], found["over_at_end"]) == (1, 1, 0, 0)
    assert (found["requests"], found["wrong"]) == (worse.requests, worse.wrong)
