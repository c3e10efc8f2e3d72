"""The pictures of a report, as SVG for inside a page: its colours are the page's, in daylight and in the dark."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from distill_ray.pipeline.recipe_figures import ENTROPY_BIN_NATS, QUANTILES
from distill_ray.pipeline.reporting.facts import Facts
from distill_ray.pipeline.reporting.result import ROLES, metric_titles, role_titles

# Drawn with these, printed with the page's own.
_TEXT, _MUTED, _AFTER, _BEFORE = "#010203", "#020304", "#030405", "#040506"
_ON_THE_PAGE = {_TEXT: "var(--text)", _MUTED: "var(--muted)", _AFTER: "var(--student)", _BEFORE: "var(--teacher)"}
_OF_ROLE = {"teacher": _TEXT, "student_before": _MUTED, "student_after": _AFTER}
_WIDTH = 4.8  # inches: as wide as a phone, where its letters are as large as the text
_UNIT_METRICS = ("exact_match", "agreement", "token_f1", "equation", "win_rate")  # from 0 to 1
_BINS = 24
_DECADES = 30.0  # from which factor on losses are drawn by their logarithm
_LABEL = 24  # letters
_LANE = 0.22  # between those who answered, of the space between two metrics


def charts(facts: Facts) -> dict[str, list[str]]:
    """Pictures by the title of the section that they belong to."""
    figures = facts.manifest.get("recipe_figures", {})
    found = {
        "Result": [
            intervals(facts.metrics),
            wins(facts.metrics),
            prompt_lengths(facts.predictions),
            completion_lengths(facts.predictions),
        ],
        "Rows": [rejects(facts.manifest)],
        "What the teacher gave": [rewards(figures.get("revisions")), soft_targets(figures.get("soft_targets"))],
        "Training": [learning_curve(facts.training_points, facts.train.get("kept_step"))],
        "Cost": [calls(facts.manifest)],
    }
    return {title: [chart for chart in drawn if chart] for title, drawn in found.items()}


def intervals(metrics: Mapping[str, Any]) -> str:
    """Each metric of each who answered, with its interval."""
    asked = {role: figures for role in ROLES if (figures := metrics.get(role))}
    names = [name for name in _UNIT_METRICS if any(name in figures for figures in asked.values())]
    if not names:
        return ""
    titles = dict(zip(ROLES, role_titles(metrics), strict=True))
    with _drawn("Metrics with their 95 % intervals", 1.0 + 0.5 * len(names)) as (axes, picture):
        for lane, (role, figures) in enumerate(asked.items()):
            there = [(place, name) for place, name in enumerate(names) if name in figures]
            places = [place + _LANE * (lane - (len(asked) - 1) / 2) for place, _ in there]
            values = [figures[name] for _, name in there]
            lows, highs = ([figures[f"{name}_{end}"] for _, name in there] for end in ("low", "high"))
            axes.hlines(places, lows, highs, color=_OF_ROLE[role], linewidth=2.5)
            axes.plot(values, places, "o", color=_OF_ROLE[role], markersize=5, label=titles[role])
        axes.set_yticks(range(len(names)), [metric_titles(metrics)[name] for name in names])
        axes.set(xlim=(-0.02, 1.02), ylim=(len(names) - 0.5, -0.5))
        axes.tick_params(axis="y", length=0)
        axes.figure.legend(loc="outside upper center", ncols=3, frameon=False, labelcolor=_TEXT, handletextpad=0.1)
    return picture[0]


def of_runs(runs: Mapping[str, Facts]) -> str:
    """Exact match of each run's student, with its interval, and of its teacher."""
    with _drawn("Exact match of each run's student, with its 95 % interval", 1.0 + 0.35 * len(runs)) as (axes, picture):
        for place, facts in enumerate(runs.values()):
            figures, teacher = facts.metrics["student_after"], facts.metrics.get("teacher")
            axes.hlines([place], figures["exact_match_low"], figures["exact_match_high"], color=_AFTER, linewidth=2.5)
            axes.plot([figures["exact_match"]], [place], "o", color=_AFTER, markersize=5)
            if teacher:
                axes.plot([teacher["exact_match"]], [place], "|", color=_TEXT, markersize=12)
        axes.set_yticks(range(len(runs)), [_label(name) for name in runs])
        axes.set(xlim=(-0.02, 1.02), ylim=(len(runs) - 0.5, -0.5), xlabel="exact match; |: the teacher's")
        axes.tick_params(axis="y", length=0)
    return picture[0]


def _label(name: str) -> str:
    """A name as long as there is room for beside a picture: its beginning and its end."""
    return name if len(name) <= _LABEL else f"{name[: _LABEL // 2]}…{name[1 - _LABEL // 2 :]}"


def prompt_lengths(predictions: Sequence[Mapping[str, Any]]) -> str:
    """Tokens of the held-out rows' prompts, before and after."""
    columns = {"prompt_tokens_before": ("before", _BEFORE), "prompt_tokens_after": ("after", _AFTER)}
    lengths = {name: [row[name] for row in predictions if row[name] is not None] for name in columns}
    if not any(lengths.values()):
        return ""
    longest = max(max(values, default=0) for values in lengths.values())
    with _drawn("Tokens of a request's prompt, before and after", 1.9) as (axes, picture):
        for name, (title, colour) in columns.items():
            axes.hist(lengths[name], bins=_BINS, range=(0, longest + 1), color=colour, alpha=0.75, label=title)
        axes.set(xlabel="tokens of a prompt", ylabel="held-out rows", xlim=(0, longest + 1))
        _legend(axes)
    return picture[0]


def completion_lengths(predictions: Sequence[Mapping[str, Any]]) -> str:
    """Tokens of the held-out rows' answers."""
    lengths = [row["completion_tokens"] for row in predictions if row.get("completion_tokens") is not None]
    if not lengths:
        return ""
    with _drawn("Tokens of an answer to learn", 1.9) as (axes, picture):
        axes.hist(lengths, bins=min(_BINS, max(lengths) + 1), range=(0, max(lengths) + 1), color=_AFTER, alpha=0.75)
        axes.set(xlabel="tokens of an answer to learn", ylabel="held-out rows", xlim=(0, max(lengths) + 1))
        axes.xaxis.get_major_locator().set_params(integer=True)
    return picture[0]


def wins(metrics: Mapping[str, Any]) -> str:
    """What a judge said of the student's answers beside the teacher's."""
    found = metrics.get("wins")
    if not found:
        return ""
    neither = found["tied"] + found["turned"]
    parts = {"won": (found["won"], _AFTER), "neither": (neither, _MUTED), "lost": (found["lost"], _BEFORE)}
    return _shares("Student against teacher, by a judge", parts) if any(count for count, _ in parts.values()) else ""


def calls(manifest: Mapping[str, Any]) -> str:
    """What the last command paid for, and what it got without a call."""
    made, replayed = manifest.get("teacher_calls", 0), manifest.get("teacher_calls_replayed", 0)
    if not made + replayed:
        return ""
    return _shares("Answers of the last command", {"calls made": (made, _BEFORE), "replayed": (replayed, _AFTER)})


def _shares(title: str, parts: Mapping[str, tuple[int, str]]) -> str:
    """One bar of several parts, each with its count: count and colour by name."""
    with _drawn(title, 1.15) as (axes, picture):
        begun = 0
        for name, (count, colour) in parts.items():
            axes.barh([0], [count], left=begun, color=colour, alpha=0.75, height=0.5, label=f"{name} {count:,}")
            begun += count
        axes.set(xlim=(0, max(1, begun)), yticks=[], xlabel=title)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.spines["left"].set_visible(False)
        axes.figure.legend(loc="outside upper center", ncols=len(parts), frameon=False, labelcolor=_TEXT)
    return picture[0]


def rejects(manifest: Mapping[str, Any]) -> str:
    """Rows by the reason of their reject."""
    counts = sorted((manifest.get("rejects") or {}).items(), key=lambda pair: (pair[1], pair[0]))
    if not counts:
        return ""
    with _drawn("Rejected rows by reason", 0.6 + 0.26 * len(counts)) as (axes, picture):
        bars = axes.barh([name for name, _ in counts], [count for _, count in counts], color=_MUTED, height=0.6)
        axes.bar_label(bars, padding=3, color=_TEXT)
        axes.set(xlabel="rows")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.margins(x=0.12)
        axes.tick_params(axis="y", length=0)
    return picture[0]


def rewards(revisions: Mapping[str, Any] | None) -> str:
    """What share of drafts and of revisions is at or below a reward."""
    if not revisions or not revisions.get("scored"):
        return ""
    with _drawn("Rewards before and after the revision", 2.1) as (axes, picture):
        for when, colour in (("before", _BEFORE), ("after", _AFTER)):
            quantiles = revisions[f"reward_{when}"]
            axes.plot([quantiles[name] for name in QUANTILES], list(QUANTILES.values()), color=colour, label=when)
        axes.set(xlabel="reward", ylabel="share at or below", ylim=(0, 1.03))
        _legend(axes)
    return picture[0]


def soft_targets(figures: Mapping[str, Any] | None) -> str:
    """What share of the teacher's tokens is at or below an entropy: how much there is to learn beside the text."""
    counts = (figures or {}).get("entropy_counts")
    if not counts:
        return ""
    sums = list(itertools.accumulate(counts))
    edges = [ENTROPY_BIN_NATS * number for number in range(1, len(counts) + 1)]
    with _drawn("Entropy of the teacher's next token", 2.1) as (axes, picture):
        axes.plot([0.0, *edges], [0.0, *(value / sums[-1] for value in sums)], color=_BEFORE)
        axes.set(xlabel="entropy of the next token (nats)", ylabel="share at or below", ylim=(0, 1.03))
        axes.set_xlim(left=0)
    return picture[0]


def learning_curve(points: Mapping[int, Mapping[str, Any]], kept_step: int | None) -> str:
    """Loss of training and of validation by step."""
    curves = {name: _finite(points, name) for name in ("loss", "validation_loss")}
    if len(curves["loss"]) < 2:
        return ""
    with _drawn("Learning curve", 2.4) as (axes, picture):
        axes.plot(*zip(*curves["loss"], strict=True), color=_MUTED, linewidth=1, label="training")
        if curves["validation_loss"]:
            validation = tuple(zip(*curves["validation_loss"], strict=True))
            axes.plot(*validation, "o-", color=_AFTER, markersize=4, label="validation")
        if kept_step is not None:
            axes.axvline(kept_step, color=_BEFORE, linestyle="--", linewidth=1, label="kept")
        axes.set(xlabel="step", ylabel="loss (nats per token)")
        losses = [loss for curve in curves.values() for _, loss in curve]
        if 0 < _DECADES * min(losses) < max(losses):
            axes.set_yscale("log")
        else:
            axes.set_ylim(bottom=0)
        _legend(axes)
    return picture[0]


def _finite(points: Mapping[int, Mapping[str, Any]], name: str) -> Sequence[tuple[int, float]]:
    values = [(step, record.get(name)) for step, record in points.items()]
    return [(step, value) for step, value in values if isinstance(value, float) and math.isfinite(value)]


def _legend(axes: Any) -> None:
    axes.legend(loc="best", frameon=False, labelcolor=_TEXT)


@contextmanager
def _drawn(title: str, height: float) -> Iterator[tuple[Any, list[str]]]:
    """Axes to draw on, and a list that has the picture afterwards. `title` is for those who do not see it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    picture: list[str] = []
    style: Any = {
        "svg.hashsalt": "distill-ray",  # the same figures give the same bytes
        "svg.fonttype": "none",
        "font.family": "sans-serif",
        "font.size": 9.5,
        "text.parse_math": False,  # a `$` in a name is one
        "text.color": _TEXT,
        "axes.labelcolor": _MUTED,
        "axes.edgecolor": _MUTED,
        "xtick.color": _MUTED,
        "ytick.color": _MUTED,
        "ytick.labelcolor": _TEXT,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with plt.rc_context(style):
        figure, axes = plt.subplots(figsize=(_WIDTH, height), layout="constrained")
        yield axes, picture
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Title": title})
        plt.close(figure)
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :].replace("<svg", f'<svg role="img" aria-label="{title}"', 1)
    for drawn, printed in _ON_THE_PAGE.items():
        svg = svg.replace(drawn, printed)
    picture.append(svg)
