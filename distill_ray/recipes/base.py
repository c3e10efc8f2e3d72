"""What a recipe is: one async function over one row. No ray, torch or vllm here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from distill_ray.records import Completion, Example, Message, Reject, Row


class Answerer(Protocol):
    """An engine in a role, as a recipe sees it: sampling, ledger and retries are behind it."""

    name: str
    """Model and revision, recorded on every example."""

    async def generate(self, messages: Sequence[Message]) -> list[Completion]:
        """Answer a conversation with the role's configured sampling (n samples)."""
        ...


Engines = Mapping[str, Answerer]
"""Engines by role: `teacher`, later also `judge`."""


class Recipe(Protocol):
    """One method of distillation."""

    columns: frozenset[str]
    """Columns of the data that it reads; a row without one of them is a `missing_column` reject."""

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
        """Ask the engines and turn their answers into examples."""
        ...
