"""`recipe:` what the teacher does with a row. One variant a method; fields of one method live on its variant."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from distill_ray.config.base import Config, FilePath, Marker, Pattern
from distill_ray.config.reward import JudgeRewardConfig, RewardConfig
from distill_ray.plugins import Group, Variants


class BaseRecipeConfig(Config):
    """What all recipes have. The base of a recipe from another package (`distill_ray.plugins`) too.

    A field `reward: RewardConfig` is found here by the stages, which then give the recipe a scorer.
    """

    if TYPE_CHECKING:
        type: Any  # each variant's own Literal

    @property
    def asks_teacher(self) -> bool:
        """Whether the teacher is asked for anything."""
        return True

    @property
    def learns_gold_only(self) -> bool:
        """Whether all that is learnt is the data's own labels: then there is no teacher's answer, nor a use for one."""
        return False


class ContextSource(Config):
    """The context that is distilled into the student. Exactly one of the fields."""

    text: str | None = None
    """The context itself."""

    file: FilePath | None = None
    """A text file; a relative path starts at the config file's folder."""

    column: str | None = None
    """A column of the data: each row its own context."""

    @model_validator(mode="after")
    def _exactly_one(self) -> ContextSource:
        given = [name for name in ("text", "file", "column") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of text, file, column (got {given or 'none'})")
        return self


class FewShotExample(Config):
    """One worked example, shown to the teacher as a user turn and an assistant turn."""

    query: str
    answer: str


class ParseConfig(Config):
    """Which part of the answer the student learns. Exactly one of the fields; without `parse`, all of it."""

    regex: Pattern | None = None
    """The last match's first group (or whole match, if the pattern has no group)."""

    json_field: Marker | None = None
    """A dotted path into the answer read as JSON (a Markdown fence around it is accepted)."""

    after: Marker | None = None
    """What stands behind the last occurrence of this marker."""

    @model_validator(mode="after")
    def _exactly_one(self) -> ParseConfig:
        given = [name for name in ("regex", "json_field", "after") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of regex, json_field, after (got {given or 'none'})")
        return self


DEFAULT_REFUSALS = [
    r"^\s*(I'm|I am) sorry,? (but )?I (can't|cannot|can not|am unable to|won't)",
    r"^\s*(Sorry, )?I (can't|cannot|am unable to|'m unable to) (help|assist|comply|provide|do that|fulfill)",
    r"^\s*As an AI( language)? model,? I (can't|cannot|am unable to|do not)",
]


class ContextRecipeConfig(BaseRecipeConfig):
    """Context distillation: answer with a long context in view, learn to answer without it.

    Papers: Askell et al. 2021 (arXiv 2112.00861, section 2.3), Snell et al. 2022 (arXiv 2209.15189).
    """

    type: Literal["context"] = "context"

    context: ContextSource
    """The system prompt that only the teacher sees."""

    query: str = "{{ text }}"
    """Sandboxed Jinja over the row's columns: what both teacher and student are asked."""

    examples: list[FewShotExample] = []
    """Few-shot turns between the context and the query, for the teacher only."""

    student_context: str | None = None
    """A short system prompt that the student does keep. Default: none."""

    parse: ParseConfig | None = None
    """Keep only a part of the answer, so that the teacher may reason and the student learns only the result."""

    refusals: list[Pattern] = DEFAULT_REFUSALS
    """Regular expressions; an answer in which one is found is a reject (`refused`). [] turns the check off."""


class WorkedExample(Config):
    """One worked problem, shown to the teacher: chain of thought (Wei et al. 2022, arXiv 2201.11903)."""

    query: str
    rationale: str
    label: str


class StepByStepRecipeConfig(BaseRecipeConfig):
    """Distilling Step-by-Step: the teacher's rationales as a second task beside the label.

    Paper: Hsieh et al. 2023 (arXiv 2305.02301, section 3). The loss of an optimizer step is
    alpha x (mean cross-entropy of the label tokens) + (1 - alpha) x (mean cross-entropy of the rationale tokens).
    """

    type: Literal["step_by_step"] = "step_by_step"

    query: str = "{{ input }}"
    """Sandboxed Jinja over the row's columns: the problem."""

    instruction: str | None = None
    """System prompt for the teacher."""

    examples: list[WorkedExample] = []
    """Few-shot turns for the teacher, each answered with rationale, marker and label."""

    marker: Marker = "The answer is"
    """Stands between rationale and label in the teacher's answers."""

    cut_at: Marker | None = "\nQ:"
    """A completion model goes on with a next question: everything from here on is dropped. null keeps it."""

    label_pattern: Pattern | None = None
    """Regular expression for the label behind the marker: its first group, or the whole match."""

    rationale_column: str | None = None
    """Column with the rationale (with or without marker and label). Then the teacher is not asked at all."""

    label_column: str | None = None
    """Column with the gold label. Needed for `label_source: gold`; rejected where it is empty."""

    label_source: Literal["gold", "teacher"] = "gold"
    """Which label the student learns: the data's own, or the teacher's where there is none."""

    mode: Literal["task_prefix", "standard", "single"] = "task_prefix"
    """task_prefix: label and rationale as two tasks. standard: the label only, without a prefix; with gold labels
    nobody is asked and no rationale is read. single: rationale and label in one answer."""

    alpha: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Weight of the label's loss; the rationale's is 1 - alpha. For `task_prefix`."""

    label_prompt: str = "predict: {{ query }}"
    """What the student is asked for the label. For a chat model, an instruction reads more naturally."""

    rationale_prompt: str = "explain: {{ query }}"
    """What the student is asked for the rationale, in training only."""

    refusals: list[Pattern] = DEFAULT_REFUSALS
    """Regular expressions; an answer in which one is found is a reject (`refused`). [] turns the check off."""

    @model_validator(mode="after")
    def _labels_come_from_somewhere(self) -> StepByStepRecipeConfig:
        if self.label_source == "gold" and self.label_column is None:
            raise ValueError("label_source is gold: give `label_column`, the column with the labels")
        if self.mode == "task_prefix" and self.label_prompt == self.rationale_prompt:
            raise ValueError(
                "label_prompt and rationale_prompt are the same, so the student cannot know which of the two is asked "
                "for; make them differ, or take mode: standard or single"
            )
        return self

    @property
    def learns_gold_only(self) -> bool:
        """Whether all that is learnt is the data's own labels."""
        return self.mode == "standard" and self.label_source == "gold"

    @property
    def asks_teacher(self) -> bool:
        """Whether the teacher is asked for anything."""
        return self.rationale_column is None and not self.learns_gold_only


CRITIQUE_REQUEST = (
    "Look at your answer again. Point out everything in it that is wrong, unkind, unsafe or reveals something private."
)
REVISION_REQUEST = "Now write your answer again without the faults you found. Give only the new answer."


class AcceptConfig(Config):
    """Which revisions take the place of what was there before."""

    type: Literal["improve", "threshold", "metropolis", "always"] = "improve"
    """improve: the reward is strictly higher. threshold: it is at least `threshold`. metropolis: with probability
    min(1, exp((after - before) / temperature)). always: every revision."""

    threshold: float = 0.0
    """For `threshold`."""

    temperature: Annotated[float, Field(gt=0)] = 1.0
    """For `metropolis`, in units of the reward."""

    seed: int = 0
    """For `metropolis`: a row's draw depends on this, its id and the round."""

    @model_validator(mode="after")
    def _has_only_its_own_keys(self) -> AcceptConfig:
        for key, kind in (("threshold", "threshold"), ("temperature", "metropolis")):
            has_effect = self.type == kind or getattr(self, key) == type(self).model_fields[key].default
            if not has_effect:  # a default may be written down, as `config.yaml` of a run folder does
                raise ValueError(f"{key} is for `type: {kind}`, and the type is {self.type}; remove it or set the type")
        return self


class FinishedChains(Config):
    """Columns with chains that were made elsewhere. Nobody is asked then."""

    draft: str
    """Column with the draft."""

    revision: str
    """Column with the revision."""

    reward_before: str | None = None
    """Column with the draft's reward. Without it `reward` scores the draft."""

    reward_after: str | None = None
    """Column with the revision's reward."""


class SelfCritiqueRecipeConfig(BaseRecipeConfig):
    """Distilled Self-Critique: draft, critique, revise; the student learns accepted revisions directly.

    Paper: Distilled Self-Critique of LLMs with Synthetic Data (arXiv 2312.01957).
    """

    type: Literal["self_critique"] = "self_critique"

    query: str = "{{ text }}"
    """Sandboxed Jinja over the row's columns: what both teacher and student are asked."""

    instruction: str | None = None
    """System prompt for the teacher (a constitution, for example)."""

    critique_request: str = CRITIQUE_REQUEST
    """What the teacher is asked after its draft. Sandboxed Jinja over `query` and the row's columns."""

    revision_request: str = REVISION_REQUEST
    """What it is asked after its critique."""

    rounds: Annotated[int, Field(ge=1)] = 1
    """Critique and revision so many times, in one conversation."""

    restart: bool = False
    """Each round begins anew from the text that was accepted last, as if it were the draft, instead of going on in the
    same conversation. Ends early where a proposal is not accepted: the same question would get the same answer."""

    reward: RewardConfig | None = None
    """What scores draft and revision. Needed unless `accept.type` is `always` or `chains` has the rewards."""

    accept: AcceptConfig = AcceptConfig()
    """Which revisions are learnt."""

    chains: FinishedChains | None = None
    """Read chains from columns instead of asking the teacher."""

    preference_pairs: bool = False
    """Write accepted revision and draft as `preferences/*.parquet` too (chosen, rejected), where the reward rose."""

    refusals: list[Pattern] = DEFAULT_REFUSALS
    """Regular expressions; a draft or revision in which one is found is a reject (`refused`). [] turns this off."""

    @model_validator(mode="after")
    def _has_a_reward(self) -> SelfCritiqueRecipeConfig:
        scored = self.chains is not None and None not in (self.chains.reward_before, self.chains.reward_after)
        if self.accept.type != "always" and self.reward is None and not scored:
            raise ValueError(
                f"accept.type {self.accept.type} compares rewards: give `reward`, or `chains` with both reward "
                "columns, or accept: {type: always}"
            )
        compares = isinstance(self.reward, JudgeRewardConfig) and self.reward.mode == "comparison"
        if compares and not scored and self.accept.type == "threshold" and not 0 <= self.accept.threshold <= 1:
            raise ValueError(
                f"accept.threshold is {self.accept.threshold:g}, and a judge that compares gives rewards from 0 to 1 "
                "(the share of the win); set it between them, or reward.mode: rating"
            )
        if self.preference_pairs and self.reward is None and not scored:
            raise ValueError(
                "preference_pairs: a pair is a revision with a higher reward than its draft; give `reward`, or "
                "`chains` with both reward columns"
            )
        if self.chains is not None and self.rounds > 1:
            raise ValueError("chains are finished, so rounds has to be 1")
        return self

    @property
    def asks_teacher(self) -> bool:
        """Whether the teacher is asked for anything."""
        return self.chains is None or (isinstance(self.reward, JudgeRewardConfig) and self.reward.engine is None)


RecipeConfig = Annotated[
    ContextRecipeConfig | StepByStepRecipeConfig | SelfCritiqueRecipeConfig | BaseRecipeConfig,
    Variants(Group.RECIPES),
]
