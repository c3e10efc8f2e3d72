"""The context recipe: what both models see, which samples are good, why a row gives no example."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distill_ray.config import ContextRecipeConfig
from distill_ray.errors import ConfigError, RowError
from distill_ray.recipes import RECIPES, ContextRecipe, Engines, make_recipe
from distill_ray.records import Completion, Example, Message, Reject, Row


class Scripted:
    """A teacher that says what it was told to say, and remembers what it was asked."""

    name = "scripted@1"

    def __init__(self, *answers: Completion) -> None:
        self.answers = list(answers)
        self.asked: list[Message] = []
        self.scored = [6, 2]  # what the answer to score is in tokens

    async def generate(self, messages: Sequence[Message], num_samples: int | None = None) -> list[Completion]:
        self.asked = list(messages)
        return self.answers

    async def score(self, messages: Sequence[Message], answer: str) -> Completion:
        self.asked = list(messages)
        return Completion(answer, "stop", 9, 0, **{**SOFT, "token_ids": self.scored})


def answer(text: str, *, sample: int = 0, finish: str = "stop", **more: Any) -> Completion:
    return Completion(text, finish_reason=finish, prompt_tokens=9, completion_tokens=3, sample_index=sample, **more)


def recipe(**keys: Any) -> ContextRecipe:
    return ContextRecipe(ContextRecipeConfig.model_validate({"context": {"text": "Be brief."}, **keys}))


def distill(it: ContextRecipe, *answers: Completion, row: Row | None = None) -> list[Example] | Reject:
    return asyncio.run(it.distill(row or ROW, Engines(Scripted(*answers))))


ROW = Row("r1", "test", "Bonjour", {"text": "Bonjour", "label": "fr"}, reference="fr")


def test_the_context_and_the_few_shot_turns_are_only_for_the_teacher() -> None:
    it = recipe(examples=[{"query": "Hola", "answer": "es"}], student_context="Short.")
    teacher = Scripted(answer("fr"))
    examples = asyncio.run(it.distill(ROW, Engines(teacher)))
    assert teacher.asked == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hola"},
        {"role": "assistant", "content": "es"},
        {"role": "user", "content": "Bonjour"},
    ]
    assert teacher.asked == it.teacher_messages(ROW)
    assert isinstance(examples, list)
    assert examples[0].messages == [
        {"role": "system", "content": "Short."},
        {"role": "user", "content": "Bonjour"},
    ]


def test_without_student_context_the_student_sees_the_query_alone() -> None:
    [example] = distill(recipe(), answer("fr"))
    assert example.messages == [{"role": "user", "content": "Bonjour"}]


def test_each_good_sample_is_an_example_and_bad_ones_are_dropped() -> None:
    samples = [answer("fr", reasoning="it says bonjour"), answer("", sample=1), answer("French", sample=2)]
    examples = distill(recipe(), *samples)
    assert isinstance(examples, list)
    assert [(e.completion, e.sample_index) for e in examples] == [("fr", 0), ("French", 2)]
    first = examples[0]
    assert (first.row_id, first.split, first.reference, first.teacher) == ("r1", "test", "fr", "scripted@1")
    assert first.reasoning == "it says bonjour"
    assert first.example_id == "r1/answer/0"


@pytest.mark.parametrize(
    ("keys", "sample", "reason", "detail"),
    [
        ({}, answer("half an ans", finish="length"), "cut_off", "after 3 tokens: 'half an ans'"),
        ({}, answer("", finish="length"), "cut_off", ""),
        ({}, answer("bad words", finish="content_filter"), "refused", "content filter"),
        ({}, answer("I'm sorry, but I can't help with that."), "refused", "I'm sorry"),
        ({}, answer("I\u2019m sorry, but I can\u2019t help with that."), "refused", "sorry"),
        ({"refusals": ["^NO$"]}, answer("NO"), "refused", "NO"),
        ({}, answer(" \n"), "empty_answer", "stop"),
        ({}, answer("", finish="abort"), "engine_error", "gave up"),
        ({"parse": {"regex": "Answer: (.+)"}}, answer("no idea"), "unparsable_answer", "no idea"),
        ({"parse": {"json_field": "label"}}, answer('{"label": ""}'), "unparsable_answer", "label"),
    ],
)
def test_a_row_without_a_good_sample_is_a_reject_with_the_first_reason(
    keys: dict[str, Any], sample: Completion, reason: str, detail: str
) -> None:
    reject = distill(recipe(**keys), sample, answer("", sample=1))
    assert isinstance(reject, Reject)
    assert (reject.row_id, reject.stage, reject.reason) == ("r1", "generate", reason)
    assert detail in reject.detail
    assert reject.row == ROW.columns


def test_a_reject_shows_no_more_than_the_start_of_a_long_answer() -> None:
    reject = distill(recipe(parse={"after": "Answer:"}), answer("blah " * 10_000))
    assert isinstance(reject, Reject)
    assert len(reject.detail) < 300


def test_no_refusal_patterns_turn_the_check_off() -> None:
    [example] = distill(recipe(refusals=[]), answer("I'm sorry, but I can't help with that."))
    assert example.completion.startswith("I'm sorry")


def test_parse_keeps_only_the_result() -> None:
    [example] = distill(recipe(parse={"regex": r"Answer: (\w+)"}), answer("Hm... Answer: fr"))
    assert example.completion == "fr"


SOFT = {
    "token_ids": [5, 2],
    "topk_ids": np.array([[5, 6], [2, 3]], dtype=np.int32),
    "topk_logprobs": np.log(np.array([[0.5, 0.25], [0.75, 0.25]], dtype=np.float32)),
}


def test_soft_targets_are_kept_where_the_text_is_the_teachers_own() -> None:
    [example] = distill(recipe(), answer("fr", **SOFT))
    assert example.completion_ids == [5, 2]
    assert example.topk_ids is SOFT["topk_ids"]
    assert example.tail_logprob is not None
    assert np.isfinite(example.tail_logprob).all()
    np.testing.assert_allclose(np.exp(example.tail_logprob), [0.25, 0.0], atol=1e-6)


def test_a_text_with_soft_targets_is_learnt_as_it_was_said() -> None:
    [example] = distill(recipe(), answer(" fr\n", **SOFT))
    assert (example.completion, example.completion_ids) == (" fr\n", [5, 2])


def test_what_parse_leaves_is_scored_anew_with_the_context_in_view() -> None:
    it, teacher = recipe(parse={"after": "Answer:"}), Scripted(answer("Hm... Answer: fr", sample=1, **SOFT))
    [example] = asyncio.run(it.distill(ROW, Engines(teacher)))
    assert (example.completion, example.completion_ids, example.sample_index) == ("fr", [6, 2], 1)
    assert teacher.asked == it.teacher_messages(ROW)


@pytest.mark.parametrize("scored", [[7, 2], [6, 7]])
def test_a_result_that_the_teacher_would_not_give_just_so_has_no_soft_targets(scored: list[int]) -> None:
    it, teacher = recipe(parse={"after": "Answer:"}), Scripted(answer("Hm... Answer: fr", **SOFT))
    teacher.scored = scored  # a token that is none of the likely ones
    [example] = asyncio.run(it.distill(ROW, Engines(teacher)))
    assert example.completion == "fr"
    assert (example.completion_ids, example.topk_ids, example.tail_logprob) == (None, None, None)


def test_the_context_may_be_a_file_with_a_byte_order_mark(tmp_path: Path) -> None:
    file = tmp_path / "context.md"
    file.write_bytes(b"\xef\xbb\xbfBe brief.\n\n")
    assert recipe(context={"file": str(file)}).teacher_messages(ROW)[0]["content"] == "Be brief."


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b"", "empty"),
        (b" \n\t", "empty"),
        ("Be brief, né".encode("latin-1"), "not UTF-8 text (byte 11)"),
    ],
)
def test_an_unusable_context_file_names_key_and_path(tmp_path: Path, content: bytes | None, message: str) -> None:
    file = tmp_path / "context.md"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError) as error:
        recipe(context={"file": str(file)})
    assert str(error.value).startswith(f"recipe.context.file: {file}")
    assert message in str(error.value)


def test_a_folder_as_context_file_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"recipe\.context\.file"):
        recipe(context={"file": str(tmp_path)})


def test_an_empty_context_text_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match=r"recipe\.context\.text: empty"):
        recipe(context={"text": "  \n"})


def test_a_context_column_gives_each_row_its_own_context() -> None:
    it = recipe(context={"column": "rules"})
    row = Row("r1", "train", "Bonjour", {"text": "Bonjour", "rules": "Rule 1."})
    assert it.columns.keys() == {"text", "rules"}
    assert it.teacher_messages(row)[0]["content"] == "Rule 1."


@pytest.mark.parametrize(
    ("columns", "reason"),
    [({"text": "a"}, "missing_column"), ({"rules": None}, "not_text"), ({"rules": 3}, "not_text")],
)
def test_a_row_without_a_usable_context_is_a_reject(columns: dict[str, Any], reason: str) -> None:
    it = recipe(context={"column": "rules"})
    reject = distill(it, answer("fr"), row=Row("r1", "train", "a", columns))
    assert isinstance(reject, Reject)
    assert reject.reason == reason
    assert "rules" in reject.detail
    with pytest.raises(RowError):
        it.teacher_messages(Row("r1", "train", "a", columns))


def test_the_fingerprint_follows_the_context_and_not_its_path(tmp_path: Path) -> None:
    one, two = tmp_path / "one.md", tmp_path / "two.md"
    one.write_text("Be brief.")
    two.write_text("Be brief.")
    first = recipe(context={"file": str(one)}).fingerprint
    assert recipe(context={"file": str(two)}).fingerprint == first
    two.write_text("Be long.")
    assert recipe(context={"file": str(two)}).fingerprint != first
    assert recipe(context={"file": str(one)}, student_context="x").fingerprint != first


def test_make_recipe_builds_what_the_type_names() -> None:
    config = ContextRecipeConfig.model_validate({"context": {"text": "Be brief."}})
    assert type(make_recipe(config)) is RECIPES[config.type] is ContextRecipe
