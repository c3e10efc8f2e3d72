"""Is a sample an answer at all? The checks that every recipe makes before it looks at what was said."""

from __future__ import annotations

from collections.abc import Sequence

from distill_ray.errors import RowError
from distill_ray.recipes.patterns import any_matches
from distill_ray.records import Completion, RejectReason

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
    # Models like to write a typographic apostrophe; the patterns have the plain one.
    if any_matches(refusals, text.replace("\u2019", "'")):
        raise RowError(RejectReason.REFUSED, show(text))
    if not text:
        raise RowError(RejectReason.EMPTY_ANSWER, f"no text (finish reason: {sample.finish_reason})")
    return text


def show(text: str) -> str:
    """The beginning of a text, quoted."""
    return repr(text if len(text) <= SHOWN_CHARS else text[: SHOWN_CHARS - 3] + "...")
