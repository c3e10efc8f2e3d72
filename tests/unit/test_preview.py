"""What `preview` shows of a row: each turn by its name, the rewards, the decision."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from distill_ray.config import FakeEngineConfig, SamplingConfig, SelfCritiqueRecipeConfig
from distill_ray.engines import make_engine
from distill_ray.pipeline.preview import Part, _Watched, outcome, turns
from distill_ray.recipes import Engines, SelfCritiqueRecipe
from distill_ray.records import Answered, Completion, Example, Message, Reject, RejectReason, Row

ANSWER = "{% if query == 'R?' %}revision{% elif query == 'C?' %}critique{% else %}draft{% endif %}"
CHAINS = {"draft": "d", "revision": "r", "reward_before": "sb", "reward_after": "sa"}


class Longer:
    """A reward: the longer the better."""

    async def score(self, item: Answered) -> float:
        return float(len(item.answer))

    async def score_pair(self, before: Answered, after: Answered) -> tuple[float, float]:
        return await self.score(before), await self.score(after)


def shown(split: Any = "train", columns: dict[str, Any] | None = None, **config: Any) -> list[tuple[str, str]]:
    asks = {"critique_request": "C?", "revision_request": "R?", "reward": {"type": "length"}}
    recipe = SelfCritiqueRecipe(SelfCritiqueRecipeConfig(**{**asks, **config}))
    engine = make_engine(FakeEngineConfig(answer=ANSWER))
    teacher = _Watched(engine, SamplingConfig())
    row = Row("r1", split, "question", columns or {"text": "question"})

    async def distilled() -> list[Example] | Reject:
        await engine.start()
        return await recipe.distill(row, Engines(teacher, Longer()))

    result = asyncio.run(distilled())
    parts = turns(teacher.calls, recipe.turns) + outcome(result, was_asked=bool(teacher.calls))
    return [(part.title, part.text) for part in parts]


ONE_ROUND = [
    ("draft", "draft"),
    ("critique request", "C?"),
    ("critique", "critique"),
    ("revision request", "R?"),
    ("revision", "revision"),
]


def test_a_self_critique_is_shown_turn_by_turn_with_rewards_and_decision() -> None:
    assert shown() == [
        *ONE_ROUND,
        ("reward", "5 before, 8 after"),
        ("decision", "accepted"),
        ("the student learns", "revision"),
    ]


def test_a_second_round_is_counted() -> None:
    titles = [title for title, _ in shown(rounds=2)]
    assert titles[5:9] == ["critique request 2", "critique 2", "revision request 2", "revision 2"]


def test_what_is_not_accepted_says_so_with_its_rewards() -> None:
    strict = {"type": "threshold", "threshold": 99}
    assert shown(accept=strict)[5:] == [
        ("the student learns", "(nothing: not_accepted: reward 5 before, 8 after (threshold))")
    ]
    assert shown("test", accept=strict)[6:] == [
        ("decision", "not accepted; kept, for the evaluation alone"),
        ("the student is held against", "revision"),
    ]


@pytest.mark.parametrize("after", [1, 0])
def test_chains_from_columns_are_shown_too(after: float) -> None:
    parts = shown(columns={"text": "question", "d": "bad", "r": "good", "sb": 0, "sa": after}, chains=CHAINS)
    assert parts[:2] == [("draft", "bad"), ("revision", "good")]
    assert "not_accepted" in parts[-1][1] if not after else parts[-1][1] == "good"


def test_other_recipes_show_what_was_asked_and_each_raw_answer() -> None:
    first, second = Completion("a", "stop", 1, 1), Completion("b", "stop", 1, 1, 1)
    asked: list[Message] = [{"role": "user", "content": "q"}]
    again: list[Message] = [*asked, {"role": "assistant", "content": "a"}, {"role": "user", "content": "sure?"}]
    assert turns([(asked, [first, second]), (again, [first])]) == [
        Part("raw answer (1 of 2)", "a", "cyan"),
        Part("raw answer (2 of 2)", "b", "cyan"),
        Part("asked", "sure?"),
        Part("raw answer", "a", "cyan"),
    ]
    learnt = [Example("r1", "train", [], text) for text in ("x", "y")]
    assert outcome(learnt, was_asked=True) == [Part("the student learns", "x\n---\ny", "green")]
    [part] = outcome(Reject("r1", "generate", RejectReason.REFUSED, "sorry"), was_asked=True)
    assert part.text == "(nothing: refused: sorry)"
