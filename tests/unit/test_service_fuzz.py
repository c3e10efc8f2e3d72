"""The service's own OpenAPI schema, fuzzed (schemathesis): whatever is sent, the answer is no 5xx, and no bug's 500."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error

from distill_ray.config import ServeConfig
from distill_ray.serving.front.ingress import build
from distill_ray.serving.front.keys import Keys
from tests.unit.scripted_backend import make_rig
from tests.unit.test_service_http import StubService

LOCAL = {"host": "127.0.0.1"}


def test_no_request_makes_the_service_fail(tmp_path: Path) -> None:
    config = ServeConfig.model_validate({"model_aliases": ["gpt-4o-mini"]})
    app = build(StubService(make_rig(tmp_path), config, Keys([], required=False)))
    schema = schemathesis.openapi.from_asgi("/openapi.json", app, headers=LOCAL)
    statuses: dict[str, set[int]] = {}
    for result in schema.get_all_operations():
        operation = result.ok()

        @given(case=operation.as_strategy())
        @settings(max_examples=30, derandomize=True, suppress_health_check=list(HealthCheck))
        def fuzz(case: Any) -> None:
            response = case.call(headers=LOCAL)
            case.validate_response(response, checks=[not_a_server_error])
            if response.status_code >= 400:
                assert response.json()["error"]["message"]
            statuses.setdefault(case.path, set()).add(response.status_code)

        fuzz()
    assert set(statuses) >= {"/v1/chat/completions", "/v1/completions", "/v1/models/{name}", "/route", "/metrics"}
    assert {200, 400} <= statuses["/v1/chat/completions"]  # it got past the first check, and not always
