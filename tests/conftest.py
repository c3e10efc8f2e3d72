"""Tiny models for every test: random weights, two layers, built once per session in a temporary folder.

They load with plain transformers and vLLM: the Llama has heads of 32, the smallest that vLLM's CPU attention
knows. Not covered by tests on this machine: a GPU, and vendors' servers (a scripted server stands in).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# Before anything imports numpy: on matrices as small as these, threads spend their time waiting for one another.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
settings.register_profile("any machine", deadline=None)  # what is slow on a busy one is not wrong
settings.load_profile("any machine")

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _byte_tokenizer(folder: Path, special_tokens: list[str], **kwargs: object) -> int:
    """Save a byte-level tokenizer without merges (a byte is a token) and return its vocabulary size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    names = [*special_tokens, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if "</s>" in special_tokens:  # an encoder's input ends with it, as T5's does
        tokenizer.post_processor = processors.TemplateProcessing(
            single="$A </s>", special_tokens=[("</s>", special_tokens.index("</s>"))]
        )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **kwargs)
    fast.save_pretrained(folder)
    return len(names)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer Llama with a ChatML template and 1,024 positions."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny_model")
    vocab_size = _byte_tokenizer(
        folder,
        ["<pad>", "<|im_start|>", "<|im_end|>"],
        pad_token="<pad>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.2,  # far from uniform, so that greedy has no near-ties
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():  # answers in printable ASCII, so that text and tokens agree byte by byte
        printable = [2, *(tokenizer.convert_tokens_to_ids(chr(c)) for c in range(33, 127))]
        others = [i for i in range(vocab_size) if i not in printable]
        model.lm_head.weight[others] = 0.0
        model.lm_head.weight *= 4.0
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer T5 without a chat template, whose tokenizer allows 512 tokens."""
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    folder = tmp_path_factory.mktemp("tiny_t5")
    vocab_size = _byte_tokenizer(
        folder,
        ["<pad>", "</s>", "<unk>"],
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=512,
    )
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=vocab_size,
        d_model=32,
        d_kv=16,
        d_ff=64,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=0,
        eos_token_id=1,
        pad_token_id=0,
    )
    T5ForConditionalGeneration(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def embedder_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache of the tests' own for what is made of embedding models, so that it is made once per session."""
    folder = tmp_path_factory.mktemp("embedder_cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DISTILL_RAY_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def example_plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for the import path into which `tests/example_plugin` is really installed, without a network."""
    folder = tmp_path_factory.mktemp("example_plugin")
    source = shutil.copytree(Path(__file__).parent / "example_plugin", folder / "source")  # building writes beside it
    offline = ["--no-index", "--no-build-isolation", "--no-deps"]
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *offline]
    subprocess.run([*command, "--target", str(folder / "installed"), str(source)], check=True)
    return folder / "installed"
