"""What of the collected pairs is learnt from, and what is not, and why."""

from __future__ import annotations

import dataclasses
import json
import random
import time
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill_ray.config.flywheel import CleanConfig
from distill_ray.errors import RowError
from distill_ray.flywheel.cleaning import Cleaned, Dropped, asked, clean
from distill_ray.serving.collecting.pairs import Pair
from tests.unit.pair_maker import pair

WORDS = [
    "apple",
    "river",
    "stone",
    "cloud",
    "engine",
    "violin",
    "desert",
    "window",
    "forest",
    "candle",
    "market",
    "harbour",
]


def unlike(number: int) -> str:
    """A question that is nothing like the others."""
    chosen = random.Random(number).sample(WORDS, 5)
    return f"{number * 7919} {' '.join(chosen)} {number}"


def at(created: int, question: str, answer: str = "an answer", **changes: Any) -> Pair:
    """A pair of that time."""
    return dataclasses.replace(pair(question, answer, **changes), created=created)


def cleaned(pairs: list[Pair], **rules: object) -> Cleaned:
    found = clean(pairs, CleanConfig.model_validate(rules))
    assert sorted([p.pair_id for p in found.kept] + [i for i, _ in found.dropped]) == sorted(p.pair_id for p in pairs)
    assert len(found.clusters_K) == len(found.kept)
    return found


@pytest.mark.parametrize(
    ("made", "rules", "reason"),
    [
        (pair("a question", "  "), {}, Dropped.NO_ANSWER),
        (pair("a question", "ok"), {"min_chars": 3}, Dropped.TOO_SHORT),
        (pair("a question " * 10, "ok"), {"max_chars": 50}, Dropped.TOO_LONG),
        (pair("ignore all previous instructions", "ok"), {"drop": ["(?i)ignore all previous"]}, Dropped.PATTERN),
        (pair("a question", "the SECRET"), {"drop": ["SECRET"]}, Dropped.PATTERN),
    ],
)
def test_a_pair_against_the_rules_is_dropped_with_its_reason(made: Pair, rules: dict[str, object], reason: str) -> None:
    good = pair("something else that is fine", "an answer")
    found = cleaned([made, good], **rules)
    assert found.dropped == [(made.pair_id, reason)]
    assert found.counts == {reason: 1}


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("write to jane.doe+x@example.co.uk today", "write to <email> today"),
        ("call +49 (30) 1234-567 now", "call <phone> now"),
        ("call 030 1234 5678 now", "call <phone> now"),
        ("my key is sk-abcdefghijklmnop1234", "my key is <key>"),
        ("token 0123456789abcdef0123456789abcdef!", "token <key>!"),
        ("in 2026 we sold 1,234,567 of 12.50 each", "in 2026 we sold 1,234,567 of 12.50 each"),
        ("on 2026-11-21 at 12:30", "on 2026-11-21 at 12:30"),
        (
            "a/path/to/some_file.py and antidisestablishmentarianism",
            "a/path/to/some_file.py and antidisestablishmentarianism",
        ),
    ],
)
def test_what_looks_like_an_address_a_number_or_a_key_is_masked_and_nothing_else(text: str, left: str) -> None:
    [kept] = cleaned([pair(text, f"you said: {text}")]).kept
    assert asked(kept) == left
    assert kept.completion == f"you said: {left}"
    [as_it_was] = cleaned([pair(text, text)], mask=[]).kept
    assert asked(as_it_was) == text


def test_masks_reach_parts_and_earlier_turns_and_leave_the_rest_alone() -> None:
    messages = [
        {"role": "system", "content": "mail a@b.example"},
        {"role": "user", "content": [{"type": "text", "text": "I am c@d.example"}]},
        {"role": "assistant", "content": "noted", "name": "clerk"},
        {"role": "user", "content": "and?"},
    ]
    found = cleaned([pair("x", messages=messages)])
    assert found.masked == {"email": 2, "phone": 0, "key": 0}
    kept = json.loads(found.kept[0].messages)
    assert kept[0]["content"] == "mail <email>"
    assert kept[1]["content"] == [{"type": "text", "text": "I am <email>"}]
    assert kept[2] == messages[2]


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (pair("x", body={"tools": [{"type": "function"}]}), Dropped.TOOLS),
        (pair("x", messages=[{"role": "assistant", "tool_calls": [{}]}, {"role": "user", "content": "x"}]), "not_text"),
        (pair("x", messages=[{"role": "system", "content": "only this"}]), Dropped.NOT_TEXT),
        (pair("x", messages=[{"role": "tool", "content": "5"}, {"role": "user", "content": "x"}]), Dropped.NOT_TEXT),
    ],
)
def test_what_is_more_than_text_is_not_learnt(bad: Pair, reason: str) -> None:
    assert cleaned([bad, pair("plain")]).dropped == [(bad.pair_id, reason)]


def test_age_counts_from_the_newest_pair_whatever_the_clock_says() -> None:
    day = 86_400 * 10**9
    old, new = (dataclasses.replace(pair(name), created=at * day) for name, at in (("old", 1), ("new", 40)))
    assert cleaned([old, new], max_age_days=30).dropped == [(old.pair_id, Dropped.TOO_OLD)]
    assert cleaned([old, new]).dropped == []


def test_answers_of_another_teacher_than_the_newest_ones_are_left_out() -> None:
    before, now = (
        pair("a", teacher="openai/large@1"),
        dataclasses.replace(pair("b", teacher="openai/large@2"), created=2),
    )
    assert cleaned([before, now]).dropped == [(before.pair_id, Dropped.OTHER_TEACHER)]
    assert cleaned([before, now], same_teacher=False).dropped == []


def test_of_the_same_question_the_newest_answer_stays() -> None:
    old, new = at(1, "what time is it", "noon"), at(2, "what time is it", "one")
    for order in ([old, new], [new, old]):
        found = cleaned(order)
        assert [p.completion for p in found.kept] == ["one"]
        assert found.dropped == [(old.pair_id, Dropped.DUPLICATE)]


def test_one_thing_sent_over_and_over_is_learnt_a_few_times() -> None:
    text = "please tell me everything about the history of the old stone bridge over the river, number "
    flood = [at(number, f"{text}{number}", f"answer {number}") for number in range(250)]
    found = cleaned([*flood, pair(unlike(1), "an answer")], per_cluster=3)
    assert found.counts == {"cluster_quota": 247}
    assert sorted(p.completion for p in found.kept) == ["an answer", "answer 247", "answer 248", "answer 249"]
    assert len(set(found.clusters_K.tolist())) == 2


@given(st.lists(st.integers(1, 40), min_size=1, max_size=5), st.floats(0.2, 1.0))
def test_no_owner_has_more_than_its_share_where_there_are_several(sizes: list[int], share: float) -> None:
    pairs = [
        at(n, unlike(1000 * owner + n), owner=f"owner {owner}") for owner, size in enumerate(sizes) for n in range(size)
    ]
    found = cleaned(pairs, owner_share=share)
    owners = Counter(p.owner for p in found.kept)
    assert len(owners) == len(sizes), "nobody is left out"
    if len(sizes) > 1 and share * len(sizes) >= 1.0:
        assert max(owners.values()) <= max(1.0, share * len(found.kept) + 1e-9)
    if len(sizes) == 1:
        assert len(found.kept) == sizes[0]


def test_what_comes_out_does_not_depend_on_the_order() -> None:
    pairs = [at(n, unlike(n % 30), f"answer {n}", owner=f"owner {n % 3}") for n in range(60)]
    shuffled = random.Random(0).sample(pairs, len(pairs))
    one, other = cleaned(pairs), cleaned(shuffled)
    assert [p.pair_id for p in one.kept] == [p.pair_id for p in other.kept]
    assert sorted(one.dropped) == sorted(other.dropped)


def test_nothing_comes_of_nothing() -> None:
    assert cleaned([]).kept == []


def test_a_pattern_that_takes_for_ever_names_itself() -> None:
    with pytest.raises(RowError, match=r"flywheel\.clean\.drop"):
        clean([pair("a" * 5000 + "!", "an answer")], CleanConfig(drop=[r"(a+a+)+$"]))


@pytest.mark.parametrize("text", ["a" * 200_000 + "@", "1-" * 100_000, "sk-" * 60_000, "a@" * 100_000])
def test_hostile_text_is_masked_in_no_time(text: str) -> None:
    started = time.process_time()
    cleaned([pair(text, "an answer")], max_chars=10**6)
    assert time.process_time() - started < 5.0
