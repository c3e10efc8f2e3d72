"""The report of a run: `report.md` for repositories and terminals, `report.html` for people; both say the same. And the
cards of its examples and its student."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from distill_ray.config import RunConfig
from distill_ray.errors import DistillError
from distill_ray.pipeline.folder import RunFolder
from distill_ray.pipeline.reporting.cards import write_cards
from distill_ray.pipeline.reporting.charts import charts, of_runs
from distill_ray.pipeline.reporting.comparison import ComparedTable
from distill_ray.pipeline.reporting.facts import Facts
from distill_ray.pipeline.reporting.markdown import cell
from distill_ray.pipeline.reporting.page import page
from distill_ray.pipeline.reporting.sections import sections


def write_comparison(path: Path, runs: Mapping[str, Facts], tables: Sequence[ComparedTable]) -> None:
    """Write the page that holds runs against one another.

    Raises:
        DistillError: it cannot be written.
    """
    written = page("Runs compared", [found.for_page() for found in tables], {"Results": [of_runs(runs)]})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(written, encoding="utf-8")
    except OSError as error:
        raise DistillError(f"{path}: cannot write it ({error.strerror or error}); give another place") from error


def write_report(folder: RunFolder, config: RunConfig) -> None:
    """Write all of them from what the run folder holds.

    Raises:
        RunFolderError: one of them cannot be written.
    """
    facts = Facts(folder, config)
    said = sections(facts)
    parts = [f"# {cell(config.name)}"]
    parts += [f"## {title}\n\n{text}" if title else text for title, text in said]
    folder.write_bytes(("\n\n".join(parts) + "\n").encode(), "report.md")
    write_cards(facts)
    folder.write_bytes(page(config.name, said, charts(facts)).encode(), "report.html")
