"""The base of every config model: unknown keys are errors, values do not change after loading."""

from __future__ import annotations

import os
from types import NoneType
from typing import Annotated, Any, get_args
from urllib.parse import urlsplit

import regex
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    model_serializer,
    model_validator,
)


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

    @model_validator(mode="before")
    @classmethod
    def _a_section_with_nothing_in_it_is_left_out(cls, raw: Any) -> Any:
        """`train:` and no key under it, which YAML reads as null: the defaults. Where null means something it stays."""
        if not isinstance(raw, dict):
            return raw
        return {key: value for key, value in raw.items() if value is not None or not _is_section(cls, key)}


def _is_section(model: type[BaseModel], key: Any) -> bool:
    """Whether a key takes a section, and never null."""
    field = model.model_fields.get(key)
    kinds = (get_args(field.annotation) or (field.annotation,)) if field is not None else ()
    return NoneType not in kinds and any(isinstance(kind, type) and issubclass(kind, BaseModel) for kind in kinds)


class Range(Config):
    """How many of something: a number, or {min, max}."""

    min: Annotated[int, Field(ge=1)] = 1
    """At least."""

    max: Annotated[int, Field(ge=1)] = 1
    """At most."""

    @model_validator(mode="before")
    @classmethod
    def _a_number_is_both(cls, value: Any) -> Any:
        return {"min": value, "max": value} if isinstance(value, int) and not isinstance(value, bool) else value

    @model_validator(mode="after")
    def _ordered(self) -> Range:
        if self.min > self.max:
            raise ValueError(f"min ({self.min}) is above max ({self.max})")
        return self

    @model_serializer
    def _as_it_is_written(self) -> int | dict[str, int]:
        return self.max if self.min == self.max else {"min": self.min, "max": self.max}


def _not_empty(text: str) -> str:
    if not text:
        raise ValueError("empty; write what to look for, or leave the key out")
    return text


Marker = Annotated[str, AfterValidator(_not_empty)]
"""Text to look for in an answer."""


def _compiles(pattern: str) -> str:
    _not_empty(pattern)
    try:
        regex.compile(pattern)
    except regex.error as error:
        raise ValueError(f"not a regular expression: {error}") from error
    return pattern


Pattern = Annotated[str, AfterValidator(_compiles)]
"""A regular expression of the `regex` package."""


def _from_folder(path: str, info: ValidationInfo) -> str:
    if info.context is None or "://" in path or not path.strip():
        return path
    return str(info.context["folder"] / os.path.expanduser(path))


FilePath = Annotated[str, AfterValidator(_from_folder)]
"""A file or URL; a relative path starts at the config file's folder and comes back absolute."""


def _is_server_url(url: str) -> str:
    if not url.startswith(("http://", "https://")):
        raise ValueError("must start with http:// or https://")
    if urlsplit(url).username is not None or urlsplit(url).query:
        raise ValueError(
            "has a user name or a query in it; put the key in the environment variable that api_key_env names"
        )
    return url.rstrip("/")


ServerUrl = Annotated[str, AfterValidator(_is_server_url)]
"""Address of an OpenAI-compatible API, up to and including /v1. It may be shown and stored: no key is in it."""
