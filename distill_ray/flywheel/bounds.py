"""Bounds on a mean of numbers in [0, 1] that hold at any time: look as often as you like, stop when you like.

A bettor who plays against "the mean is m" grows rich only if it is more; who has 1/alpha times the stake refutes m
(Ville's inequality). The lower bound is the largest mean that is refuted. "Estimating means of bounded random variables
by betting", Waudby-Smith and Ramdas, JRSS-B 2024 (arXiv 2010.09686), section 4: bets that know only what came before.

The gate asks it once about a candidate, drift detection after every request; both get an honest answer.
"""

from __future__ import annotations

import math

import numpy as np

STEPS = 40  # of the bisection: finer than float32
MOST_BET = 0.5  # of the wealth; a smaller share survives surprises


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


def _bets(values_N: np.ndarray, alpha: float, horizon: int | None) -> np.ndarray:
    """What is bet on each value, from those before it alone."""
    count_N = np.arange(1, len(values_N) + 1, dtype=np.float64)
    means_N = (0.5 + np.cumsum(values_N)) / (count_N + 1.0)
    variances_N = (0.25 + np.cumsum((values_N - means_N) ** 2)) / (count_N + 1.0)
    before_N = np.concatenate([[0.25], variances_N])[: len(values_N)]
    spread_N = count_N * np.log(count_N + 1.0) if horizon is None else float(horizon)
    return np.sqrt(2.0 * math.log(1.0 / alpha) / (before_N * spread_N))


def _is_refuted(values_N: np.ndarray, bets_N: np.ndarray, mean: float, alpha: float) -> bool:
    if not len(values_N) or mean <= 0.0:
        return False
    wealth_N = np.cumsum(np.log1p(np.minimum(bets_N, MOST_BET / mean) * (values_N - mean)))
    return bool(wealth_N.max() >= math.log(1.0 / alpha))
