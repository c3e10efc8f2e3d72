"""What the commands of a run have taken so far, added up in its manifest.

`spent.STAGE` has `seconds`, and `replica_seconds`: of engines or workers together, from when each was started. The
generation has `calls` and `working_seconds` too: of its engines, from when each was ready. `spent.judge`, of who judges
the evaluation, has `calls`, `prompt_tokens`, `completion_tokens`: those that were paid.

Stopped and failed commands count too. Only kill -9 leaves no time to note anything.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from distill_ray.errors import RunFolderError
from distill_ray.pipeline.folder import RunFolder


@contextlib.contextmanager
def spending(folder: RunFolder, stage: str, replicas: int = 1) -> Iterator[dict[str, float]]:
    """Time the block, and add that to what the stage has taken before.

    Args:
        folder: of the run.
        stage: its name.
        replicas: how many engines or workers stand for the whole block. A block that knows better puts its own
            `replica_seconds` into the dict that it is given, and other figures that add up.

    Raises:
        RunFolderError: it cannot be noted. (If the block fails, that is what is raised.)
    """
    figures: dict[str, float] = {}
    started = time.monotonic()
    try:
        yield figures
    except BaseException:
        with contextlib.suppress(RunFolderError):  # what went wrong first is what has to be said
            _add(folder, stage, figures, time.monotonic() - started, replicas)
        raise
    _add(folder, stage, figures, time.monotonic() - started, replicas)


def _add(folder: RunFolder, stage: str, figures: dict[str, float], seconds: float, replicas: int) -> None:
    figures = {"replica_seconds": replicas * seconds, **figures, "seconds": seconds}
    before = folder.manifest().get("spent", {}).get(stage, {})
    total = {name: round(before.get(name, 0) + value, 2) for name, value in figures.items()}
    folder.update_manifest({"spent": {stage: total}})
