"""Which examples meet in which optimizer step: a pure function of (lengths, rows, budget, seed, epoch).

    rows, shuffled -> chunks, each sorted by length -> steps by padded-token budget -> steps, shuffled
    one step -> `num_parts` micro-batches (workers x gradient accumulation), balanced in padded tokens

Two promises. All examples of one row (its label and its rationale, say) meet in one step, because their
losses belong together. And what a step holds depends only on the budget of the whole step, never on how its
parts are dealt out to workers and accumulation: 2 workers x 1 and 1 worker x 2 take the same steps, of the same
micro-batches.

A micro-batch costs (longest x count): what the forward pass computes, padding included.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]

# Steps per sorted chunk. Larger: less padding; smaller: more random company. At 64 padding is already a few
# percent.
STEPS_PER_CHUNK = 64


def plan_epoch(lengths_E: Ints, rows_E: Ints, *, max_tokens: int, num_parts: int, seed: int, epoch: int) -> list[Ints]:
    """Cut one epoch into optimizer steps.

    Args:
        lengths_E: tokens of each example.
        rows_E: number of the row that each example belongs to, ascending.
        max_tokens: padded tokens per micro-batch.
        num_parts: micro-batches per step.
        seed: of the run.
        epoch: each has an order of its own.

    Returns:
        Example indices of each step, in the order of the steps.
    """
    rng = np.random.default_rng([seed, epoch])
    starts_R, counts_R = _row_ranges(rows_E, lengths_E, max_tokens, num_parts)
    longest_R = np.maximum.reduceat(lengths_E, starts_R) if len(starts_R) else starts_R
    tokens_R = np.add.reduceat(lengths_E, starts_R) if len(starts_R) else starts_R
    order_R = rng.permutation(len(starts_R))
    chunk_R = np.cumsum(tokens_R[order_R]) // (STEPS_PER_CHUNK * max_tokens * num_parts)
    steps: list[Ints] = []
    for rows in np.split(order_R, np.flatnonzero(np.diff(chunk_R)) + 1):
        rows = rows[np.argsort(-longest_R[rows], kind="stable")]
        steps += _cut_rows(rows, starts_R, counts_R, lengths_E, max_tokens, num_parts)
    return [steps[i] for i in rng.permutation(len(steps))]


def plan_in_order(lengths_E: Ints, *, max_tokens: int, num_parts: int) -> list[Ints]:
    """Cut everything into steps by length, with no shuffling: for validation."""
    each = np.arange(len(lengths_E))
    order = np.argsort(-lengths_E, kind="stable")
    return _cut_rows(order, each, np.ones_like(each), lengths_E, max_tokens, num_parts)


def split_step(examples: Ints, lengths_E: Ints, *, max_tokens: int, num_parts: int) -> list[Ints]:
    """Deal a step's examples out to `num_parts` micro-batches so that the most expensive one is as cheap as
    possible.

    Some are empty where there are fewer examples than parts.
    """
    ordered = examples[np.argsort(-lengths_E[examples], kind="stable")]
    lengths = lengths_E[ordered]
    low, high = int(lengths[0]) if len(lengths) else 0, max_tokens
    while low < high:  # the smallest cap that still needs no more than num_parts micro-batches
        cap = (low + high) // 2
        low, high = (low, cap) if _num_batches(lengths, cap, num_parts) <= num_parts else (cap + 1, high)
    parts, begin = [], 0
    for _ in range(num_parts):
        end = min(len(ordered), begin + low // int(lengths[begin])) if begin < len(ordered) else begin
        parts.append(ordered[begin:end])
        begin = end
    if begin < len(ordered):
        raise ValueError(f"{len(ordered)} examples do not fit {num_parts} micro-batches of {max_tokens} tokens")
    return parts


def parts_of(worker: int, *, num_workers: int, num_parts: int) -> range:
    """Which of a step's micro-batches a worker takes: all workers as many, as `num_workers` divides `num_parts`."""
    return range(worker, num_parts, num_workers)


def _row_ranges(rows_E: Ints, lengths_E: Ints, max_tokens: int, num_parts: int) -> tuple[Ints, Ints]:
    """First example and number of examples of each row (the examples of a row are neighbours).

    A row too large for one step (many samples of a long answer) has to be taken apart: its examples go
    separate ways.
    """
    is_first = np.diff(rows_E, prepend=-1) != 0
    starts = np.flatnonzero(is_first)
    counts = np.diff(starts, append=len(rows_E))
    for start, count in zip(starts[counts > num_parts], counts[counts > num_parts], strict=True):
        lengths = -np.sort(-lengths_E[start : start + count])
        if _num_batches(lengths, max_tokens, num_parts) > num_parts:
            is_first[start : start + count] = True
    starts = np.flatnonzero(is_first)
    return starts, np.diff(starts, append=len(rows_E))


def _cut_rows(
    rows: Ints, starts_R: Ints, counts_R: Ints, lengths_E: Ints, max_tokens: int, num_parts: int
) -> list[Ints]:
    """Greedy: each step takes as many of the next rows as fit its `num_parts` micro-batches, at least one row."""
    steps, begin = [], 0
    while begin < len(rows):
        # Galloping search for the largest number of rows that fits: adding a row never makes a step fit better.
        fits, size = 1, 2
        while begin + fits < len(rows) and _fit(
            rows[begin : begin + size], starts_R, counts_R, lengths_E, max_tokens, num_parts
        ):
            fits, size = min(size, len(rows) - begin), size * 2
        too_many = min(size, len(rows) - begin + 1)
        while too_many - fits > 1:
            middle = (fits + too_many) // 2
            if _fit(rows[begin : begin + middle], starts_R, counts_R, lengths_E, max_tokens, num_parts):
                fits = middle
            else:
                too_many = middle
        steps.append(_examples_of(rows[begin : begin + fits], starts_R, counts_R))
        begin += fits
    return steps


def _fit(rows: Ints, starts_R: Ints, counts_R: Ints, lengths_E: Ints, max_tokens: int, num_parts: int) -> bool:
    lengths = -np.sort(-lengths_E[_examples_of(rows, starts_R, counts_R)])
    return _num_batches(lengths, max_tokens, num_parts) <= num_parts


def _num_batches(lengths: Ints, cap: int, limit: int) -> int:
    """Micro-batches of at most `cap` padded tokens that these lengths (descending) need; counting stops past
    `limit`.

    Longest first, each filled up, is optimal: the longest must be somewhere, and fills its batch best with
    the next ones.
    """
    count, begin = 0, 0
    while begin < len(lengths) and count <= limit:
        begin += max(1, cap // int(lengths[begin]))
        count += 1
    return count


def _examples_of(rows: Ints, starts_R: Ints, counts_R: Ints) -> Ints:
    counts = counts_R[rows]
    first = np.repeat(starts_R[rows], counts)
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return first + within
