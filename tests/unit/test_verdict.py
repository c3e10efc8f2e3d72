"""A candidate is promoted only if it is not worse; and it is called worse only if that is shown."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest

from distill_ray.config.flywheel import GateConfig
from distill_ray.flywheel.verdict import Compared, Verdict, compare, judge

CONFIG = GateConfig(margin=0.05, min_pairs=100)


def good(share: float, count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random(count) < share


def compared(candidate: np.ndarray, current: np.ndarray | None) -> Compared:
    return compare(candidate, current, np.arange(len(candidate)), CONFIG.confidence, 0)


def verdict(all_: Compared, new: Compared | None = None, earlier: Compared | None = None, *failed: str) -> Verdict:
    nothing = compared(np.zeros(0, dtype=bool), None)
    return judge(CONFIG, {"all": all_, "new": new or nothing, "earlier": earlier or nothing}, failed)


def test_equal_students_pass_where_there_are_enough_pairs() -> None:
    same = good(0.95, 300)
    assert verdict(compared(same, same)).outcome == "go_on"
    few = same[:60]
    assert verdict(compared(few, few)).outcome == "unclear"
    assert "60 held-out requests" in verdict(compared(few, few)).why[0]


def test_a_worse_one_is_refused_and_one_of_which_little_is_known_is_unclear() -> None:
    assert verdict(compared(good(0.5, 300), good(0.95, 300, 1))).outcome == "refused"
    found = verdict(compared(good(0.90, 110), good(0.92, 110, 1)))
    assert found.outcome == "unclear"
    assert "not shown to be at most 5.0% worse" in found.why[0]


def test_a_gain_on_new_requests_is_no_excuse_for_a_loss_on_earlier_ones() -> None:
    new = compared(good(0.95, 900), good(0.1, 900, 1))
    earlier = compared(good(0.4, 120), good(0.95, 120, 1))
    everything = compared(
        np.concatenate([good(0.95, 900), good(0.4, 120)]), np.concatenate([good(0.1, 900, 1), good(0.95, 120, 1)])
    )
    assert everything.low is not None
    assert everything.low > 0
    found = verdict(everything, new, earlier)
    assert found.outcome == "refused"
    assert found.why[0].startswith("earlier: worse than the student in service")


def test_one_broken_regression_is_enough() -> None:
    same = good(0.95, 300)
    found = verdict(compared(same, same), None, None, "'who?': equals 'me'")
    assert found == Verdict("refused", ["regression: 'who?': equals 'me'"])


def test_without_a_student_in_service_there_is_nothing_to_be_worse_than() -> None:
    assert verdict(compared(good(0.3, 200), None)).outcome == "go_on"
    assert verdict(compared(good(0.9, 20), None)).outcome == "unclear"
    assert verdict(compared(np.zeros(0, dtype=bool), None)).outcome == "unclear"


def test_near_duplicates_count_once() -> None:
    candidate, current = np.array([True] * 99 + [False]), np.array([False] * 99 + [True])
    groups = np.array([0] * 99 + [1])
    found = compare(candidate, current, groups, 0.95, 0)
    assert (found.pairs, found.groups, found.difference) == (100, 2, 0.0)
    assert (found.lost, found.gained) == (1, 99)
    assert found.low is not None
    assert found.low < -0.5


@pytest.mark.parametrize("loss", [0.05, 0.15])
def test_a_candidate_that_is_worse_by_the_margin_or_more_hardly_ever_passes(loss: float) -> None:
    random, passed, runs = np.random.default_rng(3), 0, 150
    for _ in range(runs):
        current = random.random(400) < 0.9
        candidate = current & (random.random(400) < (0.9 - loss) / 0.9)
        passed += verdict(compared(candidate, current)).outcome == "go_on"
    assert binomtest(passed, runs, 0.05, alternative="greater").pvalue > 0.01, passed
