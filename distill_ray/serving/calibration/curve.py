"""The curve of a calibration: what share goes to the student at each threshold, how often it is worse, what that costs.

Drawn from the select and report splits together: a picture to choose a budget by, not the guarantee.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from distill_ray.config.serve import PricesConfig
from distill_ray.serving.calibration.guarantee import Count, interval

NUM_POINTS = 101
Point = dict[str, float | None]


def curve_points(
    count: Callable[[float], Count],
    scores: Sequence[float],
    confidence: float,
    prices: PricesConfig,
    tokens: Mapping[str, float],
) -> list[Point]:
    """Points from all requests to the surest ones, at thresholds that each leave out about one percent more.

    Args:
        count: what goes to the student at a threshold.
        scores: of the requests that are not the teacher's for another reason.
        confidence: of the error's interval.
        prices: `serve.prices`, per million tokens.
        tokens: mean tokens of a request (see `study`).

    Returns:
        threshold, share, error with error_low and error_high; cost of a request, over that of the teacher alone; money
        per thousand requests, where prices are given.
    """
    levels = np.linspace(0.0, 1.0, NUM_POINTS)
    thresholds = sorted({0.0, *np.quantile(scores, levels, method="lower").tolist()}) if len(scores) else [0.0]
    points: list[Point] = []
    for threshold in thresholds:
        here = count(threshold)
        low, high = interval(here.num_bad, here.num_routed, confidence)
        points.append(
            {
                "threshold": threshold,
                "share": here.share,
                "error": here.error,
                "error_low": low if here.num_routed else None,
                "error_high": high if here.num_routed else None,
                **_cost(here.share, prices, tokens),
            }
        )
    return points


def _cost(share: float, prices: PricesConfig, tokens: Mapping[str, float]) -> Point:
    """Without prices or counts, what the teacher is not asked is saved, and the student is free."""
    if not tokens or not (prices.teacher_prompt or prices.teacher_completion):
        return {"cost": 1.0 - share, "money": None}
    answer = tokens["teacher_completion"]  # the student's is no longer
    teacher = tokens["teacher_prompt"] * prices.teacher_prompt + answer * prices.teacher_completion
    student = tokens["student_prompt"] * prices.student_prompt + answer * prices.student_completion
    mean = share * student + (1.0 - share) * teacher
    return {"cost": mean / teacher, "money": mean / 1e6 * 1000}


def curve_svg(points: Sequence[Point], threshold: float, budget: float) -> bytes:
    """The curve as a picture: error over share, with its interval; the budget and the chosen threshold in it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    drawn = sorted((p for p in points if p["error"] is not None), key=lambda p: p["share"] or 0.0)
    shares = [100 * (p["share"] or 0.0) for p in drawn]

    def percent(name: str) -> list[float]:
        return [100 * (p[name] or 0.0) for p in drawn]

    # The same figures give the same bytes: no date, no random ids.
    with plt.rc_context({"svg.hashsalt": "distill-ray", "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
        axes.fill_between(shares, percent("error_low"), percent("error_high"), color="#4c78a8", alpha=0.2, linewidth=0)
        axes.plot(shares, percent("error"), color="#4c78a8", marker=".", label="worse than the teacher")
        axes.axhline(100 * budget, color="#e45756", linestyle="--", linewidth=1, label="error budget")
        chosen = [p for p in drawn if (p["threshold"] or 0.0) >= threshold]
        if chosen:
            last = max(chosen, key=lambda p: p["share"] or 0.0)
            axes.plot(100 * (last["share"] or 0.0), 100 * (last["error"] or 0.0), "o", color="#54a24b", label="chosen")
        axes.set(xlabel="requests that the student answers (%)", ylabel="of those worse (%)", xlim=(0, 100))
        axes.set_ylim(0, max([300 * budget, *(1.5 * error for error in percent("error"))]))
        axes.grid(alpha=0.3)
        axes.legend(loc="upper left", frameon=False)
        picture = io.BytesIO()
        figure.savefig(picture, format="svg", metadata={"Date": None})
        plt.close(figure)
    return picture.getvalue()
