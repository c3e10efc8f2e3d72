"""The result of a run as a table: who answered how well, each figure with its interval.

eval/metrics.json -> rows of cells, for the report, the terminal and the comparison of runs
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

ROLES: tuple[str, ...] = ("teacher", "student_before", "student_after")
METRICS = {
    "exact_match": "exact match",
    "agreement": "agreement with the teacher",
    "token_f1": "word F1",
    "equation": "equation comes to the same",
    "win_rate": "wins over the teacher, by a judge",
    "loss": "loss (nats per token)",
}
NOT_THERE = "-"


def summary_table(metrics: Mapping[str, Any]) -> Table:
    """The result for the terminal, from the content of `eval/metrics.json`."""
    shown = Table(title=f"{metrics['num_rows']} held-out rows", title_justify="left")
    shown.add_column("")
    for role in role_titles(metrics):
        shown.add_column(role, justify="right")
    for row in result_rows(metrics):
        shown.add_row(*(text.replace(" [", "\n[").replace(" (", "\n(") for text in row))  # fits 80 columns
    return shown


def result_rows(metrics: Mapping[str, Any]) -> list[list[str]]:
    """Cells: one row per metric that anybody has, then the length of prompts."""
    rows = []
    for name, title in metric_titles(metrics).items():
        figures = [figure(metrics.get(role), name) for role in ROLES]
        if any(figure != NOT_THERE for figure in figures):
            rows.append([title, *figures])
    if rewards := metrics.get("reward"):
        rows.append(["reward", *(figure(rewards.get(role), "mean") for role in ROLES)])
        if "draft" in rewards:
            rows.append(["reward of its draft", figure(rewards["draft"], "mean"), NOT_THERE, NOT_THERE])
    before, after = metrics["prompt_tokens_before"], metrics["prompt_tokens_after"]
    shorter = f"{after:.1f} ({saving(before, after)} fewer)"
    return [*rows, ["prompt tokens per request", f"{before:.1f}", f"{after:.1f}", shorter]]


def metric_titles(metrics: Mapping[str, Any]) -> dict[str, str]:
    """What the rows are called: ours, then the metrics of other packages by their own names."""
    names = [name for role in ROLES for name in metrics.get(role) or {}]
    theirs = [name for name in names if f"{name}_low" in names and name not in METRICS]
    return {**METRICS, **{name: name for name in theirs}}


def figure(figures: Mapping[str, float] | None, name: str) -> str:
    """A metric with its interval."""
    if not figures or name not in figures:
        return NOT_THERE
    return f"{figures[name]:.3f} [{figures[f'{name}_low']:.3f}, {figures[f'{name}_high']:.3f}]"


def saving(before: float, after: float) -> str:
    """How much shorter a prompt is, in words."""
    return f"{100 * (1 - after / before):.0f} %" if before else "0 %"


def has_context(metrics: Mapping[str, Any]) -> bool:
    """Whether the teacher saw what the student does not."""
    return metrics.get("recipe", "context") == "context"


def role_titles(metrics: Mapping[str, Any]) -> list[str]:
    """What the ROLES are called."""
    return ["teacher, with context" if has_context(metrics) else "teacher", "student before", "student after"]
