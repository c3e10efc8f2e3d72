"""The plan of one row: id, query, split, partition, or why it is unusable. Knows no files.

Equal queries (normalised) meet in one partition, so that they share its ledger, and in one split, so that
nothing that is tested was trained on.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Mapping
from typing import Any

from distill_ray.config import RunConfig
from distill_ray.errors import RowError
from distill_ray.pipeline.planning.readers import SourceRow
from distill_ray.pipeline.planning.scratch import Scratch
from distill_ray.recipes.base import Recipe
from distill_ray.recipes.template import kind_of
from distill_ray.records import RejectReason, Split, to_json


def normalise(query: str) -> str:
    """The form in which two queries count as equal: NFKC, casefolded, white space collapsed and stripped."""
    return " ".join(unicodedata.normalize("NFKC", query).casefold().split())


class Planner:
    """Plans row by row into a scratch file.

    Args:
        config: data and reference.
        recipe: renders the query.
        scratch: keeps the records (JSON of `ROW_SCHEMA`'s columns), and what occurred before.
        num_partitions: P.
    """

    def __init__(self, config: RunConfig, recipe: Recipe, scratch: Scratch, num_partitions: int) -> None:
        self.data = config.data
        self.reference = config.evaluate.reference
        self.recipe = recipe
        self.scratch = scratch
        self.num_partitions = num_partitions
        self.num_rows = 0  # planned so far, bad ones included
        self.test_share = 0.0 if self.data.test is not None else self.data.holdout
        self.validation_share = 0.0 if self.data.validation is not None else self.data.validation_holdout

    def add(self, row: SourceRow, held_out: Split | None) -> None:
        """Plan one row. Held-out sources come first: a row to train on is checked against them."""
        self.num_rows += 1
        row_id, problem = self._identify(row)
        query, key = None, ""
        try:
            if row.error is not None:
                raise RowError(RejectReason.UNREADABLE_ROW, row.error)
            query = self.recipe.query(row.columns)
            key = normalise(query)
            if key and row.history:  # the same question in another conversation is another question
                key = normalise("\n".join([*(turn["content"] for turn in row.history), query]))
            if not key:
                raise RowError(RejectReason.EMPTY_QUERY, f"the query is empty ({query[:80]!r})")
            if problem is None:
                self._refuse_repeats(key, row.label, held_out)
        except RowError as error:
            problem = problem or error
        split = held_out or (self._split(key) if key else "train")
        if split == "train" and _hash64(key, "subsample") / 2**64 >= self.data.subsample:
            self.num_rows -= 1  # no row of this run
            return
        record = {
            "row_id": row_id,
            "split": split,
            "query": query,
            "history": row.history,
            "columns": row.json,
            "reference": reference_of(row.columns, self.reference),
            "source": row.label,
            "reject_reason": problem and str(problem.reason),
            "reject_detail": problem and problem.detail,
        }
        partition = _hash64(key or row.json, "partition") % self.num_partitions
        self.scratch.add(partition, row_id, json.dumps(record, ensure_ascii=False))

    def _identify(self, row: SourceRow) -> tuple[str, RowError | None]:
        """The row's unique id, and why the one that it was given will not do."""
        problem = None
        if self.data.id is not None and row.error is None:
            try:
                given = _text_id(row.columns, self.data.id)
            except RowError as error:
                problem = error
            else:
                row_id, first = self._unique(given, "#", row.label)
                if row_id == given:
                    return row_id, None
                detail = f"id {given!r} occurred before, at {first}; ids are unique over all sources"
                return row_id, RowError(RejectReason.DUPLICATE_ID, detail)
        content = json.dumps(row.columns, sort_keys=True, ensure_ascii=False, default=str)
        digest = hashlib.blake2b(content.encode(), digest_size=8).hexdigest()
        return self._unique(digest, "-", row.label)[0], problem

    def _unique(self, base: str, mark: str, label: str) -> tuple[str, str]:
        """`base`, or base-2, base-3, ... if it is taken; and where it occurred first."""
        number, first = self.scratch.saw("id", base, label)
        candidate = base
        while number > 1:
            candidate = f"{base}{mark}{number}"
            times, _ = self.scratch.saw("id", candidate, label)
            if times == 1:
                break
            number += 1
        return candidate, first

    def _refuse_repeats(self, key: str, label: str, held_out: Split | None) -> None:
        """Raise RowError for a query that is in a held-out source too, or (`data.dedup`) occurred before."""
        for source in ("test", "validation"):
            if source == held_out:
                break  # test comes before validation: what is in both is tested
            found = self.scratch.place(source, key) if getattr(self.data, source) is not None else None
            if found is not None:
                raise RowError(RejectReason.DUPLICATE, f"also in the {source} source, at {found}")
        if self.data.dedup:
            times, first = self.scratch.saw("query", key, label)
            if times > 1:
                raise RowError(RejectReason.DUPLICATE, f"same query as {first}")
        if held_out is not None:
            self.scratch.saw(held_out, key, label)

    def _split(self, key: str) -> Split:
        share = _hash64(key, "split") / 2**64
        if share < self.test_share:
            return "test"
        return "validation" if share < self.test_share + self.validation_share else "train"


def reference_of(columns: Mapping[str, Any], name: str | None) -> str | None:
    """The gold answer in the column `evaluate.reference` as text; None where there is none."""
    value = columns.get(name) if name is not None else None
    return value if value is None or isinstance(value, str) else to_json(value)


def _text_id(columns: dict[str, Any], column: str) -> str:
    """The id as text. Raises RowError."""
    if column not in columns:
        raise RowError(RejectReason.MISSING_COLUMN, f"no column `{column}` (data.id)")
    value = columns[column]
    if isinstance(value, bool) or not isinstance(value, str | int | float) or not str(value).strip():
        kind = "empty" if isinstance(value, str) else kind_of(value)
        raise RowError(RejectReason.NOT_TEXT, f"column `{column}` (data.id) is {kind}, expected text or a number")
    return str(value)


def _hash64(text: str, person: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8, person=person.encode()).digest(), "big")
