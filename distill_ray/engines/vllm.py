"""vLLM inside the process that calls it (in a run: a Ray Data actor), through its async engine.

We render and tokenise ourselves (`models.ChatTokenizer`) and pass token ids, so text that spells a control token stays
text. The engine's own process may die (out of memory, kill -9): it is started again and the calls that were in flight
are made again. Written against vLLM 0.32.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import itertools
import json
import os
from collections.abc import AsyncIterator, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil

from distill_ray.config.engine import SamplingConfig, StructuredOutput, VllmEngineConfig
from distill_ray.engines.base import Engine, hash_ids, request_seed
from distill_ray.engines.last_words import died, last_words
from distill_ray.errors import ConfigError, EngineUnavailable, RequestRejected, TransientEngineError
from distill_ray.models import ChatTokenizer, model_identity, resolve_adapter, resolve_model
from distill_ray.records import Completion, Message, RejectReason

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.outputs import CompletionOutput
    from vllm.v1.engine.async_llm import AsyncLLM

# Engine arguments that change what is answered, not only how fast.
_ANSWER_ARGS = (
    "max_model_len",
    "dtype",
    "quantization",
    "kv_cache_dtype",
    "hf_overrides",
    "rope_scaling",
    "logits_processors",
)


class VllmEngine(Engine):
    """See the module docstring. One engine process per instance; GPUs are those that Ray gave to this process."""

    def __init__(self, config: VllmEngineConfig) -> None:
        self.config = config
        arguments = {k: config.engine_kwargs[k] for k in _ANSWER_ARGS if k in config.engine_kwargs}
        self.identity = f"vllm:{model_identity(config.model, config.revision)}" + (f":{arguments}" if arguments else "")
        if config.reasoning_parser:
            self.identity += f":{config.reasoning_parser}"
        if config.adapter:
            self.identity += f"+{model_identity(config.adapter)}"
        self._llm: AsyncLLM | None = None
        self._reasoning_parser: Any = None
        self._restart_lock = asyncio.Lock()
        self._num_restarts = 0
        self._params_of: dict[tuple[str, int], SamplingParams] = {}
        self._request_ids = itertools.count()
        # The ledger asks for a prompt's key and then for its answer: rendered and tokenised once, not twice.
        self._ids_of = lru_cache(maxsize=2 * config.max_concurrency)(self._tokenise)

    # -- life ------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Load the tokenizer and start the engine's process."""
        if self._llm is not None:
            return
        config = self.config
        if config.num_gpus == 0:
            os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")  # GiB; left alone, vLLM takes half the memory
            # vLLM compiles a helper of its log-probabilities even with enforce_eager: 48 s, and a C++ compiler.
            os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
        _ = self._tokenizer  # an error of its own, before vLLM's
        self._llm = self._launch()
        if config.reasoning_parser:
            from vllm.reasoning import ReasoningParserManager

            try:
                parser = ReasoningParserManager.get_reasoning_parser(config.reasoning_parser)
            except KeyError as error:
                known = ", ".join(ReasoningParserManager.list_registered())
                raise ConfigError(
                    f"teacher.reasoning_parser: vLLM has no parser {config.reasoning_parser!r}; known: {known}"
                ) from error
            self._reasoning_parser = parser(self._tokenizer.tokenizer)

    def _launch(self) -> AsyncLLM:
        from pydantic import ValidationError
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.async_llm import AsyncLLM

        try:
            arguments = AsyncEngineArgs(**engine_args(self.config))
        except TypeError as error:
            raise ConfigError(f"teacher.engine_kwargs: vLLM does not know an argument ({error})") from error
        except (ValueError, ValidationError) as error:
            raise ConfigError(f"teacher.engine_kwargs: vLLM refuses them: {error}") from error
        try:
            # The batch sizes of offline inference (`vllm.LLM`): 2 to 8 times those that an async engine has by default.
            llm = AsyncLLM.from_engine_args(arguments, usage_context=UsageContext.LLM_CLASS)
        except (OSError, ValueError, ValidationError) as error:
            raise ConfigError(f"teacher.model: vLLM cannot load {self.config.model!r}: {error}") from error
        except RuntimeError as error:  # what vLLM raises when its engine process ends before it is ready
            raise EngineUnavailable(
                f"vLLM did not start with model {self.config.model!r} ({last_words() or error}); its own messages are "
                "in logs/"
            ) from error
        if self.config.num_gpus == 0:
            _share_core_with_worker()
        return llm

    async def close(self) -> None:
        """End the engine's process."""
        llm, self._llm = self._llm, None
        if llm is not None:
            llm.shutdown()

    async def _restart(self, dead: AsyncLLM) -> None:
        async with self._restart_lock:
            if self._llm is not dead:
                return  # another request has done it
            if self._num_restarts >= self.config.max_retries:
                raise EngineUnavailable(died(self._num_restarts + 1))
            self._num_restarts += 1
            with contextlib.suppress(Exception):  # it is dead already; whatever it says changes nothing
                dead.shutdown()
            self._llm = self._launch()

    # -- answering -------------------------------------------------------------------------------------------------

    def prompt_key(self, messages: Sequence[Message]) -> bytes:
        """Hash of the prompt's token ids."""
        return hash_ids(self._ids(messages))

    async def generate(
        self, messages: Sequence[Message], sampling: SamplingConfig, *, first_sample: int = 0
    ) -> list[Completion]:
        """Ask for all samples in one request; ask again when the engine's process dies on the way."""
        prompt_ids = self._prompt_ids(messages)
        params = copy.copy(self._params(sampling, first_sample))
        # vLLM gives sample i of a request this seed + i.
        params.seed = request_seed(sampling.seed, hash_ids(prompt_ids)) + first_sample
        final = await self._final(prompt_ids, params)
        return [
            self._completion(output, len(prompt_ids) if i == 0 else 0, sampling, first_sample)
            for i, output in enumerate(sorted(final.outputs, key=lambda o: o.index))
        ]

    async def score(self, messages: Sequence[Message], answer: str, top_logprobs: int) -> Completion:
        """Read prompt and answer in one pass (prefill), with the top k at each token of the answer."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        prompt_ids, answer_ids = self._ids(messages), self._tokenizer.completion_ids(answer)
        self._require_room([*prompt_ids, *answer_ids])
        params = SamplingParams(
            max_tokens=1,
            temperature=0.0,
            prompt_logprobs=top_logprobs,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        final = await self._final([*prompt_ids, *answer_ids], params)
        topk_ids, topk_logprobs = _top_k(final.prompt_logprobs, top_logprobs, skip=len(prompt_ids))
        return Completion(
            text=answer,
            finish_reason="stop",
            prompt_tokens=len(prompt_ids) + len(answer_ids),
            completion_tokens=0,
            token_ids=answer_ids,
            topk_ids=topk_ids,
            topk_logprobs=topk_logprobs,
        )

    async def _final(self, prompt_ids: list[int], params: SamplingParams) -> Any:
        """vLLM's last output for a request."""
        from vllm.inputs.engine import tokens_input
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        for _ in range(self.config.max_retries + 1):
            llm = self._engine
            try:
                final = None
                async for output in llm.generate(
                    tokens_input(prompt_ids), params, self._next_id(), lora_request=self._lora()
                ):
                    final = output
            except EngineDeadError:
                self.num_retries += 1
                await self._restart(llm)
                continue
            except EngineGenerateError:
                self.num_retries += 1
                continue
            except ValueError as error:  # vLLM's validation of one request
                raise RequestRejected(RejectReason.BAD_REQUEST, f"vLLM: {error}") from error
            if final is not None:
                return final
        raise TransientEngineError("vLLM's engine failed on this request again and again; its messages are in logs/")

    async def stream(self, messages: Sequence[Message], sampling: SamplingConfig) -> AsyncIterator[str]:
        """One answer, piece by piece."""
        from vllm.inputs.engine import tokens_input
        from vllm.sampling_params import RequestOutputKind

        prompt = tokens_input(self._prompt_ids(messages))
        params = self._new_params(sampling.model_copy(update={"n": 1}), 0)
        params.seed = request_seed(sampling.seed, self.prompt_key(messages))
        params.output_kind, params.detokenize = RequestOutputKind.DELTA, True
        async for output in self._engine.generate(prompt, params, self._next_id(), lora_request=self._lora()):
            yield output.outputs[0].text

    @property
    def _engine(self) -> AsyncLLM:
        assert self._llm is not None, "start() first"
        return self._llm

    @cached_property
    def _tokenizer(self) -> ChatTokenizer:
        """There before the engine is: calls that are in the ledger need no engine, only their prompt's key."""
        return ChatTokenizer.of(self.config, key="teacher.model")

    def _next_id(self) -> str:
        return f"call-{next(self._request_ids)}"

    def _lora(self) -> Any:
        if self.config.adapter is None:
            return None
        from vllm.lora.request import LoRARequest

        return LoRARequest("student", 1, resolve_adapter(self.config.adapter, key="teacher.adapter"))

    def _ids(self, messages: Sequence[Message]) -> list[int]:
        return self._ids_of(tuple((m["role"], m["content"]) for m in messages))

    def _tokenise(self, turns: tuple[tuple[Any, str], ...]) -> list[int]:
        return self._tokenizer.prompt_ids([{"role": role, "content": content} for role, content in turns])

    def _prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        ids = self._ids(messages)
        self._require_room(ids)
        return ids

    def _require_room(self, ids: Sequence[int]) -> None:
        longest = self._engine.model_config.max_model_len
        if len(ids) >= longest:
            raise RequestRejected(
                RejectReason.PROMPT_TOO_LONG,
                f"the prompt has {len(ids)} tokens and the model takes {longest} with the answer "
                "(engine_kwargs.max_model_len)",
            )

    def _params(self, sampling: SamplingConfig, first_sample: int) -> SamplingParams:
        """Built once per setting: vLLM's checks in its constructor cost more than a short answer (it copies them)."""
        key = (sampling.model_dump_json(), first_sample)
        if key not in self._params_of:
            self._params_of[key] = self._new_params(sampling, first_sample)
        return self._params_of[key]

    def _new_params(self, sampling: SamplingConfig, first_sample: int) -> SamplingParams:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            n=sampling.n - first_sample,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=sampling.max_tokens,
            stop=sampling.stop or None,
            logprobs=sampling.top_logprobs or None,
            flat_logprobs=sampling.top_logprobs > 0,
            # Text is made once, at the end (`_text`), not token by token and for k alternatives each (docs/engines.md).
            detokenize=bool(sampling.stop),
            structured_outputs=_structured(sampling.structured),
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def _completion(
        self, output: CompletionOutput, prompt_tokens: int, sampling: SamplingConfig, first_sample: int
    ) -> Completion:
        token_ids = list(output.token_ids)
        text = output.text if sampling.stop else self._text(token_ids, stopped=output.finish_reason == "stop")
        reasoning = None
        if self._reasoning_parser is not None:
            reasoning, content = self._reasoning_parser.extract_reasoning(text, None)
            text = content or ""
        topk_ids, topk_logprobs = _top_k(output.logprobs, sampling.top_logprobs)
        return Completion(
            text=text,
            reasoning=reasoning,
            finish_reason=output.finish_reason if output.finish_reason in ("stop", "length") else "abort",
            prompt_tokens=prompt_tokens,
            completion_tokens=len(token_ids),
            sample_index=first_sample + output.index,
            token_ids=token_ids,
            topk_ids=topk_ids,
            topk_logprobs=topk_logprobs,
        )

    def _text(self, token_ids: list[int], *, stopped: bool) -> str:
        """As vLLM decodes: without the token that stopped it (not always one that the tokenizer calls special)."""
        ids = token_ids[:-1] if stopped else token_ids
        return self._tokenizer.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def engine_args(config: VllmEngineConfig) -> dict[str, Any]:
    """vLLM's engine arguments for a section of the config: here and in service."""
    arguments: dict[str, Any] = {
        "model": resolve_model(config.model, key="teacher.model"),
        "revision": config.revision,
        "trust_remote_code": config.trust_remote_code,
        "load_format": "safetensors",  # other formats run code when they are read
        "enable_log_requests": False,  # prompts do not belong in logs
        "disable_log_stats": True,  # counted per token in the process that all requests pass through
        "max_logprobs": max(20, config.sampling.top_logprobs),
    }
    if config.num_gpus == 0:
        arguments["enforce_eager"] = True  # no C++ compiler needed, and nothing to gain on CPU
        # vLLM 0.32 rewinds the generator of a seeded request whose prefill it cuts in two, which a CPU generator
        # cannot do ("CPU Generator does not use offset", gpu_model_runner.py): the engine dies. Delete when fixed.
        arguments["enable_chunked_prefill"] = False
    if config.adapter:
        arguments |= {
            "enable_lora": True,
            "max_lora_rank": _lora_rank(resolve_adapter(config.adapter, key="teacher.adapter")),
        }
    if config.num_gpus > 1:
        arguments["tensor_parallel_size"] = config.num_gpus // config.engine_kwargs.get("pipeline_parallel_size", 1)
        arguments["distributed_executor_backend"] = "ray"  # workers sit in the actor's placement group
    return arguments | config.engine_kwargs


def _share_core_with_worker() -> None:
    """On a machine with no core to spare, let vLLM's scheduler process wait on the core of its worker.

    It waits by yielding in a loop (vLLM's `SpinCondition`). Beside the worker that costs nothing; on the last other
    core it takes the time of this process, which feeds it (measured: docs/results.md).
    """
    own = psutil.Process()
    if not hasattr(own, "cpu_affinity"):
        return  # macOS
    cores = set(own.cpu_affinity() or ())
    for child in own.children():
        bound = [set(worker.cpu_affinity() or ()) for worker in child.children()]
        of_workers = set[int]().union(*(b for b in bound if b < cores))
        if of_workers and len(cores - of_workers) <= 1:
            child.cpu_affinity(list(of_workers))


def _lora_rank(adapter: str) -> int:
    """The smallest rank that vLLM has room for and these adapters fit in."""
    try:
        rank = json.loads(Path(adapter, "adapter_config.json").read_text(encoding="utf-8"))["r"]
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{adapter}: not a folder of LoRA adapters ({error})") from error
    return next((r for r in (8, 16, 32, 64, 128, 256, 320, 512) if r >= rank), rank)


def _structured(structured: StructuredOutput | None) -> Any:
    if structured is None:
        return None
    from vllm.sampling_params import StructuredOutputsParams

    return StructuredOutputsParams(json=structured.json_schema, regex=structured.regex, choice=structured.choice)


def _top_k(logprobs: Any, k: int, *, skip: int = 0) -> tuple[np.ndarray | None, np.ndarray | None]:
    """The k best per position behind the first `skip`, best first, from vLLM's flat lists. [T, K] int32 and float32.

    vLLM puts the sampled token first, once more if it is among the top k, and then the top k in order.
    """
    if not k or logprobs is None:
        return None, None
    start = logprobs.start_indices[skip] if len(logprobs.start_indices) > skip else len(logprobs.token_ids)
    shape = (len(logprobs.start_indices) - skip, k + 1)
    ids = np.array(logprobs.token_ids[start:], dtype=np.int32).reshape(shape)
    values = np.array(logprobs.logprobs[start:], dtype=np.float32).reshape(shape)
    return ids[:, 1:], values[:, 1:]
