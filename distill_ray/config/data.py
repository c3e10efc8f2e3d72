"""`data:` where the queries come from and how they are split."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from distill_ray.config.base import Config
from distill_ray.plugins import Group, Name


class DatasetSource(Config):
    """A data set of Hugging Face's `datasets` library: by name where there is a network, or a folder on this disk."""

    dataset: str
    """Its name ("facebook/anli"), or a folder that `datasets` can load. Class labels come as their names."""

    config: str | None = None
    """Which of its configurations."""

    split: str = "train"
    """Which of its splits ("train_r1", "test[:500]")."""

    revision: str | None = None
    """Commit or tag."""


def _entry(value: object) -> str:
    return "<dataset>" if isinstance(value, dict | DatasetSource) else "<file>"


def _source(value: object) -> str:
    return "<list>" if isinstance(value, list) else _entry(value)


_File = Annotated[str, Tag("<file>")]
_Dataset = Annotated[DatasetSource, Tag("<dataset>")]
Entry = Annotated[_File | _Dataset, Discriminator(_entry)]
Source = Annotated[_File | _Dataset | Annotated[list[Entry], Tag("<list>")], Discriminator(_source)]
Files = str | list[str]
Format = Annotated[Literal["auto", "jsonl", "json", "csv", "parquet", "lance"] | str, Name(Group.READERS)]
Layout = Literal["columns", "messages", "alpaca", "sharegpt", "role_prompts"]


class _Rows(Config):
    """What is known of rows wherever they come from."""

    format: Format = "auto"
    """`auto` goes by the file's ending (.jsonl .ndjson .json .csv .parquet .lance, each also .gz where it is text)."""

    layout: Layout = "columns"
    """How a row says what is asked. columns: in columns of its own. messages, sharegpt: as a conversation; alpaca: as
    instruction, input, output; these give the columns `text` (what is asked last), `system` and `answer`, and turns
    before the last stay in front of it for teacher and student. role_prompts: a role's system prompt and tasks, each
    task a row with `text` and `system`."""

    role: str | None = None
    """With role_prompts: only this role."""

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

    dedup: bool = False
    """Reject a query that occurred before (`duplicate`). Off: equal prompts share one call, each row its example."""

    @field_validator("source", "validation", "test", check_fields=False)
    @classmethod
    def _names_something(cls, value: Source | None) -> Source | None:
        names = value if isinstance(value, list) else [value]
        if not names or any(isinstance(name, str) and not name.strip() for name in names):
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
    def _leave_something_to_train_on(self) -> Self:
        if self.holdout + self.validation_holdout >= 1.0:
            raise ValueError(
                f"holdout ({self.holdout}) and validation_holdout ({self.validation_holdout}) together leave "
                "nothing to train on; make their sum less than 1"
            )
        return self


class FilesDataConfig(_Rows):
    """Queries from files, globs or folders, local or on an object store (s3://; gs:// with gcsfs installed)."""

    type: Literal["files"] = "files"

    source: Source
    """A file, glob or folder, {dataset: NAME}, or a list of them. Relative paths start at the config file's folder."""

    alongside: dict[str, Files] = {}
    """Columns from files of their own: JSON arrays or JSON lines, whose element i belongs to row i of `source`."""

    @model_validator(mode="after")
    def _has_roles_for_a_role(self) -> FilesDataConfig:
        if self.role is not None and self.layout != "role_prompts":
            raise ValueError(f"role {self.role!r} chooses among role prompts; set `layout: role_prompts`, or leave it")
        return self


class SynthesizeDataConfig(_Rows):
    """The teacher writes the queries itself, as column `text`.

    After Self-Instruct (Wang et al. 2022, arXiv 2212.10560): what was written before is shown as examples, and what is
    nearly the same as something before is dropped.
    """

    type: Literal["synthesize"] = "synthesize"

    count: Annotated[int, Field(ge=1)]
    """Queries wanted."""

    topics: list[str] = []
    """What the queries are about, in turn. Or `role_prompts`."""

    role_prompts: str | None = None
    """A file of role prompts (role, system, task_type, task, contents, generation), asked as they are. With `role`: one
    of them."""

    prompt: str | None = None
    """Sandboxed Jinja in place of the built-in request, over `topic`, `number` (queries to ask for in this call:
    `per_call`, or 1 with `parse: whole`) and `examples` (a list of some seeds and queries written before)."""

    system: str | None = None
    """System prompt of the teacher while it writes queries."""

    seeds: list[str] = []
    """Queries to begin with: shown as examples, not used as rows."""

    seeds_file: str | None = None
    """A text file with a seed per line."""

    parse: Literal["lines", "whole"] = "lines"
    """lines: each line of an answer is a query (numbers and bullets are taken off). whole: an answer is one query."""

    per_call: Annotated[int, Field(ge=1)] = 10
    """Queries asked for in one call, with `parse: lines`."""

    shown: Annotated[int, Field(ge=0)] = 4
    """Examples shown in a call."""

    max_similarity: Annotated[float, Field(gt=0, le=1)] = 0.7
    """A query is dropped if it shares more than this with an earlier one (Jaccard, of runs of four characters)."""

    max_calls: Annotated[int, Field(ge=1)] | None = None
    """Calls made at most. Default: ten times what the count needs if no query were dropped. It ends before that when
    50 calls in a row give nothing new."""

    seed: int = 0
    """Which examples are shown, and the first call's sampling seed."""

    @model_validator(mode="after")
    def _says_what_to_write(self) -> SynthesizeDataConfig:
        given = [name for name in ("topics", "role_prompts", "prompt") if getattr(self, name)]
        if not given or (self.role_prompts is not None and len(given) > 1):
            raise ValueError("say what to write: `topics`, a `prompt` of your own, or `role_prompts` by itself")
        return self

    @model_validator(mode="after")
    def _has_roles_for_a_role(self) -> SynthesizeDataConfig:
        if self.role is not None and self.role_prompts is None:
            raise ValueError(f"role {self.role!r} chooses among role prompts; set `role_prompts: FILE`, or leave it")
        return self

    @property
    def calls_needed(self) -> int:
        """If no query were dropped."""
        return -(-self.count // (self.per_call if self.parse == "lines" else 1))


DataConfig = Annotated[FilesDataConfig | SynthesizeDataConfig, Field(discriminator="type")]
