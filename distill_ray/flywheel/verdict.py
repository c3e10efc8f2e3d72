"""Is a candidate no worse than the student in service? Numbers in, a verdict out.

Each near-duplicate group of held-out requests counts once: the mean of (candidate - current) over its members, 1 where
an answer is as good as the teacher's and 0 where not. The bound is that of `calibration.anytime`; the order of the
groups is drawn from a seed. It is asked of

    all      the held-out pairs of this cycle and of those before it: has to be above -margin
    new      those of this cycle         } may not be shown to be worse than -margin: a gain
    earlier  those of the cycles before  } in one is no excuse for a loss in the other
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from distill_ray.config.flywheel import GateConfig
from distill_ray.serving.calibration.anytime import difference_bound
from distill_ray.serving.calibration.guarantee import interval

SETS = ("all", "new", "earlier")


@dataclass(frozen=True)
class Compared:
    """What was found on one set of held-out pairs."""

    pairs: int
    groups: int
    candidate: float | None
    """Share of its answers that are as good as the teacher's; None of no pairs."""

    candidate_low: float | None
    candidate_high: float | None
    current: float | None
    """The same of the student in service; None: there is none."""

    difference: float | None
    """Mean over groups of candidate - current."""

    low: float | None
    high: float | None
    lost: int | None
    """Pairs that the student in service answers as well as the teacher, and the candidate does not."""

    gained: int | None
    """The other way round."""


@dataclass(frozen=True)
class Verdict:
    """What it comes to."""

    outcome: Literal["go_on", "refused", "unclear"]
    why: list[str]


def compare(
    candidate_P: np.ndarray, current_P: np.ndarray | None, groups_P: np.ndarray, confidence: float, seed: int
) -> Compared:
    """Compare on a set of pairs.

    Args:
        candidate_P: whether its answer is as good as the teacher's, bool.
        current_P: the same of the student in service.
        groups_P: near-duplicate group of each.
        confidence: of each bound, and of the two-sided interval of the candidate's share.
        seed: of the order.
    """
    names, members_P = np.unique(groups_P, return_inverse=True)
    num_pairs, num_good = len(candidate_P), int(candidate_P.sum())
    low, high = interval(num_good, num_pairs, confidence) if num_pairs else (None, None)
    share = num_good / num_pairs if num_pairs else None
    if current_P is None or not num_pairs:
        return Compared(num_pairs, len(names), share, low, high, None, None, None, None, None, None)
    order = np.random.default_rng(seed).permutation(len(names))
    sizes = np.bincount(members_P)
    candidate_G = (np.bincount(members_P, candidate_P) / sizes)[order]
    current_G = (np.bincount(members_P, current_P) / sizes)[order]
    alpha, horizon = 1.0 - confidence, len(names)
    return Compared(
        num_pairs,
        len(names),
        share,
        low,
        high,
        float(current_P.mean()),
        float((candidate_G - current_G).mean()),
        difference_bound(candidate_G, current_G, alpha, horizon),
        -difference_bound(current_G, candidate_G, alpha, horizon),
        int((current_P & ~candidate_P).sum()),
        int((candidate_P & ~current_P).sum()),
    )


def judge(config: GateConfig, sets: Mapping[str, Compared], failed: Sequence[str]) -> Verdict:
    """The verdict.

    Args:
        config: `flywheel.gate`.
        sets: by the names of SETS.
        failed: regression prompts that the candidate gets wrong.
    """
    whole, margin = sets["all"], config.margin
    worse = [
        f"{name}: worse than the student in service by {-each.difference:.1%} (at least {-each.high:.1%} with "
        f"{config.confidence:.0%} confidence), {margin:.1%} are allowed"
        for name, each in sets.items()
        if each.difference is not None and each.high is not None and each.difference < -margin and each.high < 0
    ]
    wrong = [f"regression: {text}" for text in failed]
    if worse or wrong:
        return Verdict("refused", [*worse, *wrong])
    if whole.groups < config.min_pairs:
        return Verdict(
            "unclear",
            [
                f"{whole.groups} held-out requests (near-duplicates count once), and a verdict takes "
                f"{config.min_pairs} (flywheel.gate.min_pairs); more pairs are needed, or a larger flywheel.holdout"
            ],
        )
    if whole.low is not None and whole.low <= -margin:
        return Verdict(
            "unclear",
            [
                f"not shown to be at most {margin:.1%} worse than the student in service: {whole.groups} held-out "
                f"requests put the difference ({whole.difference:+.1%}) above {whole.low:+.1%}; more pairs are needed"
            ],
        )
    if whole.low is None:
        return Verdict("go_on", ["no student is in service yet; its threshold decides what it may answer"])
    return Verdict(
        "go_on",
        [
            f"the difference to the student in service ({whole.difference:+.1%}) is above {whole.low:+.1%}; "
            f"the margin is {-margin:.1%}"
        ],
    )
