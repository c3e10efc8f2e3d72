"""Which member of a mixture answers: weighted rendezvous hashing.

For each key every member draws a number u in (0, 1) that only its name and the key decide. -ln(u) / weight is
exponentially distributed with the weight as its rate, so the smallest is a member's with the probability weight / (sum
of weights). No member's number depends on the others: a new member takes keys from all others in proportion and moves
none between them, a member that leaves gives up only its own, and a new weight moves keys to or from that member only.

Sources: Thaler and Ravishankar, "Using Name-Based Mappings to Increase Hit Rates", 1998 (rendezvous hashing);
Schindelhauer and Schomaker, "Weighted Distributed Hash Tables", 2005 (weights through the logarithm).
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Sequence


class Mixture:
    """Members by number, each with a name and a weight.

    Args:
        identities: of the members' engines. What does not change an answer has no part in who gives it, so that a
            server may move to another URL.
        weights: of the members, each above 0. Only their ratios count.
    """

    def __init__(self, identities: Sequence[str], weights: Sequence[float]) -> None:
        self._members = list(zip(_names(identities), weights, strict=True))

    def choose(self, key: bytes) -> int:
        """Number of the member that answers what has this key."""
        return min(range(len(self._members)), key=lambda number: self._turn(number, key))

    def _turn(self, number: int, key: bytes) -> tuple[float, str]:
        """The smallest one answers; the name settles it where two are equal, so that no order matters."""
        name, weight = self._members[number]
        drawn = int.from_bytes(hashlib.blake2b(name.encode() + b"\0" + key, digest_size=8).digest()) >> 11
        return -math.log((drawn + 0.5) / 2**53) / weight, name


def _names(identities: Sequence[str]) -> list[str]:
    """Two members may be one model at two servers: they are told apart by their number among their like."""
    seen = Counter[str]()
    names = []
    for identity in identities:
        names.append(f"{identity}#{seen[identity]}")
        seen[identity] += 1
    return names
