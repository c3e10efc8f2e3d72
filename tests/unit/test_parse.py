"""Parsing answers: what is found, what is not, and that nothing a teacher says can raise."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill_ray.config import ParseConfig
from distill_ray.errors import RowError
from distill_ray.recipes import patterns
from distill_ray.recipes.parse import parse_answer

REGEX = ParseConfig(regex=r"Final Answer: (\w+)")
LABEL = ParseConfig(json_field="label")
AFTER = ParseConfig(after="</think>")


@pytest.mark.parametrize(
    ("config", "text", "expected"),
    [
        (REGEX, "Final Answer: en\nno wait. Final Answer: fr.", "fr"),
        (REGEX, "I do not know", None),
        (ParseConfig(regex=r"\d+"), "1, 2 and 3", "3"),
        (ParseConfig(regex=r"(a)|b"), "b", None),
        (ParseConfig(regex=r"x( *)"), "x   ", None),
        (LABEL, '{"label": "en"}', "en"),
        (LABEL, 'Thinking {a, b}...\n```json\n{"label": " en "}\n```\nDone.', "en"),
        (LABEL, '{"label": "first"} then {"label": "last"} and {"other": 1}', "last"),
        (LABEL, '{"label": null}', None),
        (LABEL, '{"label": ""}', None),
        (LABEL, '{"label": 3}', "3"),
        (LABEL, '{"label": true}', "true"),
        (LABEL, '{"label": ["a", "b"]}', '["a", "b"]'),
        (LABEL, '{"label": "en"', None),
        (LABEL, '{"label": "\\ud800"}', None),
        (ParseConfig(json_field="result.items.0.name"), '{"result": {"items": [{"name": "x"}]}}', "x"),
        (ParseConfig(json_field="items.-1"), '{"items": ["a", "b"]}', "b"),
        (ParseConfig(json_field="items.7"), '{"items": ["a", "b"]}', None),
        (ParseConfig(json_field="1"), '["a", "b"]', "b"),
        (AFTER, "<think>hm</think> a </think>\n the answer \n", "the answer"),
        (AFTER, "the answer", None),
        (AFTER, "<think>hm</think>  ", None),
    ],
)
def test_parse_finds_the_last_result_or_nothing(config: ParseConfig, text: str, expected: str | None) -> None:
    assert parse_answer(text, config) == expected


@pytest.mark.parametrize("text", ["[" * 5000, '{"a":' * 3000, "{" * 5000, "[1" + "0" * 5000 + "]"])
def test_deep_or_huge_json_does_not_raise(text: str) -> None:
    assert parse_answer(text, LABEL) is None


@given(
    st.text(),
    st.sampled_from([REGEX, LABEL, AFTER, ParseConfig(regex=r"(?s)(.*)"), ParseConfig(json_field="0.a")]),
)
def test_parse_never_raises_and_never_returns_blank_text(text: str, config: ParseConfig) -> None:
    found = parse_answer(text, config)
    assert found is None or (found and found == found.strip())


@given(st.text(alphabet='{}[]":,0123456789.-eE\\ud8label truefalsn \n', max_size=200))
def test_almost_json_never_raises(text: str) -> None:
    parse_answer(text, LABEL)


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), min_size=1).filter(lambda t: t.strip()))
def test_any_text_in_json_comes_back_stripped(value: str) -> None:
    import json

    assert parse_answer(f"So: {json.dumps({'label': value})}", LABEL) == value.strip()


def test_a_regular_expression_that_takes_for_ever_rejects_the_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "LIMIT_S", 0.1)
    with pytest.raises(RowError, match=r"takes more than 0.1 s") as caught:
        parse_answer("a" * 60 + "!", ParseConfig(regex="(a|aa)+$"))
    assert caught.value.reason == "unparsable_answer"
