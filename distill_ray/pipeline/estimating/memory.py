"""What fits into a GPU: an engine with its key-value cache, a worker that trains.

Both are setups of plain numbers, so that "and with two GPUs?" is `dataclasses.replace` (see `remedies`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from distill_ray.pipeline.estimating.hardware import GIB, Gpu
from distill_ray.pipeline.estimating.sizes import ModelSize

VLLM_OVERHEAD = 2.0 * GIB
"""CUDA's context, CUDA graphs and the activations of one scheduled batch: 1 to 3 GiB in vLLM's start-up messages."""

TRAINING_OVERHEAD = 1.5 * GIB
"""CUDA's context and what the allocator cannot use."""

BLOCK = 16  # tokens of a block of vLLM's key-value cache
MAX_NUM_SEQS = 256  # vLLM's own default; larger on GPUs of 70 GiB and more
BUCKET = 500_000_000  # elements: DeepSpeed's reduce_bucket_size
LIVE_PARAMETERS = 1_000_000_000  # DeepSpeed's stage3_max_live_parameters


@dataclass(frozen=True, slots=True)
class EngineSetup:
    """One replica of an engine. Memory is of its fullest GPU, in bytes."""

    size: ModelSize
    gpu: Gpu
    tensor: int
    pipeline: int
    utilisation: float
    """Share of a GPU's memory that it takes."""

    weight_bytes: float
    """Of all GPUs together."""

    cache_dtype_bytes: float
    max_model_len: int
    max_num_seqs: int

    @property
    def num_gpus(self) -> int:
        """Of one replica."""
        return self.tensor * self.pipeline

    @property
    def weights(self) -> float:
        """Tensor and pipeline parallel both divide the weights."""
        return self.weight_bytes / self.num_gpus

    @property
    def cache_per_token(self) -> float:
        """Bytes of keys and values: 2 x layers x key-value heads x head size x bytes of a value.

        Pipeline parallel divides the layers; tensor parallel the heads, of which each GPU has at least one. A latent
        vector (MLA, arXiv 2405.04434, section 2.1) is on every GPU. Layers with a sliding window count like all others.
        """
        layers = math.ceil(self.size.num_layers / self.pipeline)
        values = self.size.latent or 2 * math.ceil(self.size.num_kv_heads / self.tensor) * self.size.head_dim
        return layers * values * self.cache_dtype_bytes

    @property
    def available(self) -> float:
        """What vLLM takes of a GPU."""
        return self.gpu.memory * self.utilisation

    @property
    def cache(self) -> float:
        """Room for keys and values: what weights and overhead leave; negative where they do not fit."""
        return self.available - self.weights - VLLM_OVERHEAD

    @property
    def needed(self) -> float:
        """With one sequence of `max_model_len`: with less vLLM does not start."""
        return self.weights + VLLM_OVERHEAD + self.sequence(self.max_model_len)

    @property
    def fits(self) -> bool:
        """Whether vLLM would start."""
        return self.needed <= self.available

    def sequence(self, tokens: float) -> float:
        """Bytes of one sequence's keys and values, in whole blocks."""
        return math.ceil(tokens / BLOCK) * BLOCK * self.cache_per_token

    def concurrent(self, tokens: float, shared: float = 0.0) -> int:
        """How many sequences of so many tokens are in the cache at once; `shared` of them are the same for all."""
        room = self.cache - self.sequence(shared)
        if room < self.sequence(tokens - shared):
            return 0
        return min(self.max_num_seqs, int(room // max(1.0, self.sequence(tokens - shared))))

    def longest(self) -> int:
        """Tokens of the longest sequence that has room."""
        return max(0, int(self.cache // self.cache_per_token) // BLOCK * BLOCK)


@dataclass(frozen=True, slots=True)
class TrainingSetup:
    """One worker of a training, a GPU each. Memory in bytes."""

    size: ModelSize
    gpu: Gpu
    workers: int
    zero_stage: int
    offload_optimizer: bool
    lora: bool
    dtype_bytes: int
    """2: bf16 with an fp32 master copy; 4: fp32."""

    max_tokens_per_batch: int
    gradient_checkpointing: bool
    completion_share: float
    """Of the tokens of a batch."""

    @property
    def trainable(self) -> int:
        """Parameters that have gradients."""
        return self.size.adapter_parameters if self.lora else self.size.parameters

    @property
    def parts(self) -> dict[str, float]:
        """What is in memory at the worst moment of a step."""
        return {
            "weights": self._weights(),
            "gradients": self._gradients(),
            "optimizer": 0.0 if self.offload_optimizer else self._sharded(self.optimizer_bytes, from_stage=1),
            "activations": self._activations(),
            "logits": self._logits(),
            "overhead": TRAINING_OVERHEAD,
        }

    @property
    def optimizer_bytes(self) -> float:
        """AdamW's two moments in fp32, and with bf16 the master copy.

        That is K = 12 bytes per parameter of ZeRO (Rajbhandari et al. 2019, arXiv 1910.02054, section 3.1).
        """
        return self.trainable * (12.0 if self.dtype_bytes == 2 else 8.0)

    @property
    def needed(self) -> float:
        """Sum of the parts."""
        return sum(self.parts.values())

    @property
    def available(self) -> float:
        """All of the GPU."""
        return self.gpu.memory

    @property
    def fits(self) -> bool:
        """Whether a step has room."""
        return self.needed <= self.available

    def _sharded(self, total: float, *, from_stage: int) -> float:
        """ZeRO, section 3 and 5: stage 1 shards optimizer states, 2 gradients too, 3 parameters too."""
        return total / self.workers if self.zero_stage >= from_stage else total

    def _weights(self) -> float:
        """Those of adapters come on top. ZeRO-3 gathers the layers at work, so many parameters at most."""
        held = self.size.parameters + (self.size.adapter_parameters if self.lora else 0)
        gathered = LIVE_PARAMETERS if self.zero_stage == 3 else 0
        return min(held, self._sharded(held, from_stage=3) + gathered) * self.dtype_bytes

    def _gradients(self) -> float:
        bucket = min(self.trainable, BUCKET) if self.zero_stage else 0
        return (self._sharded(self.trainable, from_stage=2) + bucket) * self.dtype_bytes

    def _activations(self) -> float:
        """What backward needs of the forward pass, for the padded tokens of a batch.

        Korthikanti et al. 2022 (arXiv 2205.05198), section 4, for a layer of today: no dropout, attention that keeps
        no matrix of scores (their 5as/h), a gated feed-forward layer, normalisation in fp32. With b bytes a value,
        h hidden, i intermediate, a and k the widths of queries and of keys, one token and layer need

            4 b i  (input of the activation, its output, the gate's output, their product)
          + 2 b (a + k)  (queries, keys, values, attention's output)
          + 2 (4 + 2 b) h  (two norms: fp32 input and result)

        A test holds this against what autograd saves. With checkpointing a layer keeps its input (b h; their section
        5, "full recomputation"), and one layer at a time is whole.
        """
        size, b = self.size, self.dtype_bytes
        widths = (size.num_heads + size.num_kv_heads) * size.head_dim
        layer = 4 * b * size.intermediate + 2 * b * widths + 2 * (4 + 2 * b) * size.hidden
        per_token = size.num_layers * layer
        if self.gradient_checkpointing:
            per_token = min(per_token, size.num_layers * b * size.hidden + layer)
        return float(per_token * self.max_tokens_per_batch)

    def _logits(self) -> float:
        """Logits, their copy in fp32 and the gradients of both. Completion tokens alone (see `student.module`)."""
        share = self.completion_share if self.size.head_is_separable else 1.0
        return share * self.max_tokens_per_batch * self.size.vocabulary * (2 * self.dtype_bytes + 8)
