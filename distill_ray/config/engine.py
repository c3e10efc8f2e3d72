"""`teacher:` (and other engines): who answers, on what hardware, with which sampling.

"Teacher" and "student" are roles; an engine is what fills one. Capabilities are known from the config alone, so that
what an engine cannot do is refused when the YAML loads, before a GPU is rented. The teacher alone may be several
engines: `mixture.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from distill_ray.config.base import Config, FilePath, Range, ServerUrl
from distill_ray.plugins import Group, Variants

DEMO_MODEL = "demo"
OPENAI_TOP_LOGPROBS = 20  # https://platform.openai.com/docs/api-reference/chat/create (top_logprobs)
TOKEN_ID_SWITCHES = ("return_token_ids", "return_tokens_as_token_ids")  # of a vLLM server, in extra_body


class StructuredOutput(Config):
    """Constrains the answer's form. Exactly one of the fields."""

    json_schema: dict[str, Any] | None = None
    """A JSON schema that the answer follows."""

    regex: str | None = None
    """A regular expression that the whole answer matches."""

    choice: list[str] | None = None
    """The answer is one of these."""

    @model_validator(mode="after")
    def _exactly_one(self) -> StructuredOutput:
        given = [name for name in ("json_schema", "regex", "choice") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of json_schema, regex, choice (got {given or 'none'})")
        return self


class SamplingConfig(Config):
    """How the engine samples. Part of a call's identity: a change here pays for the calls again."""

    temperature: Annotated[float, Field(ge=0.0)] = 0.7
    """0 is greedy."""

    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Nucleus sampling: the smallest set of tokens with this probability mass."""

    max_tokens: Annotated[int, Field(ge=1)] = 512
    """Most new tokens per sample. An answer cut off here is a reject (`cut_off`), never trained on."""

    n: Annotated[int, Field(ge=1)] = 1
    """Samples per query; each gives an example of its own."""

    stop: list[str] = []
    """Strings that end the answer; they are not part of it."""

    seed: int = 0
    """Sample i uses seed + i, so a repeated run asks for the same."""

    top_logprobs: Annotated[int, Field(ge=0)] = 0
    """Keep the k most probable tokens per position, for soft targets. 0 keeps none."""

    structured: StructuredOutput | None = None
    """Structured output, where the engine has it."""

    @model_validator(mode="after")
    def _samples_differ(self) -> SamplingConfig:
        if self.temperature == 0 and self.n > 1:
            raise ValueError(
                f"temperature 0 is greedy, so all n = {self.n} samples would be the same; raise it or set n: 1"
            )
        return self


class Replicas(Range):
    """An actor pool that grows from min to max with the queue; a number is a fixed pool."""


class BaseEngineConfig(Config):
    """What all engines have. The base of an engine from another package (`distill_ray.plugins`) too."""

    if TYPE_CHECKING:
        type: Any  # each variant's own Literal

    model: str = DEMO_MODEL
    """A folder, the URL of one in a store (s3://...), a hub id, or `demo` (the built-in tiny model)."""

    sampling: SamplingConfig = SamplingConfig()
    """How answers are sampled."""

    max_concurrency: Annotated[int, Field(ge=1)] = 256
    """Most requests in flight per engine."""

    max_retries: Annotated[int, Field(ge=0)] = 5
    """Tries after the first, for errors that may pass, before the row is rejected as `engine_error`."""

    replicas: Replicas = Replicas()
    """Engine actors: a number, or {min, max} to scale with the queue."""

    cpus: Annotated[float, Field(gt=0)] = 1.0
    """CPUs that Ray reserves per replica."""

    node_labels: dict[str, str] = {}
    """Only nodes of the cluster with these labels hold a replica, for example {distill-ray/stage: teacher}."""

    @property
    def num_gpus(self) -> int:
        """GPUs per replica: none, for what needs no model here."""
        return 0

    @property
    def capabilities(self) -> frozenset[str]:
        """What this engine can do: answer (`generate`), and perhaps `top_logprobs`, `structured`, `score`."""
        return frozenset({"generate"})


class _LocalModel(BaseEngineConfig):
    revision: str | None = None
    """Commit or tag of a hub model; recorded on every example."""

    trust_remote_code: bool = False
    """Runs code that ships with the model. Leave it off unless you have read that code."""

    gpus: Annotated[int, Field(ge=0)] | None = None
    """GPUs per replica = tensor x pipeline parallel. 0 runs on CPU. Default: 0 for `demo`, else 1."""

    chat_template: FilePath | None = None
    """A Jinja file, for a model that ships none."""

    chat_template_kwargs: dict[str, Any] = {}
    """Passed to the chat template, for example {enable_thinking: false}."""

    adapter: str | None = None
    """Folder of LoRA adapters to put on the model, or its URL in a store."""

    @property
    def num_gpus(self) -> int:
        """GPUs per replica with the default resolved."""
        return self.gpus if self.gpus is not None else (0 if self.model == DEMO_MODEL else 1)


class VllmEngineConfig(_LocalModel):
    """vLLM inside Ray actors on this cluster."""

    type: Literal["vllm"] = "vllm"

    max_concurrency: Annotated[int, Field(ge=1)] = 1024
    """Most requests in flight per replica: more than vLLM runs at once, so that its queue never runs dry."""

    engine_kwargs: dict[str, Any] = {}
    """Any argument of vLLM's engine, for example {max_model_len: 8192, tensor_parallel_size: 2}."""

    reasoning_parser: str | None = None
    """vLLM's parser that keeps the reasoning apart from the answer (deepseek_r1, qwen3, ...)."""

    @property
    def capabilities(self) -> frozenset[str]:
        """What this engine can do beside answering."""
        return frozenset({"generate", "top_logprobs", "structured", "score"})

    @model_validator(mode="after")
    def _logprobs_are_allowed(self) -> VllmEngineConfig:
        most, asked = self.engine_kwargs.get("max_logprobs", -1), self.sampling.top_logprobs  # -1: no limit, as in vLLM
        if isinstance(most, int) and 0 <= most < asked:
            raise ValueError(
                f"sampling.top_logprobs is {asked} but engine_kwargs allows max_logprobs {most}; leave max_logprobs "
                "out: it is raised as far as needed"
            )
        return self

    @model_validator(mode="after")
    def _parallelism_fills_the_gpus(self) -> VllmEngineConfig:
        tensor = self.engine_kwargs.get("tensor_parallel_size", 0)
        pipeline = self.engine_kwargs.get("pipeline_parallel_size", 1)
        if tensor and self.num_gpus and tensor * pipeline != self.num_gpus:
            raise ValueError(
                f"gpus is {self.num_gpus} but engine_kwargs asks for tensor_parallel_size {tensor} x "
                f"pipeline_parallel_size {pipeline}; make gpus their product"
            )
        return self


class HfEngineConfig(_LocalModel):
    """Plain transformers `generate`: CPU, encoder-decoder models, small things."""

    type: Literal["hf"] = "hf"

    batch_size: Annotated[int, Field(ge=1)] = 64
    """Requests generated together."""


class OpenAIEngineConfig(BaseEngineConfig):
    """Any OpenAI-compatible URL: llama.cpp server, Ollama, a vLLM server, a vendor."""

    type: Literal["openai"] = "openai"

    model: str  # type: ignore[misc]  (without the default that local engines have: nobody serves `demo`)
    """Its name at that server."""

    base_url: ServerUrl = "https://api.openai.com/v1"
    """Up to and including /v1."""

    api_key_env: str | None = "OPENAI_API_KEY"
    """Name of the environment variable with the key; null for a server that asks for none. Never the key itself."""

    max_concurrency: Annotated[int, Field(ge=1)] = 32
    """Most requests in flight per replica. Falls on 429 and climbs back."""

    timeout_s: Annotated[float, Field(gt=0)] = 600.0
    """Seconds for one request, connection to last byte."""

    extra_body: dict[str, Any] = {}
    """Sent with every request as it is, for server-specific parameters."""

    @model_validator(mode="after")
    def _logprobs_are_allowed(self) -> OpenAIEngineConfig:
        if urlsplit(self.base_url).hostname == "api.openai.com" and self.sampling.top_logprobs > OPENAI_TOP_LOGPROBS:
            raise ValueError(
                f"sampling.top_logprobs is {self.sampling.top_logprobs}, and OpenAI's API gives {OPENAI_TOP_LOGPROBS} "
                "at most; lower it"
            )
        return self

    @property
    def capabilities(self) -> frozenset[str]:
        """What this engine can do beside answering."""
        return frozenset({"generate", "top_logprobs", "structured"})


class FakeEngineConfig(BaseEngineConfig):
    """Deterministic answers without a model: for tests, dry runs, and breaking things on purpose.

    Whether a request fails is a function of (`seed`, prompt, attempt), so a test can rely on it.
    """

    type: Literal["fake"] = "fake"

    gpus: Annotated[int, Field(ge=0)] = 0
    """GPUs that Ray reserves per replica, to try out how a cluster grows. None is used."""

    answer: str = "{{ query }}"
    """Jinja template of the answer over `query` (the last user message), `system`, `sample_index`."""

    latency_s: Annotated[float, Field(ge=0)] = 0.0
    """Seconds that every answer takes."""

    transient_error_rate: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of attempts that fail with an error that may pass; retried like any other."""

    fatal_error_rate: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of prompts for which every attempt fails with an error that may pass (ends as `engine_error`)."""

    empty_rate: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of prompts answered with nothing."""

    cut_off_rate: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of prompts whose answer ends with finish_reason `length`."""

    refusal_rate: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of prompts answered with a refusal."""

    unavailable: bool = False
    """Fail at start, as an engine with a wrong key does."""

    failure_seed: int = 0
    """Which prompts the rates above pick."""

    max_model_len: Annotated[int, Field(ge=1)] | None = None
    """Reject prompts of more words than this as `prompt_too_long`."""

    @property
    def num_gpus(self) -> int:
        """GPUs per replica."""
        return self.gpus

    @property
    def capabilities(self) -> frozenset[str]:
        """What this engine can do beside answering."""
        return frozenset({"generate", "structured"})


class NoEngineConfig(BaseEngineConfig):
    """Nobody: for a recipe whose answers are in the data. The default there."""

    type: Literal["none"] = "none"

    @property
    def capabilities(self) -> frozenset[str]:
        """Nothing."""
        return frozenset()


BuiltInEngineConfig = VllmEngineConfig | OpenAIEngineConfig | HfEngineConfig | FakeEngineConfig | NoEngineConfig
EngineConfig = Annotated[BuiltInEngineConfig | BaseEngineConfig, Variants(Group.ENGINES)]
