"""Where a service keeps its files, and how its parts are called in Ray Serve. Several may share a cluster."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from distill_ray.config import RunConfig
from distill_ray.errors import ConfigError, ServingError
from distill_ray.pipeline.folder import in_jobs_copy
from distill_ray.pipeline.lock import Taken, take

PATIENCE_S = 10.0  # what was killed, or is being replaced, is gone by then


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
    """Bundles, pairs, keys, spools and logs of a service. Absolute; need not be there yet.

    Raises:
        ConfigError: it is a file.
    """
    folder = Path(config.serve.folder or Path("services") / config.name).resolve()
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"serve.folder: {folder} is not a folder; name one, or a place where one can be made")
    return str(folder)


def existing_service_folder(config: RunConfig) -> str:
    """For commands that look at a service.

    Raises:
        ConfigError: there is none, and it would be wrong to say that nothing is in it. Or it is in a Ray job's copy of
            the working directory, which no service sees, and which goes with the job.
    """
    folder = service_folder(config)
    if in_jobs_copy(folder):
        raise ConfigError(
            f"serve.folder: {folder} is in the copy that Ray made of the job's working directory: the service does not "
            "see it, and it goes with the job; give an absolute path that job and service share: "
            "--set serve.folder=/shared/services/NAME"
        )
    if not os.path.isdir(folder):
        raise ConfigError(
            f"{folder}: no such folder, so no service has been here; run this in the folder where the service is "
            "started, or name its own with --set serve.folder=FOLDER"
        )
    return folder


def occupy(folder: str) -> TextIO:
    """Take a service's folder for this process: one store has one writer. Closing the file gives it back.

    Raises:
        ServingError: another service is at work there, or it cannot be written.
    """
    try:
        return take(Path(folder) / ".lock", PATIENCE_S)
    except Taken as error:
        raise ServingError(
            f"{folder}: another service is at work here (its keeper: {error}); end that one, or give this one another "
            "serve.folder"
        ) from error
    except OSError as error:
        raise ServingError(f"{folder}: cannot write there ({error.strerror}); give another serve.folder") from error
