"""Prompts that every student has to answer rightly: read, held against answers, and refused with a reason."""

from __future__ import annotations

from pathlib import Path

import pytest

from distill_ray.errors import ConfigError
from distill_ray.flywheel.regressions import Regression, read_regressions


@pytest.mark.parametrize(
    ("expected", "right", "wrong", "breaks"),
    [
        ({"equals": "yes "}, " yes", "yes.", "equals 'yes '"),
        ({"contains": "cook"}, "ask the cook", "ask nobody", "contains 'cook'"),
        ({"lacks": "sorry"}, "here it is", "sorry, no", "lacks 'sorry'"),
        ({"matches": "(?i)^(yes|no)$"}, "No", "perhaps", "matches '(?i)^(yes|no)$'"),
        ({"contains": "a", "lacks": "b"}, "a", "ab", "lacks 'b'"),
    ],
)
def test_an_answer_is_right_or_breaks_something(expected: dict[str, str], right: str, wrong: str, breaks: str) -> None:
    prompt = Regression.model_validate({"text": "?", **expected})
    assert prompt.broken(right) is None
    assert prompt.broken(wrong) == breaks


def test_prompts_are_texts_or_conversations(tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text(
        '{"text": "who?", "equals": "me"}\n\n'
        '{"messages": [{"role": "system", "content": "be short"}, {"role": "user", "content": "why?"}], "lacks": "x"}\n'
    )
    first, second = read_regressions(str(file))
    assert first.turns == [{"role": "user", "content": "who?"}]
    assert (len(second.turns), second.shown) == (2, "why?")
    assert read_regressions(None) == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "who?"}', "say what the answer has to be like"),
        ('{"equals": "me"}', "give either `text` or `messages`"),
        ('{"text": "who?", "equal": "me"}', "equal: unknown key; there are: text, messages, equals"),
        ('{"text": "who?", "matches": "("}', "matches: not a regular expression"),
        ("[1]", "not a JSON object but a list"),
        ('"who?"', "not a JSON object but text"),
        ('{"text": "", "equals": "me"}', "text: empty"),
        ('{"text": "who?", "contains": ""}', "contains: empty; write what to look for"),
        ('{"text": "who?", "lacks": ""}', "lacks: empty; write what to look for"),
        ('{"messages": [], "lacks": "x"}', "messages: empty; give at least the user's turn"),
        ('{"messages": ["who?"], "lacks": "x"}', r"messages\.0: a turn is an object with role and content"),
        (
            '{"messages": [{"content": "who?"}], "lacks": "x"}',
            r"messages\.0\.role: missing; a turn has role and content",
        ),
        (
            '{"messages": [{"role": "usr", "content": "who?"}], "lacks": "x"}',
            r"messages\.0\.role: .*'user'.* \(got 'usr'\)",
        ),
        ('{"messages": [{"role": "user", "content": ""}], "lacks": "x"}', r"messages\.0\.content: empty"),
        (
            '{"messages": [{"role": "assistant", "content": "I"}], "lacks": "x"}',
            "messages: the last turn has to be the",
        ),
        ('{"text": ', "not a JSON object"),
    ],
)
def test_a_line_that_is_no_prompt_is_named(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text('{"text": "who?", "equals": "me"}\n' + line + "\n")
    with pytest.raises(ConfigError, match=rf"flywheel\.gate\.regressions: .*mine\.jsonl:2: .*{message}"):
        read_regressions(str(file))


def test_line_separators_in_a_text_and_a_byte_order_mark_are_no_ends_of_lines(tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_bytes(
        '\ufeff{"text": "one\u2028two\u0085three", "equals": "me"}\r\n{"text": "b", "lacks": "x"}'.encode()
    )
    assert [each.shown for each in read_regressions(str(file))] == ["one\u2028two\u0085three", "b"]


def test_a_file_that_is_missing_or_empty_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_regressions(str(tmp_path / "nowhere.jsonl"))
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ConfigError, match="no prompt in it"):
        read_regressions(str(tmp_path / "empty.jsonl"))
