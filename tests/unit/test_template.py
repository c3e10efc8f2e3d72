"""Templates: which columns they read, what they print, what they refuse."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill_ray.errors import ConfigError, RowError
from distill_ray.recipes.template import TextTemplate, columns_of


@pytest.mark.parametrize(
    ("source", "columns"),
    [
        ("{{ text }}", {"text"}),
        ("{{ title }}: {{ body | trim }}", {"title", "body"}),
        ("{% for t in turns %}{{ t }}{% endfor %}", {"turns"}),
        ("{% set x = a %}{{ x }}", {"a"}),
        ("{% for i in range(3) %}{{ i }}{% endfor %}", set()),
        ("no columns", set()),
    ],
)
def test_columns_of_a_template_are_the_names_it_does_not_set_itself(source: str, columns: set[str]) -> None:
    assert columns_of(source) == columns
    assert TextTemplate(source, key="recipe.query").columns == columns


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ text", "recipe.query: not a valid template, line 1:"),
        ("first line\n{% if %}", "recipe.query: not a valid template, line 2:"),
        ("{{ text | no_such_filter }}", "no_such_filter"),
    ],
)
def test_a_template_that_does_not_compile_names_the_key_and_the_line(source: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        TextTemplate(source, key="recipe.query")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("source", "columns", "reason", "detail"),
    [
        ("{{ text }}", {"id": 1}, "missing_column", "`text`"),
        ("{{ text }} {{ more }}", {"text": "a"}, "missing_column", "`more`"),
        ("{{ text.x.y }}", {"text": {}}, "missing_column", "x"),
        ("{{ text }}", {"text": None}, "not_text", "`text` is null"),
        ("{{ text }}", {"text": 17}, "not_text", "`text` is a number (17)"),
        ("{{ text }}\n", {"text": True}, "not_text", "`text` is a boolean"),
        ("{{ text }}", {"text": ["a"]}, "not_text", "`text` is a list"),
        ("Q: {{ text }}", {"text": None}, "not_text", "null"),
        ("Q: {{ text }}", {"text": ["a"]}, "not_text", "a list"),
        ("Q: {{ text }}", {"text": {"a": 1}}, "not_text", "an object"),
        ("Q: {{ text + 1 }}", {"text": "a"}, "not_text", "does not render"),
    ],
)
def test_a_row_that_does_not_fit_the_template_is_a_row_error(
    source: str, columns: dict[str, object], reason: str, detail: str
) -> None:
    with pytest.raises(RowError) as error:
        TextTemplate(source, key="recipe.query").render(columns)
    assert error.value.reason == reason
    assert detail in error.value.detail


@pytest.mark.parametrize(
    ("source", "columns", "text"),
    [
        ("Q: {{ number }}", {"number": 3.5}, "Q: 3.5"),
        ("{{ turns | join(', ') }}", {"turns": ["a", "b"]}, "a, b"),
        ("{{ turns | tojson }}", {"turns": ["a"]}, '["a"]'),
        ("{{ title or 'untitled' }}: {{ text }}", {"title": None, "text": "x"}, "untitled: x"),
        ("{{ text }}", {"text": "<b>&amp;</b>"}, "<b>&amp;</b>"),
        ("{{ range }}", {"range": "a column may be called so"}, "a column may be called so"),
    ],
)
def test_values_are_printed_as_they_are(source: str, columns: dict[str, object], text: str) -> None:
    assert TextTemplate(source, key="recipe.query").render(columns) == text


def test_the_sandbox_keeps_templates_away_from_python() -> None:
    template = TextTemplate("{{ text.__class__.__mro__ }}", key="recipe.query")
    with pytest.raises(ConfigError, match=r"recipe\.query: not allowed in a template"):
        template.render({"text": "a"})


@given(st.text())
def test_braces_in_a_value_stay_text(value: str) -> None:
    tricky = value + "{{ 7 * 7 }}{% raw %}{# x #}" + value
    assert TextTemplate("{{ text }}", key="recipe.query").render({"text": tricky}) == tricky
