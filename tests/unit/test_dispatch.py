"""The life of a request, with scripted models around a small bundle: who answers, who else does, what stays."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

import pytest

from distill_ray.config import ParseConfig
from distill_ray.errors import ApiError, EmbedderError, TextTooLong
from distill_ray.serving.request import Call, Live
from tests.unit.scripted_backend import DOWN, Rig, chunks, make_rig, text_of, whole
from tests.unit.small_bundle import REQUESTS

T = TypeVar("T")
TRAINED, UNLIKE = REQUESTS[0], "Explain the French revolution to a child"


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(asyncio.wait_for(coroutine, 20))


def ask(rig: Rig, text: str, **kwargs: Any) -> tuple[Any, list[dict[str, Any]]]:
    return run(rig.ask(text, **kwargs))


# -- who answers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_what_the_student_was_trained_on_goes_to_the_student_and_the_rest_to_the_teacher(
    tmp_path: Path, stream: bool
) -> None:
    rig = make_rig(tmp_path)
    decision, pieces = ask(rig, TRAINED, stream=stream)
    assert (decision.route, decision.reason, text_of(pieces).strip()) == ("student", "good", "the student says")
    decision, pieces = ask(rig, UNLIKE, stream=stream)
    assert (decision.route, text_of(pieces).strip()) == ("teacher", "the teacher says")
    assert decision.reason in ("far", "below_threshold")
    assert rig.count("requests_total", route="student", reason="good") == 1
    assert [note["route"] for note in rig.noted] == ["student", "teacher"]
    assert all(note["text"] is None for note in rig.noted)  # nobody's words, unless asked for


def test_the_context_is_for_the_teacher_only_and_never_given_twice(tmp_path: Path) -> None:
    rig = make_rig(tmp_path)
    context = {"role": "system", "content": "You are a home assistant."}
    for messages in ([{"role": "user", "content": TRAINED}], [context, {"role": "user", "content": TRAINED}]):
        decision, _ = ask(rig, "", messages=messages)
        assert decision.route == "student"
        assert rig.student.bodies[-1]["messages"] == [{"role": "user", "content": TRAINED}]
        ask(rig, "", messages=messages, wants="teacher")
        assert rig.teacher.bodies[-1]["messages"] == [context, {"role": "user", "content": TRAINED}]


def test_another_system_prompt_tools_or_format_go_to_the_teacher(tmp_path: Path) -> None:
    rig = make_rig(tmp_path)
    other = [{"role": "system", "content": "Answer in rhyme."}, {"role": "user", "content": TRAINED}]
    tools = [{"type": "function", "function": {"name": "light", "parameters": {}}}]
    for body in ({"messages": other}, {"tools": tools}, {"response_format": {"type": "json_object"}}):
        decision, _ = ask(rig, TRAINED, **body)
        assert (decision.route, decision.reason) == ("teacher", "other_fingerprint")


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([{"role": "user", "content": "   "}], "empty"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}], "not_text"),
        ([{"role": "user", "content": f"{TRAINED}<|im_end|>"}], "control_tokens"),
    ],
)
def test_what_the_student_cannot_be_asked_goes_to_the_teacher(
    tmp_path: Path, messages: list[dict[str, Any]], reason: str
) -> None:
    decision, _ = ask(make_rig(tmp_path), "", messages=messages)
    assert (decision.route, decision.reason) == ("teacher", reason)


def test_without_a_bundle_everything_goes_to_the_teacher(tmp_path: Path) -> None:
    rig = make_rig(tmp_path)
    rig.dispatcher.swap(Live())
    decision, _ = ask(rig, TRAINED)
    assert (decision.route, decision.reason) == ("teacher", "no_bundle")
    with pytest.raises(ApiError, match="there is no student") as caught:
        ask(rig, TRAINED, wants="student")
    assert caught.value.status == 404


def test_a_client_may_choose(tmp_path: Path) -> None:
    rig = make_rig(tmp_path)
    assert ask(rig, TRAINED, wants="teacher")[0].route == "teacher"
    assert ask(rig, UNLIKE, wants="student")[0].route == "student"


def test_what_a_request_leaves_open_is_as_it_was_measured(tmp_path: Path) -> None:
    rig = make_rig(tmp_path)
    ask(rig, TRAINED)
    assert (rig.student.bodies[-1]["temperature"], rig.student.bodies[-1]["max_tokens"]) == (0.0, 512)
    ask(rig, TRAINED, temperature=0.9, max_completion_tokens=5)
    assert rig.student.bodies[-1]["temperature"] == 0.9
    assert "max_tokens" not in rig.student.bodies[-1]


def test_a_conversation_that_the_teacher_began_stays_with_the_teacher(tmp_path: Path) -> None:
    rig = make_rig(tmp_path)
    first = [{"role": "user", "content": UNLIKE}]
    ask(rig, "", messages=first)
    more = [*first, {"role": "assistant", "content": "the teacher says"}, {"role": "user", "content": TRAINED}]
    assert ask(rig, "", messages=more)[0].reason == "latched"
    other = [*first, {"role": "assistant", "content": "somebody else said"}, {"role": "user", "content": TRAINED}]
    assert ask(rig, "", messages=other)[0].reason != "latched"


def test_the_answer_comes_under_the_name_that_was_asked_for(tmp_path: Path) -> None:
    """`model` would tell who was trained on what."""
    rig = make_rig(tmp_path)
    for stream in (False, True):
        for text in (TRAINED, UNLIKE):
            _, pieces = ask(rig, text, stream=stream, model="gpt-4o")
            assert {piece["model"] for piece in pieces} == {"gpt-4o"}


def test_usage_is_asked_for_and_shown_only_to_who_wants_it(tmp_path: Path) -> None:
    rig = make_rig(tmp_path)
    _, pieces = ask(rig, UNLIKE, stream=True)
    assert rig.teacher.bodies[-1]["stream_options"] == {"include_usage": True}
    assert all(piece.get("usage") is None and piece["choices"] for piece in pieces)
    assert rig.count("tokens_total", route="teacher", kind="prompt") == 7
    _, pieces = ask(rig, UNLIKE, stream=True, stream_options={"include_usage": True})
    assert pieces[-1]["usage"]["total_tokens"] == 10


def test_explaining_asks_nobody(tmp_path: Path) -> None:
    rig = make_rig(tmp_path)
    found = run(rig.dispatcher.explain(Call("chat", {"messages": [{"role": "user", "content": TRAINED}]})))
    assert (found["route"], found["reason"]) == ("student", "good")
    assert found["nearest"][0]["text"] == TRAINED
    assert found["nearest"][0]["similarity"] == pytest.approx(1.0, abs=1e-5)
    assert not rig.student.bodies
    assert not rig.teacher.bodies


# -- the student fails -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ([DOWN], "student_unavailable"),
        ([ApiError(400, "too long for me")], "student_refused"),
        ([5.0], "student_timeout"),
        ("empty", "student_empty"),
        ("role_then_down", "student_unavailable"),
    ],
)
def test_before_its_first_words_the_teacher_answers_instead(
    tmp_path: Path, script: Any, reason: str, stream: bool
) -> None:
    rig = make_rig(tmp_path)
    if script == "empty":
        script = chunks("  ") if stream else [whole("  ")]
    elif script == "role_then_down":
        script = [chunks()[0], DOWN] if stream else [DOWN]
    rig.student.script = lambda body: list(script)
    decision, pieces = ask(rig, TRAINED, stream=stream)
    assert (decision.route, decision.reason, text_of(pieces).strip()) == ("teacher", reason, "the teacher says")
    assert rig.count("fallbacks_total", why=reason) == 1
    assert rig.student.num_closed == 1  # its work has ended


def test_after_its_first_words_the_client_gets_the_error(tmp_path: Path) -> None:
    rig = make_rig(tmp_path)
    rig.student.script = lambda body: [*chunks("Half ", "an ")[:3], DOWN]

    async def read() -> str:
        routed = await rig.dispatcher.answer(
            Call("chat", {"messages": [{"role": "user", "content": TRAINED}], "stream": True})
        )
        got: list[dict[str, Any]] = []
        try:
            async for piece in routed.pieces:
                got.append(piece)
        except ApiError:
            return text_of(got)
        raise AssertionError("it went through")

    assert run(read()) == "Half an "
    assert rig.count("errors_total", where="student_midway") == 1
    assert not rig.teacher.bodies


@pytest.mark.parametrize(("text", "who"), [(TRAINED, "student"), (UNLIKE, "teacher")])
@pytest.mark.parametrize("ending", [DOWN, 5.0])
def test_who_is_gone_behind_a_whole_answer_costs_nobody_that_answer(
    tmp_path: Path, text: str, who: str, ending: Any
) -> None:
    rig = make_rig(tmp_path)
    rig.student.script = rig.teacher.script = lambda body: [whole("all of it"), ending]
    decision, pieces = ask(rig, text)
    assert (decision.route, text_of(pieces)) == (who, "all of it")
    assert rig.count("errors_total", where=f"{who}_midway") == 0
    assert len(rig.kept) == (1 if who == "teacher" else 0)


def test_nobody_waits_for_a_student_that_is_gone_until_it_is_back(tmp_path: Path) -> None:
    rig = make_rig(tmp_path)
    rig.student.script = lambda body: [DOWN]
    ask(rig, TRAINED)
    ask(rig, TRAINED)
    assert len(rig.student.bodies) == 1  # the second request did not try
    rig.student.script = None
    rig.student.up = False
    run(rig.dispatcher.look())
    assert ask(rig, TRAINED)[0].reason == "student_unavailable"
    rig.student.up = True
    run(rig.dispatcher.look())
    assert ask(rig, TRAINED)[0].route == "student"


def test_a_student_that_dies_is_found_out_before_anybody_has_waited_for_it(tmp_path: Path) -> None:
    rig = make_rig(tmp_path, router={"student_whole_timeout_s": 60.0})
    rig.student.script = lambda body: [60.0]

    async def meanwhile() -> Any:
        asking = asyncio.create_task(rig.ask(TRAINED))
        await asyncio.sleep(0.05)
        rig.student.up = False
        await rig.dispatcher.look()
        assert not asking.done(), "once may be a busy machine"
        await rig.dispatcher.look()
        return await asyncio.wait_for(asking, 5)

    decision, pieces = run(meanwhile())
    assert (decision.reason, text_of(pieces)) == ("student_unavailable", "the teacher says")
    assert rig.student.num_closed == 1
    assert ask(rig, TRAINED)[0].reason == "student_unavailable"
    assert len(rig.student.bodies) == 1


def test_requests_that_the_student_refuses_take_it_away_from_nobody(tmp_path: Path) -> None:
    rig = make_rig(tmp_path)
    rig.student.script = lambda body: [ApiError(400, "no such thing")] if body.get("tools") else [whole("fine")]
    for _ in range(10):
        with pytest.raises(ApiError, match="no such thing"):
            ask(rig, TRAINED, wants="student", tools=[{"type": "function"}])
    assert ask(rig, TRAINED)[0].route == "student"


def test_who_asked_for_the_student_gets_its_error(tmp_path: Path) -> None:
    rig = make_rig(tmp_path)
    rig.student.script = lambda body: [DOWN]
    with pytest.raises(ApiError, match="gone"):
        ask(rig, TRAINED, wants="student")
    assert not rig.teacher.bodies


def test_an_unsure_student_is_overruled_where_it_can_still_be(tmp_path: Path) -> None:
    def sure(mean: float) -> dict[str, Any]:
        response = whole("an answer")
        response["choices"][0]["logprobs"] = {"content": [{"token": "a", "logprob": mean}] * 2}
        return response

    rig = make_rig(tmp_path, cascade={"min_mean_logprob": -0.5})
    rig.student.script = lambda body: [sure(-0.6)] if not body.get("stream") else chunks("an answer")
    assert ask(rig, TRAINED)[0].reason == "student_unsure"
    assert rig.student.bodies[-1]["logprobs"] is True
    assert ask(rig, TRAINED, stream=True)[0].route == "student"
    rig.student.script = lambda body: [sure(-0.4)]
    decision, [response] = ask(rig, TRAINED)
    assert decision.route == "student"
    assert response["choices"][0]["logprobs"] is None  # the client did not ask for them


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        (EmbedderError("broken"), "embedder_failed"),
        (TextTooLong("too long"), "too_long"),
        (RuntimeError("a bug"), "router_failed"),
    ],
)
def test_a_decision_that_fails_is_the_teachers_whose_answer_is_kept_without_a_vector(
    tmp_path: Path, failure: Exception, reason: str
) -> None:
    rig = make_rig(tmp_path)

    class Broken:
        async def embed(self, text: str) -> Any:
            raise failure

    rig.dispatcher.swap(dataclasses.replace(rig.dispatcher.live, embedder=Broken()))
    decision, pieces = ask(rig, TRAINED)
    assert (decision.route, decision.reason) == ("teacher", reason)
    assert text_of(pieces) == "the teacher says"
    assert [asked.vector for asked, _ in rig.kept] == [None]
    num_errors = sum(rig.count("errors_total", where=where) for where in ("embedder", "decision"))
    assert (num_errors > 0) == (reason != "too_long")


# -- the teacher fails -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("problem", "status", "retry_after"),
    [
        (DOWN, 503, 5.0),
        (5.0, 503, 5.0),
        (ApiError(500, "x"), 503, 5.0),
        (ApiError(429, "slow down", retry_after=9.0), 429, 9.0),
        (ApiError(401, "our key is wrong"), 503, None),
        (ApiError(400, "bad tools"), 400, None),
    ],
)
def test_a_teacher_that_is_down_is_503_with_retry_after_and_a_wrong_request_its_own_error(
    tmp_path: Path, problem: Any, status: int, retry_after: float | None
) -> None:
    rig = make_rig(tmp_path)
    rig.teacher.script = lambda body: [problem]
    with pytest.raises(ApiError) as caught:
        ask(rig, UNLIKE)
    assert (caught.value.status, caught.value.retry_after) == (status, retry_after)
    assert "our key" not in str(caught.value)
    assert not rig.kept


def test_while_the_teacher_is_down_the_student_answers_where_the_operator_allowed_it(tmp_path: Path) -> None:
    rig = make_rig(tmp_path, degraded="student")
    rig.teacher.script = lambda body: [DOWN]
    decision, pieces = ask(rig, UNLIKE)
    assert (decision.route, decision.reason, text_of(pieces)) == ("student", "teacher_unavailable", "the student says")
    with pytest.raises(ApiError):
        ask(rig, f"{TRAINED}<|im_end|>")  # it would read something else than what was sent
    rig.student.script = lambda body: [DOWN]
    with pytest.raises(ApiError) as caught:
        ask(rig, UNLIKE)
    assert caught.value.status == 503


@pytest.mark.parametrize(("text", "who"), [(TRAINED, "student"), (UNLIKE, "teacher")])
def test_who_falls_silent_in_the_middle_is_counted_and_not_named(tmp_path: Path, text: str, who: str) -> None:
    rig = make_rig(tmp_path)
    rig.student.script = rig.teacher.script = lambda body: [*chunks("Half ", "an ")[:3], 5.0]
    with pytest.raises(ApiError, match="the model stopped in the middle") as caught:
        ask(rig, text, stream=True)
    assert (caught.value.status, rig.count("errors_total", where=f"{who}_midway")) == (504, 1)


@pytest.mark.parametrize("ending", [DOWN, 5.0])
def test_a_teacher_that_breaks_off_is_an_error_and_nothing_is_kept(tmp_path: Path, ending: Any) -> None:
    rig = make_rig(tmp_path)
    rig.teacher.script = lambda body: [*chunks("Half ", "an ")[:3], ending]
    with pytest.raises(ApiError):
        ask(rig, UNLIKE, stream=True)
    assert not rig.kept
    assert rig.count("errors_total", where="teacher_midway") == 1


# -- what stays --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_a_teachers_answer_is_kept_before_its_response_ends_and_a_students_never(tmp_path: Path, stream: bool) -> None:
    rig = make_rig(tmp_path)

    async def first_kept_at() -> tuple[int, int]:
        call = Call("chat", {"messages": [{"role": "user", "content": UNLIKE}], "stream": stream})
        routed = await rig.dispatcher.answer(call)
        num_pieces = kept_at = 0
        async for _ in routed.pieces:
            num_pieces += 1
            kept_at = kept_at or (num_pieces if rig.kept else 0)
        return kept_at, num_pieces

    kept_at, num_pieces = run(first_kept_at())
    assert kept_at == (0 if stream else num_pieces)  # of a stream: behind its last chunk, before [DONE]
    [(asked, answer)] = rig.kept
    assert answer.text.strip() == "the teacher says"
    assert asked.messages == [{"role": "user", "content": UNLIKE}]  # without the context
    assert asked.vector is not None
    ask(rig, TRAINED, stream=stream)
    assert len(rig.kept) == 1


def test_a_client_that_leaves_ends_the_work_keeps_nothing_and_still_pays(tmp_path: Path) -> None:
    rig = make_rig(tmp_path, limits={"teacher_tokens_per_day": 5})
    rig.teacher.script = lambda body: chunks(*("word " for _ in range(50)))

    async def leave() -> None:
        call = Call("chat", {"messages": [{"role": "user", "content": UNLIKE}], "stream": True}, owner="alice")
        routed = await rig.dispatcher.answer(call)
        await anext(routed.pieces)
        await routed.pieces.aclose()

    run(leave())
    assert rig.teacher.num_closed == 1
    assert not rig.kept
    with pytest.raises(ApiError, match="tokens of the large model") as caught:
        ask(rig, UNLIKE)
    assert (caught.value.status, caught.value.code) == (429, "insufficient_quota")
    assert ask(rig, TRAINED)[0].route == "student"  # costs the teacher nothing


def test_what_stands_before_a_clients_words_does_not_come_back_with_an_answer(tmp_path: Path) -> None:
    rig = make_rig(tmp_path)
    leaky = {**whole("fine"), "prompt_logprobs": [{"1": "You"}], "prompt_token_ids": [1, 2], "prompt_text": "You are"}
    leaky["choices"][0] |= {"token_ids": [3], "prompt_token_ids": [1]}
    rig.teacher.script = lambda body: [leaky]
    [piece] = ask(rig, UNLIKE)[1]
    assert set(piece) == {"id", "object", "created", "model", "choices", "usage"}
    assert set(piece["choices"][0]) == {"index", "message", "logprobs", "finish_reason"}


def test_of_a_parsed_answer_the_rest_is_not_spelt_out_by_its_tokens(tmp_path: Path) -> None:
    rig = make_rig(tmp_path, bundle={"parse": ParseConfig(after="Answer:")})
    said = whole("It is this and that. Answer: yes", reasoning_content="hm")
    said["choices"][0]["logprobs"] = {"content": [{"token": "It", "logprob": -0.1}]}
    rig.teacher.script = lambda body: [said]
    [piece] = ask(rig, UNLIKE, logprobs=True)[1]
    assert piece["choices"][0]["logprobs"] is None
    assert piece["choices"][0]["message"] == {"role": "assistant", "content": "yes"}


@pytest.mark.parametrize("stream", [False, True])
def test_of_a_parsed_recipe_both_routes_answer_alike_and_what_has_no_result_is_not_kept(
    tmp_path: Path, stream: bool
) -> None:
    rig = make_rig(tmp_path, bundle={"parse": ParseConfig(after="Answer:")})
    rig.teacher.script = lambda body: [whole("I think and think. Answer: 42")]
    _, pieces = ask(rig, UNLIKE, stream=stream)
    assert text_of(pieces) == "42"
    assert rig.teacher.bodies[-1]["stream"] is False
    assert [answer.text for _, answer in rig.kept] == ["42"]
    rig.teacher.script = lambda body: [whole("I have no idea")]
    _, pieces = ask(rig, "Something unlike that too", stream=stream)
    assert text_of(pieces) == "I have no idea"
    assert len(rig.kept) == 1
    assert rig.count("pairs_total", result="unparsable") == 1


def test_a_swap_in_the_middle_of_a_request_changes_nothing_for_it(tmp_path: Path) -> None:
    rig = make_rig(tmp_path)

    async def swap_midway() -> str:
        call = Call("chat", {"messages": [{"role": "user", "content": TRAINED}], "stream": True})
        routed = await rig.dispatcher.answer(call)
        rig.dispatcher.swap(Live())
        pieces = [piece async for piece in routed.pieces]
        return routed.version + " " + text_of(pieces)

    assert run(swap_midway()) == "0123456789ab the student says "
    assert ask(rig, TRAINED)[0].reason == "no_bundle"


def test_a_threshold_that_drift_raised_counts_at_once_and_is_said(tmp_path: Path) -> None:
    rig = make_rig(tmp_path)
    call = Call("chat", {"messages": [{"role": "user", "content": TRAINED}]})
    assert run(rig.dispatcher.explain(call))["threshold"] == 0.5
    rig.student.script = lambda body: [DOWN]
    ask(rig, TRAINED)
    rig.dispatcher.set_floor(0.999)
    assert ask(rig, TRAINED)[0].reason == "student_unavailable"  # what is known of the student stays
    rig.student.script = None
    run(rig.dispatcher.look())
    assert ask(rig, TRAINED)[0].reason == "below_threshold"
    found = run(rig.dispatcher.explain(call))
    assert (found["threshold"], found["bundle"], found["route"]) == (0.999, "0123456789ab", "teacher")
    rig.dispatcher.set_floor(0.1)  # below the bundle's own
    assert run(rig.dispatcher.explain(call))["threshold"] == 0.5
