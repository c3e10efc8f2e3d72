"""The KL on the teacher's top k against the KL of full distributions, by torch and by TRL."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from distill_ray.config.train import TopkKlConfig
from distill_ray.engines.vllm import _top_k
from distill_ray.records import EXAMPLE_SCHEMA, Example, examples_table
from distill_ray.student.losses import Targets, compute_loss, topk_kl
from distill_ray.student.module import collate
from distill_ray.student.tokens import TokenizedExample, Tokens, TokenWriter

V = 50


def logits(seed: int, rows: int = 4, size: int = V, scale: float = 3.0) -> Tensor:
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(seed)) * scale


def top(teacher_NV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Ids and log-probabilities, as an engine gives them."""
    best = teacher_NV.log_softmax(-1).topk(k)
    return best.indices, best.values


def dense_kl(student_NV: Tensor, teacher_NV: Tensor, temperature: float = 1.0) -> Tensor:
    student, teacher = ((x / temperature).log_softmax(-1) for x in (student_NV, teacher_NV))
    return F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)


@settings(deadline=None)
@given(
    seed=st.integers(0, 10**6),
    k=st.integers(1, V),
    scale=st.floats(0.0, 30.0),
    temperature=st.floats(0.5, 8.0),
)
def test_it_is_never_negative_and_never_above_the_kl_of_full_distributions(
    seed: int, k: int, scale: float, temperature: float
) -> None:
    student, teacher = logits(seed, scale=scale), logits(seed + 1, scale=scale)
    kl = topk_kl(student, *top(teacher, k), temperature=temperature)
    assert (kl >= -1e-5).all()
    if temperature == 1.0:  # merging outcomes loses information (log sum inequality)
        assert (kl <= dense_kl(student, teacher) + 1e-3).all()


@settings(deadline=None)
@given(seed=st.integers(0, 10**6), k=st.integers(1, V), temperature=st.floats(0.5, 8.0))
def test_it_is_zero_where_the_student_is_the_teacher(seed: int, k: int, temperature: float) -> None:
    teacher = logits(seed)
    # The bucket is 1 minus a sum; a temperature magnifies what rounding leaves of a small one.
    tolerance = 1e-5 if temperature <= 1 else 1e-3
    assert topk_kl(teacher, *top(teacher, k), temperature=temperature).abs().max() < tolerance


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_with_the_whole_vocabulary_value_and_gradient_are_those_of_the_dense_kl(temperature: float) -> None:
    student, teacher = logits(0).requires_grad_(), logits(1)
    again = student.detach().clone().requires_grad_()
    value = topk_kl(student, *top(teacher, V), temperature=temperature).sum()
    dense = dense_kl(again, teacher, temperature).sum()
    value.backward()
    dense.backward()
    torch.testing.assert_close(value, dense, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(student.grad, again.grad, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_it_equals_trls_generalised_jsd_at_beta_0(temperature: float) -> None:
    from trl.experimental.gkd import GKDTrainer

    student, teacher = logits(2, rows=6), logits(3, rows=6)
    theirs = GKDTrainer.generalized_jsd_loss(
        student[None], teacher[None], beta=0.0, temperature=temperature, reduction="sum"
    )
    targets = Targets(torch.zeros(6, dtype=torch.int64), torch.ones(6), *top(teacher, V))
    ours = compute_loss(TopkKlConfig(temperature=temperature), student, targets)
    torch.testing.assert_close(ours, temperature**2 * theirs, atol=1e-4, rtol=1e-5)


def test_the_gradient_with_a_bucket_pulls_the_bucket_too() -> None:
    """At the optimum the student has the teacher's top k, and the rest of its mass anywhere else."""
    teacher = logits(4, rows=1)
    ids, logprobs = top(teacher, 5)
    student = torch.zeros(1, V, requires_grad=True)
    optimizer = torch.optim.Adam([student], lr=0.1)
    for _ in range(500):
        loss = topk_kl(student, ids, logprobs).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    learnt = student.detach().log_softmax(-1).gather(-1, ids)
    torch.testing.assert_close(learnt.exp(), logprobs.exp(), atol=1e-2, rtol=0)


def test_rows_that_pad_the_teachers_head_count_as_part_of_the_bucket() -> None:
    teacher = logits(5, size=V + 8)
    wide = top(teacher, V + 8)
    narrow = topk_kl(logits(6), *wide)
    assert torch.isfinite(narrow).all()
    assert (narrow >= 0).all()


def test_a_batch_without_tokens_gives_zero_with_a_gradient_path() -> None:
    student = torch.zeros(0, V, requires_grad=True)
    empty = Targets(torch.zeros(0, dtype=torch.int64), torch.zeros(0), *top(torch.zeros(0, V), 3))
    loss = compute_loss(TopkKlConfig(ce_weight=0.5), student, empty)
    loss.backward()
    assert loss.item() == 0.0
    assert student.grad is not None


def test_ce_weight_mixes_in_the_cross_entropy_on_the_text() -> None:
    student, teacher = logits(7), logits(8)
    ids = torch.tensor([1, 2, 3, 4])
    coefficients = torch.tensor([1.0, 0.5, 0.25, 2.0])
    targets = Targets(ids, coefficients, *top(teacher, 10))
    kl = topk_kl(student, *top(teacher, 10), temperature=2.0)
    mixed = compute_loss(TopkKlConfig(temperature=2.0, ce_weight=0.3), student, targets)
    by_hand = 0.7 * 4 * kl + 0.3 * F.cross_entropy(student, ids, reduction="none")
    torch.testing.assert_close(mixed, (by_hand * coefficients).sum())


def test_soft_targets_are_read_back_for_any_choice_of_examples(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    examples = []
    for i in range(5):
        size = int(rng.integers(1, 6))
        ids = rng.integers(0, V, (size, 3)).astype(np.int32)
        examples.append(
            TokenizedExample(
                f"{i}", f"{i}", "answer", 1.0, [1, 2], ids[:, 0].tolist(), ids, rng.random((size, 3), np.float32)
            )
        )
    with TokenWriter(tmp_path, topk=3) as writer:
        writer.write(examples)
    tokens = Tokens(tmp_path)
    assert tokens.topk == 3
    chosen = np.array([3, 0, 4])
    batch = collate(tokens, chosen, tokens.task_tokens(chosen), pad_id=0)
    assert batch.targets.topk_ids_NK is not None
    expected = np.concatenate([examples[i].topk_ids for i in chosen])
    assert batch.targets.topk_ids_NK.tolist() == expected.tolist()
    assert batch.targets.topk_ids_NK[:, 0].tolist() == batch.targets.ids_N.tolist()
    logprobs = np.concatenate([examples[i].topk_logprobs for i in chosen])
    np.testing.assert_array_equal(batch.targets.topk_logprobs_NK, logprobs)
    nothing = collate(tokens, np.zeros(0, dtype=np.int64), tokens.task_tokens(chosen), pad_id=0)
    assert nothing.targets.topk_ids_NK is not None
    assert nothing.targets.topk_ids_NK.shape == (0, 3)


def test_an_unused_place_of_the_k_is_no_outcome() -> None:
    """As of the end that is appended where a stop string ended the answer, and of servers that give fewer than k."""
    student = logits(9, rows=1)
    ids, logprobs = torch.tensor([[3, 3, 0]]), torch.tensor([[0.0, -torch.inf, -torch.inf]])
    certain = topk_kl(student, ids, logprobs)
    torch.testing.assert_close(certain, -student.log_softmax(-1)[:, 3], atol=1e-4, rtol=1e-4)


def test_vllms_flat_lists_become_the_top_k_without_the_sampled_token() -> None:
    flat = SimpleNamespace(  # the first position is a prompt's, without a distribution
        start_indices=[0, 0, 3],
        end_indices=[0, 3, 6],
        token_ids=[7, 7, 5, 9, 2, 3],
        logprobs=[-0.5, -0.5, -1.5, -4.0, -0.25, -2.0],
    )
    ids, values = _top_k(flat, 2, skip=1)
    assert ids is not None
    assert values is not None
    assert (ids.dtype, values.dtype) == (np.int32, np.float32)
    assert ids.tolist() == [[7, 5], [2, 3]]
    assert values.tolist() == [[-0.5, -1.5], [-0.25, -2.0]]
    nothing = SimpleNamespace(start_indices=[], end_indices=[], token_ids=[], logprobs=[])
    assert [array.shape for array in _top_k(nothing, 2) if array is not None] == [(0, 2), (0, 2)]
    assert _top_k(None, 2) == _top_k(flat, 0) == (None, None)


def test_examples_with_and_without_soft_targets_share_a_table() -> None:
    def example(name: str, tokens: int, k: int) -> Example:
        ids = np.arange(tokens * k, dtype=np.int32).reshape(tokens, k)
        return Example(
            name, "train", [], "x", topk_ids=ids, topk_logprobs=-ids.astype(np.float32), tail_logprob=-ids.sum(axis=1)
        )

    plain = Example("plain", "train", [], "x")
    table = examples_table([plain, example("a", 2, 3), example("b", 0, 3), plain, example("c", 1, 2)])
    table.validate(full=True)
    assert table.schema.equals(EXAMPLE_SCHEMA, check_metadata=True)
    assert table["topk_ids"].to_pylist() == [None, [[0, 1, 2], [3, 4, 5]], [], None, [[0, 1]]]
    assert table["topk_logprobs"].to_pylist() == [None, [[0, -1, -2], [-3, -4, -5]], [], None, [[0, -1]]]
    assert table["tail_logprob"].to_pylist() == [None, [-3, -12], [], None, [-1]]
    for examples in ([], [plain]):
        assert examples_table(examples).schema.equals(EXAMPLE_SCHEMA, check_metadata=True)
