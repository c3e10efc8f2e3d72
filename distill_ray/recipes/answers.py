"""From samples and columns to text that a recipe can use, or to the reason why there is none."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from distill_ray.errors import RowError
from distill_ray.recipes.patterns import any_matches
from distill_ray.recipes.template import kind_of
from distill_ray.records import Completion, Reject, RejectReason, Row

T = TypeVar("T")

SHOWN_CHARS = 200  # of an answer, in a reject's detail


def checked_text(sample: Completion, refusals: Sequence[str]) -> str:
    """The sample's text, stripped.

    Raises:
        RowError: cut off, given up, filtered, a refusal, or empty.
    """
    text = sample.text.strip()
    if sample.finish_reason == "length":
        raise RowError(RejectReason.CUT_OFF, f"cut off after {sample.completion_tokens} tokens: {show(text)}")
    if sample.finish_reason == "abort":
        raise RowError(RejectReason.ENGINE_ERROR, "the engine gave up on this request")
    if sample.finish_reason == "content_filter":
        raise RowError(RejectReason.REFUSED, f"stopped by the engine's content filter: {show(text)}")
    if any_matches(refusals, with_plain_apostrophes(text)):
        raise RowError(RejectReason.REFUSED, show(text))
    if not text:
        raise RowError(RejectReason.EMPTY_ANSWER, f"no text (finish reason: {sample.finish_reason})")
    return text


def with_plain_apostrophes(text: str) -> str:
    """For the patterns of refusals, which have the plain one: models like to write the typographic one."""
    return text.replace("\u2019", "'")


def good_ones(samples: Sequence[Completion], use: Callable[[Completion], T]) -> list[T]:
    """What `use` makes of each sample, without those that it refuses.

    Raises:
        RowError: it refuses all of them, with the first one's reason.
    """
    good: list[T] = []
    first: RowError | None = None
    for sample in samples:
        try:
            good.append(use(sample))
        except RowError as error:
            first = first or error
    if not good:
        raise first or RowError(RejectReason.EMPTY_ANSWER, "the teacher returned no sample")
    return good


def text_column(
    columns: Mapping[str, object], column: str, key: str, *, if_empty: RejectReason = RejectReason.EMPTY_ANSWER
) -> str:
    """The text in a column, as it is.

    Raises:
        RowError: it is not there, not text, or empty. `key` is the dotted config key that names it.
    """
    if column not in columns:
        raise RowError(RejectReason.MISSING_COLUMN, f"no column `{column}` ({key})")
    value = columns[column]
    if not isinstance(value, str):
        raise RowError(RejectReason.NOT_TEXT, f"column `{column}` ({key}) is {kind_of(value)}, expected text")
    if not value.strip():
        raise RowError(if_empty, f"column `{column}` ({key}) is empty")
    return value


def is_blank(value: object) -> bool:
    """Whether a column's value says nothing: not there, null, or only white space."""
    return value is None or (isinstance(value, str) and not value.strip())


def rejected(row: Row, error: RowError) -> Reject:
    """The reject of a row that cannot be used."""
    return Reject(row.row_id, "generate", RejectReason(error.reason), error.detail, row.columns)


def show(text: str) -> str:
    """The beginning of a text, quoted."""
    return repr(text if len(text) <= SHOWN_CHARS else text[: SHOWN_CHARS - 3] + "...")
