"""Several runs side by side: results, the rows that they were all measured on, what differs in their configs, costs.

Tables of plain text, for the terminal and, as sections, for a page.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table
from rich.text import Text

from distill_ray.errors import DistillError
from distill_ray.pipeline.metrics import interval
from distill_ray.pipeline.reporting.costs import costs, thousand
from distill_ray.pipeline.reporting.facts import Facts
from distill_ray.pipeline.reporting.markdown import text_table
from distill_ray.pipeline.reporting.result import NOT_THERE, figure, metric_titles
from distill_ray.pipeline.reporting.sections import Section

_PER_ROW = {"match": "exact match", "token_f1": "word F1", "reward_student_after": "reward", "win": "judge's share"}
_NOT_COMPARED = ("name", "plan", "serve", "calibrate", "flywheel")
_FIGURE = re.compile(r"^([-+]?[\d.]+) \[")  # with its interval


@dataclass(frozen=True, slots=True)
class ComparedTable:
    """One table: a title, what stands above its columns, cells, and a sentence below."""

    title: str
    header: list[str]
    rows: list[list[str]]
    note: str = ""

    def for_terminal(self) -> Table:
        """As rich prints it."""
        shown = Table(title=Text(self.title), title_justify="left")
        for number, title in enumerate(self.header):
            shown.add_column(Text(title), justify="right" if number else "left", overflow="fold")
        for row in self.rows:
            shown.add_row(*(Text(_FIGURE.sub(r"\1\n[", text)) for text in row))  # what is set may look like markup
        return shown

    def for_page(self) -> Section:
        """As a section of a report."""
        note = f"\n\n{self.note}" if self.note else ""
        return Section(self.title, text_table(self.header, self.rows) + note)


def compare(runs: Mapping[str, Facts]) -> list[ComparedTable]:
    """What there is to say about two runs and more; the first is what the others are held against.

    Args:
        runs: by the name to show.

    Raises:
        DistillError: one of them is not evaluated.
    """
    for name, facts in runs.items():
        if not facts.metrics:
            raise DistillError(f"{name}: not evaluated yet; run `distill-ray evaluate` on it first")
    found = [_results(runs), *_differences(runs), _settings(runs), _costs(runs)]
    return [table for table in found if table.rows]


def _results(runs: Mapping[str, Facts]) -> ComparedTable:
    titles = {name: title for facts in runs.values() for name, title in metric_titles(facts.metrics).items()}
    rows = [["held-out rows", *(str(facts.metrics["num_rows"]) for facts in runs.values())]]
    for role, who in (("teacher", "teacher: "), ("student_after", "")):
        for name in ("exact_match",) if role == "teacher" else titles:
            rows.append([who + titles[name], *(figure(facts.metrics.get(role), name) for facts in runs.values())])
    rows.append(["reward", *(_reward(facts.metrics) for facts in runs.values())])
    for when in ("before", "after"):
        lengths = (f"{facts.metrics[f'prompt_tokens_{when}']:.1f}" for facts in runs.values())
        rows.append([f"prompt tokens {when}", *lengths])
    note = "Of the student after training, if nothing else is said. In brackets: 95 % interval, bootstrapped over rows."
    return ComparedTable("Results", ["", *runs], [row for row in rows if set(row[1:]) != {NOT_THERE}], note)


def _reward(metrics: Mapping[str, Any]) -> str:
    return figure((metrics.get("reward") or {}).get("student_after"), "mean")


def _differences(runs: Mapping[str, Facts]) -> Iterator[ComparedTable]:
    """Row by row against the first run, on the held-out queries that both have: the same rows are right by chance."""
    (first_name, first), *others = runs.items()
    rows: list[list[str]] = []
    for name, facts in others:
        pairs = _shared(first, facts)
        has_references = any(row["reference"] is not None for _, row in pairs)
        for column, title in _PER_ROW.items():
            title = title if has_references or column != "match" else "agreement with its own teacher"
            both = [(a[column], b[column]) for a, b in pairs if a.get(column) is not None and b.get(column) is not None]
            if both:
                rows.append([name, title, *_difference(both, first.config.evaluate.seed)])
    header = ["run", "", "rows of both", "better", "worse", "difference"]
    note = (
        f"Against {first_name}, on held-out queries that both runs have. In brackets: 95 % interval of the mean "
        "difference, bootstrapped over pairs; where it has 0 in it the runs are not told apart."
    )
    yield ComparedTable(f"Against {first_name}, row by row", header, rows, note)


def _shared(first: Facts, other: Facts) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Predictions for the same query, expected to be the same. Equal queries stand in their order."""
    found: dict[tuple[str, str | None, int], dict[str, Any]] = _by_query(first.predictions)
    return [(found[key], row) for key, row in _by_query(other.predictions).items() if key in found]


def _by_query(predictions: Sequence[dict[str, Any]]) -> dict[tuple[str, str | None, int], dict[str, Any]]:
    counts: dict[tuple[str, str | None], int] = {}
    found = {}
    for row in predictions:
        key = (row["query"], row["reference"])
        counts[key] = counts.get(key, 0) + 1
        found[*key, counts[key]] = row
    return found


def _difference(pairs: Sequence[tuple[float, float]], seed: int) -> list[str]:
    differences = [after - before for before, after in pairs]
    low, high = interval(differences, num_resamples=2000, seed=seed)
    better, worse = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    mean = sum(differences) / len(differences)
    return [str(len(pairs)), str(better), str(worse), f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"]


def _settings(runs: Mapping[str, Facts]) -> ComparedTable:
    """The keys that decide what is learnt and that not all runs have alike."""
    configs = [dict(_flat(_compared(facts, with_defaults=True))) for facts in runs.values()]
    keys = list(dict.fromkeys(key for facts in runs.values() for key, _ in _flat(_compared(facts))))
    values = {key: [config.get(key, NOT_THERE) for config in configs] for key in keys}
    rows = [[key, *shown] for key, shown in values.items() if len(set(shown)) > 1]
    return ComparedTable("What was set differently", ["key", *runs], rows)


def _compared(facts: Facts, *, with_defaults: bool = False) -> dict[str, Any]:
    raw = facts.config.model_dump(mode="json", exclude_defaults=not with_defaults)
    return {key: value for key, value in raw.items() if key not in _NOT_COMPARED}


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from _flat(inner, f"{key}.{name}".lstrip("."))
    else:
        yield key, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _costs(runs: Mapping[str, Facts]) -> ComparedTable:
    found = [costs(facts) for facts in runs.values()]
    manifests = [facts.manifest for facts in runs.values()]
    rows = [
        [title, *(f"{manifest[name]:,}" if name in manifest else NOT_THERE for manifest in manifests)]
        for name, title in (
            ("prompt_tokens", "teacher's prompt tokens"),
            ("completion_tokens", "teacher's completion tokens"),
        )
    ]
    for stage in ("generate", "train", "evaluate", "judge"):
        spent = [manifest.get("spent", {}).get(stage) for manifest in manifests]
        hours = [NOT_THERE if not each else f"{each['replica_seconds'] / 3600:.4f}" for each in spent]
        rows.append([f"hours of engines or workers, {stage}", *hours])
    money = {
        "the run": [each.total for each in found],
        "saved by 1,000 requests": [thousand(each.saved_per_request) for each in found],
        "requests until it is paid": [each.break_even for each in found],
    }
    for title, amounts in money.items():
        rows.append([title, *(NOT_THERE if amount is None else f"{amount:,.4g}" for amount in amounts)])
    return ComparedTable("Cost", ["", *runs], [row for row in rows if set(row[1:]) != {NOT_THERE}])
