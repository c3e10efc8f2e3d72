"""Whole cycles whose student a vendor trains and runs: a scripted one, over HTTP."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from benchmarks.two_languages import config_of, pairs, sentences
from distill_ray.config import load_config
from distill_ray.flywheel.cycle import run_cycle
from distill_ray.serving.collecting.marks import learnt_pairs
from distill_ray.serving.collecting.store import Selection, make_store
from distill_ray.serving.routing.bundle import load_bundle
from distill_ray.serving.routing.bundles import Bundles
from tests.unit.scripted_server import Reply
from tests.unit.scripted_vendor import ScriptedVendor

os.environ["TEST_VENDOR_KEY"] = "k-123"  # before Ray starts: its processes inherit it
pytestmark = pytest.mark.usefixtures("local_ray", "embedder_cache")


class Vendor(ScriptedVendor):
    """What it has trained answers rightly; its base model does not answer at all."""

    knows: dict[str, str]

    def _carry_out(self, route: str, path: str, query: dict[str, str], headers: dict[str, str], body: bytes) -> Reply:
        if route != "POST /chat/completions":
            return super()._carry_out(route, path, query, headers, body)
        asked = json.loads(body)
        if asked["model"] not in {job["fine_tuned_model"] for job in self.jobs.values()}:
            return Reply(404, {"error": {"message": "no such model"}})
        answer = self.knows[asked["messages"][-1]["content"]]
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": answer}}
        usage = {"prompt_tokens": 20, "completion_tokens": 1, "total_tokens": 21}
        return Reply(body={"id": "x", "model": asked["model"], "choices": [choice], "usage": usage})


def test_a_vendor_trains_its_student_is_promoted_and_goes_on_there(tmp_path: Path) -> None:
    vendor = Vendor()
    vendor.knows = dict(sentences(260, 1)) | dict(sentences(220, 2))
    with vendor:
        trainer: dict[str, Any] = {"type": "openai", "model": "base-mini", "base_url": vendor.base_url}
        config = load_config(config_of(tmp_path, trainer={**trainer, "api_key_env": "TEST_VENDOR_KEY", "poll_s": 0.05}))
        service = tmp_path / "service"
        store, bundles = make_store(config.serve.collect.store, service), Bundles(service / "bundles")
        store.add(pairs(260, 1))
        first = run_cycle(config, str(service))
        assert (first.outcome, first.why) == ("promoted", [])
        bundle = load_bundle(bundles.path(str(first.version)), None)
        spec = bundle.manifest.student
        assert (spec.kind, spec.base_url, spec.api_key_env) == ("remote", vendor.base_url, "TEST_VENDOR_KEY")
        assert not any(bundle.student_folder.glob("*"))
        assert store.count(Selection(indexed=True)) == len(learnt_pairs(bundle.folder)) > 0
        store.add(pairs(220, 2))
        second = run_cycle(config, str(service))
    assert (second.outcome, second.why) == ("promoted", [])
    assert len(vendor.jobs) == 2
    assert [body["model"] for body in vendor.bodies] == ["base-mini", spec.base]
    assert not list(service.rglob("train.jsonl")), "no text of a cycle that is over stays"
    assert "k-123" not in "".join(path.read_text() for path in service.rglob("*.json"))
