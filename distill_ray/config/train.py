"""`student:` and `train:` which model learns, and how. One trainer for every recipe."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from distill_ray.config.base import Config, FilePath, Range
from distill_ray.config.engine import DEMO_MODEL


class LoraConfig(Config):
    """Low-rank adapters (PEFT) instead of all weights."""

    rank: Annotated[int, Field(ge=1)] = 32
    """Rank of each adapter."""

    alpha: Annotated[float, Field(gt=0)] | None = None
    """Scale; default 2 x rank."""

    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the adapter's input."""

    target_modules: list[str] | Literal["all-linear"] = "all-linear"
    """Which layers get one."""

    merge: bool = False
    """Write the merged model to `student/` (and keep the adapter in `student/adapter/`)."""


class StudentConfig(Config):
    """The model that learns."""

    model: str = DEMO_MODEL
    """A folder, the URL of one in a store (s3://...), a hub id, or `demo`."""

    revision: str | None = None
    """Commit or tag of a hub model."""

    lora: LoraConfig | None = None
    """Adapters; without it all weights are trained."""

    adapter: FilePath | None = None
    """A folder of trained adapters (safetensors) to go on from. With `lora` they are trained on, else they are merged
    into the weights before all of them are trained."""

    trust_remote_code: bool = False
    """Runs code that ships with the model. Leave it off unless you have read that code."""

    chat_template: FilePath | None = None
    """A Jinja file, for a model that ships none."""

    chat_template_kwargs: dict[str, Any] = {}
    """Passed to the chat template, for example {enable_thinking: false}."""

    engine_kwargs: dict[str, Any] = {}
    """Arguments of vLLM's engine when the student is evaluated."""


class DeepSpeedConfig(Config):
    """DeepSpeed's part. https://www.deepspeed.ai/docs/config-json/"""

    zero_stage: Literal[0, 1, 2, 3] = 2
    """What is sharded over the workers: 1 optimizer states, 2 gradients too, 3 parameters too."""

    offload_optimizer: bool = False
    """Keep optimizer states in CPU memory (GPU training only)."""


class CrossEntropyConfig(Config):
    """The teacher's text, token by token."""

    type: Literal["cross_entropy"] = "cross_entropy"


class TopkKlConfig(Config):
    """Soft targets: the teacher's most probable tokens and their log-probabilities, with one bucket for all others.

    Needs `teacher.sampling.top_logprobs`, and a student with the teacher's tokenizer. With the `context` recipe this is
    the loss of Askell et al. 2021 (arXiv 2112.00861): the student matches the distribution of the prompted teacher.
    """

    type: Literal["topk_kl"] = "topk_kl"

    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Softens both sides where it is above 1; the loss is multiplied by its square."""

    ce_weight: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of cross-entropy on the teacher's text in the loss."""


LossConfig = Annotated[CrossEntropyConfig | TopkKlConfig, Field(discriminator="type")]


class Workers(Range):
    """Training processes that start together: `max` of them or, where so many have no room, fewer, from `min` up.

    Data and steps are those of `max` workers, whatever their number: fewer of them share the same parts of each step.
    """

    @property
    def allowed(self) -> list[int]:
        """How many there may be, most first: the divisors of `max`, so that all of them have as much to do."""
        return [count for count in range(self.max, self.min - 1, -1) if self.max % count == 0]

    @property
    def fewest(self) -> int:
        """The least of `allowed`."""
        return self.allowed[-1]


class TrainConfig(Config):
    """The training loop."""

    loss: LossConfig = CrossEntropyConfig()
    """What the student's predictions are held against."""

    epochs: Annotated[int, Field(ge=1)] = 3
    """Passes over the data."""

    max_steps: Annotated[int, Field(ge=1)] | None = None
    """Stop after so many optimizer steps, whatever `epochs` says."""

    learning_rate: Annotated[float, Field(gt=0)] = 1.0e-4
    """Peak. 1e-4 suits LoRA; full fine-tuning of a large model wants about a tenth."""

    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """From the peak down to 0 (or not)."""

    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.03
    """Share of steps over which the rate climbs from 0."""

    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW's."""

    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients are clipped to this norm."""

    max_length: Annotated[int, Field(ge=8)] | None = None
    """Tokens of prompt + completion. Longer examples are counted rejects (`too_long_to_train`), never cut.
    Default: 2048, or max_tokens_per_batch where that is less."""

    max_tokens_per_batch: Annotated[int, Field(ge=8)] = 16384
    """Padded tokens per worker and forward pass."""

    gradient_accumulation: Annotated[int, Field(ge=1)] = 1
    """Forward passes per worker and optimizer step. A step sees max_tokens_per_batch x workers x this many tokens."""

    workers: Workers = Workers()
    """Training processes: a number, or {min, max} to start with fewer where there is no room for max. How many there
    may be divides max: each of 2 of 4 makes twice as many forward passes per step, and the result is the same."""

    gpus_per_worker: Literal[0, 1] | None = None
    """Default: 1 where the nodes with `node_labels` have a GPU, or the cluster adds such a node, and the student is not
    `demo`, else 0. What evaluates the student has as many."""

    cpus_per_worker: Annotated[float, Field(gt=0)] = 1.0
    """CPUs that Ray reserves per worker."""

    node_labels: dict[str, str] = {}
    """Only nodes of the cluster with these labels hold a worker, or an engine that evaluates the student."""

    threads_per_worker: Annotated[int, Field(ge=1)] | None = None
    """Torch threads, fixed so that a resumed CPU run repeats exactly. Default: cpus_per_worker."""

    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """`auto`: bf16 on GPU, fp32 on CPU."""

    gradient_checkpointing: bool = False
    """Trade compute for memory."""

    deepspeed: DeepSpeedConfig = DeepSpeedConfig()
    """DeepSpeed's part."""

    validate_every: Annotated[int, Field(ge=1)] | None = None
    """Optimizer steps between validations (each also saves a checkpoint). Default: once per epoch."""

    max_failures: Annotated[int, Field(ge=0)] = 3
    """Restarts from the last checkpoint after a worker died."""

    seed: int = 0
    """Data order, adapters' initial weights, dropout."""

    tensorboard: bool = True
    """Write TensorBoard events to `logs/tensorboard/`."""

    @model_validator(mode="after")
    def _one_example_fits_a_batch(self) -> TrainConfig:
        if self.max_length is not None and self.max_length > self.max_tokens_per_batch:
            raise ValueError(
                f"max_length ({self.max_length}) is above max_tokens_per_batch ({self.max_tokens_per_batch}): "
                "one example would not fit; raise max_tokens_per_batch or lower max_length"
            )
        return self

    @property
    def num_parts(self) -> int:
        """Forward passes of an optimizer step, of all workers together."""
        return self.workers.max * self.gradient_accumulation

    @property
    def deciding(self) -> dict[str, Any]:
        """What decides the trained weights: all keys but those of how it is executed, which may differ in a resume."""
        executed = {"max_failures", "tensorboard", "cpus_per_worker", "node_labels"}
        return {**self.model_dump(mode="json", exclude=executed), "workers": self.workers.max}

    @property
    def longest_example(self) -> int:
        """`max_length` with its default resolved, in tokens."""
        return self.max_length or min(2048, self.max_tokens_per_batch)
