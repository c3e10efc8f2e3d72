"""The curve of a calibration: what share goes to the student at each threshold, how often it is worse, what that costs.

Drawn from the select and report splits together: a picture to choose a budget by, not the guarantee. Beside it the
picture of a replay.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from distill_ray.config.serve import PricesConfig
from distill_ray.serving.calibration.guarantee import Count, interval

NUM_POINTS = 101
TITLES = {
    "random": "random",
    "similarity": "similarity only",
    "neighbours": "neighbour outcomes",
    "fitted": "fitted probability",
    "logprob": "log-probability of its answer",
    "cascade": "with its answer in view",
    "perfect": "perfect (knows both)",
}
"""Of the routers that `replay` compares; "its" is the small model's."""

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
    drawn = sorted((p for p in points if p["error"] is not None), key=lambda p: p["share"] or 0.0)
    shares = [100 * (p["share"] or 0.0) for p in drawn]

    def percent(name: str) -> list[float]:
        return [100 * (p[name] or 0.0) for p in drawn]

    with _drawn() as (axes, picture):
        axes.fill_between(shares, percent("error_low"), percent("error_high"), color="#4c78a8", alpha=0.2, linewidth=0)
        axes.plot(shares, percent("error"), color="#4c78a8", marker=".", label="worse than the teacher")
        axes.axhline(100 * budget, color="#e45756", linestyle="--", linewidth=1, label="error budget")
        chosen = [p for p in drawn if (p["threshold"] or 0.0) >= threshold]
        if chosen:
            last = max(chosen, key=lambda p: p["share"] or 0.0)
            axes.plot(100 * (last["share"] or 0.0), 100 * (last["error"] or 0.0), "o", color="#54a24b", label="chosen")
        axes.set(xlabel="requests that the student answers (%)", ylabel="of those worse (%)", xlim=(0, 100))
        axes.set_ylim(0, max([300 * budget, *(1.5 * error for error in percent("error"))]))
        axes.legend(loc="upper left", frameon=False)
    return picture.getvalue()


COLOURS = {
    "random": "#9d9d9d",
    "similarity": "#f58518",
    "neighbours": "#eeca3b",
    "fitted": "#4c78a8",
    "logprob": "#b279a2",
    "cascade": "#54a24b",
    "perfect": "#222222",
}


def recovered_svg(figures: Mapping[str, Any]) -> bytes:
    """What `replay` found as a picture: PGR over the share of large calls, a line per router, mean of the splits."""
    with _drawn() as (axes, picture):
        for name, router in figures["routers"].items():
            style = "--" if name in ("random", "perfect") else "-"
            axes.plot(
                [100 * share for share in figures["shares"]],
                [100 * pgr for pgr in router["pgr"]],
                color=COLOURS[name],
                linestyle=style,
                linewidth=1.5,
                label=f"{TITLES[name]}: APGR {router['apgr']['mean']:.2f}",
            )
        axes.set(xlabel="calls of the large model (%)", ylabel="gap recovered (PGR, %)", xlim=(0, 100))
        axes.set_ylim(bottom=min(0.0, *(100 * min(router["pgr"]) for router in figures["routers"].values())))
        axes.legend(loc="lower right", frameon=False, fontsize=8)
    return picture.getvalue()


@contextlib.contextmanager
def _drawn() -> Iterator[tuple[Any, io.BytesIO]]:
    """Axes to draw on, and the SVG file that has them afterwards."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    picture = io.BytesIO()
    # The same figures give the same bytes: no date, no random ids.
    with plt.rc_context({"svg.hashsalt": "distill-ray", "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
        axes.grid(alpha=0.3)
        yield axes, picture
        figure.savefig(picture, format="svg", metadata={"Date": None})
        plt.close(figure)
