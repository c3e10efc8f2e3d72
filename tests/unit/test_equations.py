"""Equations come to numbers, and nothing that a model may say is ever run or ends the evaluation."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill_ray.pipeline.equations import equation_match, equation_value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("( 84.0 / 2.0 )", 42),
        ("42", 42),
        ("( ( 17.0 + 15.0 ) + 2.0 )", 34),
        ("-(3 - 5)", 2),
        ("1 / 3 * 3", 1),
        ("1,000 * 2", 2000),
        ("007 + 1", 8),
        ("2 ** 10", 1024),
        ("2^3", 8),
        ("6 × 7", 42),
        ("0.1 + 0.2", Fraction(3, 10)),
        ("(7 * 36).", 252),
    ],
)
def test_arithmetic_comes_to_its_value_exactly(text: str, value: Fraction | int) -> None:
    assert equation_value(text) == value


@pytest.mark.parametrize(
    "text",
    [
        "",
        "1 / 0",
        "( 1 +",
        "forty two",
        "9 ** 9 ** 9",
        "2 ** -10000",
        "2 ** 0.5",
        "(-8) ** 0.5",
        "__import__('os').system('true')",
        "(1).real",
        "1 if 2 else 3",
        "'a' * 10",
        "True",
        "1 < 2",
        "1j",
        "1e999999",
        "(" * 500 + "1" + ")" * 500,
        "1 + " * 5000 + "1",
        "\x00",
        "84 / 2 = 42",
        "nan",
    ],
)
def test_junk_is_no_number(text: str) -> None:
    assert equation_value(text) is None


def test_a_match_is_one_of_value_or_of_text() -> None:
    assert equation_match("( 84.0 / 2.0 )", "42") == 1.0
    assert equation_match("( 84.0 / 2.1 )", "42") == 0.0
    assert equation_match("1 / 0", "1 / 0") == 1.0
    assert equation_match("1 / 0", "2 / 0") == 0.0
    assert equation_match("junk", "other junk") == 0.0


@given(st.text(max_size=60))
def test_no_text_ends_it(text: str) -> None:
    assert equation_match(text, "42") in (0.0, 1.0)


OPERATIONS = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}


def combined(left: tuple[str, int], sign: str, right: tuple[str, int]) -> tuple[str, int]:
    return f"( {left[0]} {sign} {right[0]} )", OPERATIONS[sign](left[1], right[1])


@given(
    st.recursive(
        st.integers(-99, 99).map(lambda n: (str(n), n)),
        lambda inner: st.builds(combined, inner, st.sampled_from("+-*"), inner),
        max_leaves=12,
    )
)
def test_nested_equations_come_to_what_they_were_built_from(built: tuple[str, int]) -> None:
    text, value = built
    assert equation_value(text) == value
