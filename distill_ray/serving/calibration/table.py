"""What a calibration came to, for the terminal: from the bundle's own files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table


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
