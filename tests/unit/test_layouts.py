"""`data.layout` and `{dataset: ...}`: conversations, instructions, role prompts and data sets become rows."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import yaml

from distill_ray.config import RunConfig, parse_config
from distill_ray.errors import ConfigError, DataError
from distill_ray.pipeline.folder import RunFolder
from distill_ray.pipeline.planning.plan import plan_rows
from distill_ray.recipes import make_recipe
from distill_ray.records import Completion, row_from_record

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
NOTHING_HELD_OUT = {"holdout": 0.0, "validation_holdout": 0.0}


def config_of(folder: Path, source: Any, **keys: Any) -> RunConfig:
    data = {"source": source, **NOTHING_HELD_OUT, **keys.pop("data", {})}
    recipe = keys.pop("recipe", {"type": "context", "context": {"text": "Be brief."}})
    return parse_config({"recipe": recipe, "teacher": {"type": "fake"}, "data": data, **keys}, base=folder)


def planned(folder: Path, config: RunConfig) -> dict[str, dict[str, Any]]:
    """The planned rows by where they were read."""
    run = RunFolder(folder / "run")
    plan_rows(config, make_recipe(config.recipe), run)
    return {record["source"]: record for table in run.read_tables("rows") for record in table.to_pylist()}


def write(folder: Path, name: str, rows: list[Any]) -> str:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(folder / name)


def turn(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def test_a_conversation_is_its_last_question_with_the_turns_before_it(tmp_path: Path) -> None:
    turns = [
        turn("system", "You teach."),
        turn("user", "What is 2 + 2?"),
        turn("assistant", "4"),
        turn("user", [{"type": "text", "text": "And "}, {"type": "text", "text": "3 + 3?"}]),
        turn("assistant", "6"),
    ]
    source = write(tmp_path, "chats.jsonl", [{"messages": turns, "topic": "sums"}])
    config = config_of(tmp_path, source, data={"layout": "messages"}, evaluate={"reference": "answer"})
    [record] = planned(tmp_path, config).values()
    row = row_from_record(record)
    assert (row.query, row.reference) == ("And 3 + 3?", "6")
    assert (row.columns["system"], row.columns["topic"]) == ("You teach.", "sums")
    recipe = make_recipe(config.recipe)
    history = [turn("user", "What is 2 + 2?"), turn("assistant", "4")]
    assert recipe.student_messages(row) == [*history, turn("user", "And 3 + 3?")]
    assert recipe.teacher_messages(row) == [turn("system", "Be brief."), *history, turn("user", "And 3 + 3?")]


def test_the_rows_own_system_prompt_can_be_the_context_that_is_distilled(tmp_path: Path) -> None:
    rows = [{"messages": [turn("system", f"You are {name}."), turn("user", "Hi")]} for name in ("Ann", "Bob")]
    recipe = {"type": "context", "context": {"column": "system"}}
    config = config_of(tmp_path, write(tmp_path, "a.jsonl", rows), data={"layout": "messages"}, recipe=recipe)
    seen = [
        make_recipe(config.recipe).teacher_messages(row_from_record(r))[0]["content"]
        for r in planned(tmp_path, config).values()
    ]
    assert sorted(seen) == ["You are Ann.", "You are Bob."]


@pytest.mark.parametrize("recipe", ["self_critique", "step_by_step"])
def test_every_recipe_keeps_the_turns_before(tmp_path: Path, recipe: str) -> None:
    keys = {"self_critique": {"accept": {"type": "always"}}, "step_by_step": {"label_source": "teacher"}}[recipe]
    turns = [turn("user", "one"), turn("assistant", "two"), turn("user", "three")]
    config = config_of(
        tmp_path,
        write(tmp_path, "a.jsonl", [{"messages": turns}]),
        data={"layout": "messages"},
        recipe={"type": recipe, "query": "{{ text }}", **keys},
    )
    [record] = planned(tmp_path, config).values()
    made, row = make_recipe(config.recipe), row_from_record(record)
    for messages in (made.teacher_messages(row), made.student_messages(row)):
        assert [m["content"] for m in messages][:2] == ["one", "two"]


def test_the_same_question_in_two_conversations_is_no_duplicate(tmp_path: Path) -> None:
    rows = [{"messages": [turn("user", a), turn("assistant", "ok"), turn("user", "Why?")]} for a in ("x", "y", "x")]
    config = config_of(tmp_path, write(tmp_path, "a.jsonl", rows), data={"layout": "messages", "dedup": True})
    assert [r["reject_reason"] for _, r in sorted(planned(tmp_path, config).items())] == [None, None, "duplicate"]


def test_sharegpt_and_alpaca_rows_are_read(tmp_path: Path) -> None:
    share = [{"conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi!"}], "system": "S"}]
    config = config_of(tmp_path, write(tmp_path, "s.jsonl", share), data={"layout": "sharegpt"})
    [record] = planned(tmp_path, config).values()
    assert record["query"] == "Hello"
    assert {"system": "S", "answer": "Hi!"}.items() <= json.loads(record["columns"]).items()

    alpaca = [
        {"instruction": "Translate.", "input": "Hund", "output": "dog"},
        {"instruction": "Say hello.", "input": "", "output": "hello"},
        {"instruction": "", "input": "What is this?", "output": "no instruction"},
    ]
    config = config_of(tmp_path, write(tmp_path, "a.jsonl", alpaca), data={"layout": "alpaca"})
    assert sorted(record["query"] for record in planned(tmp_path, config).values()) == [
        "Say hello.",
        "Translate.\n\nHund",
        "What is this?",
    ]


def test_a_role_without_role_prompts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"role 'faq' chooses among role prompts; set `layout: role_prompts`"):
        config_of(tmp_path, str(tmp_path / "a.jsonl"), data={"role": "faq"})


@pytest.mark.parametrize(
    ("layout", "row", "why"),
    [
        ("messages", {"text": "x"}, "column `messages` is not there"),
        ("messages", {"messages": "x"}, "column `messages` is text, expected a list of turns"),
        ("messages", {"messages": []}, "no user turn at the end"),
        ("messages", {"messages": [turn("assistant", "x")]}, "no user turn at the end"),
        ("messages", {"messages": [turn("tool", "x")]}, "turn 1: role 'tool' is none of"),
        ("messages", {"messages": ["x"]}, "turn 1 is text"),
        ("messages", {"messages": [turn("user", None)]}, "turn 1: content is null"),
        ("messages", {"messages": [turn("user", [{"type": "image_url"}])]}, "turn 1 has parts that are not text"),
        (
            "messages",
            {"messages": [turn("user", "a"), turn("system", "b"), turn("user", "c")]},
            "a system turn that is not the first",
        ),
        ("sharegpt", {"conversations": [{"from": "human"}]}, "turn 1: value is not there"),
        ("alpaca", {"instruction": 3}, "column `instruction` is a number (3)"),
        ("role_prompts", {"system": "x", "task_type": "list", "task": "x"}, "column `task` is text"),
        ("role_prompts", {"task": "x"}, "column `system` is not there"),
    ],
)
def test_a_row_of_another_shape_is_unreadable_and_says_why(
    tmp_path: Path, layout: str, row: dict[str, Any], why: str
) -> None:
    good = {
        "messages": [turn("user", "fine")],
        "conversations": [{"from": "user", "value": "fine"}],
        "instruction": "fine",
        "system": "s",
        "task": "fine",
    }
    config = config_of(tmp_path, write(tmp_path, "a.jsonl", [good, row]), data={"layout": layout})
    rows = planned(tmp_path, config)
    assert rows["a.jsonl:1"]["reject_reason"] is None
    assert rows["a.jsonl:2"]["reject_reason"] == "unreadable_row"
    assert f"not of layout {layout}: {why}" in rows["a.jsonl:2"]["reject_detail"]
    assert json.loads(rows["a.jsonl:2"]["columns"]) == row


ROLES = [
    {
        "role": "solver",
        "system": "Add.\n",
        "task_type": "string",
        "task": "",
        "contents": "Example: 1 + 1\n",
        "generation": "4 + 3\n",
    },
    {
        "role": "tutor",
        "system": "Teach.",
        "task_type": "list",
        "task": ["Which chord?", "Which string?"],
        "contents": "",
        "generation": "Answer:",
    },
]


def test_role_prompts_are_read_as_they_are_one_row_per_task(tmp_path: Path) -> None:
    (tmp_path / "roles.json").write_text(json.dumps(ROLES))
    recipe = {"type": "context", "context": {"column": "system"}}
    config = config_of(tmp_path, "roles.json", data={"layout": "role_prompts"}, recipe=recipe)
    assert {source: record["query"] for source, record in planned(tmp_path, config).items()} == {
        "roles.json:1": "Example: 1 + 1\n4 + 3",
        "roles.json:2/1": "Which chord?\nAnswer:",
        "roles.json:2/2": "Which string?\nAnswer:",
    }


def test_one_role_can_be_chosen_and_an_unknown_one_names_those_there_are(tmp_path: Path) -> None:
    (tmp_path / "roles.json").write_text(json.dumps(ROLES))
    config = config_of(tmp_path, "roles.json", data={"layout": "role_prompts", "role": "tutor"})
    assert len(planned(tmp_path, config)) == 2
    config = config_of(tmp_path, "roles.json", data={"layout": "role_prompts", "role": "cook"})
    with pytest.raises(DataError, match="no role 'cook'; there are: solver, tutor"):
        planned(tmp_path / "other", config)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data is not here")
def test_the_published_role_prompts_are_read_whole(tmp_path: Path) -> None:
    source = str(SHARED / "context" / "role_prompts.json")
    recipe = {"type": "context", "context": {"column": "system"}}
    config = config_of(tmp_path, source, data={"layout": "role_prompts"}, recipe=recipe)
    rows = planned(tmp_path, config)
    assert len(rows) == 7  # three roles with a text, two with lists of one and three tasks
    assert all(record["reject_reason"] is None for record in rows.values())


# -- data sets -------------------------------------------------------------------------------------------------------


def nli() -> datasets.Dataset:
    features = datasets.Features(
        {
            "premise": datasets.Value("string"),
            "hypothesis": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["entailment", "neutral", "contradiction"]),
        }
    )
    rows = {"premise": ["It rains.", "A dog.", "?"], "hypothesis": ["It is wet.", "A cat.", "!"], "label": [0, 2, -1]}
    return datasets.Dataset.from_dict(rows, features=features)


@pytest.mark.parametrize("kind", ["save_to_disk", "dict", "parquet"])
def test_a_data_set_folder_is_read_with_its_labels_by_name(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "nli"
    if kind == "save_to_disk":
        nli().save_to_disk(folder)
    elif kind == "dict":
        datasets.DatasetDict({"train": nli(), "test": nli().select([0])}).save_to_disk(folder)
    else:
        folder.mkdir()
        nli().to_parquet(folder / "train.parquet")
    recipe = {
        "type": "step_by_step",
        "query": "premise: {{ premise }}\nhypothesis: {{ hypothesis }}",
        "label_column": "label",
    }
    config = config_of(tmp_path, {"dataset": str(folder), "split": "train"}, recipe=recipe)
    rows = sorted(planned(tmp_path, config).values(), key=lambda record: record["source"])
    assert rows[0]["query"] == "premise: It rains.\nhypothesis: It is wet."
    assert [json.loads(record["columns"])["label"] for record in rows] == ["entailment", "contradiction", None]


def test_files_and_data_sets_can_be_mixed_and_a_test_split_can_be_one(tmp_path: Path) -> None:
    datasets.DatasetDict({"train": nli(), "test": nli().select([0])}).save_to_disk(tmp_path / "nli")
    source = [write(tmp_path, "a.jsonl", [{"premise": "Snow."}]), {"dataset": "./nli"}]
    recipe = {"type": "context", "context": {"text": "x"}, "query": "{{ premise }}"}
    config = config_of(tmp_path, source, data={"test": {"dataset": "./nli", "split": "test"}}, recipe=recipe)
    splits = [(record["query"], record["split"]) for record in planned(tmp_path, config).values()]
    assert ("It rains.", "test") in splits
    assert ("Snow.", "train") in splits
    assert len(splits) == 5  # the test row is in train too, as a duplicate reject


PAPERS_ROWS: dict[str, dict[str, Any]] = {
    "facebook/anli": {"premise": "It rains.", "hypothesis": "It is wet.", "label": 0},
    "esnli/esnli": {"premise": "It rains.", "hypothesis": "It is wet.", "label": 0, "explanation_1": "Rain is wet."},
    "Salesforce/cos_e": {"question": "Where?", "choices": ["here", "there"], "answer": "there"},
    "ChilleD/SVAMP": {"Body": "Two and two.", "Question": "How many?", "Equation": "( 2.0 + 2.0 )", "Answer": "4"},
}


def test_the_configs_of_the_papers_data_sets_in_the_docs_read_rows_like_theirs(tmp_path: Path) -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", (Path(__file__).parents[2] / "docs" / "data.md").read_text(), re.DOTALL)
    configs = [yaml.safe_load(block) for block in blocks if "dataset:" in block]
    seen = {}
    for number, raw in enumerate(configs):
        name = raw["data"]["source"]["dataset"]
        folder = tmp_path / str(number)
        features = None
        if "label" in PAPERS_ROWS[name]:
            features = datasets.Dataset.from_list([PAPERS_ROWS[name]]).features
            features["label"] = datasets.ClassLabel(names=["entailment", "neutral", "contradiction"])
        rows = datasets.Dataset.from_list([PAPERS_ROWS[name]], features=features)
        rows.save_to_disk(folder / "rows")
        source = {**raw["data"]["source"], "dataset": str(folder / "rows")}
        config = parse_config({**raw, "data": {"source": source, **NOTHING_HELD_OUT}, "teacher": {"type": "fake"}})
        [record] = planned(folder, config).values()
        recipe = make_recipe(config.recipe)
        engines: Any = SimpleNamespace(teacher=Said("So. The answer is x"))
        result = asyncio.run(recipe.distill(row_from_record(record), engines))
        assert isinstance(result, list)
        seen[name] = (record["query"], [(example.task, example.completion) for example in result])
    assert seen == {
        "facebook/anli": (
            "premise: It rains.\nhypothesis: It is wet.",
            [("label", "entailment"), ("rationale", "So.")],
        ),
        "esnli/esnli": (
            "premise: It rains.\nhypothesis: It is wet.",
            [("label", "entailment"), ("rationale", "Rain is wet.")],
        ),
        "Salesforce/cos_e": (
            "Where?\nAnswer Choices:\n(a) here\n(b) there\n",
            [("label", "there"), ("rationale", "So.")],
        ),
        "ChilleD/SVAMP": ("Two and two. How many?", [("label", "( 2.0 + 2.0 )"), ("rationale", "So.")]),
    }


class Said:
    """A teacher that always says the same."""

    name = "said"

    def __init__(self, text: str) -> None:
        self.text = text

    async def generate(self, messages: Any, num_samples: int | None = None) -> list[Completion]:
        return [Completion(self.text, "stop", 1, 1)]


def test_a_data_set_that_is_not_there_is_one_clear_message(tmp_path: Path) -> None:
    nli().save_to_disk(tmp_path / "nli")
    datasets.DatasetDict({"train": nli()}).save_to_disk(tmp_path / "splits")
    for name, split in (("./splits", "dev"), ("./nowhere", "train")):
        config = config_of(tmp_path, {"dataset": name, "split": split})
        with pytest.raises(DataError, match=rf"{name[2:]}, split {split}: cannot load it .* or give a folder"):
            planned(tmp_path, config)


def test_a_wrong_key_of_a_data_set_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.source\.splt: unknown key .* did you mean `split`"):
        config_of(tmp_path, {"dataset": "x", "splt": "train"})
    with pytest.raises(ConfigError, match=r"data\.source\.0: expected a file, a list of files or \{dataset: NAME\}"):
        config_of(tmp_path, [5])
