"""Where a service keeps its files, and how its parts are called in Ray Serve. Several may share a cluster."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from distill_ray.config import RunConfig


@dataclass(frozen=True)
class AppNames:
    """Of the service `name`."""

    name: str

    @property
    def front(self) -> str:
        """The application with routers and keeper."""
        return self.name

    @property
    def teacher(self) -> str:
        """The teacher, where it is in this cluster."""
        return f"{self.name}-teacher"

    def student(self, version: str) -> str:
        """The student of a bundle. A name for each version: two of them are up while one follows the other."""
        return f"{self.name}-student-{version}"


def service_folder(config: RunConfig) -> str:
    """Bundles, pairs, keys, spools and logs of a service. Absolute."""
    return str(Path(config.serve.folder or Path("services") / config.name).resolve())
