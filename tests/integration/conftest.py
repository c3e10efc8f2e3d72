"""One Ray for all integration tests; the tests that kill things start processes of their own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from distill_ray.pipeline.cluster import connected


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """A local Ray with the settings that the commands use."""
    with connected():
        yield
