"""The base of every config model: unknown keys are errors, values do not change after loading."""

from __future__ import annotations

from typing import Annotated

import regex
from pydantic import AfterValidator, BaseModel, ConfigDict


class Config(BaseModel):
    """A strict, frozen model. `Field(description=...)` under every field is its documentation."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        validate_default=True,
        allow_inf_nan=False,
        protected_namespaces=(),
        use_attribute_docstrings=True,
        hide_input_in_errors=True,  # a value may be a secret in the wrong place; `run._explain` decides what is shown
    )


def _compiles(pattern: str) -> str:
    try:
        regex.compile(pattern)
    except regex.error as error:
        raise ValueError(f"not a regular expression: {error}") from error
    return pattern


Pattern = Annotated[str, AfterValidator(_compiles)]
"""A regular expression of the `regex` package."""
