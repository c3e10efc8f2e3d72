"""Rationale and label out of what a teacher or a file says, and the examples of each mode."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from distill_ray.config import StepByStepRecipeConfig, parse_config
from distill_ray.errors import ConfigError
from distill_ray.pipeline.held_out import has_only_a_label, teachers_answer
from distill_ray.recipes import Engines, StepByStepRecipe
from distill_ray.records import Completion, Example, Message, Reject, Row, Split


class Says:
    """A teacher with given answers."""

    name = "teacher@1"

    def __init__(self, *texts: str, finish_reason: str = "stop") -> None:
        self.texts, self.finish_reason = texts, finish_reason
        self.asked: list[list[Message]] = []

    async def generate(self, messages: Sequence[Message], num_samples: int | None = None) -> list[Completion]:
        self.asked.append(list(messages))
        return [Completion(text, self.finish_reason, 1, 1, i) for i, text in enumerate(self.texts)]


def distill(
    columns: dict[str, Any], teacher: Says | None = None, *, split: Split = "train", **config: Any
) -> list[Example] | Reject:
    recipe = StepByStepRecipe(StepByStepRecipeConfig(**{"label_column": "label", **config}))
    row = Row("r1", split, recipe.query(columns), columns, reference="gold")
    return asyncio.run(recipe.distill(row, Engines(teacher or Says())))


ROW = {"input": "Luke scored 84 points in 2 rounds. How many per round?", "label": "( 84.0 / 2.0 )"}
PALM = (
    "Luke scored 84 points after 2 rounds. 84 / 2 = 42. The answer is (84 / 2).\n\n"
    "Q: There are 120 students. The answer is (120 /"
)


def test_task_prefix_gives_two_tasks_with_the_weights_of_alpha() -> None:
    label, rationale = distill(ROW, Says("84 / 2 = 42. The answer is (84 / 2)."), alpha=0.3)
    assert (label.task, label.weight, label.completion) == ("label", 0.3, "( 84.0 / 2.0 )")
    assert label.messages == [{"role": "user", "content": f"predict: {ROW['input']}"}]
    assert (rationale.task, rationale.weight, rationale.completion) == ("rationale", 0.7, "84 / 2 = 42.")
    assert rationale.messages == [{"role": "user", "content": f"explain: {ROW['input']}"}]
    assert label.teacher_answer == "(84 / 2)"
    assert label.row_id == rationale.row_id


def test_standard_learns_the_label_alone_and_single_both_in_one_answer() -> None:
    teacher = Says("84 / 2 = 42. The answer is (84 / 2).")
    [standard] = distill(ROW, teacher, mode="standard", label_source="teacher")
    assert (standard.completion, standard.teacher_answer) == ("(84 / 2)", "(84 / 2)")
    [standard] = distill(ROW, teacher, mode="standard")
    assert (standard.task, standard.completion, standard.weight) == ("label", "( 84.0 / 2.0 )", 1.0)
    assert standard.messages == [{"role": "user", "content": ROW["input"]}]
    [single] = distill(ROW, teacher, mode="single")
    assert (single.task, single.completion) == ("answer", "84 / 2 = 42. The answer is ( 84.0 / 2.0 )")


def test_the_teachers_label_is_learnt_where_it_is_the_source() -> None:
    label, _ = distill({"input": "q"}, Says("Because. The answer is 42."), label_source="teacher", label_column=None)
    assert label.completion == "42"


@pytest.mark.parametrize(
    ("text", "rationale", "teacher_label"),
    [
        (PALM, "Luke scored 84 points after 2 rounds. 84 / 2 = 42.", "(84 / 2)"),
        ("No marker at all, only thoughts.", "No marker at all, only thoughts.", None),
        ("The answer is near. So we add. The answer is (1 + 2).", "The answer is near. So we add.", "(1 + 2)"),
        ("We add. The answer is:  (1 + 2)", "We add.", "(1 + 2)"),
    ],
)
def test_answers_from_a_file_are_taken_apart(text: str, rationale: str, teacher_label: str | None) -> None:
    label, explained = distill({**ROW, "palm": text}, rationale_column="palm")
    assert explained.completion == rationale
    assert label.teacher_answer == teacher_label
    assert label.completion == ROW["label"]
    assert label.teacher == "data"


def test_a_label_pattern_picks_the_part_that_counts() -> None:
    text = "It has to do with the problem. So the answer is (d) math problem."
    label, rationale = distill(
        {"input": "q", "label": "math problem", "palm": text},
        rationale_column="palm",
        marker="So the answer is",
        label_pattern=r"\(.\)\s*(.*?)\.?$",
    )
    assert label.teacher_answer == "math problem"
    assert rationale.completion == "It has to do with the problem."


def test_the_generic_format_is_read_as_it_is() -> None:
    label, rationale = distill(
        {"input": "Patient John", "label": "Patient?given=John", "rationale": "The name is John."},
        rationale_column="rationale",
    )
    assert (label.completion, rationale.completion) == ("Patient?given=John", "The name is John.")


@pytest.mark.parametrize(
    ("columns", "answer", "config", "reason"),
    [
        (ROW, "The answer is (84 / 2).", {}, "unparsable_answer"),  # no rationale
        ({"input": "q"}, "Because. Full stop.", {"label_source": "teacher", "label_column": None}, "unparsable_answer"),
        ({"input": "q", "label": None}, "Because. The answer is 1.", {}, "not_text"),
        ({"input": "q", "label": " "}, "Because. The answer is 1.", {}, "empty_answer"),
        (ROW, "", {}, "empty_answer"),
        ({**ROW, "palm": ""}, "", {"rationale_column": "palm"}, "empty_answer"),
        ({**ROW, "palm": 7}, "", {"rationale_column": "palm"}, "not_text"),
    ],
)
def test_what_cannot_be_learnt_is_a_reject_with_its_reason(
    columns: dict[str, Any], answer: str, config: dict[str, Any], reason: str
) -> None:
    result = distill(columns, Says(answer), **config)
    assert isinstance(result, Reject)
    assert result.reason == reason


def test_an_answer_that_runs_on_into_the_next_question_is_no_cut_off_answer() -> None:
    result = distill(ROW, Says(PALM, finish_reason="length"))
    assert isinstance(result, list)
    result = distill(ROW, Says("84 / 2 = 42. The ans", finish_reason="length"))
    assert isinstance(result, Reject)
    assert result.reason == "cut_off"


def test_the_teacher_sees_worked_examples_in_the_form_that_is_taken_apart() -> None:
    teacher = Says("x. The answer is 1.")
    distill(
        ROW,
        teacher,
        instruction="Explain.",
        examples=[{"query": "1 + 1?", "rationale": "One and one.", "label": "2"}],
    )
    assert [m["content"] for m in teacher.asked[0]] == [
        "Explain.",
        "1 + 1?",
        "One and one. The answer is 2",
        ROW["input"],
    ]


@pytest.mark.parametrize("rationale", [None, "", [], "no marker", "x. The answer is 7."])
def test_where_only_gold_labels_are_learnt_nobody_is_asked_and_no_rationale_is_missed(rationale: Any) -> None:
    teacher = Says("x. The answer is 1.")
    [example] = distill({**ROW, "why": rationale}, teacher, mode="standard", rationale_column="why")
    assert (example.completion, example.teacher, example.teacher_answer) == ("( 84.0 / 2.0 )", "data", None)
    [example] = distill(ROW, teacher, mode="standard")
    assert not teacher.asked
    result = distill({**ROW, "label": ""}, teacher, mode="standard")
    assert isinstance(result, Reject)


def test_a_row_needs_only_the_columns_of_what_is_learnt() -> None:
    config = {"label_column": "label", "rationale_column": "why", "rationale_prompt": "{{ hint }}: {{ query }}"}
    assert StepByStepRecipe(StepByStepRecipeConfig(**config, mode="standard")).columns.keys() == {"input", "label"}
    assert StepByStepRecipe(StepByStepRecipeConfig(**config)).columns.keys() == {"input", "label", "why", "hint"}


def test_gold_labels_need_a_column_and_alpha_lies_between_0_and_1() -> None:
    base = {"data": {"source": "x.jsonl"}, "teacher": {"type": "fake"}}
    with pytest.raises(ConfigError, match="label_source is gold: give `label_column`"):
        parse_config({**base, "recipe": {"type": "step_by_step"}})
    with pytest.raises(ConfigError, match=r"recipe\.alpha: .*less than or equal to 1"):
        parse_config({**base, "recipe": {"type": "step_by_step", "label_column": "label", "alpha": 1.5}})


def test_a_recipe_whose_answers_are_in_the_data_needs_no_teacher() -> None:
    recipe = {"type": "step_by_step", "label_column": "label", "rationale_column": "rationale"}
    assert parse_config({"data": {"source": "x.jsonl"}, "recipe": recipe}).teacher.type == "none"
    standard = {"type": "step_by_step", "label_column": "label", "mode": "standard"}
    assert parse_config({"data": {"source": "x.jsonl"}, "recipe": standard}).teacher.type == "none"
    for asked, recipe in (
        (False, standard),
        (True, {**standard, "mode": "single"}),
        (True, {**standard, "label_source": "teacher"}),
    ):
        raw = {"data": {"source": "x.jsonl"}, "recipe": recipe, "teacher": {"type": "fake"}}
        assert parse_config(raw).asks_teacher == asked
    asking = {"type": "step_by_step", "label_column": "label"}
    with pytest.raises(ConfigError, match="the `step_by_step` recipe asks a teacher"):
        parse_config({"data": {"source": "x.jsonl"}, "recipe": asking, "teacher": {"type": "none"}})


@pytest.mark.parametrize("palm", [{}, {"palm": None}, {"palm": " "}])
@pytest.mark.parametrize(
    ("split", "mode", "completion"),
    [
        ("test", "task_prefix", "( 84.0 / 2.0 )"),
        ("validation", "task_prefix", "( 84.0 / 2.0 )"),
        ("validation", "standard", "( 84.0 / 2.0 )"),
        ("test", "single", "The answer is ( 84.0 / 2.0 )"),
    ],
)
def test_a_held_out_row_with_a_gold_label_needs_no_rationale(
    split: Split, mode: str, completion: str, palm: dict[str, Any]
) -> None:
    [label] = distill({**ROW, **palm}, split=split, mode=mode, rationale_column="palm")
    assert (label.completion, label.teacher_answer, label.reference) == (completion, None, "gold")


@pytest.mark.parametrize(
    ("split", "config"),
    [
        ("train", {}),
        ("validation", {"mode": "single"}),  # what is validated there has the rationale in it
        ("test", {"label_source": "teacher"}),
    ],
)
def test_where_something_is_to_be_learnt_from_a_rationale_it_has_to_be_there(
    split: Split, config: dict[str, Any]
) -> None:
    result = distill({**ROW, "palm": None}, split=split, rationale_column="palm", **config)
    assert isinstance(result, Reject)


def test_a_rationale_that_is_there_but_no_text_is_a_reject_in_every_split() -> None:
    assert isinstance(distill({**ROW, "palm": 7}, split="test", rationale_column="palm"), Reject)


@pytest.mark.parametrize("mode", ["task_prefix", "single"])
@pytest.mark.parametrize(
    ("palm", "answer", "is_own"), [("Because. The answer is 7", "7", False), ("Because.", "", False), (None, "3", True)]
)
def test_in_the_evaluation_the_datas_own_label_stands_in_for_a_teacher_who_said_nothing(
    palm: str | None, answer: str, is_own: bool, mode: str
) -> None:
    recipe = {"type": "step_by_step", "label_column": "label", "rationale_column": "palm", "mode": mode}
    columns = {"input": "q", "label": "3", "palm": palm}
    example = distill(columns, split="test", rationale_column="palm", mode=mode)[0]
    config, row = parse_config({"data": {"source": "x"}, "recipe": recipe}), Row("r1", "test", "q", columns)
    record = {"completion": example.completion, "teacher_answer": example.teacher_answer}
    assert (teachers_answer(config, record, row), has_only_a_label(config, row)) == (answer, is_own)
