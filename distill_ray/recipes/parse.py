"""Cut the result out of a teacher's answer, so that it may reason and the student learns only the result."""

from __future__ import annotations

import json
import re
from typing import Any

from distill_ray.config import ParseConfig
from distill_ray.recipes.patterns import last_match

SKIPPED_WHERE_TOO_DEEP = 500  # characters

_DECODER = json.JSONDecoder()
_JSON_START = re.compile(r"[{\[]")


def parse_answer(text: str, config: ParseConfig) -> str | None:
    """Return the part of `text` that `config` describes, stripped; None if it is not there or is empty.

    Raises:
        RowError: the regular expression takes too long.
    """
    if config.regex is not None:
        found = last_match(config.regex, text)
    elif config.json_field is not None:
        found = _json_field(text, config.json_field.split("."))
    else:
        assert config.after, "exactly one is given, and no marker is empty"
        found = text.rpartition(config.after)[2] if config.after in text else None
    found = (found or "").strip()
    return found if found and _is_unicode(found) else None


def _json_field(text: str, path: list[str]) -> str | None:
    """The field, from the last JSON value in the text that has it: after reasoning, in a fence or not."""
    found = None
    position = 0
    while start := _JSON_START.search(text, position):
        position = start.start() + 1
        try:
            value, end = _DECODER.raw_decode(text, start.start())
        except ValueError:
            continue
        except RecursionError:  # a model stuck on "[[[[...": trying each bracket would take seconds
            position += SKIPPED_WHERE_TOO_DEEP
            continue
        field = _walk(value, path)
        if field is not None:
            found = field if isinstance(field, str) else json.dumps(field, ensure_ascii=False)
        position = end
    return found


def _walk(value: Any, path: list[str]) -> Any:
    for part in path:
        if isinstance(value, dict):
            value = value.get(part)
        elif isinstance(value, list) and re.fullmatch(r"-?[0-9]{1,9}", part):
            index = int(part)
            value = value[index] if -len(value) <= index < len(value) else None
        else:
            return None
    return value


def _is_unicode(text: str) -> bool:
    r"""False for half of a surrogate pair (JSON can spell "\ud800"), which no file can hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
