"""What `distill-ray serve` says when the service is up: where it is, and when its student is up too."""

from __future__ import annotations

import os
import time

import httpx

from distill_ray.config import RunConfig
from distill_ray.errors import BundleError
from distill_ray.serving.routing.bundles import Bundles

_ANY = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # an address to listen on is none to ask
_ANSWER_S = 2.0


def url_of(host: str, port: int) -> str:
    """Where a service on that address is."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def where(config: RunConfig, folder: str, seconds: float, *, needs_key: bool) -> str:
    """The service's addresses, and a command that tries it.

    Args:
        config: the whole YAML.
        folder: the service's.
        seconds: that its start took.
        needs_key: whether a request needs one.
    """
    url = url_of(config.serve.host, config.serve.port)
    key = "-H 'Authorization: Bearer KEY' " if needs_key else ""
    return (
        f"up after {seconds:.0f} s: {url}/v1 (OpenAI API)\n"
        f"page:  {url}/\n"
        f"files: {os.path.relpath(folder)}\n"
        f"try:   curl {url}/v1/chat/completions \\\n"
        f"         {key}-H 'Content-Type: application/json' \\\n"
        """         -d '{"messages": [{"role": "user", "content": "..."}]}'\n"""
        "Ctrl-C ends it"
    )


class StudentNews:
    """The current bundle's student, each time that something about it is new.

    Args:
        config: the whole YAML.
        bundles: of the service.
        started: when the command began to start it, on the monotonic clock.
    """

    def __init__(self, config: RunConfig, bundles: Bundles, started: float) -> None:
        host = config.serve.host
        self._url = url_of(_ANY.get(host, host), config.serve.port) + "/healthz"
        self._bundles, self._since = bundles, started
        self._said: tuple[str | None, bool] | None = None

    def line(self) -> str | None:
        """What is new; None: nothing, or no router says anything now."""
        try:
            version = self._bundles.current()
            health = httpx.get(self._url, timeout=_ANSWER_S, trust_env=False).raise_for_status().json()
        except (BundleError, httpx.HTTPError):  # the service's log says it
            return None
        is_up = version is not None and health["bundle"] == version and health["student_up"]
        before, self._said = self._said, (version, is_up)
        if self._said == before:
            return None
        if before is not None and before[0] != version:
            self._since = time.monotonic()
        if version is None:
            return "no bundle is in service yet: the teacher answers everything"
        if not is_up:
            return f"student of bundle {version}: loading; the teacher answers meanwhile"
        return f"student of bundle {version}: up after {time.monotonic() - self._since:.0f} s"
