"""The base of every config model: unknown keys are errors, values do not change after loading."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

import regex
from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationInfo


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
    return str(info.context["folder"] / Path(path).expanduser())


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
