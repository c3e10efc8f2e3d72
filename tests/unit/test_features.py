"""What similar words may hide: numbers, negation, names."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill_ray.serving.calibration.polarity import PAIRS
from distill_ray.serving.routing.features import contains_and_adds, marks_of, mismatch


def differs(a: str, b: str) -> set[str]:
    return set(mismatch(marks_of(a), marks_of(b)))


@given(st.text(max_size=300))
def test_a_text_does_not_differ_from_itself(text: str) -> None:
    assert differs(text, text) == set()
    assert differs(text, f"  {text}\n") == set()


@given(st.text(max_size=300))
def test_a_text_adds_nothing_to_itself(text: str) -> None:
    assert not contains_and_adds(marks_of(text), marks_of(f"{text} {text}"))


@pytest.mark.parametrize("wording", ["{asked} {trained}", "{trained}\n{asked}", "{trained} {asked} {trained}"])
def test_a_request_pasted_beside_another_is_seen_and_a_longer_wording_of_it_is_not(wording: str) -> None:
    trained = "Is the shop in Paris open on a Sunday"
    text = wording.format(trained=trained, asked="write a poem about love and war")
    assert contains_and_adds(marks_of(text), marks_of(trained))
    assert not contains_and_adds(marks_of(trained), marks_of(text))
    assert not contains_and_adds(marks_of(f"Please tell me: {trained}"), marks_of(trained))
    assert not contains_and_adds(marks_of("Is the shop in Rome open, and is it worth seeing"), marks_of(trained))


@given(st.text(max_size=100), st.text(max_size=100))
def test_differing_is_mutual(a: str, b: str) -> None:
    assert differs(a, b) == differs(b, a)


@given(st.integers(-10_000_000, 10_000_000), st.integers(-10_000_000, 10_000_000))
def test_other_numbers_differ_and_equal_ones_do_not_however_they_are_grouped(a: int, b: int) -> None:
    text = "transfer {} from my account today"
    assert ("numbers" in differs(text.format(a), text.format(b))) == (a != b)
    assert differs(text.format(a), text.format(f"{a:,}")) == set()


@given(st.lists(st.integers(0, 99), min_size=2, max_size=6), st.randoms(use_true_random=False))
def test_numbers_in_another_order_are_other_numbers(numbers: list[int], random: object) -> None:
    text = " then ".join(map(str, numbers))
    assert ("numbers" in differs(text, " then ".join(map(str, sorted(numbers))))) == (numbers != sorted(numbers))


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("Don't send it", "Do not send it"),
        ("I cannot come", "I can not come"),
        ("I can’t come", "I can't come"),
        ("wait two days", "wait 2 days"),
        ("it costs 1,000 euros", "it costs 1000 euros"),
        ("add ３ and ٤", "add 3 and 4"),
        ("How do I enable dark mode?", "How can I activate dark mode?"),
        ("Please translate this sentence into French", "Could you translate this sentence to French"),
        ("What's the weather in Rome today?", "How is the weather today in Rome?"),
        ("Is the shop open today?", "Will the shop be open today?"),
        ("the teacher carries the books", "the farmer carries the chairs"),
        ("HOW DO I RESET IT", "how do i reset it"),
    ],
)
def test_what_means_the_same_does_not_differ(a: str, b: str) -> None:
    assert differs(a, b) == set()


@pytest.mark.parametrize(
    ("a", "b", "what"),
    [
        ("5 degrees", "-5 degrees", "numbers"),
        ("version 3.1", "version 3.11", "numbers"),
        ("it costs 1.000", "it costs 1000", "numbers"),  # a thousand or one: unclear, so it differs
        ("from open to closed", "from closed to open", "negation"),
        ("turn right here", "turn left here", "negation"),
        ("a useful tool", "a useless tool", "negation"),
        ("उसे चाय चाहिए", "उसे चाय नहीं चाहिए", "negation"),
        ("does Alice owe Bob", "does Bob owe Alice", "names"),
        ("what does open_file do", "what does close_file do", "names"),
        ("call getUser now", "call getName now", "names"),
        ('define the word "affect"', 'define the word "effect"', "names"),
    ],
)
def test_what_means_something_else_differs(a: str, b: str, what: str) -> None:
    assert what in differs(a, b)


def test_the_polarity_pairs_are_many_and_of_several_kinds_and_scripts() -> None:
    assert len(PAIRS) == len(set(PAIRS)) >= 200
    assert all(pair.trained != pair.asked for pair in PAIRS)
    assert {pair.kind for pair in PAIRS} == {"numbers", "names", "negation"}
    assert sum(not pair.asked.isascii() for pair in PAIRS) >= 40


def test_the_guard_finds_nearly_all_polarity_pairs_by_what_they_differ_in() -> None:
    """Not a measure of the world: pairs and word lists were written by the same people. What is missed is known."""
    missed = [pair for pair in PAIRS if pair.kind not in differs(pair.trained, pair.asked)]
    assert [pair.asked for pair in missed] == ["The patient denies chest pain"]
