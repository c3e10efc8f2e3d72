"""Models in this cluster as Serve deployments: vLLM through `ray.serve.llm`, any other engine of ours as it is.

A replica answers `answer(method, body)` with pieces as JSON text: whole responses or chunks as the OpenAI API has them,
or {"error", "status"}. The router parses them (`DeployedBackend`) and needs no vLLM for it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
import uuid
from collections.abc import AsyncGenerator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from ray import serve
from ray.serve.handle import DeploymentHandle

from distill_ray.config import HfEngineConfig, OpenAIEngineConfig, RunConfig, SamplingConfig, VllmEngineConfig
from distill_ray.config.engine import BaseEngineConfig, Replicas
from distill_ray.config.serve import ScalingConfig
from distill_ray.engines import make_engine
from distill_ray.errors import ApiError, ConfigError, EngineError, RequestRejected
from distill_ray.pipeline.cluster import redirect_output
from distill_ray.pipeline.folder import RunFolder
from distill_ray.records import Completion, Message
from distill_ray.serving.backends import UP_S, Backend, Method
from distill_ray.serving.chunks import as_chunks
from distill_ray.serving.front.wire import error_of
from distill_ray.serving.names import AppNames
from distill_ray.serving.routing.bundle import read_manifest

_LOG = logging.getLogger("distill_ray.serving")
ADAPTED = "adapted"  # how vLLM calls the base model with the adapter on


def application(config: BaseEngineConfig, role: str, folder: RunFolder, scaling: ScalingConfig) -> serve.Application:
    """The Serve application of a model.

    Args:
        config: the engine.
        role: "teacher" or "student-VERSION"; names its log.
        folder: the service's, for logs.
        scaling: when replicas are added.
    """
    options: dict[str, Any] = {
        "name": role,
        "max_ongoing_requests": max(256, 2 * scaling.target_ongoing),  # the rest waits in the router
        "graceful_shutdown_timeout_s": 5.0,
        "health_check_period_s": 5.0,
        "health_check_timeout_s": 60.0,  # an engine that computes is not dead
        **scaled(config.replicas, scaling),
    }
    actor: dict[str, Any] = {"num_cpus": config.cpus}
    if config.num_gpus == 1 and not isinstance(config, VllmEngineConfig):
        actor["num_gpus"] = 1
    if isinstance(config, VllmEngineConfig):
        bundles: list[dict[str, float]] = [{"CPU": config.cpus}, *({} for _ in range(config.num_gpus - 1))]
        options["placement_group_bundles"] = [b | ({"GPU": 1} if config.num_gpus else {}) for b in bundles]
        options["placement_group_strategy"] = "PACK"
    model = VllmModel if isinstance(config, VllmEngineConfig) else EngineModel
    deployment: Any = serve.deployment(model, ray_actor_options=actor, **options)
    return deployment.bind(config, role, folder)


def scaled(replicas: Replicas, scaling: ScalingConfig) -> dict[str, Any]:
    """Options of a deployment. Ray's own defaults never add a replica to a model (ray-project/ray#59681)."""
    if replicas.min == replicas.max:
        return {"num_replicas": replicas.min}
    return {
        "autoscaling_config": {
            "min_replicas": replicas.min,
            "max_replicas": replicas.max,
            "target_ongoing_requests": scaling.target_ongoing,
            "upscale_delay_s": scaling.upscale_delay_s,
            "downscale_delay_s": scaling.downscale_delay_s,
        }
    }


def student_engine(config: RunConfig, folder: Path) -> BaseEngineConfig:
    """What runs the student of the bundle in `folder`, in this cluster.

    Raises:
        BundleError: it cannot be read.
        ConfigError: that engine cannot run this student.
    """
    spec = read_manifest(folder).student
    engine = config.serve.student
    if engine is None:
        engine = HfEngineConfig() if spec.is_encoder_decoder else VllmEngineConfig(gpus=config.teacher.num_gpus and 1)
    if spec.is_encoder_decoder and isinstance(engine, VllmEngineConfig):
        raise ConfigError("serve.student: vLLM runs no encoder-decoder models, and this student is one; take type hf")
    if not isinstance(engine, VllmEngineConfig | HfEngineConfig):
        return engine
    student = str(folder / "student")
    values: dict[str, Any] = {
        "model": spec.base if spec.kind == "adapter" else student,
        "adapter": student if spec.kind == "adapter" else None,
        "revision": spec.revision,
        "trust_remote_code": spec.trust_remote_code,
        "chat_template": str(folder / spec.chat_template) if spec.chat_template else None,
        "chat_template_kwargs": spec.chat_template_kwargs,
        "sampling": spec.sampling,
        "gpus": engine.num_gpus,
    }
    if isinstance(engine, VllmEngineConfig):
        values["engine_kwargs"] = {**config.student.engine_kwargs, **engine.engine_kwargs}
    return engine.model_copy(update=values)


def require_runnable(config: RunConfig, folder: Path) -> None:
    """Raises ConfigError: what the config says cannot run the student of the bundle in `folder`, or not so."""
    engine = student_engine(config, folder)
    if config.serve.cascade is not None and not isinstance(engine, VllmEngineConfig | OpenAIEngineConfig):
        raise ConfigError(
            f"serve.cascade: it looks at the log-probabilities of the student's tokens, and the `{engine.type}` engine "
            "serves none; leave serve.cascade out"
        )


def student_application(config: RunConfig, folder: Path, names: AppNames, logs: RunFolder) -> serve.Application:
    """The student of the bundle in `folder`. Raises as `student_engine`."""
    version = read_manifest(folder).version
    return application(student_engine(config, folder), names.student(version), logs, config.serve.scaling)


# -- vLLM ------------------------------------------------------------------------------------------------------------


class VllmModel:
    """Replica: vLLM behind `ray.serve.llm.LLMServer`.

    Our deployment holds the server instead of being one: what starts it needs no vLLM then, and its limits are ours.
    """

    async def __init__(self, config: VllmEngineConfig, role: str, folder: RunFolder) -> None:
        redirect_output(folder, f"{role}-{os.getpid()}")
        if config.num_gpus == 0:
            os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
            os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # see engines/vllm.py
        from ray.serve.llm import LLMServer

        self._model = ADAPTED if config.adapter else role
        self._server = LLMServer.sync_init(_llm_config(config, role))
        await self._server.start()

    async def answer(self, method: Method, body: Mapping[str, Any]) -> AsyncGenerator[str, None]:
        """See the module docstring."""
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
        from vllm.entrypoints.openai.completion.protocol import CompletionRequest

        kind = ChatCompletionRequest if method == "chat" else CompletionRequest
        ask = self._server.chat if method == "chat" else self._server.completions
        try:
            request = kind.model_validate({**body, "model": self._model})
            async for batch in await ask(request):  # type: ignore[arg-type]
                for item in batch if isinstance(batch, list) else [batch]:
                    for data in _pieces(item):
                        yield data
        except (ValueError, TypeError, NotImplementedError) as error:  # what vLLM and pydantic say of a wrong request
            yield json.dumps({**ApiError(400, _reason(error)).body, "status": 400})

    async def ping(self) -> None:
        """Answers when it is up."""

    async def check_health(self) -> None:
        """Called by Serve: an engine process that died takes its replica with it."""
        await self._server.check_health()


def _llm_config(config: VllmEngineConfig, name: str) -> Any:
    from ray.serve.llm import LLMConfig

    from distill_ray.engines.vllm import engine_args

    arguments = engine_args(config)
    source = arguments.pop("model")
    arguments.pop("distributed_executor_backend", None)  # LLMConfig chooses it
    if config.adapter:
        arguments["lora_modules"] = [{"name": ADAPTED, "path": config.adapter}]
    if config.chat_template:
        arguments["chat_template"] = config.chat_template
    if config.chat_template_kwargs:
        arguments["default_chat_template_kwargs"] = config.chat_template_kwargs
    if config.reasoning_parser:
        arguments["reasoning_parser"] = config.reasoning_parser
    return LLMConfig(
        model_loading_config={"model_id": name, "model_source": source},  # type: ignore[arg-type]
        accelerator_config={"kind": "cpu"} if config.num_gpus == 0 else None,  # type: ignore[arg-type]
        placement_group_config={"bundles": [{"CPU": config.cpus}]} if config.num_gpus == 0 else None,
        engine_kwargs=arguments,
        log_engine_metrics=False,
        experimental_configs={"stream_batching_interval_ms": 0},  # else each piece waits up to 50 ms for others
        **_no_download(source),  # type: ignore[arg-type]
    )


def _no_download(source: str) -> dict[str, Any]:
    """A model on this disk needs no task on every node to fetch it: that task imports vLLM once more (12 s)."""
    if not os.path.isdir(source):
        return {}
    from ray.llm._internal.common.callbacks.base import CallbackBase

    class ModelIsThere(CallbackBase):
        async def on_before_node_init(self) -> None:
            self.ctx.run_init_node = False

    return {"callback_config": {"callback_class": ModelIsThere}}


def _pieces(item: Any) -> list[str]:
    """What vLLM yields, as JSON: server-sent events, an error, or an answer."""
    if isinstance(item, str):
        return _events(item)
    status = getattr(getattr(item, "error", None), "code", None)
    if status is None:
        return [item.model_dump_json()]
    return [json.dumps({**item.model_dump(), "status": status if isinstance(status, int) else 400})]


def _events(text: str) -> list[str]:
    """The data of server-sent events, without the one that ends them."""
    data = [line[5:].strip() for line in text.splitlines() if line.startswith("data:")]
    return [each for each in data if each != "[DONE]"]


def _reason(error: Exception) -> str:
    """One line for a client: of pydantic's report what is wrong and where, of vLLM's advice the way it is done here."""
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        return f"{where}: {first['msg']}" if where else first["msg"]
    first_line = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return first_line.replace("--enable-auto-tool-choice", "engine_kwargs.enable_auto_tool_choice").replace(
        "--tool-call-parser", "engine_kwargs.tool_call_parser"
    )


# -- other engines ---------------------------------------------------------------------------------------------------

# What `EngineModel` passes on, and what says nothing about the answer.
_KNOWN = frozenset(
    {"model", "messages", "stream", "stream_options", "temperature", "top_p", "max_tokens", "max_completion_tokens"}
    | {"n", "stop", "seed", "user", "metadata", "store", "safety_identifier", "prompt_cache_key"}
)
_NEUTRAL: dict[str, Any] = {
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "logprobs": False,
    "top_logprobs": 0,
    "tools": [],
    "tool_choice": "none",
    "logit_bias": {},
    "response_format": {"type": "text"},
    "parallel_tool_calls": True,
}


class EngineModel:
    """Replica: an engine of ours (`hf` for encoder-decoder students, `fake`, another package's).

    Its answers are made whole and, where a stream is asked for, sent as one chunk.
    """

    async def __init__(self, config: BaseEngineConfig, role: str, folder: RunFolder) -> None:
        redirect_output(folder, f"{role}-{os.getpid()}")
        self._config, self._name = config, role
        self._engine = make_engine(config)  # type: ignore[arg-type]
        await self._engine.start()

    async def answer(self, method: Method, body: Mapping[str, Any]) -> AsyncGenerator[str, None]:
        """See the module docstring."""
        try:
            messages, sampling = self._request(method, body)
            samples = await self._engine.generate(messages, sampling)
        except ValidationError as error:
            yield json.dumps({**ApiError(400, _reason(error)).body, "status": 400})
            return
        except ApiError as error:
            yield json.dumps({**error.body, "status": error.status})
            return
        except RequestRejected as error:
            yield json.dumps({**ApiError(400, error.detail, code=error.reason).body, "status": 400})
            return
        except EngineError as error:
            yield json.dumps({**ApiError(503, str(error), "server_error").body, "status": 503})
            return
        response = _response(samples, self._name)
        for piece in as_chunks(response) if body.get("stream") else [response]:
            yield json.dumps(piece, ensure_ascii=False)

    async def ping(self) -> None:
        """Answers when it is up."""

    def _request(self, method: Method, body: Mapping[str, Any]) -> tuple[list[Message], SamplingConfig]:
        if method != "chat":
            raise ApiError(400, f"the `{self._config.type}` engine answers chats only; use /v1/chat/completions")
        for name, value in body.items():
            if name not in _KNOWN and value is not None and value != _NEUTRAL.get(name):
                raise ApiError(400, f"the `{self._config.type}` engine cannot do `{name}`; leave it out", param=name)
        default = self._config.sampling
        stop = body.get("stop")
        chosen = {
            "temperature": body.get("temperature"),
            "top_p": body.get("top_p"),
            "max_tokens": body.get("max_completion_tokens") or body.get("max_tokens"),
            "n": body.get("n"),
            "stop": [stop] if isinstance(stop, str) else stop,
            "seed": body.get("seed"),
        }
        values = default.model_dump() | {name: value for name, value in chosen.items() if value is not None}
        if values["temperature"] == 0 and values["n"] > 1:
            raise ApiError(400, "n: with temperature 0 all answers would be the same", param="n")
        return [_plain(message) for message in body["messages"]], SamplingConfig(**values)


def _plain(message: Mapping[str, Any]) -> Message:
    role, content = message["role"], message.get("content")
    if isinstance(content, list):
        if any(part.get("type") != "text" for part in content):
            raise ApiError(400, "this model reads text only", param="messages")
        content = "".join(part.get("text", "") for part in content)
    if role == "developer":
        role = "system"
    if role not in ("system", "user", "assistant") or message.get("tool_calls"):
        raise ApiError(400, "this model knows no tools", param="messages")
    return {"role": role, "content": content or ""}


def _response(samples: list[Completion], model: str) -> dict[str, Any]:
    prompt_tokens = sum(sample.prompt_tokens for sample in samples)
    completion_tokens = sum(sample.completion_tokens for sample in samples)
    reasons = {"stop": "stop", "length": "length", "content_filter": "content_filter"}
    return {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "system_fingerprint": model,
        "choices": [
            {
                "index": index,
                "message": {"role": "assistant", "content": sample.text, "refusal": None},
                "logprobs": None,
                "finish_reason": reasons.get(sample.finish_reason, "stop"),
            }
            for index, sample in enumerate(samples)
        ],
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        },
    }


# -- seen from the router --------------------------------------------------------------------------------------------


class DeployedBackend(Backend):
    """A model that is a Serve application.

    Args:
        app: name of the application.
        name: what answers, for people and for the store.
    """

    is_here = True

    def __init__(self, app: str, name: str) -> None:
        self.app, self.name = app, name

    @cached_property
    def _handle(self) -> DeploymentHandle:
        return serve.get_app_handle(self.app)

    async def is_up(self) -> bool:
        """Whether a replica answers."""
        from ray.exceptions import RayError
        from ray.serve.exceptions import RayServeException

        try:
            async with asyncio.timeout(UP_S):
                await self._handle.ping.remote()
        except (RayError, RayServeException, TimeoutError):
            return False
        return True

    async def answer(self, method: Method, body: Mapping[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """See `Backend.answer`."""
        from ray.exceptions import RayError, RayTaskError
        from ray.serve.exceptions import RayServeException

        pieces: Any = None
        try:
            pieces = self._handle.options(stream=True).answer.remote(method, dict(body))
            async for data in pieces:
                piece = json.loads(data)
                if "error" in piece:
                    error = error_of(piece.pop("status", 500), piece)
                    error.message = error.message.replace(self.app, "the model")  # which one is the operator's
                    raise error
                yield piece
        except RayTaskError as error:  # something in it failed, and it is still there; unless that was its engine
            code = "gone" if "EngineDead" in type(error.cause).__name__ else None
            _LOG.warning("%s failed: %s", self.name, type(error.cause).__name__)
            raise ApiError(500, "the model failed on this request", "server_error", code=code) from error
        except (RayError, RayServeException) as error:
            _LOG.warning("%s does not answer: %s", self.name, type(error).__name__)
            raise ApiError(503, "the model does not answer", "server_error", code="gone") from error
        finally:
            if pieces is not None:
                pieces.cancel()  # ends the work where the client has left; nothing where it is done
