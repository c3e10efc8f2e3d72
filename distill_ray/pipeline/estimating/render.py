"""The plan for people: stages, fits, what it all rests on. And as JSON."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from distill_ray.errors import ConfigError
from distill_ray.pipeline.estimating.estimate import Estimate
from distill_ray.pipeline.estimating.figures import Figure
from distill_ray.pipeline.estimating.fits import Fit
from distill_ray.pipeline.estimating.hardware import GIB
from distill_ray.pipeline.estimating.stages import Cost, Stage
from distill_ray.pipeline.progress import duration

NOTHING = "-"


def show(found: Estimate, console: Console) -> None:
    """Print all of it, what does not fit or work last."""
    splits = ", ".join(f"{name} {count:,}" for name, count in sorted(found.splits.items()))
    unusable = f"; {found.unusable:,} unusable" if found.unusable else ""
    console.print(f"{found.rows_in:,} rows ({splits}{unusable}), {found.sampled:,} of them tokenised")
    console.print(_stages(found))
    console.print(_fits(found.fits))
    console.print(_figures(found.figures))
    for note in found.notes:
        console.print(f"[yellow]note:[/yellow] {escape(note)}")
    for fit in found.fits:
        if not fit.fits:
            console.print(_refusal(fit))


def write_json(found: Estimate, path: Path) -> None:
    """All of it. Raises ConfigError: the file cannot be written."""
    try:
        path.write_text(json.dumps(found.as_json(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"--json {path}: cannot write it ({error.strerror}); give a file in a folder there is"
        ) from error


# -- stages ----------------------------------------------------------------------------------------------------------


def _stages(found: Estimate) -> Table:
    """Stages side by side, so that 80 columns are enough."""
    at_min, at_max = found.totals
    table = Table(title="stages", title_justify="left")
    table.add_column("")
    for stage in found.stages:
        table.add_column(stage.name, justify="right")
    table.add_column("total", justify="right")
    stages = found.stages
    table.add_row("rows", *(_count(stage.rows) for stage in stages), "")
    table.add_row("calls", *(_count(stage.calls) for stage in stages), _count(sum(s.calls for s in stages)))
    table.add_row("prompt tokens", *(_count(stage.prompt_tokens) for stage in stages), "")
    table.add_row("completion tokens", *(_count(stage.completion_tokens) for stage in stages), "")
    table.add_row("replicas x GPUs", *map(_replicas, stages), "")
    table.add_row("GPU-hours", *(_hours(s.at_min, s.at_max) for s in stages), _hours(at_min, at_max))
    table.add_row("cost (USD)", *(_money(s.at_min, s.at_max) for s in stages), _money(at_min, at_max))
    table.add_row("time, min replicas", *(_time(s.at_min, s.is_beside) for s in stages), _time(at_min))
    table.add_row("time, max replicas", *(_time(s.at_max, s.is_beside) for s in stages), _time(at_max))
    return table


def _count(value: float) -> str:
    """`-`, `3,400`, `1.63 M`."""
    if not value:
        return NOTHING
    for size, unit in ((1e9, "G"), (1e6, "M")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:,.0f}"


def _replicas(stage: Stage) -> str:
    low, high = stage.at_min.replicas, stage.at_max.replicas
    many = f"{low}" if low == high else f"{low}-{high}"
    if not stage.gpus_per_replica:
        return f"{many}\n{stage.gpu}" if stage.gpu else NOTHING
    return f"{many} x {stage.gpus_per_replica}\n{stage.gpu}"


def _between(low: str, high: str) -> str:
    return low if low == high else f"{low}-{high}"


def _hours(low: Cost, high: Cost) -> str:
    if low.gpu_hours is None or high.gpu_hours is None:
        return "?"
    return _between(_amount(low.gpu_hours), _amount(high.gpu_hours))


def _money(low: Cost, high: Cost) -> str:
    if low.money is None or high.money is None:
        return "?"
    return _between(_amount(low.money), _amount(high.money))


def _amount(value: float) -> str:
    """Two figures that count, cents where there are few."""
    if not value:
        return NOTHING
    return f"{value:,.2f}" if value < 10 else f"{value:,.1f}" if value < 100 else f"{value:,.0f}"


def _time(cost: Cost, is_beside: bool = False) -> str:
    if is_beside:
        return "beside"
    return "?" if cost.wall_s is None else duration(cost.wall_s)


# -- fits ------------------------------------------------------------------------------------------------------------


def _fits(fits: list[Fit]) -> Table:
    table = Table(title="fits?", title_justify="left")
    for name in ("", "on", "GiB per GPU", ""):
        table.add_column(name)
    for fit in fits:
        room = NOTHING
        if fit.available is not None:
            parts = " + ".join(f"{name} {size / GIB:.1f}" for name, size in fit.parts.items() if size)
            room = f"{fit.needed / GIB:.1f} of {fit.available / GIB:.1f}: {parts}"
        colour = "green" if fit.fits else "red"
        verdict = f"[{colour}]{'yes' if fit.fits else 'no'}[/{colour}]"
        table.add_row(escape(fit.who), escape(fit.where), escape(room), f"{verdict}: {escape(fit.says)}")
    return table


def _refusal(fit: Fit) -> str:
    available = fit.available or 0.0
    if fit.is_refused:
        text = f"[red]would not work:[/red] {escape(fit.who)}: {escape(fit.says)}."
        return "\n  - ".join([f"{text} Instead:", *map(escape, fit.remedies)])
    text = (
        f"[red]does not fit:[/red] {escape(fit.who)} on {escape(fit.where)} needs {fit.needed / GIB:.1f} GiB of each "
        f"GPU and has {available / GIB:.1f}."
    )
    if not fit.remedies:
        return f"{text} Nothing that was tried would: take a smaller model"
    return "\n  - ".join([f"{text} Each of these would:", *map(escape, fit.remedies)])


# -- what it rests on ------------------------------------------------------------------------------------------------


def _figures(figures: list[Figure]) -> str:
    """A list, not a table: keys are not cut in two."""
    lines = ["what this rests on"]
    for figure in figures:
        value = f"{figure.value:,.0f}" if figure.value >= 100 else f"{figure.value:.3g}"
        lines += [f"- {figure.name}: {value}", f"    {figure.origin}: {figure.how}"]
        if figure.replace:
            lines.append(f"    better: {figure.replace}")
    return escape("\n".join(lines))
