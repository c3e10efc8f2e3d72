"""Conversations that the teacher has answered stay with the teacher: half a conversation each serves nobody.

A conversation is known by what was said up to the last answer, so no session id is needed. Bounded, per router.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any


class Latch:
    """The last `size` conversations that ended with an answer of the teacher."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._known: OrderedDict[bytes, None] = OrderedDict()

    def remember(self, messages: Sequence[Mapping[str, Any]], answer: str) -> None:
        """The teacher answered these messages."""
        if not self._size:
            return
        key = _key([*messages, {"role": "assistant", "content": answer}])
        self._known[key] = None
        self._known.move_to_end(key)
        while len(self._known) > self._size:
            self._known.popitem(last=False)

    def holds(self, messages: Sequence[Mapping[str, Any]]) -> bool:
        """Whether these go on from an answer of the teacher's."""
        ends = [i for i, message in enumerate(messages) if message.get("role") == "assistant"]
        return bool(ends) and _key(messages[: ends[-1] + 1]) in self._known


def _key(messages: Sequence[Mapping[str, Any]]) -> bytes:
    turns = [(m.get("role"), _text(m.get("content")).strip()) for m in messages]
    return hashlib.blake2b(json.dumps(turns).encode(), digest_size=16).digest()


def _text(content: Any) -> str:
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content if isinstance(part, Mapping))
    return content or ""
