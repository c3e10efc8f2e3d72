"""What makes one answer better than another, as a number: used by `self_critique` and by the evaluation.

| `type:`        | module   | a higher score means                                  |
|----------------|----------|-------------------------------------------------------|
| `classifier`   | `models` | the labels with high scores are more probable         |
| `reward_model` | `models` | a scalar reward model likes the conversation better   |
| `entities`     | `models` | fewer named entities                                  |
| `regex`        | `text`   | more matches (fewer, with a negative score)           |
| `length`       | `text`   | closer to the best length                             |
| `judge`        | `judge`  | a language model rates it higher, or prefers it       |

Importing this package loads no torch; `make_reward` loads the module of its kind only.
"""

from __future__ import annotations

from distill_ray import plugins
from distill_ray.config.reward import (
    ClassifierRewardConfig,
    EntitiesRewardConfig,
    JudgeRewardConfig,
    LengthRewardConfig,
    RegexRewardConfig,
    RewardConfig,
    RewardModelConfig,
)
from distill_ray.rewards.base import Reward
from distill_ray.rewards.text import LengthReward, RegexReward

__all__ = ["Reward", "make_reward"]


def make_reward(config: RewardConfig) -> Reward:
    """Build a reward, ours or another package's (`distill_ray.plugins`), its model loaded.

    Not for `judge`, which asks an engine (`judge.JudgeReward`).

    Raises:
        ConfigError: there is no such model, or it has not the labels that the config names.
    """
    assert not isinstance(config, JudgeRewardConfig)
    if isinstance(config, RegexRewardConfig):
        return RegexReward(config)
    if isinstance(config, LengthRewardConfig):
        return LengthReward(config)
    if not isinstance(config, ClassifierRewardConfig | EntitiesRewardConfig | RewardModelConfig):
        return plugins.make(plugins.Group.REWARDS, config, Reward)
    from distill_ray.rewards.models import ClassifierReward, EntitiesReward, ScalarReward

    if isinstance(config, ClassifierRewardConfig):
        return ClassifierReward(config)
    if isinstance(config, EntitiesRewardConfig):
        return EntitiesReward(config)
    return ScalarReward(config)
