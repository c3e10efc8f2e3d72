"""Whether a model can be the reward that the config makes of it: known from its config.json, without its weights."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from distill_ray.config.reward import ClassifierRewardConfig, EntitiesRewardConfig, RewardModelConfig
from distill_ray.errors import ConfigError

OwnModelReward = ClassifierRewardConfig | RewardModelConfig | EntitiesRewardConfig

HEADS = {
    "classifier": "ForSequenceClassification",
    "reward_model": "ForSequenceClassification",
    "entities": "ForTokenClassification",
}


def require_head(config: OwnModelReward, architectures: Collection[str]) -> None:
    """Refuse a model without the head that scores: transformers would give it one of random numbers.

    Raises:
        ConfigError: with what it is. (What remote code calls its classes is its own business.)
    """
    head = HEADS[config.type]
    if architectures and not config.trust_remote_code and not any(name.endswith(head) for name in architectures):
        raise ConfigError(
            f"recipe.reward.model: {config.model} is a {', '.join(architectures)}, and type {config.type} needs a "
            f"...{head}; take a model that was trained as one"
        )


def require_labels(config: OwnModelReward, labels: Mapping[int, str]) -> None:
    """Refuse labels that the model does not have, and a reward model with more than one output.

    Raises:
        ConfigError: with those that it has.
    """
    if isinstance(config, RewardModelConfig):
        if len(labels) != 1:
            raise ConfigError(
                f"recipe.reward.model: {config.model} has {len(labels)} outputs, a reward model has one; take type "
                "classifier and give each label a score"
            )
        return
    known = list(labels.values())
    if isinstance(config, EntitiesRewardConfig):
        known = sorted({kind_of_entity(label) for label in known} - {"O"})
    unknown = sorted(set(config.labels) - set(known))
    if unknown:
        raise ConfigError(
            f"recipe.reward.labels: {config.model} has no label {', '.join(map(repr, unknown))}; it has: "
            f"{', '.join(known)}"
        )


def require_chat_template(config: RewardModelConfig, chat_template: object) -> None:
    """Refuse a reward model that does not say how it reads a conversation. Raises ConfigError."""
    if not chat_template:
        raise ConfigError(f"recipe.reward.model: {config.model} has no chat template; a reward model needs one")


def kind_of_entity(label: str) -> str:
    """A label without the prefix of its tagging scheme: B-PER is PER."""
    return re.sub(r"^[BIES]-", "", label)
