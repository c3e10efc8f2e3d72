"""The plan of an epoch: nothing lost, nothing twice, budgets kept, and no trace of how a step is dealt out."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill_ray.config.train import Workers
from distill_ray.student.batches import Ints, parts_of, plan_epoch, plan_in_order, split_step

MAX_TOKENS = 64

# A row is the lengths of its examples.
rows_strategy = st.lists(st.lists(st.integers(2, MAX_TOKENS), min_size=1, max_size=5), max_size=60)


def flat(rows: list[list[int]]) -> tuple[Ints, Ints]:
    lengths = np.array([length for row in rows for length in row], dtype=np.int64)
    return lengths, np.repeat(np.arange(len(rows)), [len(row) for row in rows]).astype(np.int64)


@settings(max_examples=150, deadline=None)
@given(rows=rows_strategy, num_parts=st.integers(1, 6), epoch=st.integers(0, 3))
def test_every_example_is_in_exactly_one_step_and_every_part_keeps_its_budget(
    rows: list[list[int]], num_parts: int, epoch: int
) -> None:
    lengths, row_numbers = flat(rows)
    steps = plan_epoch(lengths, row_numbers, max_tokens=MAX_TOKENS, num_parts=num_parts, seed=1, epoch=epoch)
    seen = [e for step in steps for e in step]
    assert sorted(seen) == list(range(len(lengths)))
    for step in steps:
        parts = split_step(step, lengths, max_tokens=MAX_TOKENS, num_parts=num_parts)
        assert len(parts) == num_parts
        assert sorted(e for part in parts for e in part) == sorted(step)
        assert all(len(part) * lengths[part].max() <= MAX_TOKENS for part in parts if len(part))


@settings(max_examples=100, deadline=None)
@given(rows=rows_strategy, num_parts=st.integers(2, 6))
def test_the_examples_of_a_row_share_a_step_unless_they_cannot(rows: list[list[int]], num_parts: int) -> None:
    lengths, row_numbers = flat(rows)
    steps = plan_epoch(lengths, row_numbers, max_tokens=MAX_TOKENS, num_parts=num_parts, seed=1, epoch=0)
    step_of = {int(e): i for i, step in enumerate(steps) for e in step}
    for row in range(len(rows)):
        mine = np.flatnonzero(row_numbers == row)
        try:
            split_step(mine, lengths, max_tokens=MAX_TOKENS, num_parts=num_parts)
        except ValueError:
            continue  # larger than a whole step
        assert len({step_of[int(e)] for e in mine}) == 1


@settings(max_examples=50, deadline=None)
@given(lengths=st.lists(st.integers(2, MAX_TOKENS), min_size=1, max_size=40), num_parts=st.integers(1, 5))
def test_validation_sees_every_example_once_within_budget(lengths: list[int], num_parts: int) -> None:
    lengths_E = np.array(lengths, dtype=np.int64)
    steps = plan_in_order(lengths_E, max_tokens=MAX_TOKENS, num_parts=num_parts)
    assert sorted(e for step in steps for e in step) == list(range(len(lengths)))
    for step in steps:
        split_step(step, lengths_E, max_tokens=MAX_TOKENS, num_parts=num_parts)  # raises where it does not fit


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    lengths = np.random.default_rng(0).integers(5, 60, 500)
    rows = np.arange(500)

    def order(seed: int, epoch: int) -> list[list[int]]:
        steps = plan_epoch(lengths, rows, max_tokens=256, num_parts=2, seed=seed, epoch=epoch)
        return [step.tolist() for step in steps]

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1)
    assert order(0, 0) != order(1, 0)


def test_padding_is_a_few_percent_where_random_batches_would_pad_a_third() -> None:
    lengths = np.random.default_rng(0).integers(10, 200, 20_000)
    steps = plan_epoch(lengths, np.arange(20_000), max_tokens=4096, num_parts=2, seed=0, epoch=0)
    parts = [p for s in steps for p in split_step(s, lengths, max_tokens=4096, num_parts=2) if len(p)]
    padded = sum(len(part) * int(lengths[part].max()) for part in parts)
    assert lengths.sum() / padded > 0.97


def test_parts_of_a_step_are_balanced_in_padded_tokens() -> None:
    lengths = np.array([60, 10, 10, 10, 10, 10, 10])
    parts = split_step(np.arange(7), lengths, max_tokens=1000, num_parts=2)
    assert [len(part) for part in parts] == [1, 6]


def test_fewer_examples_than_parts_leave_some_parts_empty() -> None:
    parts = split_step(np.array([0]), np.array([7]), max_tokens=64, num_parts=3)
    assert [len(part) for part in parts] == [1, 0, 0]


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="do not fit 1 micro-batches of 10 tokens"):
        split_step(np.arange(3), np.array([8, 8, 8]), max_tokens=10, num_parts=1)


@given(full=st.integers(1, 12), accumulation=st.integers(1, 3))
def test_fewer_workers_have_the_parts_of_all_of_them_each_as_many(full: int, accumulation: int) -> None:
    num_parts = full * accumulation
    for few in Workers(min=1, max=full).allowed:
        shares = [parts_of(worker, num_workers=few, num_parts=num_parts) for worker in range(few)]
        assert {len(share) for share in shares} == {num_parts // few}
        assert sorted(part for share in shares for part in share) == list(range(num_parts))
