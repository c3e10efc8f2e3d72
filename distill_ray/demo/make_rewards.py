"""Make the demo's two reward models from nothing: `python -m distill_ray.demo.make_rewards --out DIR --seed 0`.

    DIR/sentiment   is a film review negative, mixed or positive?       BERT for sequence classification
    DIR/names       which pieces of a text are the name of a person?    BERT for token classification

Both read text that the project generates (`reviews.py`, `arithmetic.py`), with a tokenizer of their own, and have some
hundred thousand parameters. The same seed, machine, threads and versions give the same models. What they score on
reviews that were not trained on stands in the model cards.
"""

from __future__ import annotations

import argparse
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import BertConfig, BertForSequenceClassification, BertForTokenClassification, PreTrainedTokenizerFast

from distill_ray.demo import arithmetic, reviews

PAD, CLS = "<|pad|>", "<|cls|>"
VOCABULARY = 1024
LONGEST = 256
STEPS, BATCH, LEARNING_RATE = 600, 32, 2e-3
SENTIMENTS = ("negative", "mixed", "positive")
TAGS = ("O", "B-PER", "I-PER")

Example = tuple[str, Any]  # text and its label, or the spans of the names in it


def texts(rng: random.Random) -> Iterator[Example]:
    """Reviews and problems without end, with the spans of the names in them."""
    while True:
        chat = reviews.review_chat(rng)
        for text in (chat.draft, chat.revision, chat.critique, arithmetic.problem(rng).question):
            yield text, name_spans(text)


def name_spans(text: str) -> list[tuple[int, int]]:
    """Where persons are named: runs of the names that the generators know."""
    known = {*reviews.NAMES, *reviews.SURNAMES, *arithmetic.NAMES}
    spans: list[tuple[int, int]] = []
    for word in re.finditer(r"[A-Za-z]+", text):
        if word.group() not in known:
            continue
        if spans and spans[-1][1] + 1 == word.start() and word.group() in reviews.SURNAMES:
            spans[-1] = (spans[-1][0], word.end())
        else:
            spans.append((word.start(), word.end()))
    return spans


def sentiments(rng: random.Random) -> Iterator[Example]:
    """Drafts with their mood, and revisions, which are positive."""
    while True:
        chat = reviews.review_chat(rng)
        yield chat.draft, SENTIMENTS.index({"bad": "negative", "good": "positive"}.get(chat.mood, chat.mood))
        if rng.random() < 0.4:
            yield chat.revision, SENTIMENTS.index("positive")


def train_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """A small byte-level BPE that puts `<|cls|>` in front."""
    rng = random.Random(f"rewards-tokenizer-{seed}")
    source = texts(rng)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, CLS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((next(source)[0] for _ in range(4000)), trainer)
    from tokenizers.processors import TemplateProcessing

    tokenizer.post_processor = TemplateProcessing(
        single=f"{CLS} $A", special_tokens=[(CLS, tokenizer.token_to_id(CLS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, cls_token=CLS, model_max_length=LONGEST, padding_side="right"
    )


def new_config(labels: tuple[str, ...]) -> BertConfig:
    """Two layers of width 64."""
    return BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        max_position_embeddings=LONGEST,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=0,
        id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)},
    )


def batch_of(tokenizer: PreTrainedTokenizerFast, examples: list[Example], *, tags: bool) -> dict[str, torch.Tensor]:
    """Inputs and labels of one step."""
    encoded = tokenizer(
        [text for text, _ in examples],
        padding=True,
        truncation=True,
        return_tensors="pt",
        return_offsets_mapping=True,
        return_token_type_ids=False,
    )
    offsets = encoded.pop("offset_mapping").tolist()
    if tags:
        labels = [
            [-100 if end == 0 else _tag(text, start, end, spans) for start, end in row]
            for (text, spans), row in zip(examples, offsets, strict=True)
        ]
    else:
        labels = [label for _, label in examples]
    return {**encoded, "labels": torch.tensor(labels)}


def _tag(text: str, start: int, end: int, spans: list[tuple[int, int]]) -> int:
    """The tag of one token; a byte-level token begins with the space before its word."""
    while start < end and text[start] == " ":
        start += 1
    for begin, stop in spans:
        if begin <= start < stop:
            return TAGS.index("B-PER" if start == begin else "I-PER")
    return TAGS.index("O")


def train(model: Any, source: Iterator[Example], as_batch: Callable[[list[Example]], dict[str, torch.Tensor]]) -> None:
    """AdamW with a linear fall of the learning rate."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    model.train()
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / 20) * (1 - step / STEPS)
        loss = model(**as_batch([next(source) for _ in range(BATCH)])).loss
        if not torch.isfinite(loss):
            raise RuntimeError(f"the loss is {loss.item()} at step {step}: lower LEARNING_RATE")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0 or step == STEPS - 1:
            print(f"step {step + 1}/{STEPS}  loss {loss.item():.4f}", flush=True)
    model.eval()


@torch.inference_mode()
def accuracy(
    model: Any, source: Iterator[Example], as_batch: Callable[[list[Example]], dict[str, torch.Tensor]]
) -> float:
    """Share of labels (of tokens, where tokens have labels) that are right on 500 new texts."""
    right = total = 0
    for _ in range(20):
        batch = as_batch([next(source) for _ in range(25)])
        labels = batch.pop("labels")
        said = model(**batch).logits.argmax(-1)
        counted = labels != -100
        right, total = right + int((said == labels)[counted].sum()), total + int(counted.sum())
    return right / total


def save(model: Any, tokenizer: PreTrainedTokenizerFast, out: Path, card: str) -> None:
    """Write the folder: float16 on disk, float32 in memory."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(out)
    model.config.dtype = torch.float32
    model.save_pretrained(out)
    weights = {name: weight.half() for name, weight in load_file(out / "model.safetensors").items()}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)  # safetensors writes for the owner alone
    (out / "README.md").write_text(card, encoding="utf-8")


CARD = """# {title}

{what} Made from nothing by `python -m distill_ray.demo.make_rewards --seed {seed}` on text that the project generates
(`distill_ray/demo/reviews.py`, `arithmetic.py`): invented films and people, a few word lists. It knows nothing else and
is meant for the demo and the tests of distill-ray.

- {parameters:,} parameters, two layers of width 64, a byte-level vocabulary of {vocabulary} pieces.
- Right on new texts of the same kind: {accuracy:.4f} of the {unit}.
- Licence: Apache-2.0, like the project.
"""


def main() -> None:
    """Train tokenizer and models and write the folders with their cards."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the folder to write into")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = train_tokenizer(arguments.seed)
    tasks: list[tuple[str, Any, tuple[str, ...], Any, bool, str, str, str]] = [
        (
            "sentiment",
            BertForSequenceClassification,
            SENTIMENTS,
            sentiments,
            False,
            "Demo: sentiment of a film review",
            "Says whether a short film review is negative, mixed or positive.",
            "reviews",
        ),
        (
            "names",
            BertForTokenClassification,
            TAGS,
            texts,
            True,
            "Demo: names of persons",
            "Tags the pieces of a text that are the name of a person.",
            "tokens",
        ),
    ]
    for name, kind, labels, source, tags, title, what, unit in tasks:
        torch.manual_seed(arguments.seed)
        model = kind(new_config(labels))

        def as_batch(examples: list[Example], tags: bool = tags) -> dict[str, torch.Tensor]:
            return batch_of(tokenizer, examples, tags=tags)

        train(model, source(random.Random(f"{name}-{arguments.seed}")), as_batch)
        measured = accuracy(model, source(random.Random(f"{name}-held-out-{arguments.seed}")), as_batch)
        print(f"{name}: {measured:.4f} right on new texts", flush=True)
        card = CARD.format(
            title=title,
            what=what,
            seed=arguments.seed,
            parameters=model.num_parameters(),
            vocabulary=VOCABULARY,
            accuracy=measured,
            unit=unit,
        )
        save(model, tokenizer, arguments.out / name, card)


if __name__ == "__main__":
    main()
