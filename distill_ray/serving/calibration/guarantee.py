"""How sure a measured error rate is: exact binomial bounds, and the choice of a threshold that keeps an error budget.

Of n independent requests that a rule gives to the student, k have a worse answer. For a rule that was fixed before
they were looked at, k is binomial, and the bounds are exact (Clopper & Pearson 1934, Biometrika 26): no normal curve,
no asymptotics. Near-duplicates that count once may be bad in part: numbers in [0, 1] vary less than whole ones of the
same mean, so the bounds fail no more often with them (simulated in `tests/unit/test_guarantee.py`).

Of many thresholds one is chosen by fixed-sequence testing (Learn then Test, Angelopoulos et al. 2021, arXiv
2110.01052): they are tested in an order that was fixed beforehand, each at the full level, until the first one fails.
The chosen one keeps the budget with the confidence asked for, whatever the score is worth.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import special


@dataclass(frozen=True, slots=True)
class Count:
    """What a rule did on measured requests."""

    num: int
    """All of them."""

    num_routed: int
    """Of which the rule gives so many to the student."""

    num_bad: float
    """Of which the student's answer is worse than the teacher's. A fraction where near-duplicates count once."""

    @property
    def share(self) -> float:
        """Share of the requests that goes to the student; 0 of none."""
        return self.num_routed / self.num if self.num else 0.0

    @property
    def error(self) -> float | None:
        """Share of the student's answers that are worse; None where it gave none."""
        return self.num_bad / self.num_routed if self.num_routed else None


def upper_bound(num_bad: float, num: int, confidence: float) -> float:
    """Upper Clopper-Pearson bound of an error rate, one-sided: the rate is above it with probability 1 - confidence."""
    return 1.0 if num_bad >= num else float(special.betaincinv(num_bad + 1, num - num_bad, confidence))


def interval(num_bad: float, num: int, confidence: float) -> tuple[float, float]:
    """Two-sided Clopper-Pearson interval; (0, 1) of nothing."""
    tail = (1.0 - confidence) / 2
    low = 0.0 if num_bad == 0 else float(special.betaincinv(num_bad, num - num_bad + 1, tail))
    return low, upper_bound(num_bad, num, 1.0 - tail)


def num_passing(counts: Sequence[Count], budget: float, confidence: float) -> int:
    """Fixed-sequence testing: how many rules pass, from the first on, before one fails.

    Args:
        counts: of the rules, in the order fixed beforehand.
        budget: the error rate to stay within.
        confidence: with which.
    """
    for number, count in enumerate(counts):
        if upper_bound(count.num_bad, count.num_routed, confidence) > budget:
            return number
    return len(counts)


def expected_p_value(error: float, num: float, budget: float) -> float:
    """p-value of "the error rate is above the budget" if `error` of `num` requests are bad; both may be fractions.

    P(Binomial(n, budget) <= k) as an incomplete beta function, which is defined between whole numbers too.
    """
    bad = error * num
    return 1.0 if bad >= num else float(special.betainc(num - bad, bad + 1, 1.0 - budget))


def num_needed(error: float, budget: float, confidence: float) -> int | None:
    """How many requests of the student's, `error` of them bad, show that the rate is within the budget.

    None: no number does, because `error` is not below the budget.
    """
    if error >= budget:
        return None
    high = 1
    while expected_p_value(error, high, budget) > 1.0 - confidence:
        high *= 2
    low = high // 2  # the p-value falls as the number grows
    while high - low > 1:
        middle = (low + high) // 2
        passes = expected_p_value(error, middle, budget) <= 1.0 - confidence
        low, high = (low, middle) if passes else (middle, high)
    return high


def num_needed_without_error(budget: float, confidence: float) -> int:
    """The least number of requests that can show anything: ln(1 - confidence) / ln(1 - budget), rounded up."""
    return math.ceil(math.log(1.0 - confidence) / math.log(1.0 - budget))
