"""vLLM as a replica."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncGenerator, Mapping
from typing import Any

from pydantic import ValidationError

from distill_ray.config import VllmEngineConfig
from distill_ray.errors import ApiError
from distill_ray.models import resolve_adapter
from distill_ray.pipeline.cluster import redirect_output
from distill_ray.pipeline.folder import RunFolder
from distill_ray.serving.backends import Method
from distill_ray.serving.front.wire import wrong_part
from distill_ray.serving.models.student import InstalledStudent, engine_here

ADAPTED = "adapted"  # how vLLM calls the base model with the adapter on


class VllmModel:
    """Replica: vLLM behind `ray.serve.llm.LLMServer`.

    Our deployment holds the server instead of being one: what starts it needs no vLLM then, and its limits are ours.
    """

    async def __init__(self, config: VllmEngineConfig | InstalledStudent, role: str, folder: RunFolder) -> None:
        redirect_output(folder, f"{role}-{os.getpid()}")
        engine: VllmEngineConfig = await engine_here(config)
        if engine.num_gpus == 0:
            os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
            os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # see engines/vllm.py
        from ray.serve.llm import LLMServer

        self._model = ADAPTED if engine.adapter else role
        self._server = LLMServer.sync_init(_llm_config(engine, role))
        await self._server.start()

    async def answer(self, method: Method, body: Mapping[str, Any]) -> AsyncGenerator[str, None]:
        """See the module docstring."""
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
        from vllm.entrypoints.openai.completion.protocol import CompletionRequest
        from vllm.exceptions import VLLMClientError

        kind = ChatCompletionRequest if method == "chat" else CompletionRequest
        ask = self._server.chat if method == "chat" else self._server.completions
        try:
            request = kind.model_validate({**body, "model": self._model})
            async for batch in await ask(request):  # type: ignore[arg-type]
                for item in batch if isinstance(batch, list) else [batch]:
                    for data in _pieces(item):
                        yield data
        except (VLLMClientError, ValueError, TypeError, NotImplementedError) as error:  # of a wrong request
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
        arguments["lora_modules"] = [{"name": ADAPTED, "path": resolve_adapter(config.adapter, key="teacher.adapter")}]
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
        return ": ".join(part for part in wrong_part(error) if part)
    first_line = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return first_line.replace("--enable-auto-tool-choice", "engine_kwargs.enable_auto_tool_choice").replace(
        "--tool-call-parser", "engine_kwargs.tool_call_parser"
    )
