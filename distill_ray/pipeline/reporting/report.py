"""The report of a run: `report.md` for repositories and terminals, `report.html` for people; both say the same."""

from __future__ import annotations

from distill_ray.config import RunConfig
from distill_ray.pipeline.folder import RunFolder
from distill_ray.pipeline.reporting.charts import charts
from distill_ray.pipeline.reporting.facts import Facts
from distill_ray.pipeline.reporting.markdown import cell
from distill_ray.pipeline.reporting.page import page
from distill_ray.pipeline.reporting.sections import sections


def write_report(folder: RunFolder, config: RunConfig) -> None:
    """Write both from what the run folder holds.

    Raises:
        RunFolderError: one of them cannot be written.
    """
    facts = Facts(folder, config)
    said = sections(facts)
    parts = [f"# {cell(config.name)}"]
    parts += [f"## {title}\n\n{text}" if title else text for title, text in said]
    folder.write_bytes(("\n\n".join(parts) + "\n").encode(), "report.md")
    folder.write_bytes(page(config.name, said, charts(facts)).encode(), "report.html")
