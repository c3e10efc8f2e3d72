"""Bounds on a mean of numbers in [0, 1] that hold at any time: look as often as you like, stop when you like.

A bettor who plays against "the mean is m" grows rich only if it is more; who has 1/alpha times the stake refutes m
(Ville's inequality). The lower bound is the largest mean that is refuted. "Estimating means of bounded random variables
by betting", Waudby-Smith and Ramdas, JRSS-B 2024 (arXiv 2010.09686), section 4: bets that know only what came before.

The gate asks it once about a candidate, drift detection after every request; both get an honest answer.

What changed lately is another question. A bettor who has lost for a thousand values that the mean is high has nothing
left when it becomes so. So there is a new one at every STRETCH-th value, and all of them share one alpha: a change from
2 % to 20 % after 500 values is found after 80 more instead of 1,000.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

STEPS = 40  # of the bisection: finer than float32
STRETCH = 100  # values between two bettors
MOST_BET = 0.9  # of the wealth: nearly all, so that a run without an error shows what it can


def lower_bound(values_N: np.ndarray, alpha: float, horizon: int | None = None) -> float:
    """Lower bound of the mean, which fails with probability alpha at most, however often it is asked as values come in.

    Args:
        values_N: [N] in [0, 1], in the order in which they came; independent, or at least with one mean.
        alpha: in (0, 1).
        horizon: number of values at which it is to be tightest; it holds at any other too. None: at none more than
            at others.

    Raises:
        ValueError: a value is not in [0, 1].
    """
    values_N = np.asarray(values_N, dtype=np.float64)
    if len(values_N) and not ((values_N >= 0) & (values_N <= 1)).all():  # a NaN is neither
        raise ValueError("values must lie in [0, 1]")
    bets_N = _bets(values_N, alpha, horizon)
    low, high = 0.0, 1.0
    for _ in range(STEPS):
        middle = (low + high) / 2
        if _is_refuted(values_N, bets_N, middle, alpha):
            low = middle
        else:
            high = middle
    return low


def upper_bound(values_N: np.ndarray, alpha: float, horizon: int | None = None) -> float:
    """As `lower_bound`, from above."""
    return 1.0 - lower_bound(1.0 - np.asarray(values_N, dtype=np.float64), alpha, horizon)


def difference_bound(better_N: np.ndarray, worse_N: np.ndarray, alpha: float, horizon: int | None = None) -> float:
    """Lower bound of the mean of `better - worse`, two scores in [0, 1] of the same things. In [-1, 1]."""
    return 2.0 * lower_bound((np.asarray(better_N) - np.asarray(worse_N) + 1.0) / 2.0, alpha, horizon) - 1.0


def exceeded_since(values_N: np.ndarray, mean: float, alpha: float, num_before: int = 0) -> int | None:
    """Whether the mean has been above `mean` for a while, now or earlier; it may change as values come in.

    Where every value's mean, whatever came before it, is `mean` at most, the answer is ever other than None with
    probability alpha at most, however often it is asked.

    Args:
        values_N: [N] in [0, 1], in the order in which they came.
        mean: what it may be.
        alpha: in (0, 1).
        num_before: values before these that are not known any more; a multiple of STRETCH.

    Returns:
        Where the stretch begins that shows it best; None: nothing does.
    """
    won = [
        (_log_wealth(stretch.values_N, stretch.bets_N, mean) / stretch.needed, stretch.start)
        for stretch in _stretches(values_N, alpha, num_before)
    ]
    most, start = max(won, default=(0.0, 0))
    return start if most >= 1.0 else None


def highest_bound(values_N: np.ndarray, alpha: float, num_before: int = 0) -> float:
    """The largest mean that `exceeded_since` finds exceeded: a lower bound of the highest that the mean has been."""
    stretches = _stretches(values_N, alpha, num_before)
    low, high = 0.0, 1.0
    for _ in range(STEPS):
        middle = (low + high) / 2
        is_refuted = any(_log_wealth(each.values_N, each.bets_N, middle) >= each.needed for each in stretches)
        low, high = (middle, high) if is_refuted else (low, middle)
    return low


@dataclass(frozen=True, slots=True)
class _Stretch:
    """What one bettor sees and does."""

    start: int
    values_N: np.ndarray
    bets_N: np.ndarray
    needed: float
    """Log of the wealth that refutes."""


def _stretches(values_N: np.ndarray, alpha: float, num_before: int) -> list[_Stretch]:
    values_N = np.asarray(values_N, dtype=np.float64)
    found: list[_Stretch] = []
    for start in range(0, len(values_N), STRETCH):
        number = (num_before + start) // STRETCH
        share = alpha / ((number + 1) * (number + 2))  # adds up to alpha over all there will ever be
        seen = values_N[start:]
        found.append(_Stretch(start, seen, _bets(seen, share, None), math.log(1.0 / share)))
    return found


def _bets(values_N: np.ndarray, alpha: float, horizon: int | None) -> np.ndarray:
    """What is bet on each value, from those before it alone."""
    count_N = np.arange(1, len(values_N) + 1, dtype=np.float64)
    means_N = (0.5 + np.cumsum(values_N)) / (count_N + 1.0)
    variances_N = (0.25 + np.cumsum((values_N - means_N) ** 2)) / (count_N + 1.0)
    before_N = np.concatenate([[0.25], variances_N])[: len(values_N)]
    spread_N = count_N * np.log(count_N + 1.0) if horizon is None else float(horizon)
    return np.sqrt(2.0 * math.log(1.0 / alpha) / (before_N * spread_N))


def _is_refuted(values_N: np.ndarray, bets_N: np.ndarray, mean: float, alpha: float) -> bool:
    return _log_wealth(values_N, bets_N, mean) >= math.log(1.0 / alpha)


def _log_wealth(values_N: np.ndarray, bets_N: np.ndarray, mean: float) -> float:
    """The most that the bettor against this mean ever had."""
    if not len(values_N) or mean <= 0.0:
        return 0.0
    return float(np.cumsum(np.log1p(np.minimum(bets_N, MOST_BET / mean) * (values_N - mean))).max())
