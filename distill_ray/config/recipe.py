"""`recipe:` what the teacher does with a row. One variant a method; fields of one method live on its variant."""

from __future__ import annotations

from typing import Annotated, Literal

import regex
from pydantic import Field, field_validator, model_validator

from distill_ray.config.base import Config


class ContextSource(Config):
    """The context that is distilled into the student. Exactly one of the fields."""

    text: str | None = None
    """The context itself."""

    file: str | None = None
    """A text file; a relative path starts at the config file's folder."""

    column: str | None = None
    """A column of the data: each row its own context."""

    @model_validator(mode="after")
    def _exactly_one(self) -> ContextSource:
        given = [name for name in ("text", "file", "column") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of text, file, column (got {given or 'none'})")
        return self


class FewShotExample(Config):
    """One worked example, shown to the teacher as a user turn and an assistant turn."""

    query: str
    answer: str


class ParseConfig(Config):
    """Which part of the answer the student learns. Exactly one of the fields; without `parse`, all of it."""

    regex: str | None = None
    """The last match's first group (or whole match, if the pattern has no group)."""

    json_field: str | None = None
    """A dotted path into the answer read as JSON (a ```json fence around it is accepted)."""

    after: str | None = None
    """What stands behind the last occurrence of this marker."""

    @field_validator("regex")
    @classmethod
    def _compiles(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                regex.compile(value)
            except regex.error as error:
                raise ValueError(f"not a regular expression: {error}") from error
        return value

    @model_validator(mode="after")
    def _exactly_one(self) -> ParseConfig:
        given = [name for name in ("regex", "json_field", "after") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of regex, json_field, after (got {given or 'none'})")
        return self


DEFAULT_REFUSALS = [
    r"^\s*(I'm|I am) sorry,? (but )?I (can't|cannot|can not|am unable to|won't)",
    r"^\s*(Sorry, )?I (can't|cannot|am unable to|'m unable to) (help|assist|comply|provide|do that|fulfill)",
    r"^\s*As an AI( language)? model,? I (can't|cannot|am unable to|do not)",
]


class ContextRecipeConfig(Config):
    """Context distillation: answer with a long context in view, learn to answer without it.

    Papers: Askell et al. 2021 (arXiv 2112.00861, section 2.3), Snell et al. 2022 (arXiv 2209.15189).
    """

    type: Literal["context"] = "context"

    context: ContextSource
    """The system prompt that only the teacher sees."""

    query: str = "{{ text }}"
    """Sandboxed Jinja over the row's columns: what both teacher and student are asked."""

    examples: list[FewShotExample] = []
    """Few-shot turns between the context and the query, for the teacher only."""

    student_context: str | None = None
    """A short system prompt that the student does keep. Default: none."""

    parse: ParseConfig | None = None
    """Keep only a part of the answer, so that the teacher may reason and the student learns only the result."""

    refusals: list[str] = DEFAULT_REFUSALS
    """Regular expressions; an answer in which one is found is a reject (`refused`). [] turns the check off."""

    @field_validator("refusals")
    @classmethod
    def _refusals_compile(cls, value: list[str]) -> list[str]:
        for pattern in value:
            try:
                regex.compile(pattern)
            except regex.error as error:
                raise ValueError(f"{pattern!r} is not a regular expression: {error}") from error
        return value


# One variant so far. A second one makes this a union with `Field(discriminator="type")`.
RecipeConfig = Annotated[ContextRecipeConfig, Field()]
