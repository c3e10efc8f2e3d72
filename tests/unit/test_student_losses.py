"""Losses against numbers worked out by hand and against plain transformers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distill_ray.config.train import CrossEntropyConfig, LoraConfig, TopkKlConfig
from distill_ray.student.batches import split_step
from distill_ray.student.load import add_adapters
from distill_ray.student.losses import Targets, compute_loss, weighted_cross_entropy
from distill_ray.student.module import StudentModule, collate
from distill_ray.student.tokens import TokenizedExample, Tokens, TokenWriter

SIZES = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}


def causal(name: str) -> Any:
    """A random model of a family whose head has, or has not, something before or after it."""
    import transformers as t

    torch.manual_seed(0)
    models = {
        "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**SIZES, **HEADS)),
        "qwen3, tied": lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**SIZES, **HEADS, tie_word_embeddings=True)),
        "gemma2, soft-capped": lambda: t.Gemma2ForCausalLM(
            t.Gemma2Config(**SIZES, **HEADS, final_logit_softcapping=5.0)
        ),
        "granite, scaled": lambda: t.GraniteForCausalLM(
            t.GraniteConfig(**SIZES, **{k: v for k, v in HEADS.items() if k != "head_dim"}, logits_scaling=4.0)
        ),
        "gpt2": lambda: t.GPT2LMHeadModel(t.GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=64)),
    }
    return models[name]().eval()


@pytest.fixture
def tokens(tmp_path: Path) -> Tokens:
    rng = np.random.default_rng(0)
    examples = []
    for i in range(6):
        prompt, completion = rng.integers(3, 40, rng.integers(2, 9)), rng.integers(3, 40, rng.integers(1, 7))
        task = ("label", "rationale")[i % 2]
        examples.append(TokenizedExample(f"{i}", f"row-{i // 2}", task, 1.0, prompt.tolist(), completion.tolist()))
    with TokenWriter(tmp_path) as writer:
        writer.write(examples)
    return Tokens(tmp_path)


def labels_loss(model: Any, tokens: Tokens, examples: list[int]) -> float:
    """Mean cross-entropy of the completions, by transformers' own `labels=`."""
    total, count = 0.0, 0
    for e in examples:
        ids = torch.from_numpy(tokens.ids(e).astype(np.int64))[None]
        labels = ids.clone()
        labels[:, : tokens.prompt_tokens_E[e]] = -100
        n = int(tokens.completion_tokens_E[e])
        total, count = total + model(input_ids=ids, labels=labels).loss.item() * n, count + n
    return total / count


def test_cross_entropy_by_hand() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]]))
    loss = weighted_cross_entropy(logits, Targets(torch.tensor([0, 2]), torch.tensor([2.0, 0.5])))
    assert loss.item() == pytest.approx(-2.0 * math.log(0.5) - 0.5 * math.log(0.1))


def test_the_dispatcher_goes_by_the_config() -> None:
    targets = Targets(torch.tensor([0]), torch.ones(1), torch.tensor([[0]]), torch.tensor([[0.0]]))
    logits = torch.zeros(1, 2)
    assert float(compute_loss(CrossEntropyConfig(), logits, targets)) == pytest.approx(math.log(2))
    assert float(compute_loss(TopkKlConfig(), logits, targets)) == pytest.approx(math.log(2), abs=1e-5)


@pytest.mark.parametrize("name", ["llama", "qwen3, tied", "gemma2, soft-capped", "granite, scaled", "gpt2"])
def test_the_loss_equals_transformers_own_for_every_kind_of_head(name: str, tokens: Tokens) -> None:
    model = causal(name)
    module = StudentModule(model)
    assert module.head_is_separable == (name not in ("gemma2, soft-capped", "granite, scaled"))
    labels = [0, 2, 4]  # one task, so that the normaliser is its number of tokens
    examples = np.array(labels)
    batch = collate(tokens, examples, tokens.task_tokens(examples), pad_id=0)
    assert module(batch).item() == pytest.approx(labels_loss(model, tokens, labels), abs=1e-5)


def test_two_tasks_add_up_each_with_its_own_mean(tokens: Tokens) -> None:
    model = causal("llama")
    everything = np.arange(6)
    batch = collate(tokens, everything, tokens.task_tokens(everything), pad_id=0)
    expected = labels_loss(model, tokens, [0, 2, 4]) + labels_loss(model, tokens, [1, 3, 5])
    assert StudentModule(model)(batch).item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("num_parts", [2, 3, 8])
def test_loss_and_gradient_do_not_depend_on_the_number_of_micro_batches(tokens: Tokens, num_parts: int) -> None:
    def run(parts: list[Any]) -> tuple[float, torch.Tensor]:
        model = causal("llama")
        module = StudentModule(model)
        losses = [module(collate(tokens, part, tokens.task_tokens(np.arange(6)), pad_id=0)) for part in parts]
        for loss in losses:
            loss.backward()
        return sum(loss.item() for loss in losses), model.model.layers[0].mlp.up_proj.weight.grad

    parts = split_step(np.arange(6), tokens.lengths_E, max_tokens=64, num_parts=num_parts)
    whole, split = run([np.arange(6)]), run(parts)
    assert split[0] == pytest.approx(whole[0], abs=1e-6)
    torch.testing.assert_close(split[1], whole[1], atol=1e-6, rtol=1e-5)


def test_an_empty_micro_batch_has_loss_zero_and_gradients_of_zero_everywhere(tokens: Tokens) -> None:
    model = causal("llama")
    batch = collate(tokens, np.zeros(0, dtype=np.int64), tokens.task_tokens(np.arange(6)), pad_id=0)
    loss = StudentModule(model)(batch)
    loss.backward()
    assert loss.item() == 0.0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_adapters_learn_and_the_base_is_left_alone(tokens: Tokens) -> None:
    model = add_adapters(causal("llama"), LoraConfig(rank=2), seed=0, base="llama")
    module = StudentModule(model)
    assert module.head_is_separable
    examples = np.array([0, 2, 4])
    loss = module(collate(tokens, examples, tokens.task_tokens(examples), pad_id=0))
    assert loss.item() == pytest.approx(labels_loss(model, tokens, [0, 2, 4]), abs=1e-5)
    loss.backward()
    assert {("lora" in name) for name, p in model.named_parameters() if p.grad is not None} == {True}


def t5() -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0)
    return T5ForConditionalGeneration(config).eval()


def t5_labels_loss(model: Any, tokens: Tokens, examples: list[int]) -> float:
    """Mean cross-entropy of the completions, by transformers' own `labels=`."""
    total, count = 0.0, 0
    for e in examples:
        ids = torch.from_numpy(tokens.ids(e).astype(np.int64))[None]
        p, n = int(tokens.prompt_tokens_E[e]), int(tokens.completion_tokens_E[e])
        total, count = total + model(input_ids=ids[:, :p], labels=ids[:, p:]).loss.item() * n, count + n
    return total / count


def test_a_t5_learns_with_the_loss_that_transformers_gives_it(tokens: Tokens) -> None:
    model = t5()
    examples = np.array([0, 2, 4])
    batch = collate(tokens, examples, tokens.task_tokens(examples), pad_id=0, decoder_start_id=0)
    assert StudentModule(model)(batch).item() == pytest.approx(t5_labels_loss(model, tokens, [0, 2, 4]), abs=1e-5)


@pytest.mark.parametrize("num_parts", [1, 2, 4], ids=lambda n: f"{n} micro-batches")  # workers x accumulation
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("kind", ["causal", "t5"])
def test_label_and_rationale_are_weighted_by_alpha_each_with_its_own_mean(
    kind: str, alpha: float, num_parts: int, tokens: Tokens
) -> None:
    """Distilling Step-by-Step's loss; labels are the even examples."""
    tokens.weights_E = np.where(np.arange(6) % 2 == 0, alpha, 1 - alpha).astype(np.float32)
    model = causal("llama") if kind == "causal" else t5()
    mean = labels_loss if kind == "causal" else t5_labels_loss
    start = None if kind == "causal" else 0
    module = StudentModule(model)
    parts = split_step(np.arange(6), tokens.lengths_E, max_tokens=64, num_parts=num_parts)
    in_step = tokens.task_tokens(np.arange(6))
    loss = sum(module(collate(tokens, part, in_step, pad_id=0, decoder_start_id=start)).item() for part in parts)
    expected = alpha * mean(model, tokens, [0, 2, 4]) + (1 - alpha) * mean(model, tokens, [1, 3, 5])
    assert loss == pytest.approx(expected, abs=1e-5)
