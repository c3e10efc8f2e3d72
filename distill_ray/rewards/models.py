"""Rewards by a transformers model: a classifier, a scalar reward model, a tagger of named entities.

Batches are padded to their longest text, sorted by length first, so that little is padding. Everything on one device;
safetensors only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from distill_ray.config.reward import ClassifierRewardConfig, EntitiesRewardConfig, RewardModelConfig
from distill_ray.errors import ConfigError, first_line
from distill_ray.models import resolve_model
from distill_ray.records import Answered
from distill_ray.rewards.labels import (
    OwnModelReward,
    kind_of_entity,
    require_chat_template,
    require_head,
    require_labels,
)

# Shape suffixes: B texts of a batch, T positions, L labels.


class _ModelReward:
    """Loads model and tokenizer, and runs them over batches of texts.

    Raises:
        ConfigError: there is no such model, or its weights are not safetensors.
    """

    auto: str

    def __init__(self, config: OwnModelReward) -> None:
        import transformers

        path = resolve_model(config.model, key="recipe.reward.model")
        kwargs = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
        self._batch_size = config.batch_size
        self._device = torch.device("cuda" if config.gpus else "cpu")
        try:
            self.tokenizer: Any = transformers.AutoTokenizer.from_pretrained(path, **kwargs)
            auto = getattr(transformers, self.auto)
            self.model: Any = auto.from_pretrained(path, use_safetensors=True, **kwargs).eval().to(self._device)
        except (OSError, ValueError) as error:
            reason = first_line(error)
            raise ConfigError(f"recipe.reward.model: cannot load {config.model} ({reason})") from error
        self.labels: dict[int, str] = self.model.config.id2label
        require_head(config, self.model.config.architectures or ())
        require_labels(config, self.labels)

    @torch.inference_mode()
    def _logits(self, texts: Sequence[Any]) -> list[tuple[torch.Tensor, Any]]:
        """(logits of one text, its encoding) in the order given. Texts too long for the model lose their end."""
        order = sorted(range(len(texts)), key=lambda i: -_length(texts[i]))
        results: list[Any] = [None] * len(texts)
        for start in range(0, len(order), self._batch_size):
            chosen = order[start : start + self._batch_size]
            pairs = [texts[i] for i in chosen]
            encoded = self._encode(pairs)
            logits = (
                self.model(**{name: value.to(self._device) for name, value in encoded.items()}).logits.float().cpu()
            )
            for row, index in enumerate(chosen):
                results[index] = (logits[row], encoded["input_ids"][row])
        return results

    def _encode(self, texts: Sequence[Any]) -> Any:
        settings = {"padding": True, "truncation": True, "return_tensors": "pt", "split_special_tokens": True}
        if isinstance(texts[0], tuple):
            return self.tokenizer([a for a, _ in texts], [b for _, b in texts], **settings)
        return self.tokenizer(list(texts), **settings)


class ClassifierReward(_ModelReward):
    """Sum over labels of probability x score.

    Raises:
        ConfigError: a label of the config that the model does not have.
    """

    auto = "AutoModelForSequenceClassification"

    def __init__(self, config: ClassifierRewardConfig) -> None:
        super().__init__(config)
        self._with_prompt = config.with_prompt
        self._scores_L = torch.tensor([config.labels.get(self.labels[i], 0.0) for i in range(len(self.labels))])

    def score(self, batch: Sequence[Answered]) -> list[float]:
        """One number per answer."""
        texts = [(item.query, item.answer) if self._with_prompt else item.answer for item in batch]
        return [float(logits_L.softmax(-1) @ self._scores_L) for logits_L, _ in self._logits(texts)]


class ScalarReward(_ModelReward):
    """The one output of a reward model over the conversation with the answer.

    Raises:
        ConfigError: the model has more than one output, or no chat template.
    """

    auto = "AutoModelForSequenceClassification"

    def __init__(self, config: RewardModelConfig) -> None:
        super().__init__(config)
        require_chat_template(config, self.tokenizer.chat_template)

    def score(self, batch: Sequence[Answered]) -> list[float]:
        """One number per answer."""
        texts = [
            self.tokenizer.apply_chat_template(
                [*item.messages, {"role": "assistant", "content": item.answer}], tokenize=False
            )
            for item in batch
        ]
        return [float(logits_L[0]) for logits_L, _ in self._logits(texts)]

    def _encode(self, texts: Sequence[Any]) -> Any:
        settings = {"padding": True, "truncation": True, "return_tensors": "pt"}  # the template's tokens are real ones
        return self.tokenizer(list(texts), add_special_tokens=False, **settings)


class EntitiesReward(_ModelReward):
    """Minus the number of entities. Consecutive pieces count once: a name of three words is one entity.

    Raises:
        ConfigError: the model does not know a label.
    """

    auto = "AutoModelForTokenClassification"

    def __init__(self, config: EntitiesRewardConfig) -> None:
        super().__init__(config)
        self._wanted = set(config.labels)

    def score(self, batch: Sequence[Answered]) -> list[float]:
        """One number per answer."""
        special = set(self.tokenizer.all_special_ids)
        return [
            -float(
                self._count(
                    [
                        self.labels[int(label)]
                        for label, token in zip(logits_TL.argmax(-1), ids_T, strict=True)
                        if int(token) not in special
                    ]
                )
            )
            for logits_TL, ids_T in self._logits([item.answer for item in batch])
        ]

    def _count(self, labels: Sequence[str]) -> int:
        """Runs of pieces of one wanted kind; a B- inside a run begins another entity only where I- would go on."""
        count, running = 0, ""
        for label in labels:
            kind = kind_of_entity(label)
            if kind in self._wanted and kind != running:
                count += 1
            running = kind if kind in self._wanted else ""
        return count


def _length(text: Any) -> int:
    return len(text) if isinstance(text, str) else sum(map(len, text))
