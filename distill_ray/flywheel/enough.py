"""Whether a candidate could be promoted at all on what is held out. Asked before anything is trained, or paid for.

The gate counts near-duplicate groups (`gate.min_pairs`). The threshold is selected on a part of them (`study.SHARES`),
and takes so many there that not one bad answer among them would show that `calibrate.error_budget` is kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from distill_ray.config import RunConfig
from distill_ray.serving.calibration.guarantee import num_needed_without_error
from distill_ray.serving.calibration.study import SELECT, SHARES, parts_of


def least_for_threshold(config: RunConfig) -> int:
    """Held-out requests, near-duplicates counted once, that a threshold takes where no answer is bad."""
    calibrate = config.calibrate
    return math.ceil(num_needed_without_error(calibrate.error_budget, calibrate.confidence) / SHARES[SELECT])


def what_is_missing(config: RunConfig, held_out: Sequence[dict[str, Any]], num_pairs: int) -> str | None:
    """Why no candidate could be promoted, and what to do; None: one could.

    Args:
        config: the whole YAML.
        held_out: what the gate will look at, in its order.
        num_pairs: that the cycle began with; they say how many are held out of those to come.
    """
    gate, calibrate = config.flywheel.gate, config.calibrate
    groups = {record["group"] for record in held_out}
    groups_P, parts_P = parts_of([record["text"] for record in held_out], calibrate.seed)
    num_select = len(np.unique(groups_P[parts_P == SELECT]))
    needed = num_needed_without_error(calibrate.error_budget, calibrate.confidence)
    missing = max(gate.min_pairs - len(groups), math.ceil((needed - num_select) / SHARES[SELECT]))
    if missing <= 0:
        return None
    num_new = len({record["group"] for record in held_out if record["split"] == "held_out"})
    rate = num_new / num_pairs if num_new else config.flywheel.holdout
    return (
        f"{len(groups)} held-out requests (near-duplicates count once): a verdict takes {gate.min_pairs} "
        f"(flywheel.gate.min_pairs), and a threshold about {least_for_threshold(config)} (calibrate.error_budget "
        f"{calibrate.error_budget:g} at calibrate.confidence {calibrate.confidence:g}). Nothing is trained yet; wait "
        f"for about {math.ceil(missing / rate)} more pairs, or raise flywheel.holdout ({config.flywheel.holdout:g})"
    )
