"""What runs a bundle's student, and engines of ours behind the OpenAI API: no Serve around them here."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest
from ray.serve.config import AutoscalingConfig

from distill_ray.config import HfEngineConfig, RunConfig, SamplingConfig, VllmEngineConfig, parse_config
from distill_ray.config.engine import Replicas
from distill_ray.errors import ConfigError
from distill_ray.pipeline.folder import RunFolder
from distill_ray.serving.models import engine
from distill_ray.serving.models.applications import require_runnable, scaled
from distill_ray.serving.models.engine import EngineModel
from distill_ray.serving.models.student import student_engine
from distill_ray.serving.routing.manifest import StudentSpec
from tests.unit.small_bundle import write_small_bundle


def config(**serve: Any) -> RunConfig:
    return parse_config(
        {
            "name": "small",
            "recipe": {"context": {"text": "Be brief."}},
            "data": {"source": "unused"},
            "teacher": {"type": "fake"},
            "serve": serve,
        }
    )


def bundle_of(folder: Path, **spec: Any) -> Path:
    return write_small_bundle(folder, student=StudentSpec(sampling=SamplingConfig(temperature=0.0), **spec))


def ask(engine: Any, body: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """Of a replica with that engine."""

    async def run() -> list[dict[str, Any]]:
        replica: Any = EngineModel.__new__(EngineModel)
        await replica.__init__(engine, "student", RunFolder(str(folder)))
        pieces: AsyncGenerator[str, None] = replica.answer("chat", body)
        return [json.loads(piece) async for piece in pieces]

    return asyncio.run(run())


@pytest.fixture(autouse=True)
def _output_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "redirect_output", lambda *_: None)


# -- which engine ------------------------------------------------------------------------------------------------------


def test_a_student_runs_on_vllm_and_an_encoder_decoder_on_hf(tmp_path: Path) -> None:
    decoder = student_engine(config(), bundle_of(tmp_path / "one", kind="full"))
    assert isinstance(decoder, VllmEngineConfig)
    assert decoder.model == str(tmp_path / "one" / "student")
    folder = bundle_of(tmp_path / "two", kind="full", is_encoder_decoder=True)
    assert isinstance(student_engine(config(), folder), HfEngineConfig)
    with pytest.raises(ConfigError, match=r"serve\.student: vLLM runs no encoder-decoder models.*take type hf"):
        student_engine(config(student={"type": "vllm"}), folder)


def test_an_adapter_runs_on_its_base(tmp_path: Path) -> None:
    folder = bundle_of(tmp_path / "one", kind="adapter", base="org/base", revision="abc")
    engine = student_engine(config(student={"type": "hf", "gpus": 0}), folder)
    assert isinstance(engine, HfEngineConfig)
    assert (engine.model, engine.revision, engine.adapter) == ("org/base", "abc", str(folder / "student"))


def test_a_cascade_over_an_engine_without_logprobs_is_refused_before_anything_starts(tmp_path: Path) -> None:
    folder = bundle_of(tmp_path / "two", kind="full", is_encoder_decoder=True)
    cascade = {"min_mean_logprob": -1.0}
    with pytest.raises(ConfigError, match=r"serve\.cascade: .* the `hf` engine serves none"):
        require_runnable(config(cascade=cascade), folder)
    require_runnable(config(), folder)
    require_runnable(config(cascade=cascade), bundle_of(tmp_path / "one", kind="full"))


def test_replicas_that_may_grow_grow_by_limits_of_our_own() -> None:
    serve = config(scaling={"target_ongoing": 5}).serve
    assert scaled(Replicas(min=2, max=2), serve.scaling) == {"num_replicas": 2}
    options = AutoscalingConfig(**scaled(Replicas(min=1, max=3), serve.scaling)["autoscaling_config"])
    assert (options.min_replicas, options.max_replicas, options.get_target_ongoing_requests()) == (1, 3, 5)
    assert (options.upscale_delay_s, options.downscale_delay_s) == (10.0, 600.0)


# -- a T5 student ------------------------------------------------------------------------------------------------------


@pytest.fixture
def t5_student(tmp_path: Path, tiny_t5: Path) -> HfEngineConfig:
    folder = bundle_of(tmp_path / "bundle", kind="full", is_encoder_decoder=True)
    shutil.rmtree(folder / "student")
    shutil.copytree(tiny_t5, folder / "student")
    engine = student_engine(config(), folder)
    assert isinstance(engine, HfEngineConfig)
    return engine


def test_a_t5_student_answers_whole_and_streamed_with_its_usage(t5_student: HfEngineConfig, tmp_path: Path) -> None:
    body = {"messages": [{"role": "user", "content": "What time is it?"}], "max_tokens": 6, "temperature": 0}
    [whole] = ask(t5_student, body, tmp_path)
    assert whole["object"] == "chat.completion"
    assert whole["usage"]["prompt_tokens"] == len("What time is it?") + 1  # a byte each, and the end
    assert 1 <= whole["usage"]["completion_tokens"] <= 6
    *chunks, usage = ask(t5_student, {**body, "stream": True}, tmp_path)
    said = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)
    assert said == whole["choices"][0]["message"]["content"]
    assert chunks[-1]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]
    assert usage["usage"] == whole["usage"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "cannot do `tools`"),
        ({"logprobs": True}, "cannot do `logprobs`"),
        ({"response_format": {"type": "json_object"}}, "cannot do `response_format`"),
        ({"n": 2}, "all answers would be the same"),
        ({"messages": [{"role": "user", "content": "x" * 600}]}, "prompt_too_long"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "reads text only"),
    ],
)
def test_what_a_t5_student_cannot_do_is_a_400_that_says_so(
    t5_student: HfEngineConfig, tmp_path: Path, change: dict[str, Any], says: str
) -> None:
    body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 6, "temperature": 0}
    [piece] = ask(t5_student, {**body, **change}, tmp_path)
    assert piece["status"] == 400
    assert says in json.dumps(piece["error"])
