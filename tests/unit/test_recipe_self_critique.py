"""Chains of draft, critique and revision, and which of them are learnt."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill_ray.config import AcceptConfig, SelfCritiqueRecipeConfig, parse_config
from distill_ray.errors import ConfigError
from distill_ray.pipeline.folder import RunFolder
from distill_ray.pipeline.recipe_figures import recipe_figures
from distill_ray.recipes import Engines, SelfCritiqueRecipe
from distill_ray.recipes.self_critique import accepts
from distill_ray.records import (
    Answered,
    Completion,
    Example,
    Message,
    Reject,
    Row,
    examples_table,
    preferences_table,
    rejects_table,
)

RESULTS = Path(__file__).resolve().parents[3] / "shared" / "data" / "self_critique" / "results_sentiment_review.json"
SCRIPT = ("draft", "critique", "revision", "critique 2", "revision 2")


class Scripted:
    """A teacher that says what stands at a place of the conversation."""

    name = "teacher@1"

    def __init__(self, *turns: str) -> None:
        self.turns = turns or SCRIPT
        self.asked: list[list[Message]] = []

    async def generate(self, messages: Sequence[Message], num_samples: int | None = None) -> list[Completion]:
        self.asked.append(list(messages))
        place = sum(m["role"] == "assistant" for m in messages)
        return [Completion(self.turns[place], "stop", 1, 1)]


class Scores:
    """A reward by table."""

    def __init__(self, **table: float) -> None:
        self.table = {name.replace("_", " "): value for name, value in table.items()}

    async def score(self, item: Answered) -> float:
        return self.table[item.answer]

    async def score_pair(self, before: Answered, after: Answered) -> tuple[float, float]:
        return await self.score(before), await self.score(after)


LENGTH = {"type": "length"}


def distill(
    engines: Engines, columns: dict[str, Any] | None = None, split: Any = "train", **config: Any
) -> list[Example] | Reject:
    recipe = SelfCritiqueRecipe(SelfCritiqueRecipeConfig(**{"reward": LENGTH, **config}))
    columns = columns or {"text": "question"}
    return asyncio.run(recipe.distill(Row("r1", split, recipe.query(columns), columns), engines))


def test_the_chain_is_one_conversation_and_the_student_learns_the_revision_directly() -> None:
    teacher = Scripted()
    [example] = distill(Engines(teacher, Scores(draft=1, revision=2)), critique_request="C?", revision_request="R?")
    assert [[m["content"] for m in messages] for messages in teacher.asked] == [
        ["question"],
        ["question", "draft", "C?"],
        ["question", "draft", "C?", "critique", "R?"],
    ]
    assert example.messages == [{"role": "user", "content": "question"}]
    assert (example.completion, example.draft) == ("revision", "draft")
    assert (example.reward_before, example.reward_after) == (1, 2)
    assert example.accepted is True


def test_a_revision_that_is_not_better_is_a_reject_with_the_chain_and_its_scores() -> None:
    result = distill(Engines(Scripted(), Scores(draft=2, revision=2)))
    assert isinstance(result, Reject)
    assert result.reason == "not_accepted"
    assert result.row == {
        "text": "question",
        "draft": "draft",
        "revision": "revision",
        "reward_before": 2,
        "reward_after": 2,
    }


class Two(Scripted):
    """Two drafts, each with a revision of its own."""

    async def generate(self, messages: Sequence[Message], num_samples: int | None = None) -> list[Completion]:
        texts = [message["content"] for message in messages]
        if len(texts) == 1:
            return [Completion(f"draft {i}", "stop", 1, 1, sample_index=i) for i in range(2)]
        return [Completion(f"{'critique' if len(texts) == 3 else 'revision'} of {texts[1]}", "stop", 1, 1)]


@pytest.mark.parametrize("better", [[0], [1], [0, 1], []])
def test_of_several_chains_none_is_lost(better: list[int], tmp_path: Path) -> None:
    table = {f"draft {i}": 1.0 for i in range(2)} | {f"revision of draft {i}": 2.0 * (i in better) for i in range(2)}
    result = distill(Engines(Two(), Scores(**table)))
    worse = [
        {"draft": f"draft {i}", "revision": f"revision of draft {i}", "reward_before": 1.0, "reward_after": 0.0}
        for i in range(2)
        if i not in better
    ]
    folder = RunFolder(tmp_path)
    if isinstance(result, Reject):
        assert not better
        assert worse[0].items() <= result.row.items()
        assert result.row["rejected_chains"] == worse[1:]
    else:
        assert [example.draft for example in result] == [f"draft {i}" for i in better]
        assert (result[0].rejected_chains or []) == worse
    folder.write_table(examples_table(result if isinstance(result, list) else []), "examples", "00000.parquet")
    folder.write_table(rejects_table([result] if isinstance(result, Reject) else []), "rejects", "00000.parquet")
    raw = {"recipe": {"type": "self_critique", "reward": LENGTH}, "data": {"source": "x"}, "teacher": {"type": "fake"}}
    figures = recipe_figures(parse_config(raw), folder)["revisions"]
    assert (figures["chains"], figures["accepted"], figures["scored"]) == (2, len(better), 2)


def test_a_held_out_row_is_kept_whether_its_revision_is_accepted_or_not() -> None:
    [example] = distill(Engines(Scripted(), Scores(draft=2, revision=1)), split="test")
    assert (example.completion, example.reward_before, example.reward_after) == ("revision", 2, 1)
    assert example.accepted is False


def test_without_a_reward_every_revision_is_accepted_and_no_number_is_made_up() -> None:
    [example] = distill(Engines(Scripted()), reward=None, accept={"type": "always"})
    assert (example.completion, example.accepted) == ("revision", True)
    assert (example.reward_before, example.reward_after) == (None, None)


def test_a_second_round_goes_on_in_the_same_conversation_and_what_was_accepted_stays() -> None:
    teacher = Scripted()
    scores = Scores(draft=1, revision=3, revision_2=2)
    [example] = distill(Engines(teacher, scores), rounds=2)
    assert len(teacher.asked) == 5
    assert len(teacher.asked[-1]) == 9  # question, draft, and two rounds of request and answer less the last answer
    assert (example.completion, example.reward_before, example.reward_after) == ("revision", 1, 3)


def test_with_restart_a_round_begins_from_the_accepted_text_and_ends_where_none_is() -> None:
    teacher = Scripted("draft", "critique", "revision")
    distill(Engines(teacher, Scores(draft=1, revision=2)), rounds=3, restart=True)
    contents = [[m["content"] for m in messages] for messages in teacher.asked]
    assert contents[3][:2] == ["question", "revision"]  # the second round; its proposal is no better, so no third
    assert len(contents) == 5


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_reward_that_is_no_number_is_a_reject(value: float) -> None:
    result = distill(Engines(Scripted(), Scores(draft=1, revision=value)))
    assert isinstance(result, Reject)
    assert result.reason == "no_reward"


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        (("", "c", "r"), "empty_answer"),
        (("d", " ", "r"), "empty_answer"),
        (("d", "c", "I'm sorry, I can't help."), "refused"),
        (("I cannot help with that.", "c", "r"), "refused"),
    ],
)
def test_a_turn_that_is_no_answer_ends_the_chain(turns: tuple[str, ...], reason: str) -> None:
    result = distill(Engines(Scripted(*turns), Scores(d=0, r=1)))
    assert isinstance(result, Reject)
    assert result.reason == reason


@given(st.floats(-100, 100), st.floats(-100, 100), st.floats(0, 1, exclude_max=True))
def test_acceptance_is_what_the_names_say(before: float, after: float, draw: float) -> None:
    assert accepts(AcceptConfig(type="always"), before, after, draw)
    assert accepts(AcceptConfig(type="improve"), before, after, draw) == (after > before)
    assert accepts(AcceptConfig(type="threshold", threshold=3.0), before, after, draw) == (after >= 3.0)
    probability = min(1.0, math.exp(min(0.0, (after - before) / 2.0)))
    assert accepts(AcceptConfig(type="metropolis", temperature=2.0), before, after, draw) == (draw < probability)


def test_metropolis_accepts_with_its_probability_and_the_same_for_the_same_seed() -> None:
    def share(seed: int) -> list[bool]:
        recipe = SelfCritiqueRecipe(
            SelfCritiqueRecipeConfig(reward=LENGTH, accept=AcceptConfig(type="metropolis", temperature=1.0, seed=seed))
        )
        rows = [Row(f"r{i}", "train", "q", {"text": "q"}) for i in range(500)]
        engines = Engines(Scripted(), Scores(draft=1.0, revision=0.0))
        return [isinstance(asyncio.run(recipe.distill(row, engines)), list) for row in rows]

    first = share(0)
    assert first == share(0)
    assert first != share(1)
    assert sum(first) / 500 == pytest.approx(math.exp(-1), abs=0.07)


CHAINS = {
    "draft": "summary_pre",
    "revision": "summary_after",
    "reward_before": "scores_pre",
    "reward_after": "scores_after",
}


def finished(before: Any, after: Any) -> list[Example] | Reject:
    columns = {"prompt": "q", "summary_pre": "d", "summary_after": "r", "scores_pre": before, "scores_after": after}
    return distill(Engines(Scripted()), columns, query="{{ prompt }}", chains=CHAINS, reward=None)


def test_finished_chains_are_decided_by_their_own_scores() -> None:
    [example] = finished(2, 5)
    assert (example.completion, example.draft, example.teacher) == ("r", "d", "data")
    assert isinstance(finished(5, 5), Reject)
    assert isinstance(no_number := finished("good", 5), Reject)
    assert no_number.reason == "no_reward"


@pytest.mark.skipif(not RESULTS.exists(), reason="the paper's results lie beside the project on some machines only")
def test_the_papers_results_are_accepted_as_their_scores_say() -> None:
    records = json.loads(RESULTS.read_text())
    recipe = SelfCritiqueRecipe(SelfCritiqueRecipeConfig(query="{{ prompt }}", chains=CHAINS))
    accepted = 0
    for i, record in enumerate(records):
        result = asyncio.run(recipe.distill(Row(str(i), "train", recipe.query(record), record), Engines(Scripted())))
        accepted += isinstance(result, list)
    assert accepted == sum(record["scores_after"] > record["scores_pre"] for record in records)


def test_a_comparison_of_rewards_needs_a_reward() -> None:
    base = {"data": {"source": "x.jsonl"}, "teacher": {"type": "fake"}}
    with pytest.raises(ConfigError, match=r"accept.type improve compares rewards: give `reward`"):
        parse_config({**base, "recipe": {"type": "self_critique"}})
    parse_config({**base, "recipe": {"type": "self_critique", "accept": {"type": "always"}}})
    config = parse_config({"data": base["data"], "recipe": {"type": "self_critique", "chains": CHAINS}})
    assert config.teacher.type == "none"


def test_a_preference_pair_is_a_revision_with_a_higher_reward_whatever_was_accepted() -> None:
    rewards: list[tuple[float | None, float | None]] = [(0, 1), (1, 1), (2, 1), (None, None), (None, 1), (0, math.inf)]
    examples = [
        Example(
            f"r{i}", "train", [], "revision", draft="draft", accepted=True, reward_before=before, reward_after=after
        )
        for i, (before, after) in enumerate(rewards)
    ]
    pairs = preferences_table(examples).to_pylist()
    assert [pair["row_id"] for pair in pairs] == ["r0", "r5"]
    assert all(pair["reward_chosen"] > pair["reward_rejected"] for pair in pairs)


@pytest.mark.parametrize("chains", [None, {"draft": "d", "revision": "r", "reward_after": "a"}])
def test_preference_pairs_need_a_reward(chains: dict[str, str] | None) -> None:
    recipe = {"type": "self_critique", "accept": {"type": "always"}, "preference_pairs": True, "chains": chains}
    base = {"data": {"source": "x.jsonl"}, "teacher": {"type": "fake"}}
    with pytest.raises(ConfigError, match="preference_pairs: a pair is a revision with a higher reward than its draft"):
        parse_config({**base, "recipe": recipe})
    parse_config({**base, "recipe": {**recipe, "reward": LENGTH}})


@pytest.mark.parametrize("value", [None, "", "n/a", math.nan])
def test_finished_chains_that_are_all_accepted_need_no_rewards(value: Any) -> None:
    columns = {"prompt": "q", "summary_pre": "d", "summary_after": "r", "scores_pre": 1, "scores_after": value}
    config = {"query": "{{ prompt }}", "chains": CHAINS, "reward": None, "accept": {"type": "always"}}
    [example] = distill(Engines(Scripted()), columns, **config)
    assert (example.completion, example.accepted) == ("r", True)
    assert (example.reward_before, example.reward_after) == (1, None)


@pytest.mark.parametrize(
    ("value", "said"),
    [(math.nan, "is nan, expected a finite number"), (math.inf, "is inf, expected a finite number")],
)
def test_a_reward_in_a_column_has_to_be_finite_and_is_said_so(value: float, said: str) -> None:
    result = finished(value, 5)
    assert isinstance(result, Reject)
    assert said in result.detail
