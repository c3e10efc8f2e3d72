"""Which collected pairs a student may learn from: rules, masks, duplicates, quotas. Every pair is kept or has a reason.

    pairs -> text? -> age, teacher, length, patterns -> masks -> exact duplicates -> near-duplicate clusters -> owners
        -> kept | dropped

Where several may stay, the newest do: an answer of last week is worth more than one of last year. What comes out does
not depend on the order of what goes in.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
import regex

from distill_ray.config.flywheel import CleanConfig
from distill_ray.errors import RowError
from distill_ray.recipes.patterns import any_matches
from distill_ray.serving.calibration.fitting import near_duplicate_groups
from distill_ray.serving.collecting.pairs import Pair
from distill_ray.serving.collecting.pairs_export import text_turns

NS_PER_DAY = 86_400 * 10**9

# What looks like one of these, in any script. They err to the careful side: a long number may be masked too.
_MASKS = {
    "email": regex.compile(r"(?<![\w.+-])[\w.+-]++@[\w-]++(?:\.[\w-]++)++"),
    "phone": regex.compile(
        r"(?<![\w.,])(?:\+|00)\d[\d ()./-]{6,}\d(?!\w)"
        r"|(?<![\w.,])\(?\d{2,5}\)?[ /-]\d{3,4}[ -]\d{3,5}(?!\w)"
    ),
    "key": regex.compile(
        r"(?<!\w)(?:sk|pk|rk|ghp|gho|ghs|glpat|xox[abps]|hf|dr|AKIA|AIza|eyJ)[-_]?[\w-]{16,}"
        r"|(?<![\w/-])(?=[\w-]*\d)(?=[\w-]*[A-Za-z])[\w-]{32,}(?!\w)"
    ),
}


class Dropped(StrEnum):
    """Why a pair is not learnt from. A closed set: reports and tests rely on the codes."""

    NO_ANSWER = "no_answer"
    TOOLS = "tools"
    NOT_TEXT = "not_text"
    TOO_OLD = "too_old"
    OTHER_TEACHER = "other_teacher"
    TOO_SHORT = "too_short"
    TOO_LONG = "too_long"
    PATTERN = "pattern"
    DUPLICATE = "duplicate"
    CLUSTER_QUOTA = "cluster_quota"
    OWNER_QUOTA = "owner_quota"
    NEAR_EVALUATION = "near_evaluation"
    NEAR_BOTH = "near_both"  # to something held out, and to something learnt


@dataclass(frozen=True)
class Cleaned:
    """What came of the pairs that went in; `kept` and `dropped` together are all of them.

    `clusters_K` is the near-duplicate cluster of each kept pair, [K] int64.
    """

    kept: list[Pair]
    clusters_K: np.ndarray
    dropped: list[tuple[str, Dropped]]
    masked: dict[str, int]

    @property
    def counts(self) -> dict[str, int]:
        """Number of dropped pairs by reason."""
        return dict(Counter(reason.value for _, reason in self.dropped))


def clean(pairs: Iterable[Pair], rules: CleanConfig) -> Cleaned:
    """Apply the rules. See the module docstring.

    Raises:
        RowError: a pattern takes too long on a pair.
    """
    dropped: list[tuple[str, Dropped]] = []
    masked: Counter[str] = Counter()
    kept: list[Pair] = []
    newest_first = sorted(pairs, key=_newest_first)
    newest = newest_first[0] if newest_first else None
    for pair in newest_first:
        assert newest is not None
        reason = _of_its_kind(pair) or _of_its_time(pair, newest, rules) or _against_the_rules(pair, rules)
        if reason is not None:
            dropped.append((pair.pair_id, reason))
        else:
            kept.append(masked_pair(pair, rules.mask, masked))
    kept = _most(kept, [asked(pair) + pair.fingerprint for pair in kept], 1, Dropped.DUPLICATE, dropped)
    kept = _most(kept, _clusters(kept), rules.per_cluster, Dropped.CLUSTER_QUOTA, dropped)
    kept = _without_a_master(kept, rules.owner_share, dropped)
    return Cleaned(kept, np.array(_clusters(kept), dtype=np.int64), dropped, dict(masked))


def asked(pair: Pair) -> str:
    """What the users of a conversation said, as text."""
    turns = [message for message in json.loads(pair.messages) if message.get("role") == "user"]
    return "\n".join(_text(turn.get("content")) for turn in turns)


# -- rules and masks ---------------------------------------------------------------------------------------------------


def _newest_first(pair: Pair) -> tuple[int, str]:
    return -pair.created, pair.pair_id


def _of_its_kind(pair: Pair) -> Dropped | None:
    """A student of text learns text from text."""
    if pair.tool_calls or json.loads(pair.request).get("tools"):
        return Dropped.TOOLS
    if not pair.completion.strip():
        return Dropped.NO_ANSWER
    return Dropped.NOT_TEXT if text_turns(json.loads(pair.messages)) is None or not asked(pair).strip() else None


def _of_its_time(pair: Pair, newest: Pair, rules: CleanConfig) -> Dropped | None:
    """Age is counted from the newest pair, not from a clock that may be wrong."""
    if rules.max_age_days is not None and newest.created - pair.created > rules.max_age_days * NS_PER_DAY:
        return Dropped.TOO_OLD
    return Dropped.OTHER_TEACHER if rules.same_teacher and pair.teacher != newest.teacher else None


def _against_the_rules(pair: Pair, rules: CleanConfig) -> Dropped | None:
    length = len(asked(pair)) + len(pair.completion)
    if len(pair.completion.strip()) < rules.min_chars:
        return Dropped.TOO_SHORT
    if length > rules.max_chars:
        return Dropped.TOO_LONG
    try:
        found = any_matches(rules.drop, asked(pair)) or any_matches(rules.drop, pair.completion)
    except RowError as error:
        raise RowError(error.reason, f"flywheel.clean.drop, pair {pair.pair_id}: {error.detail}") from error
    return Dropped.PATTERN if found else None


def masked_pair(pair: Pair, kinds: Sequence[str], counts: Counter[str]) -> Pair:
    """The pair with what looks like an address, a number or a key replaced. Adds to `counts`."""

    def mask(text: str) -> str:
        for kind in kinds:
            text, number = _MASKS[kind].subn(f"<{kind}>", text)
            counts[kind] += number
        return text

    messages = json.dumps(_in_texts(json.loads(pair.messages), mask), ensure_ascii=False)
    return dataclasses.replace(pair, messages=messages, completion=mask(pair.completion))


def _in_texts(messages: list[dict[str, Any]], change: Callable[[str], str]) -> list[dict[str, Any]]:
    """The conversation with its texts changed, and nothing else of it."""
    changed = []
    for message in messages:
        content = message.get("content")
        if isinstance(content, str):
            content = change(content)
        elif isinstance(content, list):
            content = [{**p, "text": change(p["text"])} if isinstance(p.get("text"), str) else p for p in content]
        changed.append({**message, "content": content} if "content" in message else message)
    return changed


def _text(content: Any) -> str:
    if isinstance(content, list):
        return "\n".join(part.get("text") or "" for part in content)
    return content or ""


# -- duplicates and quotas ---------------------------------------------------------------------------------------------


def _clusters(pairs: Sequence[Pair]) -> list[int]:
    return near_duplicate_groups([asked(pair) for pair in pairs]).tolist() if pairs else []


def _most(
    pairs: list[Pair], groups: Sequence[Any], most: int, reason: Dropped, dropped: list[tuple[str, Dropped]]
) -> list[Pair]:
    """The first so many of each group."""
    taken: Counter[Any] = Counter()
    kept = []
    for pair, group in zip(pairs, groups, strict=True):
        taken[group] += 1
        if taken[group] <= most:
            kept.append(pair)
        else:
            dropped.append((pair.pair_id, reason))
    return kept


def _without_a_master(pairs: list[Pair], share: float, dropped: list[tuple[str, Dropped]]) -> list[Pair]:
    """No owner has more than `share` of what stays. One who is alone has it all."""
    by_owner: dict[str, int] = defaultdict(int)
    for pair in pairs:
        by_owner[pair.owner] += 1
    if len(by_owner) < 2 or share >= 1.0:
        return pairs
    most = max(1, _cap(sorted(by_owner.values()), share))
    return _most(pairs, [pair.owner for pair in pairs], most, Dropped.OWNER_QUOTA, dropped)


def _cap(sizes: list[int], share: float) -> int:
    """The largest cap under which the largest owner has no more than `share` of all: min(size, cap) summed."""
    low, high = 0, sizes[-1]
    while low < high:
        cap = (low + high + 1) // 2
        if min(sizes[-1], cap) <= share * sum(min(size, cap) for size in sizes):
            low = cap
        else:
            high = cap - 1
    return low
