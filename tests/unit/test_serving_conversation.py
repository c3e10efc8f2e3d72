"""What the router looks at: which requests are of one kind, which text is compared, and the context on and off."""

from __future__ import annotations

import copy
import json
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill_ray.records import Message
from distill_ray.serving.routing import conversation
from distill_ray.serving.routing.conversation import MASK, RequestKey, request_key, strip_context, with_context

CONTEXT: list[Message] = [
    {"role": "system", "content": "Name the language."},
    {"role": "user", "content": "guten Tag"},
    {"role": "assistant", "content": "German"},
]
DATES = [r"\d{4}-\d{2}-\d{2}", r"\d{2}:\d{2}"]
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
OTHER_TOOL = {"type": "function", "function": {"name": "multiply"}}
JSON_SCHEMA = {"type": "json_schema", "json_schema": {"name": "answer", "schema": {"type": "object"}}}
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}


def chat(*turns: tuple[str, Any], **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns], **fields}


def key(*turns: tuple[str, Any], ignore: tuple[str, ...] | list[str] = (), **fields: Any) -> RequestKey:
    return request_key(chat(*turns, **fields), ignore)


ASK = ("user", "Add 2 and 3")
WORDS = st.text(st.characters(codec="utf-8", exclude_categories=("Z", "C")), min_size=1, max_size=8)
TEXTS = st.lists(WORDS, min_size=1, max_size=4).map(" ".join)
TURNS = st.lists(st.tuples(st.sampled_from(["user", "assistant"]), TEXTS), min_size=1, max_size=5)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)
)


# -- the text ---------------------------------------------------------------------------------------------------------


def test_one_question_is_its_text_alone() -> None:
    assert key(("system", "Be brief."), ("user", " hello\n")).text == "hello"


def test_a_conversation_is_all_its_turns_in_order() -> None:
    turns = [("user", "Add 2 and 3"), ("assistant", "5"), ("user", "And 4?")]
    assert key(*turns).text == "user: Add 2 and 3\nassistant: 5\nuser: And 4?"
    assert key(*turns).text != key(*turns[2:]).text


def test_calls_of_tools_and_their_results_are_part_of_the_text_without_their_ids() -> None:
    def body(call_id: str) -> dict[str, Any]:
        called = chat(ASK, ("assistant", None), ("tool", "5"))
        function = {"name": "add", "arguments": '{"a": 2, "b": 3}'}
        called["messages"][1]["tool_calls"] = [{"id": call_id, "type": "function", "function": function}]
        called["messages"][2]["tool_call_id"] = call_id
        return called

    first = request_key(body("call_1"), [])
    assert first.text == 'user: Add 2 and 3\nassistant: add({"a": 2, "b": 3})\ntool: 5'
    assert first == request_key(body("call_2"), [])
    assert first.problem is None


@given(st.lists(TEXTS, min_size=1, max_size=4))
def test_text_parts_are_the_text_that_they_make(texts: list[str]) -> None:
    parts = [{"type": "text", "text": text} for text in texts]
    assert key(("system", parts), ("user", parts)) == key(("system", "\n".join(texts)), ("user", "\n".join(texts)))


# -- the fingerprint --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [TOOL]},
        {"tools": [OTHER_TOOL]},
        {"functions": [TOOL["function"]]},
        {"tools": [TOOL], "tool_choice": "required"},
        {"tools": [TOOL], "tool_choice": "none"},
        {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "add"}}},
        {"response_format": JSON_SCHEMA},
        {"response_format": {"type": "json_object"}},
        {"structured_outputs": {"choice": ["yes", "no"]}},
    ],
    ids=lambda fields: json.dumps(fields)[:60],
)
def test_what_the_program_asks_for_makes_another_kind(fields: dict[str, Any]) -> None:
    others = [{}, {"tools": [TOOL, OTHER_TOOL]}, {"tools": [TOOL], "response_format": JSON_SCHEMA}]
    if fields != {"tools": [TOOL]}:
        others.append({"tools": [TOOL]})
    for other in others:
        assert key(ASK, **fields).fingerprint != key(ASK, **other).fingerprint


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": None, "functions": [], "response_format": None},
        {"response_format": {"type": "text"}},
        {"tool_choice": "none"},
        {"temperature": 0.3, "max_tokens": 5, "stream": True, "user": "ann", "model": "auto"},
    ],
    ids=str,
)
def test_what_says_nothing_about_the_task_changes_nothing(fields: dict[str, Any]) -> None:
    assert key(ASK, **fields) == key(ASK)
    assert key(ASK, tools=[TOOL], tool_choice="auto") == key(ASK, tools=[TOOL])


def test_the_order_of_keys_and_tools_changes_nothing() -> None:
    turned = {"function": dict(reversed(TOOL["function"].items())), "type": "function"}  # type: ignore[union-attr]
    assert key(ASK, tools=[TOOL, OTHER_TOOL]) == key(ASK, tools=[OTHER_TOOL, turned])


@given(TURNS, TEXTS, TEXTS)
def test_the_fingerprint_is_that_of_the_system_prompts_and_of_nothing_that_was_said(
    turns: list[tuple[str, str]], system: str, other: str
) -> None:
    fingerprint = key(("system", system), *turns).fingerprint
    assert len(bytes.fromhex(fingerprint)) == 8
    assert fingerprint == key(("developer", f"{system}\n"), ASK).fingerprint
    assert fingerprint != key(*turns).fingerprint
    assert fingerprint != key(("system", system), *turns, ("system", other)).fingerprint
    assert (fingerprint == key(("system", other), *turns).fingerprint) == (system == other)


@given(TURNS)
def test_equal_requests_have_equal_keys_and_are_left_as_they_were(turns: list[tuple[str, str]]) -> None:
    body = chat(*turns, tools=[TOOL])
    before = copy.deepcopy(body)
    assert request_key(body, DATES) == request_key(json.loads(json.dumps(body)), DATES)
    assert body == before


# -- what varies ------------------------------------------------------------------------------------------------------


@given(st.dates(), st.times(), st.dates(), st.times())
def test_masked_parts_may_differ(day: Any, hour: Any, other_day: Any, other_hour: Any) -> None:
    def asked(when: str) -> RequestKey:
        tool = {"type": "function", "function": {"name": "add", "description": f"As of {when}."}}
        return key(("system", f"Now: {when}. Be brief."), ("user", f"On {when} what?"), ignore=DATES, tools=[tool])

    one = asked(f"{day.isoformat()} {hour:%H:%M}")
    assert one == asked(f"{other_day.isoformat()}  {other_hour:%H:%M}")
    assert one.text == f"On {MASK} what?"
    assert one != asked("some day")


def test_a_pattern_that_matches_nothing_at_all_inserts_no_mask() -> None:
    assert key(("user", "a 1 b"), ignore=[r"\d*"]).text == f"a {MASK} b"


def test_a_pattern_without_end_is_given_up_and_costs_little() -> None:
    hostile = ("user", "a" * 5000 + "!")
    started = time.monotonic()
    found = key(*[hostile] * 20, ignore=[r"(a+a+)+$"])
    assert time.monotonic() - started < 20 * conversation.MASK_LIMIT_S  # once for the request, not for each turn
    assert found == key(*[hostile] * 20)


# -- problems ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "turns",
    [
        [("user", "")],
        [("user", " \n")],
        [("user", [])],
        [("user", None)],
        [],
        [("system", "Be brief.")],
        [("assistant", "hello")],
        [("user", "hello"), ("assistant", "yes?"), ("user", " ")],
    ],
    ids=str,
)
def test_a_request_that_asks_nothing_is_empty(turns: list[tuple[str, Any]]) -> None:
    assert key(*turns).problem == "empty"


@pytest.mark.parametrize(
    "part",
    [IMAGE, {"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}, {"type": "file", "file": {}}, {}, 5],
    ids=str,
)
def test_what_is_no_text_is_said(part: Any) -> None:
    assert key(("user", [{"type": "text", "text": "What is this?"}, part])).problem == "not_text"
    assert key(("user", [part]), ("assistant", "A dog."), ASK).problem == "not_text"


def test_spoken_answers_are_no_text() -> None:
    spoken = {"role": "assistant", "content": None, "audio": {"id": "audio_1"}}
    question = {"role": "user", "content": "And now?"}
    assert request_key({"messages": [question, spoken, question]}, []).problem == "not_text"
    assert key(ASK, modalities=["text", "audio"]).problem == "not_text"
    assert key(ASK, modalities=["text"]).problem is None


@given(st.dictionaries(st.sampled_from(["messages", "tools", "tool_choice", "modalities"]), JSON) | st.just({}), JSON)
def test_no_body_is_too_strange(body: dict[str, Any], message: Any) -> None:
    request_key(body, DATES)
    request_key({"messages": [message, {"role": message, "content": message, "tool_calls": message}]}, DATES)
    strip_context([{"role": "system", "content": message}], CONTEXT)


def test_deep_nesting_and_broken_characters_are_survived() -> None:
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    assert key(ASK, tools=deep).problem == "not_text"
    assert key(("system", "\ud800"), ASK).problem is None


# -- the bundle's context ---------------------------------------------------------------------------------------------

QUERY = {"role": "user", "content": "bonjour"}


def test_the_context_stands_before_the_clients_own_system_prompt() -> None:
    assert with_context([QUERY], CONTEXT) == [*CONTEXT, QUERY]
    own = {"role": "developer", "content": "Be brief."}
    merged = {"role": "system", "content": "Name the language.\n\nBe brief."}
    assert with_context([own, QUERY], CONTEXT) == [merged, *CONTEXT[1:], QUERY]
    assert with_context([QUERY], []) == [QUERY]
    picture = {"role": "system", "content": [IMAGE]}
    assert with_context([picture, QUERY], CONTEXT) == [CONTEXT[0], picture, *CONTEXT[1:], QUERY]


@given(TURNS, st.lists(TEXTS, max_size=2), st.sampled_from([CONTEXT, CONTEXT[:1], CONTEXT[1:]]))
def test_a_context_that_was_put_on_is_taken_off(
    turns: list[tuple[str, str]], system: list[str], context: list[Message]
) -> None:
    body = chat(*(("system", text) for text in system), *turns)
    stripped, is_found = strip_context(with_context(body["messages"], context), context)
    assert is_found
    assert request_key({"messages": stripped}, []) == request_key(body, [])
    assert with_context(stripped, context) == with_context(body["messages"], context)


@pytest.mark.parametrize(
    ("sent", "left"),
    [
        ([*CONTEXT, QUERY], [QUERY]),
        ([CONTEXT[0], QUERY], [QUERY]),  # its examples are put on again with it
        ([{"role": "developer", "content": [{"type": "text", "text": "\nName the language. "}]}, QUERY], [QUERY]),
        (
            [{"role": "system", "content": "Name the language.\n \nBe brief."}, QUERY],
            [{"role": "system", "content": "Be brief."}, QUERY],
        ),
    ],
)
def test_a_client_that_sends_the_context_is_recognised(sent: list[Any], left: list[Any]) -> None:
    assert strip_context(sent, CONTEXT) == (left, True)


@pytest.mark.parametrize(
    "sent",
    [
        [QUERY],
        [*CONTEXT[1:], QUERY],
        [QUERY, *CONTEXT],
        [{"role": "user", "content": "Name the language."}, QUERY],
        [{"role": "system", "content": "Name the language. In French."}, QUERY],
        [{"role": "system", "content": "Name the languages.\n\nName the language."}, QUERY],
        [{"role": "system", "content": [{"type": "text", "text": "Name the language.\n\n"}, IMAGE]}, QUERY],
        [CONTEXT[0], {"role": "system", "content": [IMAGE]}, QUERY],
    ],
)
def test_another_system_prompt_is_left_alone(sent: list[Any]) -> None:
    assert strip_context(sent, CONTEXT) == (sent, False)


def test_the_examples_themselves_are_a_question_when_nothing_follows_them() -> None:
    assert strip_context(CONTEXT, CONTEXT) == (CONTEXT[1:], True)
    assert strip_context(CONTEXT[1:], CONTEXT[1:]) == (CONTEXT[1:], False)


def test_without_a_context_nothing_is_recognised() -> None:
    assert strip_context([QUERY], []) == ([QUERY], False)
