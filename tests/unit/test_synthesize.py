"""The teacher writes the queries: what it is asked, what is taken from its answers, what is dropped."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill_ray.config import RunConfig, SynthesizeDataConfig, parse_config
from distill_ray.errors import ConfigError, EngineUnavailable, TransientEngineError
from distill_ray.pipeline.check import check
from distill_ray.pipeline.planning.planner import normalise
from distill_ray.pipeline.synthesize import MOST_BARREN, Distinct, Requests, Written, queries_in, write_queries
from distill_ray.records import Completion, Message


def data_of(**keys: Any) -> SynthesizeDataConfig:
    return SynthesizeDataConfig(**{"count": 10, "topics": ["trains"], **keys})


def said(text: str, finish_reason: str = "stop") -> Completion:
    return Completion(text, finish_reason, 10, len(text))


def written_by(data: SynthesizeDataConfig, ask: Any) -> Written:
    return asyncio.run(write_queries(data, Requests(data), data.count, ask, lambda written: True))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("When does it leave?\n\nWhere is it?", ["When does it leave?", "Where is it?"]),
        ("Here are two:\n1. When?\n2) Where?\nI hope this helps!", ["When?", "Where?"]),
        ('- "When?"\n* \u201cWhere?\u201d', ["When?", "Where?"]),
        ("3.5 km or 4 km?", ["3.5 km or 4 km?"]),
        ("  \n", []),
        ("1. \n2. Where?", ["Where?"]),
    ],
)
def test_each_line_is_a_query_without_its_number_or_bullet(text: str, expected: list[str]) -> None:
    assert queries_in(said(text), "lines") == expected


def test_the_last_query_of_an_answer_that_was_cut_off_is_dropped() -> None:
    assert queries_in(said("When?\nWhere is th", "length"), "lines") == ["When?"]
    assert queries_in(said("Where is th", "length"), "whole") == []
    assert queries_in(said(" A question\nof two lines. "), "whole") == ["A question\nof two lines."]


def test_what_is_nearly_the_same_is_dropped_and_what_is_not_is_kept() -> None:
    distinct = Distinct(0.7)
    assert distinct.add("When does the next train to Paris leave?")
    assert not distinct.add("when does the next train to PARIS leave")
    assert distinct.add("How much is a ticket to Paris?")
    assert distinct.add("Why?")
    assert not distinct.add("why?")


@given(st.lists(st.text(alphabet="abc ", min_size=1, max_size=30), max_size=40), st.sampled_from([0.5, 0.7, 0.9]))
def test_no_two_kept_texts_are_more_alike_than_allowed(texts: list[str], most: float) -> None:
    def shingles(text: str) -> set[str]:
        key = normalise(text)
        return {key[i : i + 4] for i in range(max(1, len(key) - 3))}

    distinct = Distinct(most)
    kept = [shingles(text) for text in texts if distinct.add(text)]
    # The hash finds candidates with a high probability, not with certainty: equal texts it finds always.
    assert all(a != b for i, a in enumerate(kept) for b in kept[:i])
    alike = [len(a & b) / len(a | b) for i, a in enumerate(kept) for b in kept[:i]]
    assert sum(share >= most for share in alike) <= max(1, len(alike) // 20)


def test_later_rounds_show_what_earlier_ones_wrote_and_seeds_are_never_rows() -> None:
    seen: list[list[Message]] = []

    async def ask(messages: Sequence[Message], call: int) -> list[Completion]:
        seen.append(list(messages))
        return [
            said("\n".join(f"Question {call * 10 + i} of the {chr(97 + call + i)}-line {call}{i}?" for i in range(2)))
        ]

    data = data_of(count=12, per_call=2, seeds=["Is there a train at night?"], max_similarity=0.95)
    written = written_by(data, ask)
    texts = [query["text"] for query in written.queries]
    assert len(texts) == len(set(texts)) == 12
    assert "Is there a train at night?" not in texts
    assert all("Is there a train at night?" in messages[-1]["content"] for messages in seen[:4])
    assert all("trains" in messages[-1]["content"] for messages in seen)
    assert any("Question" in messages[-1]["content"] for messages in seen[4:])  # the second round
    assert not any("Question 0" in messages[-1]["content"] for messages in seen[:4])


def test_the_same_config_asks_the_same_again_and_a_larger_count_only_more() -> None:
    def asked(count: int) -> dict[int, str]:
        seen: dict[int, str] = {}

        async def ask(messages: Sequence[Message], call: int) -> list[Completion]:
            seen[call] = messages[-1]["content"]
            return [said("\n".join(f"{call}-{i} {'xyz'[i % 3] * (call + 5)}" for i in range(5)))]

        written_by(data_of(count=count, per_call=5, max_similarity=1.0), ask)
        return seen

    small, large = asked(15), asked(100)
    assert asked(15) == small
    assert {call: large[call] for call in small} == small
    assert len(large) > len(small)


def test_a_teacher_that_repeats_itself_ends_after_max_calls() -> None:
    async def ask(messages: Sequence[Message], call: int) -> list[Completion]:
        return [said("Always this.")]

    written = written_by(data_of(max_calls=6), ask)
    assert written.queries == [{"text": "Always this."}]
    assert written.near_duplicates == 5


def test_a_teacher_with_nothing_new_to_say_is_not_asked_as_often_as_it_might_be() -> None:
    asked: list[int] = []

    async def ask(messages: Sequence[Message], call: int) -> list[Completion]:
        asked.append(call)
        return [said("Always this." if call else "At first this one.")]

    written = written_by(data_of(count=1000, per_call=1, max_calls=10_000), ask)
    assert len(written.queries) == 2
    assert written.barren_calls == len(asked) - 2
    assert MOST_BARREN <= written.barren_calls < 2 * MOST_BARREN


@pytest.mark.parametrize("parse", ["lines", "whole"])
def test_a_refusal_is_no_query(parse: str) -> None:
    refusals = [
        "I'm sorry, but I can't write those.",
        "I\u2019m sorry, but I can\u2019t write those.\nTry another topic?",
        "As an AI language model, I cannot do that.",
    ]

    async def ask(messages: Sequence[Message], call: int) -> list[Completion]:
        filtered = said("When does", "content_filter")
        return [*(said(text) for text in refusals), filtered, said("When does it leave?")]

    written = written_by(data_of(max_calls=1, count=1 if parse == "whole" else 10, parse=parse), ask)
    assert written.queries == [{"text": "When does it leave?"}]
    assert written.figures()["refused"] == 4


def test_a_name_that_a_prompt_does_not_have_is_refused_with_those_it_has() -> None:
    with pytest.raises(
        ConfigError, match=r"data\.prompt: unknown name `num`, `text`; there are: examples, number, topic"
    ):
        list(check(config_of(prompt="{{ num }} about {{ text }}, {{ topic }}")))
    prompt = "{% for e in examples %}{{ e }}{% endfor %} {{ number }} of {{ topic }}"
    assert Requests(data_of(prompt=prompt, per_call=3)).messages(0, [])[0]["content"] == " 3 of trains"


def test_a_call_that_fails_costs_only_itself_and_an_engine_that_is_gone_ends_it() -> None:
    async def sometimes(messages: Sequence[Message], call: int) -> list[Completion]:
        if call % 2:
            raise TransientEngineError("busy")
        return [said(f"Number {call} and {'abcdefghij'[call % 10] * 9}?")]

    written = written_by(data_of(count=3, per_call=1), sometimes)
    assert len(written.queries) == 3
    assert written.failed_calls == 2

    async def gone(messages: Sequence[Message], call: int) -> list[Completion]:
        raise EngineUnavailable("no such model")

    with pytest.raises(EngineUnavailable):
        written_by(data_of(), gone)

    async def always_busy(messages: Sequence[Message], call: int) -> list[Completion]:
        raise TransientEngineError("busy")

    with pytest.raises(TransientEngineError):
        written_by(data_of(), always_busy)


def test_role_prompts_are_asked_as_they_are_task_by_task(tmp_path: Path) -> None:
    roles = [
        {
            "role": "faq",
            "system": "You play.",
            "task_type": "list",
            "task": ["A?", "B?"],
            "generation": "Answer:",
        },
        {
            "role": "maker",
            "system": "Sums.",
            "task_type": "string",
            "contents": "1 + 1",
            "generation": "Next:",
        },
    ]
    (tmp_path / "roles.json").write_text(json.dumps(roles))
    requests = Requests(data_of(topics=[], role_prompts=str(tmp_path / "roles.json")))
    asked = [[(m["role"], m["content"]) for m in requests.messages(number, ["x"])] for number in range(4)]
    assert asked[0] == [("system", "You play."), ("user", "A?\nAnswer:")]
    assert asked[1][1] == ("user", "B?\nAnswer:")
    assert asked[2] == [("system", "Sums."), ("user", "1 + 1\nNext:")]
    assert asked[3] == asked[0]
    one = Requests(data_of(topics=[], role_prompts=str(tmp_path / "roles.json"), role="maker"))
    assert one.messages(1, [])[0]["content"] == "Sums."


def test_seeds_come_from_the_config_and_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "seeds.txt").write_text("one\n\n two \n")
    assert Requests(data_of(seeds=["zero"], seeds_file=str(tmp_path / "seeds.txt"))).seeds == ["zero", "one", "two"]


def config_of(**data: Any) -> RunConfig:
    teacher = data.pop("teacher", {"type": "fake"})
    raw = {"type": "synthesize", "count": 5, **data}
    return parse_config({"recipe": {"context": {"text": "x"}}, "teacher": teacher, "data": raw})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "say what to write"),
        ({"topics": ["a"], "role_prompts": "b"}, "say what to write"),
        ({"prompt": "a", "role_prompts": "b"}, "say what to write"),
        ({"topics": ["a"], "count": 0}, "data.count"),
        ({"topics": ["a"], "source": "x"}, "data.source: unknown key"),
        ({"topics": ["a"], "teacher": {"type": "fake", "sampling": {"temperature": 0}}}, "temperature"),
        ({"topics": ["a"], "teacher": {"type": "none"}}, "teacher"),
        ({"topics": ["a"], "role": "b"}, "role 'b' chooses among role prompts; set `role_prompts: FILE`"),
    ],
)
def test_what_cannot_work_is_refused_when_the_config_loads(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_of(**data)
    assert config_of(topics=["a"]).data.type == "synthesize"
