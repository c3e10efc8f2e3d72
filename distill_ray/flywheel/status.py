"""What the flywheel has come to, for the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from distill_ray.config import RunConfig
from distill_ray.flywheel.cycle import Ended, line_of
from distill_ray.flywheel.cycles import STEPS, Cycle, Cycles
from distill_ray.flywheel.gathering import what_waits
from distill_ray.flywheel.pool import pool
from distill_ray.pipeline.progress import duration
from distill_ray.serving.collecting.store import existing_store
from distill_ray.serving.routing.bundles import Bundles, bundles_of

MOVES_SHOWN = 10

_MEANS = {
    "promoted": "promoted",
    "refused": "refused: the student in service stays; its pairs are set aside (`--again` takes them back)",
    "unclear": "not promoted: the student in service stays; its pairs wait for the next cycle (`--again` begins it "
    "before there are flywheel.min_pairs new ones)",
    "overtaken": "not promoted: another bundle was",
    "too_few": "nothing to do yet",
}


def ended_lines(ended: Ended, config: str) -> Iterator[str]:
    """What a cycle came to."""
    yield f"cycle {ended.number} {_MEANS[ended.outcome]}"
    for reason in ended.why:
        yield f"  {reason}"
    if (ended.folder / "gate.html").exists():
        yield f"wrote: {_shown(ended.folder / 'gate.html')}"
    if ended.outcome == "promoted":
        yield f"current: {ended.version}; `distill-ray rollback {config}` goes back"


def show_status(config: RunConfig, service: str, console: Console) -> None:
    """Print it.

    Raises:
        StoreError: the store of pairs cannot be used. What else there is has been printed.
    """
    cycles = Cycles(service).all()
    bundles = bundles_of(config, service)
    _show_bundles(bundles, console)
    if cycles:
        _show_cycle(cycles[-1], console)
    console.print(f"next: {escape(_waits_for(config, service, cycles))}")


def _show_cycle(cycle: Cycle, console: Console) -> None:
    how = _MEANS[cycle.outcome] if cycle.outcome is not None else "at work, or interrupted"
    console.print(f"cycle {cycle.number}: {how}")  # not the table's title, which would break lines at its width
    table = Table(show_header=False)
    results = cycle.results()
    for step in STEPS:
        result = results.get(step)
        if result is None:
            table.add_row(step, "-", "")
        else:
            table.add_row(step, duration(result["seconds"]), escape(line_of(step, result)))
    console.print(table)


def _show_bundles(bundles: Bundles, console: Console) -> None:
    versions, candidate = bundles.versions(), bundles.candidate()
    title = f"bundle in service: {versions[-1] if versions else 'none, the teacher answers everything'}"
    if candidate is not None:
        title += f" (candidate: {candidate.version})"
    console.print(title)
    moves = bundles.history()[-MOVES_SHOWN:]
    if not moves:
        return
    table = Table()
    for name in ("when", "what", "bundle", "before"):
        table.add_column(name)
    for move in moves:
        table.add_row(move.time, move.action, move.version or "none", move.before or "none")
    console.print(table)


def _waits_for(config: RunConfig, service: str, cycles: list[Cycle]) -> str:
    """What the next step waits for."""
    if cycles and cycles[-1].outcome is None:
        step = STEPS[len(cycles[-1].results())]
        return f"{step} of cycle {cycles[-1].number}; `distill-ray flywheel run` goes on with it, if no one does"
    before = [cycle for cycle in cycles if cycle.outcome != "too_few"]
    found = pool(existing_store(config.serve.collect.store, service), before, again=False)
    ended = cycles[-1].last if cycles and cycles[-1].outcome == "too_few" else None
    is_same = ended is not None and cycles[-1].needed("snapshot")["until"] == found.until
    if ended is not None and is_same and ended["step"] != "snapshot":  # what would be said again
        return f"more pairs: {'; '.join(ended['why'])}"
    lacking = config.flywheel.min_pairs - found.num_new
    if lacking > 0:
        return f"{lacking:,} more pairs: {what_waits(found, config)}"
    return f"ready: {found.num_new:,} new pairs are there; `distill-ray flywheel run` begins a cycle"


def _shown(path: Path) -> str:
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
