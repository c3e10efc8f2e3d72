"""The learning rate as a pure function of the step: a resumed run needs no scheduler state."""

from __future__ import annotations

import math
from typing import Literal

Schedule = Literal["cosine", "linear", "constant"]


def learning_rate(step: int, *, total_steps: int, peak: float, warmup_ratio: float, schedule: Schedule) -> float:
    """Rate of optimizer step `step` (counted from 0): up to `peak` in a line, then down to 0 (or constant).

    The first step of a warm-up is not 0 (a step without effect) but one share of the climb.
    """
    warmup_steps = min(math.ceil(total_steps * warmup_ratio), total_steps)
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    match schedule:
        case "constant":
            return peak
        case "linear":
            return peak * (1.0 - progress)
        case "cosine":
            return peak * 0.5 * (1.0 + math.cos(math.pi * progress))
