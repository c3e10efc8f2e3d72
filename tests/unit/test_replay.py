"""PGR, APGR and CPT against definitions and other ways to the same number; routers must not see what they score."""

from __future__ import annotations

import dataclasses
import itertools
import json

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from distill_ray.config.serve import CalibrateConfig
from distill_ray.errors import DataError
from distill_ray.serving.calibration import replay as module
from distill_ray.serving.calibration.curve import TITLES, recovered_svg
from distill_ray.serving.calibration.fitting import near_duplicate_groups, split_groups
from distill_ray.serving.calibration.replay import (
    Answers,
    Curve,
    Recorded,
    apgr,
    cpt,
    pgr_curve,
    replay,
    router_scores,
)
from distill_ray.serving.calibration.vectors import Vectors
from distill_ray.serving.routing.index import NearestIndex

DIM = 16
Pairs = tuple[np.ndarray, np.ndarray, np.ndarray]


@st.composite
def pairs(draw: st.DrawFn, rightness: tuple[float, ...] = (0.0, 0.5, 1.0)) -> Pairs:
    """Scores with ties, and how right both models are; the large one is better."""
    num = draw(st.integers(2, 40))
    of = st.lists(st.sampled_from(rightness), min_size=num, max_size=num).map(np.array)
    scores = draw(st.lists(st.integers(-5, 5), min_size=num, max_size=num))
    small, large = draw(of), draw(of)
    assume((large - small).sum() > 0)
    return np.array(scores, dtype=np.float64), small, large


# -- what RouteLLM measures --------------------------------------------------------------------------------------------


@given(pairs())
def test_the_curve_is_what_each_threshold_gives(given_pairs: Pairs) -> None:
    """PGR by its definition, (r(router) - r(small)) / (r(large) - r(small)), threshold by threshold."""
    scores, small, large = given_pairs
    expected = []
    for threshold in [*np.unique(scores), np.inf]:
        to_large = scores < threshold
        quality = np.where(to_large, large, small).mean()
        expected.append((to_large.mean(), (quality - small.mean()) / (large.mean() - small.mean())))
    curve = pgr_curve(scores, small, large)
    assert np.column_stack([curve.shares_T, curve.pgr_T]) == pytest.approx(np.array(expected), abs=1e-12)


@given(pairs(rightness=(0.0, 1.0)))
def test_where_the_large_model_is_always_right_the_area_follows_from_the_area_under_the_roc(given_pairs: Pairs) -> None:
    """Of a gains chart: area = p / 2 + (1 - p) AUC, with p the share of requests that gain. sklearn has the AUC."""
    scores, small, _ = given_pairs
    gains = 1 - small
    assume(0 < gains.mean() < 1)
    auc = roc_auc_score(gains, -scores)
    expected = gains.mean() / 2 + (1 - gains.mean()) * auc
    assert apgr(pgr_curve(scores, small, np.ones(len(small)))) == pytest.approx(expected, abs=1e-12)


def test_with_ten_different_scores_it_is_what_routellm_computes_at_its_eleven_thresholds() -> None:
    """Its evaluation draws ten equal bins of scores, takes the trapezoid over them and interpolates for CPT."""
    rng = np.random.default_rng(0)
    small = np.array([0, 1, 0, 0, 1, 0, 1, 1, 1, 1], dtype=np.float64)
    large = np.ones(10)
    scores = np.arange(10) + rng.random(10)
    shares = np.arange(11) / 10
    accuracy = np.array([(large[:n].sum() + small[n:].sum()) / 10 for n in range(11)])
    weak, strong = small.mean(), large.mean()
    reference = (np.trapezoid(accuracy, shares) - weak) / (strong - weak)
    curve = pgr_curve(scores, small, large)
    assert apgr(curve) == pytest.approx(reference, abs=1e-12)
    for level in (0.3, 0.6, 0.9):
        assert cpt(curve, level) == pytest.approx(np.interp(level * (strong - weak) + weak, accuracy, shares))


@given(pairs(), st.sampled_from([0.2, 0.5, 0.8, 1.0]))
def test_cpt_is_the_least_share_that_recovers_so_much(given_pairs: Pairs, level: float) -> None:
    curve = pgr_curve(*given_pairs)
    share = cpt(curve, level)
    assert 0 < share <= 1
    assert curve.at(np.array([share]))[0] == pytest.approx(level, abs=1e-9)
    before = np.linspace(0.0, share, 200, endpoint=False)
    assert (curve.at(before) < level).all()


@given(st.integers(1, 50), st.integers(0, 50))
def test_a_score_that_tells_nothing_apart_is_random_routing(num_gain: int, num_same: int) -> None:
    small = np.array([0.0] * num_gain + [1.0] * num_same)
    curve = pgr_curve(np.zeros(len(small)), small, np.ones(len(small)))
    assert apgr(curve) == 0.5
    assert (cpt(curve, 0.5), cpt(curve, 0.8)) == (0.5, 0.8)


def test_drawn_scores_recover_half_on_average() -> None:
    rng = np.random.default_rng(0)
    small, large = (rng.random(200) < rate for rate in (0.6, 0.9))
    areas = [apgr(pgr_curve(rng.random(200), 1.0 * small, 1.0 * large)) for _ in range(500)]
    assert np.mean(areas) == pytest.approx(0.5, abs=4 * np.std(areas) / np.sqrt(500))


def test_equal_scores_count_as_their_mean_over_all_orders() -> None:
    scores = np.array([0.0, 1.0, 1.0, 1.0, 1.0, 2.0])
    small, large = np.array([1.0, 0.0, 1.0, 0.5, 0.0, 1.0]), np.array([1.0, 1.0, 0.0, 1.0, 1.0, 1.0])
    orders = [np.array([0.0, *order, 9.0]) for order in itertools.permutations([1.0, 2.0, 3.0, 4.0])]
    curves = [pgr_curve(order, small, large) for order in orders]
    tied = pgr_curve(scores, small, large)
    assert apgr(tied) == pytest.approx(np.mean([apgr(curve) for curve in curves]))
    shares = np.linspace(0, 1, 61)
    assert tied.at(shares) == pytest.approx(np.mean([curve.at(shares) for curve in curves], axis=0))


@given(pairs())
def test_only_the_order_of_scores_counts(given_pairs: Pairs) -> None:
    scores, small, large = given_pairs
    curve = pgr_curve(scores, small, large)
    for other in (np.exp(scores), scores**3, 1 / (1 + np.exp(-scores)), 7 * scores - 100):
        changed = pgr_curve(other, small, large)
        assert (changed.shares_T == curve.shares_T).all()
        assert changed.pgr_T == pytest.approx(curve.pgr_T, abs=1e-12)


@given(pairs())
def test_nothing_is_better_than_to_know_both_at_any_share(given_pairs: Pairs) -> None:
    scores, small, large = given_pairs
    best = pgr_curve(small - large, small, large)
    shares = np.linspace(0, 1, 101)
    assert (best.at(shares) >= pgr_curve(scores, small, large).at(shares) - 1e-9).all()
    if (large >= small).all() and set(large - small) <= {0.0, 1.0}:
        assert apgr(best) == pytest.approx(1 - (large - small).mean() / 2)


def test_what_cannot_be_ranked_or_recovered_is_refused() -> None:
    half = np.array([0.0, 1.0])
    with pytest.raises(ValueError, match="not finite"):
        pgr_curve(np.array([0.0, np.nan]), half, np.ones(2))
    for large in (half, 0 * half):
        with pytest.raises(ValueError, match="nothing to recover"):
            pgr_curve(half, half, large)


# -- routers side by side ----------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _few_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "NUM_SPLITS", 3)


def unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def recorded(num: int, rates: tuple[float, float], seed: int = 0, large: float = 0.97) -> Recorded:
    """Requests of two topics; `rates`: how often the small model is right on each."""
    rng = np.random.default_rng(seed)
    is_first = rng.random(num) < 0.5
    vectors = unit(np.eye(DIM)[np.where(is_first, 0, 1)] + 0.25 * rng.standard_normal((num, DIM)))
    texts = [f"{number} {rng.integers(10**9)} {rng.integers(10**9)}" for number in range(num)]
    small = rng.random(num) < np.where(is_first, *rates)
    return Recorded(Vectors(texts, ["k"] * num, vectors), 1.0 * small, 1.0 * (rng.random(num) < large))


def with_answers(pairs: Recorded, seed: int = 0) -> Recorded:
    """A wrong answer is less probable, and every second one says "perhaps"."""
    rng = np.random.default_rng(seed)
    is_right = pairs.small_P == 1
    says_perhaps = ~is_right & (rng.random(len(is_right)) < 0.5)
    vectors = unit(np.eye(DIM)[np.where(says_perhaps, 2, 3)] + 0.1 * rng.standard_normal((len(is_right), DIM)))
    answers = Answers(["perhaps" if each else "yes" for each in says_perhaps], vectors)
    logprobs = -rng.exponential(np.where(is_right, 0.2, 0.5))
    return dataclasses.replace(pairs, answers=answers, logprobs_P=logprobs)


def areas(pairs: Recorded, seed: int = 0) -> dict[str, float]:
    return {
        name: router["apgr"]["mean"] for name, router in replay(pairs, CalibrateConfig(seed=seed))["routers"].items()
    }


def test_routers_that_know_outcomes_find_the_hard_topic_and_the_answer_tells_more() -> None:
    found = areas(with_answers(recorded(400, (0.95, 0.4))))
    assert list(found) == list(TITLES)
    assert found["neighbours"] > 0.6
    assert found["fitted"] > 0.6
    assert found["cascade"] > max(found["fitted"], found["logprob"]) + 0.05
    assert found["perfect"] == max(found.values())
    assert abs(found["random"] - 0.5) < 0.1


def test_without_answers_there_is_no_cascade_and_with_one_of_both_there_is() -> None:
    pairs = with_answers(recorded(300, (0.9, 0.4)))
    neither = dataclasses.replace(pairs, answers=None, logprobs_P=None)
    assert not {"logprob", "cascade"} & set(areas(neither))
    words = areas(dataclasses.replace(pairs, logprobs_P=None))
    assert "logprob" not in words
    assert words["cascade"] > words["fitted"], "half of the wrong answers say perhaps"
    probability = areas(dataclasses.replace(pairs, answers=None))
    assert probability["cascade"] > probability["fitted"]


def test_a_router_never_sees_the_outcomes_that_it_is_measured_on() -> None:
    pairs = with_answers(recorded(300, (0.9, 0.4)))
    groups = near_duplicate_groups(pairs.queries.texts)
    parts = split_groups(groups, (0.5, 0.5), 0)
    train, test = np.flatnonzero(parts == 0), np.flatnonzero(parts == 1)
    turned = pairs.small_P.copy()
    turned[test] = 1 - turned[test]
    before, after = (
        router_scores(each, CalibrateConfig(), groups, train, test, 0)
        for each in (pairs, dataclasses.replace(pairs, small_P=turned))
    )
    for name, scores in before.items():
        assert (scores == after[name]).all() == (name != "perfect"), name


def test_near_duplicates_give_nothing_away() -> None:
    """Every request three times with one outcome, drawn by lot: who has seen one of them knows the others."""
    rng = np.random.default_rng(0)
    texts = [f"{rng.integers(10**12)} {rng.integers(10**12)}" for _ in range(150)]
    vectors = unit(rng.standard_normal((150, DIM)))
    right = 1.0 * (rng.random(150) < 0.5)
    three = np.repeat(np.arange(150), 3)
    pairs = Recorded(Vectors([texts[n] for n in three], ["k"] * 450, vectors[three]), right[three], np.ones(450))
    found = replay(pairs, CalibrateConfig())
    assert (found["rows"], found["different"]) == (450, 150)
    for name in ("similarity", "neighbours", "fitted"):
        assert found["routers"][name]["apgr"]["mean"] == pytest.approx(0.5, abs=0.12), name


def test_a_training_request_is_not_its_own_neighbour_nor_is_a_near_duplicate() -> None:
    known = recorded(60, (0.9, 0.4)).queries
    groups = np.arange(60) // 3
    index = NearestIndex.build(known.vectors_ND, known.kinds)
    for row, (similarities, rows) in enumerate(module._nearest_of_others(index, known, groups, 5)):
        others = [other for other in range(60) if groups[other] != groups[row]]
        expected = sorted(others, key=lambda other: -float(known.vectors_ND[row] @ known.vectors_ND[other]))[:5]
        assert rows.tolist() == expected
        assert similarities == pytest.approx(known.vectors_ND[expected] @ known.vectors_ND[row], abs=1e-6)


def test_what_both_get_wrong_is_no_reason_to_ask_the_large_one() -> None:
    """A topic that is hopeless for both, and one that only the small model finds hard."""
    pairs = recorded(400, (0.0, 0.6))
    is_hopeless = pairs.queries.vectors_ND[:, 0] > pairs.queries.vectors_ND[:, 1]
    found = areas(dataclasses.replace(pairs, large_P=np.where(is_hopeless, 0.0, pairs.large_P)))
    assert found["fitted"] > 0.65
    assert found["neighbours"] > 0.65


def test_a_model_that_is_as_good_everywhere_the_router_has_seen_leaves_nothing_to_learn() -> None:
    """One request in two hundred gains: most halves have none of them to train on."""
    pairs = with_answers(recorded(200, (1.0, 1.0), large=1.0))
    small = pairs.small_P.copy()
    small[7] = 0.0
    found = replay(dataclasses.replace(pairs, small_P=small), CalibrateConfig())
    assert not found["is_sure"]
    assert found["splits_left_out"] + len(found["routers"]["cascade"]["apgr"]["values"]) == 3


def test_the_spread_is_that_of_the_splits_and_the_same_seed_gives_the_same() -> None:
    pairs = recorded(300, (0.9, 0.4))
    one, two, other = (replay(pairs, CalibrateConfig(seed=seed)) for seed in (0, 0, 3))
    assert json.dumps(one, allow_nan=False) == json.dumps(two, allow_nan=False)
    assert one["routers"]["fitted"] != other["routers"]["fitted"]
    assert recovered_svg(one) == recovered_svg(two)
    spread = one["routers"]["fitted"]["cpt_50"]
    assert len(spread["values"]) == 3
    assert spread["mean"] == pytest.approx(np.mean(spread["values"]))
    assert spread["sd"] == pytest.approx(np.std(spread["values"], ddof=1))
    assert (spread["min"], spread["max"]) == (min(spread["values"]), max(spread["values"]))
    mean_curve = Curve(np.array(one["shares"]), np.array(one["routers"]["fitted"]["pgr"]))
    assert apgr(mean_curve) == pytest.approx(one["routers"]["fitted"]["apgr"]["mean"], abs=0.01)


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (recorded(60, (0.9, 0.4)), "60 rows, of which 60 have different queries.*at least 100 are needed"),
        (recorded(200, (0.9, 0.9), large=0.2), "not better than the small one: its mean is 0.* no gap to recover"),
    ],
)
def test_too_few_pairs_and_a_large_model_that_is_none_are_errors(pairs: Recorded, message: str) -> None:
    with pytest.raises(DataError, match=message):
        replay(pairs, CalibrateConfig())


def test_a_gap_that_no_half_shows_is_an_error() -> None:
    pairs = recorded(200, (1.0, 1.0), large=1.0)
    groups = near_duplicate_groups(pairs.queries.texts)
    parts = np.array([split_groups(groups, (0.5, 0.5), split) for split in range(3)])
    is_never_measured = (parts == 0).all(axis=0)
    small = np.where(np.cumsum(is_never_measured) * is_never_measured == 1, 0.0, 1.0)
    assert small.sum() == 199
    with pytest.raises(DataError, match="in none of 3 random halves is it better"):
        replay(dataclasses.replace(pairs, small_P=small), CalibrateConfig())
