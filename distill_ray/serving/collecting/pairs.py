"""A pair: a request and the teacher's complete answer to it, kept for the next training.

    request + answer  ->  why_not_kept  ->  make_pair  ->  spool (a line each)  ->  store (PAIR_SCHEMA)

There is no column for who answered: `why_not_kept` refuses everything that is not a teacher's, so a student never
learns from students. (The conversation before the answer may well hold a student's earlier turns; they are what was
asked, not what is learnt.)
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np
import pyarrow as pa

from distill_ray.errors import RowError
from distill_ray.recipes.answers import with_plain_apostrophes
from distill_ray.recipes.patterns import any_matches
from distill_ray.records import with_arrays
from distill_ray.serving.collecting.answer import Answer

PAIR_SCHEMA_VERSION = 1

# Of a request's body, what shapes the answer. The rest is transport (stream), or says who asked (user, metadata).
OPTIONS = (
    "tools",
    "tool_choice",
    "parallel_tool_calls",
    "functions",
    "function_call",
    "response_format",
    "temperature",
    "top_p",
    "max_tokens",
    "max_completion_tokens",
    "stop",
    "seed",
    "frequency_penalty",
    "presence_penalty",
    "logit_bias",
    "reasoning_effort",
)
_COMPLETE = {"stop", "tool_calls"}  # finish reasons of an answer that came to its own end


class NotKept(StrEnum):
    """Why an answer is not kept. A closed set: metrics and tests rely on the codes."""

    NOT_TEACHER = "not_teacher"
    OPTED_OUT = "opted_out"
    ERROR = "error"
    UNFINISHED = "unfinished"
    CUT_OFF = "cut_off"
    FILTERED = "filtered"
    REFUSED = "refused"
    EMPTY = "empty"
    SEVERAL_ANSWERS = "several_answers"
    NOT_TEXT = "not_text"


@dataclass(frozen=True, slots=True)
class Pair:
    """One kept answer. `embedding` is [D] float32, unit norm; None where the embedder failed."""

    pair_id: str  # 32 hex digits; a pair is stored once, see `pair_id`
    messages: str  # JSON: the conversation as the client sent it, without the bundle's context
    request: str  # JSON: the OPTIONS of the request's body
    completion: str
    tool_calls: str | None  # JSON
    prompt_tokens: int | None  # None: the teacher did not say
    completion_tokens: int | None
    model: str  # the name that the teacher's server gave
    teacher: str  # identity of the engine, revision included
    owner: str  # of the key
    fingerprint: str
    bundle: str | None  # that was serving
    created: int  # ns since 1970, UTC
    embedder: str | None = None  # its identity
    embedding: np.ndarray | None = field(default=None, compare=False)


_TEXT = pa.string()
PAIR_SCHEMA = pa.schema(
    [
        ("pair_id", _TEXT),
        ("messages", _TEXT),
        ("request", _TEXT),
        ("completion", _TEXT),
        ("tool_calls", _TEXT),
        ("prompt_tokens", pa.int32()),
        ("completion_tokens", pa.int32()),
        ("model", _TEXT),
        ("teacher", _TEXT),
        ("owner", _TEXT),
        ("fingerprint", _TEXT),
        ("bundle", _TEXT),
        ("created", pa.int64()),
        ("embedder", _TEXT),
        ("embedding", pa.list_(pa.float32())),
        ("batch", pa.int64()),  # with which it was stored: 1, 2, ... (`PairStore.snapshot`)
        ("indexed", pa.bool_()),
        ("indexed_by", _TEXT),  # the bundle that was first to be trained on it
    ],
    metadata={"distill_ray.pairs": str(PAIR_SCHEMA_VERSION)},
)


def opted_out(collect_header: str | None) -> bool:
    """Whether a client asked with `x-distill-collect` that nobody learns from its request."""
    return collect_header is not None and collect_header.strip().lower() in ("no", "off", "false", "0")


def why_not_kept(
    body: Mapping[str, Any],
    answer: Answer,
    *,
    route: str,
    collect_header: str | None = None,
    refusals: Sequence[str] = (),
) -> NotKept | None:
    """Why this answer may not be learnt from; None if it may.

    Of a request with `n` > 1 nothing is kept: one request would count n times, and what its client throws away is
    not known to be good.

    Args:
        body: the request.
        answer: to it.
        route: who answered; only "teacher" is kept.
        collect_header: value of `x-distill-collect`.
        refusals: patterns, `serve.collect.refusals`. One that takes too long on an answer counts as found.
    """
    if route != "teacher":
        return NotKept.NOT_TEACHER
    if opted_out(collect_header):
        return NotKept.OPTED_OUT
    if answer.is_error:
        return NotKept.ERROR
    if answer.num_choices > 1 or (body.get("n") or 1) != 1:
        return NotKept.SEVERAL_ANSWERS
    if answer.finish_reason == "length":
        return NotKept.CUT_OFF
    if answer.finish_reason == "content_filter":
        return NotKept.FILTERED
    if answer.finish_reason not in _COMPLETE:
        return NotKept.UNFINISHED
    if answer.refusal or _is_refusal(answer.text, refusals):
        return NotKept.REFUSED
    if not answer.text.strip() and not answer.tool_calls:
        return NotKept.EMPTY
    return None if _is_text(body, answer) else NotKept.NOT_TEXT


def _is_refusal(text: str, refusals: Sequence[str]) -> bool:
    try:
        return any_matches(refusals, with_plain_apostrophes(text))
    except RowError:
        return True


def _is_text(body: Mapping[str, Any], answer: Answer) -> bool:
    """Whether a student of text can learn it, and a file hold it: no images, no half of a surrogate pair."""
    for message in body.get("messages") or []:
        content = message.get("content")
        if isinstance(content, list) and any(not isinstance(p, dict) or p.get("type") != "text" for p in content):
            return False
    try:
        _json([body, answer.text, answer.tool_calls, answer.model]).encode()
    except UnicodeEncodeError:
        return False
    return True


def pair_id(
    messages: Sequence[Mapping[str, Any]],
    request: Mapping[str, Any],
    *,
    owner: str,
    teacher: str,
    idempotency_key: str | None = None,
) -> str:
    """32 hex digits that are the same for a request and its retry.

    With the client's own idempotency key that key decides. Without, the request does, and not the answer: a retry may
    be answered in other words, and should still count once. Another teacher's answer is another pair.
    """
    identity = ["key", owner, idempotency_key] if idempotency_key else ["request", owner, teacher, messages, request]
    return hashlib.blake2b(_json(identity, sort_keys=True).encode(), digest_size=16).hexdigest()


def make_pair(
    body: Mapping[str, Any],
    answer: Answer,
    *,
    messages: Sequence[Mapping[str, Any]],
    teacher: str,
    owner: str,
    fingerprint: str,
    bundle: str | None = None,
    idempotency_key: str | None = None,
    embedder: str | None = None,
    embedding: np.ndarray | None = None,
) -> Pair:
    """The pair of a request and an answer for which `why_not_kept` is None.

    Args:
        body: the request.
        answer: to it.
        messages: of the request, without the bundle's context.
        teacher: identity of the engine that answered.
        owner: of the key.
        fingerprint: of the request.
        bundle: version that was serving.
        idempotency_key: of the client, from the header `Idempotency-Key`.
        embedder: identity of what made the embedding.
        embedding: [D] float32.
    """
    request = {name: body[name] for name in OPTIONS if body.get(name) is not None}
    return Pair(
        pair_id=pair_id(messages, request, owner=owner, teacher=teacher, idempotency_key=idempotency_key),
        messages=_json(messages),
        request=_json(request),
        completion=answer.text,
        tool_calls=_json(answer.tool_calls) if answer.tool_calls else None,
        prompt_tokens=answer.prompt_tokens,
        completion_tokens=answer.completion_tokens,
        model=answer.model,
        teacher=teacher,
        owner=owner,
        fingerprint=fingerprint,
        bundle=bundle,
        created=time.time_ns(),
        embedder=embedder,
        embedding=None if embedding is None else np.asarray(embedding, dtype=np.float32),
    )


def pair_to_json(pair: Pair) -> str:
    """One line: the embedding is base64 of its little-endian floats, a quarter of what its digits would take."""
    values = {f.name: getattr(pair, f.name) for f in dataclasses.fields(pair)}
    if pair.embedding is not None:
        values["embedding"] = base64.b64encode(pair.embedding.astype("<f4").tobytes()).decode()
    return _json({"version": PAIR_SCHEMA_VERSION, **values})


def pair_from_json(text: str | bytes) -> Pair:
    """Inverse of `pair_to_json`. Raises ValueError: it is not a pair of this version."""
    values = json.loads(text)
    if not isinstance(values, dict) or values.pop("version", None) != PAIR_SCHEMA_VERSION:
        raise ValueError(f"not a pair of version {PAIR_SCHEMA_VERSION}")
    if values.get("embedding") is not None:
        values["embedding"] = np.frombuffer(base64.b64decode(values["embedding"]), dtype="<f4")
    try:
        return Pair(**values)
    except TypeError as error:
        raise ValueError(f"not a pair: {error}") from error


def pairs_table(pairs: Iterable[Pair], batch: int) -> pa.Table:
    """A `PAIR_SCHEMA` table of fresh pairs, in the order given."""
    pairs = list(pairs)
    names = [f.name for f in dataclasses.fields(Pair) if f.name != "embedding"]
    fresh = {"batch": batch, "indexed": False, "indexed_by": None}
    records = [{**{name: getattr(pair, name) for name in names}, **fresh} for pair in pairs]
    return with_arrays(
        pa.Table.from_pylist(records, schema=PAIR_SCHEMA), {"embedding": [pair.embedding for pair in pairs]}
    )


def _json(value: Any, *, sort_keys: bool = False) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), sort_keys=sort_keys)
