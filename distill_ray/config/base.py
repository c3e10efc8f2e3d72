"""The base of every config model: unknown keys are errors, values do not change after loading."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


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
