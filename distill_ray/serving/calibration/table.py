"""What a calibration came to, for the terminal, from the bundle's own files; and what a replay did."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from distill_ray.serving.calibration.curve import TITLES


def calibration_table(folder: Path) -> Table:
    """A table of a bundle's `calibration.json`, 80 columns wide."""
    figures: dict[str, Any] = json.loads((folder / "calibration.json").read_text(encoding="utf-8"))
    table = Table(title=f"bundle {figures['version']}", title_justify="left", show_header=False)
    for name, value in _rows(figures):
        table.add_row(name, escape(value))
    return table


def _rows(figures: dict[str, Any]) -> list[tuple[str, str]]:
    select, report, crossing = figures["select"], figures["report"], figures["polarity"]["crossing"]
    rows = [
        ("measured", f"{figures['pairs']} pairs of the {figures['split']} split, {figures['pairs_good']} as good"),
        ("score", f"{figures['kind']}, over {figures['trained']} trained requests"),
    ]
    if figures["why"] is not None:
        return [*rows, ("all to the teacher", figures["why"]), _crossing(figures, crossing)]
    bound = f"at most {select['error_upper']:.1%} worse with {figures['confidence']:.0%} confidence"
    interval = f"[{figures['error_low']:.1%}, {figures['error_high']:.1%}]" if report["routed"] else ""
    error = "-" if report["error"] is None else f"{report['error']:.1%} {interval}"
    return [
        *rows,
        ("threshold", f"{figures['threshold']:.3f}, guard {figures['guard']}"),
        ("selected on", f"{select['pairs']} pairs: {select['bad']} of {select['routed']} worse, {bound}"),
        ("reported on", f"{report['pairs']} pairs"),
        ("  to the student", f"{figures['share']:.1%} ({figures['share_strict']:.1%} with guard: strict)"),
        ("  of those worse", error),
        _crossing(figures, crossing),
    ]


def _crossing(figures: dict[str, Any], crossing: dict[str, Any]) -> tuple[str, str]:
    return (
        "similar words,\nanother meaning",
        f"{crossing['off']['all']} of {figures['polarity']['pairs']} pairs cross, "
        f"{crossing['strict']['all']} with guard: strict",
    )


# -- a replay ----------------------------------------------------------------------------------------------------------


def replay_table(figures: Mapping[str, Any]) -> Table:
    """Routers side by side, 80 columns wide: mean ± standard deviation over the splits, below it least and most."""
    table = Table(title=_title(figures), title_justify="left")
    table.add_column("goes to the large model by")
    for name in ("APGR", "CPT(50)", "CPT(80)"):
        table.add_column(name, justify="right")
    for name, router in figures["routers"].items():
        table.add_row(
            TITLES[name],
            _spread(router["apgr"], 1, ".3f"),
            _spread(router["cpt_50"], 100, ".1f", " %"),
            _spread(router["cpt_80"], 100, ".1f", " %"),
        )
    return table


def replay_notes(figures: Mapping[str, Any]) -> list[str]:
    """What has to be known beside the table, a line each."""
    notes = []
    if figures["too_long"]:
        notes.append(f"{figures['too_long']} rows left out: the embedder does not read so far")
    if not figures["is_sure"]:
        notes.append(
            f"warning: the gap is {figures['gap']:.4f} with a standard error of {figures['gap_error']:.4f}, and PGR "
            "divides by it: these figures are mostly noise; record more pairs"
        )
    if figures["splits_left_out"]:
        notes.append(
            f"warning: {figures['splits_left_out']} of {figures['splits']} random halves left out: the large model is "
            "not better there"
        )
    return notes


def _title(figures: Mapping[str, Any]) -> str:
    return (
        f"{figures['rows']} pairs: small {figures['small']:.3f}, large {figures['large']:.3f}; large better in "
        f"{figures['large_better']}, worse in {figures['small_better']}"
    )


def _spread(of: Mapping[str, Any], times: float, form: str, unit: str = "") -> str:
    deviation = "" if of["sd"] is None else f" ± {times * of['sd']:{form}}"
    return f"{times * of['mean']:{form}}{deviation}{unit}\n[{times * of['min']:{form}}, {times * of['max']:{form}}]"
