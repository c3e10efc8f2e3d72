"""One Ray for all integration tests; the tests that kill things start processes of their own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from moto.server import ThreadedMotoServer

from distill_ray.object_store.s3 import PatientS3
from distill_ray.pipeline.cluster import connected
from tests.integration.faulty_s3 import FaultyS3

# Begun first, so that at the end no worker is left with one of them: `make test` hands out files in this order.
LONGEST = ("flywheel", "train", "service", "demo", "docs", "engine_contract", "clusters", "recipe_runs", "generate")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort files; the order of tests in a file stays."""
    places = {f"test_{name}": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """A local Ray with the settings that the commands use."""
    with connected():
        yield


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """URL of an S3 server on loopback."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    yield f"http://127.0.0.1:{port}"
    server.stop()


@pytest.fixture
def bucket(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """URL of a bucket; where it is and who may write stands in the environment, as on a cluster."""
    for name, value in {
        "AWS_ENDPOINT_URL": s3_server,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "sk-canary-0123456789",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(name, value)
    PatientS3.clear_instance_cache()  # it would go on asking the server of the test before
    PatientS3().makedirs("bucket", exist_ok=True)
    return "s3://bucket"


@pytest.fixture
def faulty(bucket: str, s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyS3]:
    """What stands in front of the bucket from now on; it passes everything on until it has a plan."""
    with FaultyS3(s3_server) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        PatientS3.clear_instance_cache()
        yield proxy
    PatientS3.clear_instance_cache()
