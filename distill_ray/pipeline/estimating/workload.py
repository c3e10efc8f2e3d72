"""How much there is to do: all rows are read, planned and counted as `generate` does it, a sample of them is tokenised.

plan_rows (into a scratch folder) -> rows of each split, unusable ones, distinct prompts
every k-th usable row -> teacher's and student's prompts -> mean, longest, what all begin with
"""

from __future__ import annotations

import itertools
import json
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from distill_ray.config import (
    FakeEngineConfig,
    HfEngineConfig,
    MixtureConfig,
    NoEngineConfig,
    RunConfig,
    SelfCritiqueRecipeConfig,
    StepByStepRecipeConfig,
    SynthesizeDataConfig,
    VllmEngineConfig,
)
from distill_ray.config.engine import BaseEngineConfig
from distill_ray.config.reward import JudgeRewardConfig
from distill_ray.errors import DataError, RequestRejected, RowError
from distill_ray.models import prompts_of
from distill_ray.pipeline.estimating.memory import BLOCK
from distill_ray.pipeline.folder import RunFolder
from distill_ray.pipeline.planning.plan import plan_rows
from distill_ray.pipeline.synthesize import Requests, as_files
from distill_ray.recipes import Recipe, make_recipe
from distill_ray.records import Message, Row, row_from_record
from distill_ray.rewards.judge import JudgeReward

CHARACTERS_PER_TOKEN = 4  # of English text
LABEL_TOKENS = 8.0  # of a label that no column has

TokensOf = Callable[[Sequence[Message]], Any]  # -> something that is as long as its tokens are many


@dataclass(frozen=True, slots=True)
class Workload:
    """Rows, and tokens of a sample of them."""

    rows_in: int
    unusable: int
    splits: dict[str, int]
    """Usable rows of each split."""

    prompts: int
    """Different prompts: rows with the same one share a call."""

    sampled: int
    prompt: float
    longest_prompt: int
    shared: int
    """Tokens that all sampled prompts begin with, as far as an engine keeps them in its cache."""

    critique_request: float
    revision_request: float
    judge_prompt: float
    verdict_prompt: float
    """Of who judges the evaluation, without the answers that it shows; 0 where nobody does."""

    student_prompt: float
    longest_student_prompt: int
    label: float
    answer: float | None
    """Tokens of an answer that is in the data already; None where the teacher gives it."""

    notes: list[str]

    @property
    def usable(self) -> int:
        """Rows that are asked, whatever their split."""
        return sum(self.splits.values())


def workload(config: RunConfig, scratch: RunFolder, limit: int | None = None) -> Workload:
    """Read the input and count.

    Args:
        config: recipe, data, models, `plan.sample_rows`.
        scratch: an empty folder for the planned rows.
        limit: only the first so many rows of each source.

    Raises:
        InputError: the input or a model cannot be used.
        DataError: no row is usable.
    """
    recipe = make_recipe(config.recipe)
    notes: list[str] = []
    planned = config
    if isinstance(config.data, SynthesizeDataConfig):
        planned = _with_stand_ins(config, config.data, scratch, limit, notes)
    plan = plan_rows(planned, recipe, scratch, limit=limit)
    splits = Counter[str]()
    for table in scratch.read_tables("rows", columns=["split", "reject_reason"]):
        splits.update(r["split"] for r in table.to_pylist() if r["reject_reason"] is None)
    usable = splits.total()
    if not usable:
        raise DataError(f"data: none of the {plan.rows_in} rows can be used; see `distill-ray check`")
    key, engine = _whose_tokenizer(config)
    teacher = tokens_of(engine, key, notes)
    if isinstance(config.teacher, MixtureConfig):
        notes.append(f"teacher: the prompts of all members are counted as those of {key}")
    sample, prompts = _sample(recipe, scratch, usable, config.plan.sample_rows)
    teacher_prompts = [teacher(messages) for messages in _rendered(recipe.teacher_messages, sample)]
    chat = prompts_of(config.student, key="student.model")
    student_prompts = [len(chat.prompt_ids(messages)) for messages in _rendered(recipe.student_messages, sample)]
    lengths = [len(ids) for ids in teacher_prompts]
    requests = _requests(config)
    return Workload(
        rows_in=plan.rows_in,
        unusable=plan.rows_in - usable,
        splits=dict(splits),
        prompts=prompts,
        sampled=len(sample),
        prompt=_mean(lengths),
        longest_prompt=max(lengths, default=0),
        shared=_shared(engine, teacher_prompts),
        critique_request=len(teacher([_user(requests[0])])),
        revision_request=len(teacher([_user(requests[1])])),
        judge_prompt=_judge_prompt(config, sample, teacher, notes),
        verdict_prompt=_verdict_prompt(config, sample, teacher, notes),
        student_prompt=_mean(student_prompts),
        longest_student_prompt=max(student_prompts, default=0),
        label=_mean([len(chat.text_ids(text)) for text in _labels(config, sample)], LABEL_TOKENS),
        answer=_mean_or_none([len(chat.text_ids(text)) for text in _answers(config, sample)]),
        notes=notes,
    )


def _whose_tokenizer(config: RunConfig) -> tuple[str, BaseEngineConfig]:
    """The teacher, or the first member whose tokenizer is here."""
    known = (item for item in config.teachers.items() if isinstance(item[1], VllmEngineConfig | HfEngineConfig))
    return next(known, next(iter(config.teachers.items())))


def tokens_of(engine: BaseEngineConfig, key: str, notes: list[str]) -> TokensOf:
    """What turns a conversation into something as long as its tokens are many."""
    if isinstance(engine, VllmEngineConfig | HfEngineConfig):
        return prompts_of(engine, key=f"{key}.model").prompt_ids
    if isinstance(engine, FakeEngineConfig):
        return lambda messages: " ".join(m["content"] for m in messages).split()
    if not isinstance(engine, NoEngineConfig):
        notes.append(
            f"{key}: the tokenizer of {engine.model} is not known; a token is {CHARACTERS_PER_TOKEN} characters"
        )
    return lambda messages: "".join(m["content"] for m in messages)[::CHARACTERS_PER_TOKEN]


# -- rows ------------------------------------------------------------------------------------------------------------


def _with_stand_ins(
    config: RunConfig, data: SynthesizeDataConfig, scratch: RunFolder, limit: int | None, notes: list[str]
) -> RunConfig:
    """The teacher's queries are not written yet: seeds or topics, numbered, stand for them."""
    requests = Requests(data)
    texts = requests.seeds or [prompt for _, prompt in requests.prompts]
    count = min(data.count, limit or data.count)
    system = {"system": requests.prompts[0][0]} if data.role_prompts is not None else {}
    rows = [{"text": f"{texts[i % len(texts)]} {i}", **system} for i in range(count)]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    scratch.write_bytes(text.encode(), "queries", "queries.jsonl")
    kind = "seeds" if requests.seeds else "topics"
    notes.append(f"data: the teacher has not written its queries yet; {kind} are tokenised in their place")
    return config.model_copy(update={"data": as_files(data, scratch.url("queries", "queries.jsonl"))})


def _rows(scratch: RunFolder) -> Iterator[Row]:
    for table in scratch.read_tables("rows"):
        yield from (row_from_record(r) for r in table.to_pylist() if r["reject_reason"] is None)


def _sample(recipe: Recipe, scratch: RunFolder, usable: int, wanted: int) -> tuple[list[Row], int]:
    """Rows at even distances, and how many different prompts there are (one partition holds all equal ones)."""
    chosen = {i * usable // wanted for i in range(wanted)} if wanted < usable else range(usable)
    sample: list[Row] = []
    prompts: set[int] = set()
    for number, row in enumerate(_rows(scratch)):
        if number in chosen:
            sample.append(row)
        for messages in _rendered(recipe.teacher_messages, [row]):
            prompts.add(hash(tuple(m["content"] for m in messages)))
    return sample, len(prompts)


def _rendered(render: Callable[[Row], list[Message]], rows: Sequence[Row]) -> list[list[Message]]:
    """The conversations of rows; one that has none will be a reject."""
    found = []
    for row in rows:
        try:
            found.append(render(row))
        except (RowError, RequestRejected):
            continue
    return found


# -- tokens ----------------------------------------------------------------------------------------------------------


def _shared(engine: BaseEngineConfig, prompts: Sequence[list[int]]) -> int:
    """Whole blocks that all prompts begin with, where the engine keeps them (vLLM does unless it is told not to)."""
    if not isinstance(engine, VllmEngineConfig) or engine.engine_kwargs.get("enable_prefix_caching") is False:
        return 0
    if len(prompts) < 2:
        return 0
    first, last = min(prompts), max(prompts)  # what these two share, all between them share
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))
    return sum(1 for _ in same) // BLOCK * BLOCK


def _requests(config: RunConfig) -> tuple[str, str]:
    """What a teacher is asked behind its draft; templates count as they are written."""
    recipe = config.recipe
    if not isinstance(recipe, SelfCritiqueRecipeConfig):
        return "", ""
    return recipe.critique_request, recipe.revision_request


def _judge_prompt(config: RunConfig, sample: Sequence[Row], teacher: TokensOf, notes: list[str]) -> float:
    reward = getattr(config.recipe, "reward", None)
    if not isinstance(reward, JudgeRewardConfig):
        return 0.0
    judge = teacher if reward.engine is None else tokens_of(reward.engine, "recipe.reward.engine", notes)
    return _asked(reward, "recipe.reward.prompt", sample, judge)


def _verdict_prompt(config: RunConfig, sample: Sequence[Row], teacher: TokensOf, notes: list[str]) -> float:
    if "win_rate" not in config.evaluate.metrics:
        return 0.0
    own = config.evaluate.judge
    judge = teacher if own is None else tokens_of(own, "evaluate.judge", notes)
    return _asked(config.evaluate.comparison, "evaluate.judge_prompt", sample, judge)


def _asked(reward: JudgeRewardConfig, key: str, sample: Sequence[Row], judge: TokensOf) -> float:
    """Tokens of what a judge is asked, without the answers that it shows."""
    asked = JudgeReward(reward, key)
    return _mean([len(judge([_user(asked.prompt(query=row.query, answer="", a="", b=""))])) for row in sample])


def _labels(config: RunConfig, sample: Sequence[Row]) -> list[str]:
    column = getattr(config.recipe, "label_column", None)
    return [] if column is None else [str(row.columns[column]) for row in sample if row.columns.get(column) is not None]


def _answers(config: RunConfig, sample: Sequence[Row]) -> list[str]:
    """Answers that are in the data, where nobody is asked for them."""
    recipe = config.recipe
    column = None
    if isinstance(recipe, StepByStepRecipeConfig):
        column = recipe.rationale_column
    elif isinstance(recipe, SelfCritiqueRecipeConfig) and recipe.chains is not None:
        column = recipe.chains.revision
    return [] if column is None else [str(row.columns[column]) for row in sample if row.columns.get(column)]


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _mean(lengths: Sequence[int], default: float = 0.0) -> float:
    return float(statistics.mean(lengths)) if lengths else default


def _mean_or_none(lengths: Sequence[int]) -> float | None:
    return _mean(lengths) if lengths else None
