"""What happened to a service, for people: one line in `events.jsonl` each, and on the status page the last ones.

A line is a JSON object with `time` (UTC, ISO 8601), `what`, `version` (of the bundle that it is about), `text`, and
figures of its own. No text of requests.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

from distill_ray.serving.routing.bundle import utc_now

TAIL = 1 << 16  # bytes that are read for the last ones
_LOG = logging.getLogger("distill_ray.serving")


class Events:
    """The file; any number of processes may add to it.

    Args:
        path: of `events.jsonl`.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)

    def add(self, what: str, version: str | None, text: str, **figures: Any) -> None:
        """Write an event down. A full disk stops nobody from doing what it tells of."""
        event = {"time": utc_now(), "what": what, "version": version, **figures, "text": text}
        _LOG.info("%s", text)
        line = (json.dumps(event, ensure_ascii=False) + "\n").encode()
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                os.write(descriptor, line)  # one call: lines of several writers do not mix
            finally:
                os.close(descriptor)
        except OSError as error:
            _LOG.error("%s: cannot write (%s): %s", self._path, error.strerror, text)

    def last(self, num: int) -> list[dict[str, Any]]:
        """The last ones, newest first; half a line, of a process that was killed, is left out."""
        try:
            with self._path.open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL))
                lines = file.read().splitlines()
        except FileNotFoundError:
            return []
        found: list[dict[str, Any]] = []
        for line in reversed(lines):
            try:
                event = json.loads(line)
            except ValueError:
                continue
            if isinstance(event, dict) and len(found) < num:
                found.append(event)
        return found
