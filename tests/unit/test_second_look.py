"""Second looks: who is asked again and when, what that finds and costs, and that no client ever notices."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import pytest

from distill_ray.config import ParseConfig
from distill_ray.config.serve import LimitsConfig
from distill_ray.errors import ApiError
from distill_ray.serving.collecting.answer import Answer, whole_answer
from distill_ray.serving.front.limits import DAY, Limits, Usage
from distill_ray.serving.request import Call
from distill_ray.serving.routing.bundle import load_bundle
from distill_ray.serving.routing.manifest import NEVER
from distill_ray.serving.watching.second_look import MOST_AT_ONCE, Trial
from distill_ray.serving.watching.verdict import budget_of, rule_of, said
from tests.unit.scripted_backend import DOWN, Rig, Scripted, chunks, make_rig, text_of, whole
from tests.unit.small_bundle import REQUESTS, WordEmbedder, write_small_bundle

T = TypeVar("T")
Tried = Callable[..., tuple[Rig, Scripted]]
TRAINED, UNLIKE = REQUESTS[0], "Explain the French revolution to a child"
MEASURED = {"metric": "exact_match", "error_budget": 0.05, "drift_budget": 0.05, "confidence": 0.95}
TOKENS = 10  # that the scripted teacher takes for an answer


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(asyncio.wait_for(coroutine, 20))


def rig_of(folder: Path, *, measured: dict[str, Any] | None = None, **config: Any) -> Rig:
    """Of which every student's answer is looked at again."""
    bundle = {"summary": MEASURED if measured is None else measured, **config.pop("bundle", {})}
    return make_rig(folder, bundle=bundle, **{"drift": {"share": 1.0}, **config})


async def tell(rig: Rig, text: str, *, wants: str = "auto", header: str | None = None, **body: Any) -> str:
    """What a client gets."""
    sent = {"messages": [{"role": "user", "content": text}], "model": "auto", **body}
    routed = await rig.dispatcher.answer(Call("chat", sent, wants=wants, owner="alice", collect_header=header))
    return text_of([piece async for piece in routed.pieces]).strip()


def ask(rig: Rig, *texts: str, **kwargs: Any) -> list[str]:
    """What clients get, when all looks have come to their end."""

    async def all_of_them() -> list[str]:
        answers = []
        for text in texts:
            answers.append(await tell(rig, text, **kwargs))
            await rig.looks.settled()
        return answers

    return run(all_of_them())


def results(rig: Rig, kind: str = "drift") -> dict[str, int]:
    found = {r: int(rig.count("second_looks_total", kind=kind, result=r)) for r in ("good", "bad", "skipped", "failed")}
    return {result: number for result, number in found.items() if number}


# -- drift: what is looked at ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_the_teacher_is_asked_as_on_its_own_route_and_the_answers_are_compared(tmp_path: Path, stream: bool) -> None:
    rig = rig_of(tmp_path)
    assert ask(rig, TRAINED, stream=stream, temperature=0.3) == ["the student says"]
    [body] = rig.teacher.bodies
    assert body["messages"] == [
        {"role": "system", "content": "You are a home assistant."},
        {"role": "user", "content": TRAINED},
    ]
    assert (body["stream"], body["temperature"], body["max_tokens"]) == (False, 0.3, 512)
    [look] = rig.found
    assert (look.kind, look.version, look.good, look.tokens) == ("drift", "0123456789ab", False, TOKENS)
    assert look.score is not None
    assert look.score > 0.9
    rig.student.script = lambda body: chunks("the ", "teacher ", "says") if stream else [whole("the teacher says")]
    ask(rig, TRAINED, stream=stream)
    assert [(look.number, look.good) for look in rig.found] == [(1, False), (2, True)]
    assert results(rig) == {"good": 1, "bad": 1}
    assert rig.count("second_look_tokens_total", kind="drift") == 2 * TOKENS


def test_no_client_waits_for_it(tmp_path: Path) -> None:
    rig = rig_of(tmp_path)
    rig.teacher.script = lambda body: [0.3, whole("the teacher says")]

    async def meanwhile() -> tuple[str, int, int]:
        answer = await asyncio.wait_for(tell(rig, TRAINED), 0.25)
        before = len(rig.found)
        await rig.looks.settled()
        return answer, before, len(rig.found)

    assert run(meanwhile()) == ("the student says", 0, 1)


def test_a_look_begins_when_the_client_has_had_all_of_it(tmp_path: Path) -> None:
    rig = rig_of(tmp_path)
    rig.student.script = lambda body: chunks("one ", "two ", "three ")

    async def read(num: int | None) -> None:
        call = Call("chat", {"messages": [{"role": "user", "content": TRAINED}], "stream": True})
        routed = await rig.dispatcher.answer(call)
        if num is None:
            async for _ in routed.pieces:
                await asyncio.sleep(0)
                assert not rig.teacher.bodies
        else:
            await anext(routed.pieces)
            await routed.pieces.aclose()  # the client leaves
        await rig.looks.settled()

    run(read(1))
    assert not rig.teacher.bodies
    run(read(None))
    assert len(rig.teacher.bodies) == len(rig.found) == 1


def test_an_answer_that_broke_off_is_not_looked_at(tmp_path: Path) -> None:
    rig = rig_of(tmp_path)
    rig.student.script = lambda body: [*chunks("Half ", "an ")[:3], DOWN]
    with pytest.raises(ApiError):
        ask(rig, TRAINED, stream=True)
    assert not rig.teacher.bodies


@pytest.mark.parametrize(
    "request_of",
    [
        {"wants": "student"},  # the client chose: the router would not have, perhaps
        {"header": "no"},
        {"n": 2},
    ],
)
def test_what_is_not_the_routers_own_choice_or_not_to_be_used_is_not_looked_at(
    tmp_path: Path, request_of: dict[str, Any]
) -> None:
    rig = rig_of(tmp_path)
    ask(rig, TRAINED, **request_of)
    assert (rig.found, rig.teacher.bodies, results(rig)) == ([], [], {})


def test_only_what_the_student_was_sent_for_its_score_is_looked_at(tmp_path: Path) -> None:
    rig = rig_of(tmp_path, degraded="student")
    ask(rig, UNLIKE)
    assert len(rig.teacher.bodies) == 1  # the answer itself
    rig.teacher.script = lambda body: [DOWN]
    assert ask(rig, "Explain something else") == ["the student says"]  # as the teacher is down
    assert (rig.found, results(rig)) == ([], {})


@pytest.mark.parametrize("config", [{"drift": None}, {"measured": {"share": 0.8}}])
def test_nobody_looks_where_it_is_switched_off_or_the_bundle_was_never_measured(
    tmp_path: Path, config: dict[str, Any]
) -> None:
    rig = rig_of(tmp_path, **config)
    ask(rig, TRAINED)
    assert (rig.found, rig.teacher.bodies) == ([], [])


def test_a_share_is_a_share(tmp_path: Path) -> None:
    rig = rig_of(tmp_path, drift={"share": 0.25})
    ask(rig, *[TRAINED] * 200)
    assert 30 < len(rig.found) < 70


def test_the_teachers_answer_is_kept_for_the_next_training_and_the_conversation_stays_the_students(
    tmp_path: Path,
) -> None:
    rig = rig_of(tmp_path)
    ask(rig, TRAINED)
    [(asked, answer)] = rig.kept
    assert (answer.text, asked.messages) == ("the teacher says", [{"role": "user", "content": TRAINED}])
    assert asked.vector is not None
    turns = [("user", TRAINED), ("assistant", "the student says"), ("user", TRAINED)]
    messages = [{"role": role, "content": text} for role, text in turns]
    call = Call("chat", {"messages": messages})
    assert run(rig.dispatcher.explain(call))["reason"] != "latched"


# -- what comes to nothing -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "script",
    [
        [DOWN],
        [ApiError(400, "too long for me")],
        [5.0],
        [],
        [whole("cut o", finish_reason="length")],
        [whole("I'm sorry, I cannot do that")],
        [whole("")],
    ],
)
def test_a_teacher_that_fails_or_says_nothing_to_measure_by_is_counted_and_no_more(
    tmp_path: Path, script: list[Any]
) -> None:
    rig = rig_of(tmp_path)
    rig.teacher.script = lambda body: list(script)
    assert ask(rig, TRAINED) == ["the student says"]
    assert (rig.found, results(rig)) == ([], {"failed": 1})
    assert rig.teacher.num_closed == 1  # its work has ended
    assert rig.count("errors_total", where="second_look") == 0


def test_a_teacher_that_never_answers_uses_up_the_budget_too(tmp_path: Path) -> None:
    rig = rig_of(tmp_path, drift={"share": 1.0, "max_tokens_per_day": 20})
    rig.teacher.script = lambda body: [ApiError(504, "too slow")]
    ask(rig, TRAINED, TRAINED, TRAINED)
    assert results(rig) == {"failed": 1, "skipped": 2}


def test_a_bug_in_it_is_no_clients_matter(tmp_path: Path) -> None:
    rig = rig_of(tmp_path, measured={**MEASURED, "metric": "embedding"})

    class Broken:
        async def embed(self, text: str) -> Any:
            if text == TRAINED:
                return await WordsEmbedder().embed(text)
            raise RuntimeError("a bug")

    rig.dispatcher.swap(dataclasses.replace(rig.dispatcher.live, embedder=Broken()))
    assert ask(rig, TRAINED, TRAINED) == ["the student says"] * 2
    assert results(rig) == {"failed": 2}
    assert rig.count("errors_total", where="second_look") == 2


class WordsEmbedder:
    async def embed(self, text: str) -> Any:
        return WordEmbedder().embed([text])[0]


def test_no_more_are_under_way_than_a_slow_teacher_can_bear(tmp_path: Path) -> None:
    rig = rig_of(tmp_path)
    rig.teacher.script = lambda body: [0.2, whole("the teacher says")]

    async def many() -> None:
        for _ in range(3 * MOST_AT_ONCE):
            await tell(rig, TRAINED)
        await rig.looks.settled()
        await tell(rig, TRAINED)
        await rig.looks.settled()

    run(many())
    assert results(rig) == {"bad": MOST_AT_ONCE + 1, "skipped": 2 * MOST_AT_ONCE}


# -- the budget ------------------------------------------------------------------------------------------------------


def test_when_the_days_tokens_are_spent_nobody_is_asked(tmp_path: Path) -> None:
    rig = rig_of(tmp_path, drift={"share": 1.0, "max_tokens_per_day": 2 * TOKENS})
    ask(rig, *[TRAINED] * 5)
    assert len(rig.teacher.bodies) == 2
    assert results(rig) == {"bad": 2, "skipped": 3}


def test_tokens_that_nobody_counts_are_guessed(tmp_path: Path) -> None:
    rig = rig_of(tmp_path)
    rig.teacher.script = lambda body: [{**whole("word " * 40), "usage": None}]
    ask(rig, TRAINED)
    [look] = rig.found
    assert 50 < look.tokens < 100


def test_routers_share_the_budget_by_day_and_a_candidates_for_as_long_as_it_is_one() -> None:
    now = [10.0 * DAY + 5]
    usage = Usage(clock=lambda: now[0])
    one, other = (Limits(LimitsConfig(), lambda: now[0]) for _ in range(2))
    one.spent("", 60, "drift")
    one.spent("v1", 70, "shadow")
    assert one.is_spent("drift", "", 60)
    assert not other.is_spent("drift", "", 60)
    for limits in (one, other):
        limits.learn(usage.exchange(limits.report()))
    assert other.is_spent("drift", "", 60)
    assert other.is_spent("shadow", "v1", 70)
    assert not other.is_spent("shadow", "v2", 70)
    again = Usage(usage.exchange({}).items(), clock=lambda: now[0])  # the keeper was killed
    now[0] += DAY
    other.learn(again.exchange({}))
    assert not other.is_spent("drift", "", 60)
    assert other.is_spent("shadow", "v1", 70)
    assert not other.is_spent("tokens", "", 1)  # nobody's own limit


# -- comparing -------------------------------------------------------------------------------------------------------


def test_of_a_parsed_recipe_the_part_that_counts_is_compared(tmp_path: Path) -> None:
    rig = rig_of(tmp_path, bundle={"parse": ParseConfig(after="Answer:")})
    rig.student.script = lambda body: [whole("42")]
    rig.teacher.script = lambda body: [whole("I think and think. Answer: 42")]
    ask(rig, TRAINED)
    assert [look.good for look in rig.found] == [True]
    assert [answer.text for _, answer in rig.kept] == ["42"]
    rig.teacher.script = lambda body: [whole("I have no idea")]
    ask(rig, TRAINED)
    assert results(rig) == {"good": 1, "failed": 1}
    assert len(rig.kept) == 1


@pytest.mark.parametrize(
    ("metric", "teacher", "good"),
    [
        ("exact_match", " the  light is on ", True),
        ("exact_match", "the light is on now", False),
        ("token_f1", "the light is on now", True),
        ("token_f1", "the radio is off", False),
        ("embedding", "the light is on now", True),
        ("embedding", "who knows", False),
        ("embedding", "word " * 300, False),  # too long to embed is like nothing
    ],
)
def test_answers_are_held_to_the_metric_of_the_bundle(tmp_path: Path, metric: str, teacher: str, good: bool) -> None:
    rig = rig_of(tmp_path, measured={**MEASURED, "metric": metric, "good_from": 0.8})
    rig.dispatcher.swap(dataclasses.replace(rig.dispatcher.live, embedder=Long()))
    rig.student.script = lambda body: [whole("the light is on")]
    rig.teacher.script = lambda body: [whole(teacher)]
    ask(rig, TRAINED)
    assert [look.good for look in rig.found] == [good]


class Long:
    """Knows its limit."""

    async def embed(self, text: str) -> Any:
        from distill_ray.errors import TextTooLong

        if WordEmbedder().count_tokens(text) > WordEmbedder.max_tokens:
            raise TextTooLong("too long")
        return WordEmbedder().embed([text])[0]


def test_a_judge_is_asked_in_both_orders_and_paid_from_the_same_budget(tmp_path: Path) -> None:
    judge = Scripted("judge")
    measured = {**MEASURED, "metric": "judge", "good_from": 0.8}
    config = {"share": 1.0, "max_tokens_per_day": 3 * TOKENS}
    rig = rig_of(tmp_path, measured=measured, judge=judge, drift=config)
    judge.script = lambda body: [whole("[[C]]")]
    ask(rig, TRAINED)
    assert len(judge.bodies) == 2
    assert TRAINED in judge.bodies[0]["messages"][0]["content"]
    assert [(look.good, look.tokens) for look in rig.found] == [(True, 3 * TOKENS)]
    ask(rig, TRAINED)
    assert results(rig) == {"good": 1, "skipped": 1}
    worse = rig_of(tmp_path / "worse", measured=measured, judge=judge)
    judge.script = lambda body: [whole("[[B]]" if len(judge.bodies) % 2 else "[[A]]")]
    ask(worse, TRAINED)
    assert [look.good for look in worse.found] == [False]
    judge.script = lambda body: [DOWN]
    ask(worse, TRAINED)
    assert results(worse) == {"bad": 1, "failed": 1}


def test_calls_of_tools_are_compared_by_what_they_call() -> None:
    def calling(name: str, arguments: str, id: str) -> Answer:
        call = {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}
        return whole_answer(whole(None, "tool_calls", tool_calls=[call]))

    one = calling("light", '{"room": "kitchen", "on": true}', "a")
    assert said(one) == said(calling("light", '{ "room": "kitchen",  "on": true}', "b"))
    assert said(one) != said(calling("light", '{"room": "hall", "on": true}', "a"))
    assert said(calling("light", "not JSON", "a")) != said(one)
    assert said(whole_answer(whole("text"))) == "text"


def test_a_bundle_that_was_not_measured_has_no_rule_and_an_older_one_its_error_budget() -> None:
    assert rule_of({"share": 0.8}) is None
    assert budget_of({"share": 0.8}) is None
    assert budget_of({"metric": "token_f1", "error_budget": 0.1}) == 0.1
    assert budget_of({"metric": "token_f1", "error_budget": 0.1, "drift_budget": 0.2}) == 0.2
    rule = rule_of({"metric": "token_f1", "error_budget": 0.1, "good_from": 0.7, "why": None})
    assert rule is not None
    assert (rule.metric, rule.good_from) == ("token_f1", 0.7)


# -- shadow ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def tried(tmp_path: Path) -> Tried:
    """A rig with a candidate that would take everything; nothing is looked at for drift."""

    def make(max_tokens: int = 1000, share: float = 1.0, **changes: Any) -> tuple[Rig, Scripted]:
        rig = rig_of(tmp_path / "current", drift=None)
        fields = {"version": "cccccccccccc", "threshold": 0.0, "far": -1.0, "summary": MEASURED, **changes}
        bundle = load_bundle(write_small_bundle(tmp_path / "candidate", **fields), WordEmbedder.identity)
        student = Scripted("candidate", "the teacher says")
        manifest = bundle.manifest
        live = dataclasses.replace(
            rig.dispatcher.live, bundle=bundle, student=student, context=tuple(manifest.context), parse=manifest.parse
        )
        rig.looks.trial = Trial(live, share, max_tokens)
        return rig, student

    return make


def test_a_candidate_is_compared_with_the_answer_that_the_teacher_just_gave(tried: Tried) -> None:
    rig, candidate = tried(max_tokens=0)
    assert ask(rig, UNLIKE, stream=True) == ["the teacher says"]
    assert len(rig.teacher.bodies) == 1  # the client's own
    assert candidate.bodies[0]["messages"] == [{"role": "user", "content": UNLIKE}]
    assert candidate.bodies[0]["stream"] is False
    [look] = rig.found
    assert (look.kind, look.version, look.good, look.tokens) == ("shadow", "cccccccccccc", True, 0)
    assert results(rig, "shadow") == {"good": 1}
    assert len(rig.kept) == 1


def test_where_the_student_answered_the_teacher_is_asked_too_within_the_candidates_budget(tried: Tried) -> None:
    rig, candidate = tried(max_tokens=TOKENS)
    candidate.script = lambda body: [whole("something else")]
    assert ask(rig, TRAINED, TRAINED, UNLIKE) == ["the student says", "the student says", "the teacher says"]
    assert results(rig, "shadow") == {"bad": 2, "skipped": 1}
    assert [look.tokens for look in rig.found] == [TOKENS, 0]
    assert len(candidate.bodies) == 2  # not for the one that nobody would have compared
    assert [asked.live.version for asked, _ in rig.kept] == ["0123456789ab"] * 2


@pytest.mark.parametrize("changes", [{"threshold": NEVER}, {"far": 1.0}, {"ignore": ["(?i)french"], "far": 2.0}])
def test_a_candidate_that_would_not_get_a_request_is_not_asked(tried: Tried, changes: dict[str, Any]) -> None:
    rig, candidate = tried(**changes)
    ask(rig, UNLIKE)
    assert (rig.found, candidate.bodies, results(rig, "shadow")) == ([], [], {})


def test_a_candidate_with_another_context_is_held_to_what_the_teacher_says_in_it(tried: Tried) -> None:
    context = [{"role": "system", "content": "You are a butler."}]
    rig, _ = tried(context=context)
    ask(rig, UNLIKE)
    assert [body["messages"][0] for body in rig.teacher.bodies][1:] == context
    assert [look.tokens for look in rig.found] == [TOKENS]
    assert len(rig.kept) == 1  # the client's own: the other was to a question that nobody asked


def test_forced_and_latched_requests_are_none_that_a_candidate_would_get(tried: Tried) -> None:
    rig, candidate = tried()
    rig.looks.trial, trial = None, rig.looks.trial
    ask(rig, UNLIKE)
    rig.looks.trial = trial
    turns = [("user", UNLIKE), ("assistant", "the teacher says"), ("user", TRAINED)]
    ask(rig, "", messages=[{"role": role, "content": text} for role, text in turns])
    ask(rig, TRAINED, wants="student")
    ask(rig, TRAINED, wants="teacher")
    ask(rig, TRAINED, header="no")
    assert (rig.found, candidate.bodies) == ([], [])


def test_a_candidate_that_fails_is_counted_and_no_more(tried: Tried) -> None:
    rig, candidate = tried()
    for script in ([DOWN], [5.0]):
        candidate.script = lambda body, script=script: list(script)
        assert ask(rig, UNLIKE) == ["the teacher says"]
    assert (rig.found, results(rig, "shadow")) == ([], {"failed": 2})
    candidate.script = lambda body: [whole("")]
    ask(rig, UNLIKE)
    assert [look.good for look in rig.found] == [False]


def test_what_the_teacher_cut_off_is_no_measure_for_a_candidate(tried: Tried) -> None:
    rig, _ = tried()
    rig.teacher.script = lambda body: [whole("cut o", finish_reason="length")]
    ask(rig, UNLIKE)
    assert (rig.found, results(rig, "shadow")) == ([], {"failed": 1})


def test_a_candidate_gets_its_share(tried: Tried) -> None:
    rig, _ = tried(share=0.25)
    ask(rig, *[UNLIKE] * 200)
    assert 30 < len(rig.found) < 70
