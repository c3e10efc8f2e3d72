"""Tokens on disk: what was written comes back, and batches are cut from it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from distill_ray.student.module import collate
from distill_ray.student.tokens import TokenizedExample, Tokens, TokenWriter


def example(row_id: str, task: str, weight: float, prompt: list[int], completion: list[int]) -> TokenizedExample:
    return TokenizedExample(f"{row_id}/{task}/0", row_id, task, weight, prompt, completion)


@pytest.fixture
def tokens(tmp_path: Path) -> Tokens:
    with TokenWriter(tmp_path) as writer:
        writer.write([example("a", "label", 1.0, [5, 6], [7]), example("a", "rationale", 0.5, [5], [8, 9])])
        writer.write([example("b", "label", 2.0, [5, 6, 7], [8])])
    return Tokens(tmp_path)


def test_what_was_written_comes_back(tokens: Tokens) -> None:
    assert len(tokens) == 3
    assert [tokens.ids(e).tolist() for e in range(3)] == [[5, 6, 7], [5, 8, 9], [5, 6, 7, 8]]
    assert tokens.rows_E.tolist() == [0, 0, 1]
    assert [tokens.task_names[t] for t in tokens.tasks_E] == ["label", "rationale", "label"]
    assert tokens.task_tokens(np.array([0, 1, 2])).tolist() == [2, 2]
    assert tokens.row_ids(np.array([2, 0, 1])) == ["b", "a"]


def test_an_empty_split_can_be_opened(tmp_path: Path) -> None:
    with TokenWriter(tmp_path):
        pass
    assert len(Tokens(tmp_path)) == 0


def test_a_causal_batch_predicts_each_completion_token_from_the_position_before(tokens: Tokens) -> None:
    examples = np.array([0, 1, 2])
    batch = collate(tokens, examples, tokens.task_tokens(examples), pad_id=0)
    assert batch.ids_BT.tolist() == [[5, 6, 7, 0], [5, 8, 9, 0], [5, 6, 7, 8]]
    assert batch.predicts_BT.int().tolist() == [[0, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0]]
    assert batch.targets.ids_N.tolist() == [7, 8, 9, 8]
    assert batch.targets.coefficients_N.tolist() == [0.5, 0.25, 0.25, 1.0]  # weight / tokens of the task in the step


def test_a_seq2seq_batch_keeps_prompt_and_completion_apart(tokens: Tokens) -> None:
    examples = np.array([0, 1])
    batch = collate(tokens, examples, tokens.task_tokens(examples), pad_id=0, decoder_start_id=3)
    assert batch.ids_BT.tolist() == [[5, 6], [5, 0]]
    assert batch.mask_BT.int().tolist() == [[1, 1], [1, 0]]
    assert batch.decoder_ids_BT is not None
    assert batch.decoder_ids_BT.tolist() == [[3, 0], [3, 8]]
    assert batch.predicts_BT.int().tolist() == [[1, 0], [1, 1]]
    assert batch.targets.ids_N.tolist() == [7, 8, 9]
