"""Loss terms: pure functions of tensors. What an example is worth is decided before, by whoever wrote its
weight.

Shapes: N completion tokens of a micro-batch, V vocabulary.

A token's coefficient is weight / (completion tokens of its task in the whole optimizer step), so the sum over
all tokens of all workers and accumulation rounds is

    sum over tasks of  (sum over the task's tokens of weight x loss) / (number of the task's tokens)

and no micro-batch needs to know of another.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def weighted_cross_entropy(logits_NV: Tensor, targets_N: Tensor, coefficients_N: Tensor) -> Tensor:
    """Sum of coefficient x -log p(target), in nats, computed in fp32. 0 (with a gradient path) for N = 0."""
    losses_N = F.cross_entropy(logits_NV.float(), targets_N, reduction="none")
    return torch.sum(losses_N * coefficients_N)


LossFunction = Callable[[Tensor, Tensor, Tensor], Tensor]

LOSSES: dict[str, LossFunction] = {"cross_entropy": weighted_cross_entropy}


def compute_loss(name: str, logits_NV: Tensor, targets_N: Tensor, coefficients_N: Tensor) -> Tensor:
    """The loss of a micro-batch by its name."""
    return LOSSES[name](logits_NV, targets_N, coefficients_N)
