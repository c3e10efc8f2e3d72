"""What a recipe is: one async function over one row. No ray, torch or vllm here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from distill_ray.records import Answered, Completion, Example, Message, Reject, Row, Split


class Answerer(Protocol):
    """An engine in a role, as a recipe sees it: sampling, ledger and retries are behind it."""

    name: str
    """Model and revision, recorded on every example."""

    async def generate(self, messages: Sequence[Message], num_samples: int | None = None) -> list[Completion]:
        """Answer a conversation with the role's configured sampling, n samples or as many as asked for here."""
        ...

    async def score(self, messages: Sequence[Message], answer: str) -> Completion:
        """The log-probabilities of an answer that is already there, as if it had been said."""
        ...


class Scorer(Protocol):
    """A reward, as a recipe sees it: batching, actors and the judge's ledger are behind it."""

    async def score(self, item: Answered) -> float:
        """The reward of one answer, which may be no number. Raises RowError: there is none."""
        ...

    async def score_pair(self, before: Answered, after: Answered) -> tuple[float, float]:
        """The rewards of two answers to one question: by themselves, or held against each other."""
        ...


@dataclass(frozen=True, slots=True)
class Engines:
    """Who a recipe may ask, by role."""

    teacher: Answerer
    reward: Scorer | None = None


@runtime_checkable
class LessWhenHeldOut(Protocol):
    """A recipe whose held-out rows may lack columns that it learns from."""

    def columns_for(self, split: Split) -> Mapping[str, str]:
        """The `columns` that rows of a split need."""
        ...


class Recipe(Protocol):
    """One method of distillation.

    One that asks the teacher several times in a conversation may have `turns`, the names of the first answer and of
    each turn behind it, for `preview`.
    """

    @property
    def columns(self) -> Mapping[str, str]:
        """Columns of the data that it reads -> the config key that names them.

        A row without one of them is a `missing_column` reject. A recipe that reads less of rows that are only held
        out has a method `columns_for(split)` too, with the columns that rows of a split need.
        """
        ...

    def query(self, columns: Mapping[str, object]) -> str:
        """Render the row's query. Raises RowError: the row lacks a column, or its value is not text."""
        ...

    def teacher_messages(self, row: Row) -> list[Message]:
        """The conversation that the teacher is asked first: for `preview`, and to count what the context costs."""
        ...

    def student_messages(self, row: Row) -> list[Message]:
        """What the student sees, in training and in service."""
        ...

    @property
    def fingerprint(self) -> str:
        """Hash of all that decides its examples, the content of files included."""
        ...

    async def distill(self, row: Row, engines: Engines) -> list[Example] | Reject:
        """Ask the engines and turn their answers into examples. Raises RowError: a reject with its reason."""
        ...
