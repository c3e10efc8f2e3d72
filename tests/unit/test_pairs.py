"""What is kept of a request and its answer, and what never is."""

from __future__ import annotations

import dataclasses
import itertools
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill_ray.config.serve import CollectConfig
from distill_ray.serving.collecting.answer import Answer, StreamedAnswer, whole_answer
from distill_ray.serving.collecting.pairs import (
    PAIR_SCHEMA,
    NotKept,
    Pair,
    pair_from_json,
    pair_id,
    pair_to_json,
    pairs_table,
    why_not_kept,
)
from tests.unit.pair_maker import TEXT, any_pair, pair

BODY: dict[str, Any] = {"model": "auto", "messages": [{"role": "user", "content": "Hallo?"}]}
GOOD = Answer("German", "stop")
CALL = {"id": "c1", "type": "function", "function": {"name": "find", "arguments": '{"x": 1}'}}
IMAGE = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:..."}}]}]


def reason(answer: Answer = GOOD, body: dict[str, Any] = BODY, **changes: Any) -> NotKept | None:
    return why_not_kept(body, answer, **{"route": "teacher", "refusals": CollectConfig().refusals, **changes})


@pytest.mark.parametrize(
    "answer",
    [
        GOOD,
        Answer("", "tool_calls", tool_calls=(CALL,)),
        Answer("The shop says: sorry, we are closed.", "stop"),  # sorry, but not at the beginning
    ],
)
def test_a_complete_answer_is_kept(answer: Answer) -> None:
    assert reason(answer) is None


@pytest.mark.parametrize(
    ("expected", "answer", "changes"),
    [
        (NotKept.NOT_TEACHER, GOOD, {"route": "student"}),
        (NotKept.OPTED_OUT, GOOD, {"collect_header": " No"}),
        (NotKept.ERROR, Answer("Ger", "stop", is_error=True), {}),
        (NotKept.CUT_OFF, Answer("Germ", "length"), {}),
        (NotKept.FILTERED, Answer("Germ", "content_filter"), {}),
        (NotKept.UNFINISHED, Answer("Germ", None), {}),
        (NotKept.UNFINISHED, Answer("Germ", "abort"), {}),
        (NotKept.REFUSED, Answer("German", "stop", refusal="no"), {}),
        (NotKept.REFUSED, Answer(" I\u2019m sorry, but no.", "stop"), {}),
        (NotKept.REFUSED, Answer("a" * 5000 + "!", "stop"), {"refusals": ["(a|a)+$"]}),  # takes for ever
        (NotKept.EMPTY, Answer(" \n", "stop"), {}),
        (NotKept.SEVERAL_ANSWERS, Answer("German", "stop", num_choices=2), {}),
        (NotKept.SEVERAL_ANSWERS, GOOD, {"body": {**BODY, "n": 2}}),
        (NotKept.NOT_TEXT, GOOD, {"body": {**BODY, "messages": IMAGE}}),
        (NotKept.NOT_TEXT, Answer("half \ud83d", "stop"), {}),
        (NotKept.NOT_TEXT, GOOD, {"body": {**BODY, "stop": ["\ud83d"]}}),
    ],
)
def test_an_answer_that_must_not_be_learnt_is_not_kept(
    expected: NotKept, answer: Answer, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distill_ray.recipes.patterns.LIMIT_S", 0.05)
    assert reason(answer, **changes) is expected


def test_every_reason_is_met_by_a_test_above() -> None:
    [mark] = [m for m in test_an_answer_that_must_not_be_learnt_is_not_kept.pytestmark if m.name == "parametrize"]
    assert {case[0] for case in mark.args[1]} == set(NotKept)


def test_a_retry_has_the_id_of_its_request_whatever_it_was_answered() -> None:
    assert pair(answer="German").pair_id == pair(answer="It is German.").pair_id
    assert pair(idempotency_key="k", answer="a").pair_id == pair(idempotency_key="k", answer="b").pair_id


@pytest.mark.parametrize(
    "changes",
    [
        {"question": "Wo ist die Post?"},
        {"owner": "other"},
        {"teacher": "openai/large@2"},
        {"idempotency_key": "k"},
        {"body": {"tools": [{"type": "function"}]}},
        {"body": {"temperature": 0}},
    ],
)
def test_another_request_has_another_id(changes: dict[str, Any]) -> None:
    assert pair(**changes).pair_id != pair().pair_id


def test_an_idempotency_key_is_its_owners() -> None:
    assert pair(idempotency_key="1", owner="a").pair_id != pair(idempotency_key="1", owner="b").pair_id


@given(TEXT, TEXT, TEXT)
def test_what_stands_in_one_part_of_an_id_cannot_pass_for_another(owner: str, teacher: str, key: str) -> None:
    ids = {
        pair_id([], {}, owner=owner, teacher=teacher),
        pair_id([], {}, owner=owner + teacher, teacher=""),
        pair_id([], {}, owner=owner, teacher=teacher, idempotency_key=key + "k"),
    }
    assert len(ids) == (3 if teacher else 2)


def test_a_pair_holds_what_shapes_the_answer_and_not_who_asked() -> None:
    assert json.loads(pair(body={"tools": [1], "stream": True}).request) == {"temperature": 0.5, "tools": [1]}
    assert "someone@example.com" not in pair_to_json(pair())


@given(any_pair)
def test_a_pair_comes_back_from_json_as_it_was(original: Pair) -> None:
    text = pair_to_json(original)
    back = pair_from_json(text.encode())
    assert "\n" not in text
    assert back == original
    assert (back.embedding is None) == (original.embedding is None)
    if original.embedding is not None and back.embedding is not None:
        assert back.embedding.tolist() == original.embedding.tolist()


@pytest.mark.parametrize("text", ["[]", "{}", '{"version": 1}', '{"version": 99}', "nothing"])
def test_other_json_is_no_pair(text: str) -> None:
    with pytest.raises(ValueError, match=r"pair|Expecting"):
        pair_from_json(text)


def test_a_table_has_a_column_for_each_field_and_pairs_begin_unindexed() -> None:
    table = pairs_table([pair(), pair("b", embedding=None)], batch=5)
    assert table.schema.equals(PAIR_SCHEMA, check_metadata=True)
    assert {f.name for f in dataclasses.fields(Pair)} == set(table.column_names) - {"batch", "indexed", "indexed_by"}
    first, second = table.to_pylist()
    assert (first["batch"], first["indexed"], first["indexed_by"]) == (5, False, None)
    assert first["embedding"] == np.linspace(-1, 1, 8, dtype=np.float32).tolist()
    assert second["embedding"] is None


def test_a_whole_response_becomes_an_answer() -> None:
    response = {
        "model": "large",
        "choices": [{"finish_reason": "stop", "message": {"role": "assistant", "content": "German"}}],
        "usage": {"prompt_tokens": 3, "completion_tokens": 1, "total_tokens": 4},
    }
    assert whole_answer(response) == Answer("German", "stop", model="large", prompt_tokens=3, completion_tokens=1)
    assert whole_answer({"choices": [{"text": "German", "finish_reason": "stop"}]}).text == "German"


@pytest.mark.parametrize(
    "response", [{}, {"choices": None}, {"choices": [{"message": None}]}, {"choices": [{"message": {"content": 3}}]}]
)
def test_a_strange_response_is_an_unfinished_answer(response: dict[str, Any]) -> None:
    assert reason(whole_answer(response)) in (NotKept.UNFINISHED, NotKept.SEVERAL_ANSWERS)


@given(st.text(max_size=30), st.lists(st.integers(0, 30)), st.booleans())
def test_a_stream_says_what_the_whole_response_says(text: str, cuts: list[int], with_tools: bool) -> None:
    borders = [0, *sorted(cuts), len(text)]
    deltas: list[dict[str, Any]] = [{"content": text[a:b]} for a, b in itertools.pairwise(borders)]
    if with_tools:
        arguments = CALL["function"]["arguments"]
        deltas.append({"tool_calls": [{"index": 0, **CALL, "function": {"name": "find", "arguments": arguments[:3]}}]})
        deltas.append({"tool_calls": [{"index": 0, "function": {"arguments": arguments[3:]}}]})
    streamed = StreamedAnswer()
    for delta in deltas:
        streamed.add({"model": "large", "choices": [{"index": 0, "delta": delta, "finish_reason": None}]})
    assert reason(streamed.answer) is NotKept.UNFINISHED
    streamed.add({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    streamed.add({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 1}})
    message = {"content": text, "tool_calls": [CALL] if with_tools else None}
    assert streamed.answer == whole_answer(
        {
            "model": "large",
            "choices": [{"message": message, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 3, "completion_tokens": 1},
        }
    )


def test_a_stream_that_ends_in_an_error_event_is_an_error() -> None:
    streamed = StreamedAnswer()
    streamed.add({"choices": [{"delta": {"content": "Ger"}, "finish_reason": "stop"}]})
    streamed.add({"error": {"message": "engine died"}})
    assert reason(streamed.answer) is NotKept.ERROR
