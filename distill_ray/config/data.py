"""`data:` where the queries come from and how they are split."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from distill_ray.config.base import Config

Source = str | list[str]
Format = Literal["auto", "jsonl", "json", "csv", "parquet", "lance"]


class DataConfig(Config):
    """Queries from files, globs or folders, local or on an object store (s3://; gs:// with gcsfs installed)."""

    source: Source
    """A file, glob or folder, or a list of them. Relative paths start at the config file's folder."""

    format: Format = "auto"
    """`auto` goes by the file's ending (.jsonl .ndjson .json .csv .parquet .lance, each also .gz where it is text)."""

    encoding: str = "utf-8"
    """Of text files. A file in another encoding is refused with the name of the file, never guessed."""

    id: str | None = None
    """Column with a unique id per row. Without it a row's id is a hash of its content."""

    holdout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1
    """Share of queries kept for `test`. Split by normalised query: a duplicate never sits on both sides."""

    validation_holdout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.05
    """Share of queries kept for `validation` (the best checkpoint is chosen on it)."""

    validation: Source | None = None
    """A source of its own for `validation`; then nothing of `source` is held out for it."""

    test: Source | None = None
    """A source of its own for `test`; then nothing of `source` is held out for it."""

    subsample: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Share of the rows to train on that is used; by a hash of the query, so a smaller share is part of a larger one.
    What is held out stays whole."""

    alongside: dict[str, Source] = {}
    """Columns from files of their own: JSON arrays or JSON lines, whose element i belongs to row i of `source`."""

    dedup: bool = False
    """Reject a query that occurred before (`duplicate`). Off: equal prompts share one call, each row its example."""

    @field_validator("source", "validation", "test")
    @classmethod
    def _names_something(cls, value: Source | None) -> Source | None:
        names = [value] if isinstance(value, str) else value
        if names is not None and (not names or not all(name.strip() for name in names)):
            raise ValueError("names no file; give a file, a glob or a folder")
        return value

    @field_validator("encoding")
    @classmethod
    def _is_of_text(cls, value: str) -> str:
        try:
            "".encode(value)
        except LookupError as error:
            raise ValueError(
                "not an encoding of text that Python knows (utf-8, latin-1, cp1252, utf-16, ...)"
            ) from error
        return value

    @model_validator(mode="after")
    def _leave_something_to_train_on(self) -> DataConfig:
        if self.holdout + self.validation_holdout >= 1.0:
            raise ValueError(
                f"holdout ({self.holdout}) and validation_holdout ({self.validation_holdout}) together leave "
                "nothing to train on; make their sum less than 1"
            )
        return self
