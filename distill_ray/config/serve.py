"""`serve:` and `calibrate:` the router in front of student and teacher, what it collects, who may ask."""

from __future__ import annotations

import ipaddress
import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from distill_ray.config.base import Config, FilePath, Pattern
from distill_ray.config.engine import EngineConfig, Replicas

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
_HOST_NAME = re.compile(r"(?!-)[A-Za-z0-9-]{1,63}(?<!-)(\.(?!-)[A-Za-z0-9-]{1,63}(?<!-))*\.?")


def _is_host(host: str) -> str:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        if not _HOST_NAME.fullmatch(host) or host.replace(".", "").isdigit():
            raise ValueError(
                "not an address to listen on; give an IP address (127.0.0.1, 0.0.0.0, ::1) or a host name, without "
                "http:// and without a port"
            ) from None
    return host


def _is_local(folder: str) -> str:
    if "://" in folder:
        raise ValueError(
            "the service's folder is a local one (its routers and its keeper lock files there); on an object store may "
            "be pairs, with serve.collect.store.url, and bundles, with serve.bundles"
        )
    return folder


def _is_model_name(name: str) -> str:
    if not name or name != name.strip() or len(name) > 256:
        raise ValueError("a model name of 1 to 256 characters, without spaces around it")
    return name


class EmbedderConfig(Config):
    """What turns a request into a vector. Part of a bundle: another embedder makes its index useless."""

    model: str = MINILM
    """A sentence-transformers model: its name on the hub, or a folder. The default comes with the package."""

    revision: str | None = None
    """Commit or tag of a hub model."""

    runtime: Literal["auto", "onnx", "torch"] = "auto"
    """onnx: half the time for a short text on a CPU; made from the model once, compared with it, and kept in the
    user's cache. auto: onnx where that works, else torch."""

    precision: Literal["float32", "int8"] = "float32"
    """int8: a third of the time, where the processor has instructions for it. The vectors are a little different
    (cosine 0.97 and more), so it is another embedder: calibrate with it. Needs onnx."""

    batch_size: Annotated[int, Field(ge=1)] = 64
    """Texts embedded together, of requests that arrive at the same time."""

    threads: Annotated[int, Field(ge=1)] = 1
    """Of the runtime, per router replica."""

    @model_validator(mode="after")
    def _int8_is_onnx(self) -> EmbedderConfig:
        if self.precision == "int8" and self.runtime == "torch":
            raise ValueError("precision: int8 needs runtime: onnx (or auto)")
        return self


class FingerprintConfig(Config):
    """What makes two requests of one kind: system prompt, tools and response format are equal."""

    ignore: list[Pattern] = []
    """Regular expressions of parts that vary from request to request (dates, ids); masked before anything else."""


class CascadeConfig(Config):
    """The teacher instead of a student that is unsure of an answer that was not streamed."""

    min_mean_logprob: Annotated[float, Field(le=0.0)] = -0.5
    """Nats per token: an answer of which the student is less sure on average is replaced by the teacher's."""


class DriftConfig(Config):
    """Some of what the student answered is answered by the teacher too, later and unseen, and compared."""

    share: Annotated[float, Field(gt=0, le=1)] = 0.02
    """Of the student's answers."""

    max_tokens_per_day: Annotated[int, Field(ge=0)] = 200_000
    """Prompt and completion tokens of the teacher spent on that, by all routers together; UTC days."""

    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.95
    """With which the error budget is broken before the threshold rises, or the bundle is gone back from."""


class RouterConfig(Config):
    """The process in front."""

    replicas: Replicas = Replicas()
    """Router processes: a number, or {min, max} to scale with the load."""

    cpus: Annotated[float, Field(gt=0)] = 0.25
    """CPUs that Ray reserves per replica."""

    node_labels: dict[str, str] = {}
    """Only nodes of the cluster with these labels hold a router."""

    max_ongoing: Annotated[int, Field(ge=1)] = 256
    """Requests in work per replica."""

    max_queued: Annotated[int, Field(ge=0)] = 256
    """Requests that wait beyond that; the next one gets 503."""

    student_timeout_s: Annotated[float, Field(gt=0)] = 10.0
    """Seconds until the first words of a student's stream; then the teacher answers."""

    student_whole_timeout_s: Annotated[float, Field(gt=0)] = 60.0
    """Seconds until a student's answer that is not streamed; then the teacher answers."""

    timeout_s: Annotated[float, Field(gt=0)] = 300.0
    """Seconds between two pieces of an answer."""

    max_body_mb: Annotated[float, Field(gt=0)] = 4.0
    """Larger requests are refused (413)."""

    latch: Annotated[int, Field(ge=0)] = 10_000
    """Conversations remembered per replica: one that the teacher answered stays with the teacher."""


class ScalingConfig(Config):
    """When `replicas: {min, max}` of teacher, student and router grow and shrink."""

    target_ongoing: Annotated[int, Field(ge=1)] = 64
    """Requests in work per replica that is aimed at: more and one is added, less and one is taken away."""

    upscale_delay_s: Annotated[float, Field(ge=0)] = 10.0
    """Seconds that it has to be more."""

    downscale_delay_s: Annotated[float, Field(ge=0)] = 600.0
    """Seconds that it has to be less."""


class StoreConfig(Config):
    """Where collected pairs are kept."""

    type: Literal["lance", "qdrant"] = "lance"
    """lance: a folder or an object store, nothing to run. qdrant: a server."""

    url: FilePath | None = None
    """lance: a folder or s3://...; default: `pairs` in the service's folder. qdrant: http://HOST:6333."""

    collection: str = "pairs"
    """Name of the table or collection."""

    api_key_env: str | None = None
    """qdrant: name of the environment variable with its key."""

    @model_validator(mode="after")
    def _a_server_has_an_address(self) -> StoreConfig:
        if self.type == "qdrant" and self.url is None:
            raise ValueError("type: qdrant needs the url of its server (url: http://HOST:6333)")
        return self


class CollectConfig(Config):
    """Complete answers of the teacher, kept for the next training."""

    enabled: bool = True
    """Off where the teacher's terms forbid training on its answers."""

    store: StoreConfig = StoreConfig()
    """Where to."""

    spool_mb: Annotated[float, Field(gt=0)] = 256.0
    """Most that waits on each router's disk while the store is away; then pairs are dropped, and counted."""

    batch: Annotated[int, Field(ge=1)] = 256
    """Pairs written to the store together."""

    flush_s: Annotated[float, Field(gt=0)] = 2.0
    """Seconds that a pair waits for others at most."""

    compact_s: Annotated[float, Field(gt=0)] = 3600.0
    """Seconds between two compactions of the store; after 200 writes there is one in any case."""

    refusals: list[Pattern] = [r"(?i)^\s*(i'?m sorry|i am sorry|sorry,|i can't|i cannot|as an ai\b)"]
    """An answer that one of these finds is a refusal and is not kept. They find more than a recipe's: nobody paid for
    the answer in order to keep it. Curly apostrophes count as plain ones."""


class LimitsConfig(Config):
    """Per owner of a key. Counted over all routers, within a second."""

    requests_per_minute: Annotated[int, Field(ge=1)] | None = None
    """Then 429 with Retry-After."""

    teacher_tokens_per_day: Annotated[int, Field(ge=1)] | None = None
    """Prompt and completion tokens of the teacher, UTC days. Then 429; what the student answers goes on."""


class KeysConfig(Config):
    """Who may ask. Only hashes of keys are ever stored."""

    file: FilePath | None = None
    """JSON lines {"owner", "sha256"}. Default: `keys.jsonl` in the service's folder, where there is one."""

    env: str = "DISTILL_RAY_KEYS"
    """Environment variable with "owner:key,owner:key", read besides the file."""

    required: bool | None = None
    """Refuse requests without a key. Default: where there are keys, and on every address but loopback."""


class PricesConfig(Config):
    """Money per million tokens, for the savings shown. Any currency."""

    teacher_prompt: Annotated[float, Field(ge=0)] = 0.0
    teacher_completion: Annotated[float, Field(ge=0)] = 0.0
    student_prompt: Annotated[float, Field(ge=0)] = 0.0
    student_completion: Annotated[float, Field(ge=0)] = 0.0


class ServeConfig(Config):
    """One OpenAI-compatible endpoint in front of student and teacher."""

    folder: Annotated[FilePath, AfterValidator(_is_local)] | None = None
    """Bundles, collected pairs, keys and what waits to be stored: a local folder. Default: services/NAME where the
    command runs."""

    bundles: FilePath | None = None
    """Where the bundles are, and which of them serves: a folder that all nodes see, or s3://... where they share no
    file system, or where several clusters serve the same student. Each node keeps a copy of what it uses. Credentials
    come from the environment. Default: `bundles` in the service's folder."""

    host: Annotated[str, AfterValidator(_is_host)] = "127.0.0.1"
    """Address to listen on. Beyond loopback, keys are required unless `keys.required` says otherwise."""

    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    """Port of the endpoint."""

    teacher: EngineConfig | None = None
    """Who answers what the student does not. Default: the `teacher` above."""

    student: EngineConfig | None = None
    """What runs the bundle's student: vllm or hf here (its `model` is `bundle`), or an OpenAI-compatible URL that has
    it.
    Default: vllm; hf for an encoder-decoder model."""

    model_aliases: list[Annotated[str, AfterValidator(_is_model_name)]] = []
    """Model names of existing clients that mean `auto`."""

    pass_fields: list[str] = []
    """Fields of requests beyond OpenAI's that are handed to whoever answers; others are refused. Some show what the
    teacher is told before a client's words (vLLM: prompt_logprobs, return_token_ids, echo, chat_template)."""

    router: RouterConfig = RouterConfig()
    """The process in front."""

    scaling: ScalingConfig = ScalingConfig()
    """When replicas are added and taken away."""

    embedder: EmbedderConfig = EmbedderConfig()
    """Of `calibrate` and of the service. A bundle is bound to the one that it was made with: with another one the
    service refuses it, so change this and calibrate again."""

    fingerprint: FingerprintConfig = FingerprintConfig()
    """Which requests are of one kind."""

    guard: Literal["off", "strict"] = "off"
    """strict: other numbers, negations or names than in the nearest trained request, or that request with something
    else beside it: the teacher answers."""

    cascade: CascadeConfig | None = None
    """The teacher instead of a student that is unsure."""

    drift: DriftConfig | None = DriftConfig()
    """Whether the student is still as good as it was measured to be; null does not look."""

    degraded: Literal["off", "student"] = "off"
    """student: while the teacher is down the student answers everything that it can."""

    headers: bool = False
    """Tell in x-distill-route, -similarity, -reason and -bundle who answered and why."""

    show_requests: bool = False
    """Show the text of the last requests on the status page."""

    collect: CollectConfig = CollectConfig()
    """What is kept for the next training."""

    limits: LimitsConfig = LimitsConfig()
    """Per owner of a key."""

    keys: KeysConfig = KeysConfig()
    """Who may ask."""

    prices: PricesConfig = PricesConfig()
    """For the savings shown."""

    @model_validator(mode="after")
    def _is_reachable(self) -> ServeConfig:
        if "auto" in self.model_aliases or {"teacher", "student"} & set(self.model_aliases):
            raise ValueError("model_aliases: auto, teacher and student have their own meaning; name others")
        return self


class CalibrateConfig(Config):
    """For which requests the student is as good as the teacher."""

    error_budget: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Share of the student's answers that may be worse than the teacher's."""

    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.95
    """With which the budget holds."""

    metric: Literal["exact_match", "token_f1", "embedding", "judge"] = "exact_match"
    """How a student's answer is compared with the teacher's (with `evaluate.reference`: with what is right)."""

    good_from: Annotated[float, Field(ge=0, le=1)] = 0.8
    """token_f1, embedding, judge: an answer that scores this much is as good as the teacher's."""

    judge: EngineConfig | None = None
    """For `metric: judge`. Default: the teacher."""

    neighbours: Annotated[int, Field(ge=1, le=1000)] = 8
    """Nearest trained requests whose outcomes count."""

    far: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Requests less similar to anything trained than all but this share of the calibration's go to the teacher."""

    max_pairs: Annotated[int, Field(ge=10)] = 20_000
    """Pairs compared at most."""

    seed: Annotated[int, Field(ge=0)] = 0
    """Of the splits."""
