"""Regular expressions of the config, on text of a model: with a time limit.

A pattern like `(a+)+$` takes for ever on the wrong text, and Python's own `re` cannot be stopped and holds up every
other thread meanwhile, the one that writes the ledger too. The `regex` package can and does not.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import islice

import regex

from distill_ray.errors import RowError
from distill_ray.records import RejectReason

LIMIT_S = 2.0


def last_match(pattern: str, text: str) -> str | None:
    """The first group of the pattern's last match, or the whole match where it has no group; None without a match.

    Raises:
        RowError: it takes longer than LIMIT_S.
    """
    try:
        matches = deque(regex.finditer(pattern, text, timeout=LIMIT_S, concurrent=True), maxlen=1)
    except TimeoutError as error:
        raise _too_slow(pattern) from error
    if not matches:
        return None
    match = matches.pop()
    return match.group(1) if match.re.groups else match.group()


def count_matches(pattern: str, text: str, most: int) -> int:
    """Number of matches, counted up to `most`. Raises RowError: it takes longer than LIMIT_S."""
    try:
        return sum(1 for _ in islice(regex.finditer(pattern, text, timeout=LIMIT_S, concurrent=True), most))
    except TimeoutError as error:
        raise _too_slow(pattern) from error


def any_matches(patterns: Sequence[str], text: str) -> bool:
    """Whether one of the patterns is found in the text. Raises RowError: it takes longer than LIMIT_S."""
    for pattern in patterns:
        try:
            if regex.search(pattern, text, timeout=LIMIT_S, concurrent=True):
                return True
        except TimeoutError as error:
            raise _too_slow(pattern) from error
    return False


def _too_slow(pattern: str) -> RowError:
    return RowError(
        RejectReason.UNPARSABLE_ANSWER,
        f"the regular expression {pattern!r} takes more than {LIMIT_S:g} s on this answer; make it less ambiguous "
        "(nested + or * are the usual cause)",
    )
