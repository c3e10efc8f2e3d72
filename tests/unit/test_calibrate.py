"""What of a recipe can be served, and when an answer is as good. The whole of it: tests/integration/test_demo.py."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

from distill_ray.config import RunConfig, parse_config
from distill_ray.config.reward import JudgeRewardConfig
from distill_ray.errors import ConfigError
from distill_ray.pipeline.folder import RunFolder
from distill_ray.pipeline.metrics import exact_match, token_f1
from distill_ray.records import Completion, Message
from distill_ray.rewards.judge import JudgeReward
from distill_ray.serving.calibration.as_good import compared, is_as_good
from distill_ray.serving.calibration.calibrate import served_form
from distill_ray.serving.calibration.comparing import agreements, outcomes
from distill_ray.serving.calibration.measured import Measured
from distill_ray.serving.routing.conversation import RequestKey
from tests.unit.small_bundle import WordEmbedder


def config(recipe: dict[str, Any], **more: Any) -> RunConfig:
    return parse_config({"recipe": recipe, "data": {"source": "q.jsonl"}, "teacher": {"type": "fake"}, **more})


def measured(student: str, teacher: str, reference: str | None = None) -> Measured:
    asked: Message = {"role": "user", "content": "why?"}
    return Measured("r", RequestKey("f", "why?"), (asked,), student, teacher, reference)


# -- how it is served --------------------------------------------------------------------------------------------------


def test_the_context_of_a_service_is_the_system_prompt_and_the_examples() -> None:
    examples = [{"query": "2 + 2", "answer": "4"}]
    form, context = served_form(config({"context": {"text": " Be exact.\n"}, "examples": examples}))
    assert [(m["role"], m["content"]) for m in context] == [
        ("system", "Be exact."),
        ("user", "2 + 2"),
        ("assistant", "4"),
    ]
    assert (form.system, form.prefix, form.suffix) == (None, "", "")


def test_a_context_that_the_student_keeps_is_part_of_its_prompt() -> None:
    form, _ = served_form(config({"context": {"text": "long"}, "student_context": "short"}))
    assert form.messages([{"role": "user", "content": "why?"}]) == [
        {"role": "system", "content": "short"},
        {"role": "user", "content": "why?"},
    ]


@pytest.mark.parametrize(
    ("recipe", "prefix"),
    [
        ({"type": "step_by_step", "label_column": "label"}, "predict: "),
        ({"type": "step_by_step", "label_column": "label", "mode": "standard"}, ""),
        ({"type": "self_critique", "accept": {"type": "always"}, "instruction": "Be kind."}, ""),
    ],
)
def test_other_recipes_have_no_context_and_their_own_prompt(recipe: dict[str, Any], prefix: str) -> None:
    form, context = served_form(config(recipe))
    assert (context, form.system, form.prefix, form.suffix) == ([], None, prefix, "")


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"context": {"column": "manual"}}, r"recipe\.context\.column: manual: each row has a context of its own"),
        (
            {"type": "step_by_step", "label_column": "label", "label_prompt": "{{ topic }}: {{ query }}"},
            "more of a row than its query",
        ),
        (
            {"type": "step_by_step", "label_column": "label", "label_prompt": "{{ query | upper }}"},
            "not some text, the query, some text",
        ),
    ],
)
def test_what_a_client_cannot_send_cannot_be_served(recipe: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        served_form(config(recipe))


# -- when an answer is as good -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("student", "teacher", "reference", "expected"),
    [
        ("fr", "fr", None, True),
        ("fr", "de", None, False),
        ("fr", "de", "fr", True),  # better than the teacher
        ("de", "de", "fr", True),  # wrong, and so is the teacher
        ("en", "de", "fr", True),
        ("en", "fr", "fr", False),
        ("", "", None, False),
    ],
)
def test_as_good_means_not_worse_than_the_teacher(
    student: str, teacher: str, reference: str | None, expected: bool
) -> None:
    assert is_as_good(measured(student, teacher, reference), exact_match, 1.0) is expected


def test_enough_of_the_words_is_enough() -> None:
    assert is_as_good(measured("red green blue grey", "red green blue black"), token_f1, 0.75)
    assert not is_as_good(measured("red green blue grey", "red green blue black"), token_f1, 0.76)
    assert is_as_good(measured("red pink", "red green", "red blue"), token_f1, 0.9), "the teacher does no better"


def test_metrics_by_name(tmp_path: Any) -> None:
    pairs = [measured("a b c d", "a b c d"), measured("x y", "a b c d"), measured("a b c", "a b c d")]
    for metric, expected in (
        ("exact_match", [True, False, False]),
        ("token_f1", [True, False, True]),
        ("embedding", [True, False, True]),
    ):
        asked = config({"context": {"text": "x"}}, calibrate={"metric": metric, "good_from": 0.75})
        found = outcomes(asked, RunFolder(tmp_path), pairs, WordEmbedder())
        assert found.dtype == np.bool_
        assert found.tolist() == expected, metric


def test_a_running_service_knows_the_teachers_answer_only(tmp_path: Any) -> None:
    pairs = [measured("fr", "fr", "fr"), measured("en", "de", "fr"), measured("fr", "de", "fr"), measured("a", "a")]
    asked = config({"context": {"text": "x"}})
    good = outcomes(asked, RunFolder(tmp_path), pairs, WordEmbedder())
    assert good.tolist() == [True, True, True, True]
    assert agreements(asked, pairs, good, WordEmbedder()).tolist() == [True, False, False, True]


class Judge:
    """Says what it is told to, one verdict per order."""

    name = "judge"

    def __init__(self, *verdicts: str) -> None:
        self.verdicts = list(verdicts)
        self.prompts: list[str] = []

    async def generate(self, messages: Any, num_samples: int | None = None) -> list[Completion]:
        self.prompts.append(messages[0]["content"])
        return [Completion(self.verdicts[len(self.prompts) - 1], "stop", 1, 1)]


@pytest.mark.parametrize(
    ("verdicts", "expected"),
    [
        (("[[A]]", "[[B]]"), 1.0),  # the student's wins both times
        (("[[C]]", "[[C]]"), 1.0),
        (("[[A]]", "[[A]]"), 1.0),  # the judge likes what it sees first: a tie
        (("[[C]]", "[[A]]"), 0.5),
        (("[[B]]", "[[A]]"), 0.0),
        (("no verdict", "[[B]]"), 0.0),
    ],
)
def test_a_judge_is_asked_in_both_orders(verdicts: tuple[str, str], expected: float) -> None:
    judge = Judge(*verdicts)
    reward = JudgeReward(JudgeRewardConfig(mode="comparison"))
    assert asyncio.run(compared(measured("mine", "yours"), reward, judge)) == expected
    assert len(judge.prompts) == 2
    assert judge.prompts[0].index("mine") < judge.prompts[0].index("yours")
    assert judge.prompts[1].index("yours") < judge.prompts[1].index("mine")


def test_equal_answers_are_not_judged() -> None:
    judge = Judge()
    reward = JudgeReward(JudgeRewardConfig(mode="comparison"))
    assert asyncio.run(compared(measured("a  b", "a b"), reward, judge)) == 1.0
    assert judge.prompts == []
