"""Loss terms: pure functions of tensors. What an example is worth is decided before, by whoever wrote its
weight.

Shapes: N completion tokens of a micro-batch, V vocabulary, K the teacher's most probable tokens per position.

A token's coefficient is weight / (completion tokens of its task in the whole optimizer step), so the sum over
all tokens of all workers and accumulation rounds is

    sum over tasks of  (sum over the task's tokens of weight x loss) / (number of the task's tokens)

and no micro-batch needs to know of another.

Every term is 0 with a gradient path where N is 0: a worker without tokens still takes part in the step.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from distill_ray.config.train import CrossEntropyConfig, LossConfig, TopkKlConfig

IMPOSSIBLE = -1e30  # a log-probability; not -inf, for 0 x inf is no number
MIN_TAIL = 1e-7  # probability outside the top k: what fp32 can tell from 0 when it is 1 minus a sum


@dataclasses.dataclass(slots=True)
class Targets:
    """What the logits of a micro-batch are held against."""

    ids_N: Tensor
    coefficients_N: Tensor
    topk_ids_NK: Tensor | None = None
    topk_logprobs_NK: Tensor | None = None  # natural logs, of the untempered distribution


def compute_loss(config: LossConfig, logits_NV: Tensor, targets: Targets) -> Tensor:
    """The loss of a micro-batch, in nats."""
    if isinstance(config, CrossEntropyConfig):
        return weighted_cross_entropy(logits_NV, targets)
    return weighted_topk_kl(logits_NV, targets, config)


def weighted_cross_entropy(logits_NV: Tensor, targets: Targets) -> Tensor:
    """Sum of coefficient x -log p(target), in nats, computed in fp32."""
    losses_N = F.cross_entropy(logits_NV.float(), targets.ids_N, reduction="none")
    return torch.sum(losses_N * targets.coefficients_N)


def weighted_topk_kl(logits_NV: Tensor, targets: Targets, config: TopkKlConfig) -> Tensor:
    """Sum of coefficient x ((1 - ce_weight) T^2 KL + ce_weight x cross-entropy).

    T^2 keeps the gradient's size independent of the temperature (Hinton et al. 2015, arXiv 1503.02531, section 2).
    """
    assert targets.topk_ids_NK is not None
    assert targets.topk_logprobs_NK is not None
    logits_NV = logits_NV.float()
    kl_N = topk_kl(logits_NV, targets.topk_ids_NK, targets.topk_logprobs_NK, temperature=config.temperature)
    losses_N = (1 - config.ce_weight) * config.temperature**2 * kl_N
    if config.ce_weight:
        losses_N = losses_N + config.ce_weight * F.cross_entropy(logits_NV, targets.ids_N, reduction="none")
    return torch.sum(losses_N * targets.coefficients_N)


def topk_kl(logits_NV: Tensor, topk_ids_NK: Tensor, topk_logprobs_NK: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Forward KL from the teacher's top k and one bucket for all other tokens to the student's. [N], in nats, >= 0.

    Without the bucket a truncated KL is none: it goes below 0 where the student puts more on the k than the teacher
    did, and training pulls it there (verl-project/verl#7856). Both sides are distributions over K + 1 outcomes;
    a temperature softens those, since nothing is known of how the bucket's inside would be softened. With K = V and
    any temperature it is the KL of the full distributions.

    The student's log-probabilities are gathered from logits minus their logsumexp: no [N, V] of log-probabilities is
    made beside the logits.

    Args:
        logits_NV: the student's, fp32.
        topk_ids_NK: the teacher's tokens. One outside the student's vocabulary counts as part of the bucket.
        topk_logprobs_NK: their log-probabilities, untempered.
        temperature: softens both sides where it is above 1.
    """
    known_NK = topk_ids_NK < logits_NV.shape[-1]  # models pad their head's rows to different sizes
    ids_NK = topk_ids_NK.masked_fill(~known_NK, 0)
    outcomes = [topk_logprobs_NK.float(), logits_NV.gather(-1, ids_NK) - logits_NV.logsumexp(-1, keepdim=True)]
    # An unused place of the K (-inf) is no outcome on either side, else it would count its token a second time.
    known_NK = known_NK & topk_logprobs_NK.isfinite()
    outcomes = [logprobs_NK.masked_fill(~known_NK, IMPOSSIBLE) for logprobs_NK in outcomes]
    if topk_ids_NK.shape[-1] < logits_NV.shape[-1]:
        outcomes = [_with_tail(logprobs_NK) for logprobs_NK in outcomes]
    teacher, student = ((logprobs / temperature).log_softmax(-1) for logprobs in outcomes)
    return F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)


def _with_tail(logprobs_NK: Tensor) -> Tensor:
    """The log-probability of everything else as one more outcome. [N, K + 1]"""
    tail_N1 = (1.0 - logprobs_NK.exp().sum(-1, keepdim=True)).clamp_min(MIN_TAIL).log()
    return torch.cat([logprobs_NK, tail_N1], dim=-1)
