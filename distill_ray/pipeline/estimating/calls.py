"""What a recipe asks per row, and what the student is given of it. One function a recipe; tokens are means."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from distill_ray.config import RunConfig, SelfCritiqueRecipeConfig, StepByStepRecipeConfig
from distill_ray.config.reward import JudgeRewardConfig


@dataclass(frozen=True, slots=True)
class Ask:
    """One kind of request. A request has one prompt and perhaps several answers."""

    name: str
    role: str  # teacher | judge
    requests: float  # per row
    answers: int  # per request
    prompt: float  # tokens of a request
    fresh: float  # of these, what is not in the engine's prefix cache
    completion: float  # tokens of an answer


@dataclass(frozen=True, slots=True)
class Lengths:
    """Means over the sample that the asks are made of."""

    prompt: float
    shared: float
    """Tokens that all prompts begin with."""

    completion: float
    critique_request: float = 0.0
    revision_request: float = 0.0
    judge_prompt: float = 0.0
    """The judge's prompt without the answers that it shows."""

    judge_completion: float = 0.0


def asks(config: RunConfig, lengths: Lengths) -> list[Ask]:
    """All requests of a row. A recipe of another package counts as one that asks once."""
    found: list[Ask] = []
    recipe = config.recipe
    if isinstance(recipe, SelfCritiqueRecipeConfig):
        found = _self_critique(config, recipe, lengths)
    elif recipe.asks_teacher:
        found = _once(config, lengths)
    return found


def _once(config: RunConfig, lengths: Lengths) -> list[Ask]:
    sampling = config.teacher.sampling
    fresh = lengths.prompt - lengths.shared
    found = [Ask("answer", "teacher", 1, sampling.n, lengths.prompt, fresh, lengths.completion)]
    if sampling.top_logprobs and getattr(config.recipe, "parse", None) is not None:  # the part is scored by itself
        prompt = lengths.prompt + lengths.completion
        found.append(Ask("score", "teacher", sampling.n, 1, prompt, lengths.completion, 0.0))
    return found


def _self_critique(config: RunConfig, recipe: SelfCritiqueRecipeConfig, lengths: Lengths) -> list[Ask]:
    """Draft, then critique and revision in one conversation, whose earlier turns are in the prefix cache."""
    chains = config.teacher.sampling.n if recipe.chains is None else 1
    found: list[Ask] = []
    if recipe.chains is None:
        fresh = lengths.prompt - lengths.shared
        found.append(Ask("draft", "teacher", 1, chains, lengths.prompt, fresh, lengths.completion))
        said = lengths.prompt + lengths.completion
        for _ in range(recipe.rounds):
            for name, request in (
                ("critique", lengths.critique_request),
                ("revision", lengths.revision_request),
            ):
                fresh = lengths.completion + request
                found.append(Ask(name, "teacher", chains, 1, said + request, fresh, lengths.completion))
                said += request + lengths.completion
            if recipe.restart:
                said = lengths.prompt + lengths.completion
    if isinstance(recipe.reward, JudgeRewardConfig) and not _has_rewards(recipe):
        role = "teacher" if recipe.reward.engine is None else "judge"
        shown = 2 if recipe.reward.mode == "comparison" else 1
        prompt = lengths.judge_prompt + shown * lengths.completion
        # Both orders of a comparison, or a rating of each. A rating that was given before is not asked for again.
        found.append(Ask("judge", role, 2 * chains * recipe.rounds, 1, prompt, prompt, lengths.judge_completion))
    return found


def _has_rewards(recipe: SelfCritiqueRecipeConfig) -> bool:
    return recipe.chains is not None and None not in (recipe.chains.reward_before, recipe.chains.reward_after)


@dataclass(frozen=True, slots=True)
class Learnt:
    """Examples that the student gets of a row."""

    examples: float
    prompt: float
    completion: float  # mean over the examples


def learnt(config: RunConfig, prompt: float, answer: float, label: float) -> Learnt:
    """Per row, if no answer is rejected.

    Args:
        config: recipe and samples.
        prompt: tokens that the student sees.
        answer: tokens of what the teacher says.
        label: tokens of a label.
    """
    recipe = config.recipe
    samples = config.teacher.sampling.n if recipe.asks_teacher else 1
    if not isinstance(recipe, StepByStepRecipeConfig):
        return Learnt(samples, prompt, answer)
    of_mode: dict[str, Callable[[], Learnt]] = {
        "standard": lambda: Learnt(samples, prompt, label),
        "single": lambda: Learnt(samples, prompt, answer + label),
        "task_prefix": lambda: Learnt(2 * samples, prompt, (answer + label) / 2),
    }
    return of_mode[recipe.mode]()
