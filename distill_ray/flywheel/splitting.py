"""What is learnt and what is held out: by near-duplicate group, and for good.

| a group with ...                         | its new pairs                                           |
|------------------------------------------|---------------------------------------------------------|
| a request of the user's evaluation files | are not used at all (`near_evaluation`)                 |
| both of the next two                     | are not used either (`near_both`)                       |
| a pair held out by an earlier cycle      | are held out too                                        |
| a request that a student has learnt      | are learnt: nothing near it can show how good it is now |
| none of these                            | are drawn: held out, validation or train                |

Learnt is what a student was trained on, whether it is in the index of its bundle or not.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from distill_ray.errors import ConfigError, DataError, NoReadableRow
from distill_ray.flywheel.pool import share_of
from distill_ray.pipeline.planning.readers import SourceRow, read_rows
from distill_ray.pipeline.planning.sources import SourceFile, resolve
from distill_ray.recipes.template import kind_of
from distill_ray.serving.calibration.fitting import near_duplicate_groups

Record = dict[str, Any]


@dataclass(frozen=True)
class Splits:
    """Records with `split` and `group`, and the ids of those that are not used."""

    records: list[Record]
    near_evaluation: list[str]
    near_both: list[str]


def split_pairs(
    new: Sequence[Record],
    earlier: Sequence[Record],
    replayed: Sequence[Record],
    learnt: Sequence[str],
    evaluation: Sequence[str],
    *,
    holdout: float,
    validation: float,
    seed: int,
    cycle: int = 0,
) -> Splits:
    """Give every record its split.

    Args:
        new: of this cycle.
        earlier: held out by earlier cycles; they stay so (`earlier`).
        replayed: learnt before; learnt again (`replay`).
        learnt: texts of other requests that a student has learnt.
        evaluation: texts that nobody may learn.
        holdout: share of groups.
        validation: share of groups.
        seed: of the draw.
        cycle: its number: validation is drawn anew in each, so that every pair is learnt in the end.
    """
    texts = [each["text"] for each in (*new, *earlier, *replayed)] + [*learnt, *evaluation]
    groups = near_duplicate_groups(texts) if texts else np.zeros(0, np.int64)
    ends = np.cumsum([len(new), len(earlier), len(replayed), len(learnt)])
    of_new, of_earlier, of_replayed, of_learnt, of_evaluation = [part.tolist() for part in np.split(groups, ends)]
    sealed, known, forbidden = set(of_earlier), {*of_replayed, *of_learnt}, set(of_evaluation)
    members: dict[int, list[str]] = defaultdict(list)
    for record, group in zip(new, of_new, strict=True):
        members[group].append(record["pair_id"])

    def split(group: int) -> str:
        if group in sealed and group in known:
            return "near_both"
        if group in sealed:
            return "held_out"
        if group in known:
            return "train"
        first = min(members[group])
        if share_of(seed, first) < holdout:
            return "held_out"
        return "validation" if share_of(seed, cycle, first) < validation else "train"

    drawn = [
        {**record, "split": split(group), "group": group}
        for record, group in zip(new, of_new, strict=True)
        if group not in forbidden
    ]
    used = [record for record in drawn if record["split"] != "near_both"]
    used += [{**record, "split": "earlier", "group": g} for record, g in zip(earlier, of_earlier, strict=True)]
    used += [
        {**record, "split": "replay", "group": group}
        for record, group in zip(replayed, of_replayed, strict=True)
        if group not in forbidden
    ]
    dropped = [record["pair_id"] for record, group in zip(new, of_new, strict=True) if group in forbidden]
    return Splits(used, dropped, [record["pair_id"] for record in drawn if record["split"] == "near_both"])


def measured_on(records: Sequence[Record], most: int) -> list[Record]:
    """What candidates are measured on, of all records of a cycle: held out now or before; by id, `most` of them."""
    held_out = [record for record in records if record["split"] in ("held_out", "earlier")]
    return sorted(held_out, key=lambda record: record["pair_id"])[:most]


def evaluation_texts(files: Sequence[str], column: str) -> list[str]:
    """The requests of the user's own evaluation sets.

    Raises:
        ConfigError: a file has no such column, or no text there.
        DataError: a file cannot be read, or a line of it.
    """
    found: list[str] = []
    for file in resolve(list(files), key="flywheel.evaluation") if files else []:
        found += [_text(row, column, f"flywheel.evaluation: {file.url}") for row in _rows(file)]
    return found


def _rows(file: SourceFile) -> Iterator[SourceRow]:
    """Of a file as a whole the reader's advice is about `data:`; here it is to be about this list."""
    try:
        yield from read_rows(file)
    except NoReadableRow as error:
        why = "no rows in this file; write some, or take it out of the list"
        raise DataError(f"flywheel.evaluation: {file.url}: {why}") from error
    except DataError as error:
        why = str(error).partition("; ")[0]
        raise DataError(f"flywheel.evaluation: {why}; write it again, or take it out of the list") from error


def _text(row: SourceRow, column: str, where: str) -> str:
    place = f"{where}:{row.label.rpartition(':')[2]}"
    if row.error is not None:
        raise DataError(f"{place}: {row.error}; mend it, or leave it out: every request of these files has to be known")
    if column not in row.columns:
        raise ConfigError(
            f"{place}: no column {column!r} (there are: {', '.join(row.columns)}); name the one with the request in "
            "flywheel.evaluation_column"
        )
    text = row.columns[column]
    if not isinstance(text, str):
        raise ConfigError(
            f"{place}: the column {column!r} has no text but {kind_of(text)}; write the request there, or name another "
            "column in flywheel.evaluation_column"
        )
    return text
