"""A file of recorded pairs: read, measured (`replay`), and what came of it written beside it.

    FILE.csv: query, small_right, large_right [, small_answer] [, small_logprob]
        -> FILE-replay.json, FILE-replay.svg

`small_right` and `large_right` are 0, 1 or between (a judge's score); `small_logprob` is the mean log-probability of
the small model's answer, in nats per token. Other columns are not looked at. A row that cannot be read is an error and
not left out: whatever made it may have made others wrong too.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.csv

from distill_ray.config import RunConfig, parse_config
from distill_ray.errors import DataError
from distill_ray.nearby import neighbours
from distill_ray.pipeline.folder import RunFolder
from distill_ray.pipeline.planning.readers import separator_hint
from distill_ray.pipeline.progress import Progress
from distill_ray.serving.calibration.curve import recovered_svg
from distill_ray.serving.calibration.replay import NUM_SPLITS, Answers, Recorded, replay
from distill_ray.serving.calibration.vectors import embedded, is_short, vectors_of
from distill_ray.serving.routing.conversation import request_key
from distill_ray.serving.routing.embedder import Embedder, load_embedder

NEEDED = ("query", "small_right", "large_right")
OPTIONAL = ("small_answer", "small_logprob")
_TYPES = {
    "query": pa.string(),
    "small_right": pa.float64(),
    "large_right": pa.float64(),
    "small_answer": pa.string(),
    "small_logprob": pa.float64(),
}
WORDS = {"true": 1.0, "false": 0.0}  # what pandas writes for a truth value
LARGEST_ROW = 1 << 26  # bytes


@dataclass(frozen=True)
class Replayed:
    """What a replay came to."""

    figures: dict[str, Any]
    written: list[str]
    """Paths."""


def replay_file(path: Path, config: RunConfig) -> Replayed:
    """Measure routers on a file of recorded pairs; write the figures and their picture beside it.

    Args:
        path: the CSV file.
        config: `serve.embedder`, `serve.fingerprint` and `calibrate` have a part in it.

    Raises:
        DataError: the file cannot be read, or says nothing about routers.
    """
    table = read_recorded(path)
    embedder = load_embedder(config.serve.embedder.model_copy(update={"threads": os.cpu_count() or 1}))
    recorded, num_too_long = _embedded(table, config, embedder)
    with Progress("replay", total=NUM_SPLITS, unit="splits") as progress:
        try:
            found = replay(recorded, config.calibrate, progress.update)
        except DataError as error:
            too_long = f"; {num_too_long} rows left out: the embedder does not read so far" if num_too_long else ""
            raise DataError(f"{path}: {error}{too_long}") from error
    about = {"file": path.name, "rows_in_file": len(table), "too_long": num_too_long, "embedder": embedder.identity}
    figures = about | found
    folder = RunFolder(path.absolute().parent)
    names = [f"{path.stem}-replay.json", f"{path.stem}-replay.svg"]
    folder.write_json(figures, names[0])
    folder.write_bytes(recovered_svg(figures), names[1])
    return Replayed(figures, [str(path.parent / name) for name in names])


def default_config(overrides: Sequence[str]) -> RunConfig:
    """Where there is no run: all defaults, and what `--set` changes of `calibrate` and `serve`."""
    unused = {"recipe": {"context": {"text": "-"}}, "data": {"source": "-"}, "teacher": {"type": "fake"}}
    return parse_config(unused, where="--set", overrides=overrides)


# -- the file ----------------------------------------------------------------------------------------------------------


def read_recorded(path: Path) -> pa.Table:
    """The columns of a file, checked: query and small_answer as text, the others as float64; row by row as they come.

    Raises:
        DataError: no such file, no CSV, a column is missing, or a value is none.
    """
    table = _read(path)
    names = table.column_names
    missing = [name for name in NEEDED if name not in names]
    if missing:
        raise DataError(
            f"{path}: no column {', '.join(missing)}; it has {', '.join(names)}{separator_hint(names)}. Needed: "
            f"{', '.join(NEEDED)}; optional: {', '.join(OPTIONAL)}"
        )
    twice = [name for name in (*NEEDED, *OPTIONAL) if names.count(name) > 1]
    if twice:
        raise DataError(f"{path}: the column {twice[0]} is there twice; keep one of them")
    texts = {name: table[name].to_pylist() for name in (*NEEDED, *OPTIONAL) if name in names}
    columns: dict[str, Any] = {"query": _converted(path, "query", texts["query"], _query)}
    for name in ("small_right", "large_right"):
        columns[name] = _converted(path, name, texts[name], _rightness)
    if "small_answer" in texts:
        columns["small_answer"] = texts["small_answer"]
    if "small_logprob" in texts:
        columns["small_logprob"] = _converted(path, "small_logprob", texts["small_logprob"], _logprob)
    return pa.table(columns, schema=pa.schema([(name, _TYPES[name]) for name in columns]))


def _read(path: Path) -> pa.Table:
    as_text = dict.fromkeys((*NEEDED, *OPTIONAL), pa.string())
    try:
        return pyarrow.csv.read_csv(
            path,
            read_options=pyarrow.csv.ReadOptions(block_size=LARGEST_ROW),
            parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True),
            convert_options=pyarrow.csv.ConvertOptions(column_types=as_text, strings_can_be_null=False),
        )
    except FileNotFoundError as error:
        near = neighbours(fsspec.filesystem("file"), str(path.absolute()))
        raise DataError(f"{path}: no such file{near}") from error
    except OSError as error:
        raise DataError(f"{path}: cannot read it ({error.strerror or error}); give a CSV file") from error
    except pa.ArrowInvalid as error:
        why = " ".join(str(error).split())[:200]
        raise DataError(
            f"{path}: not a CSV file in UTF-8 with a line of column names ({why}); write it again, for example with "
            "pandas.DataFrame.to_csv(index=False)"
        ) from error


def _converted(path: Path, name: str, texts: Sequence[str], convert: Callable[[str], Any]) -> list[Any]:
    values: list[Any] = []
    for number, text in enumerate(texts, start=1):
        try:
            values.append(convert(text))
        except ValueError as error:
            raise DataError(f"{path}: row {number} (the line of names not counted): {name}: {error}") from error
    return values


def _query(text: str) -> str:
    if not text.strip():
        raise ValueError("empty; what was asked is needed")
    return text


def _rightness(text: str) -> float:
    value = WORDS.get(text.strip().lower(), _number(text))
    if not 0 <= value <= 1:  # a NaN is not
        raise ValueError(f"expected 0 (wrong), 1 (right) or a number between (got {text[:40]!r})")
    return value


def _logprob(text: str) -> float:
    value = _number(text)
    if not -math.inf < value <= 0:
        raise ValueError(f"expected a mean log-probability in nats, 0 at most (got {text[:40]!r})")
    return value


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


# -- as vectors --------------------------------------------------------------------------------------------------------


def _embedded(table: pa.Table, config: RunConfig, embedder: Embedder) -> tuple[Recorded, int]:
    """At most `calibrate.max_pairs` rows, drawn at random, and how many are longer than the embedder reads."""
    rows = np.random.default_rng(config.calibrate.seed).permutation(len(table))[: config.calibrate.max_pairs]
    table = table.take(np.sort(rows))
    ignore = config.serve.fingerprint.ignore
    asked = [{"messages": [{"role": "user", "content": text}]} for text in table["query"].to_pylist()]
    keys = [request_key(body, ignore) for body in asked]
    is_short_P = np.array([is_short(key, embedder) for key in keys], dtype=bool)
    table = table.filter(pa.array(is_short_P))
    answers = table["small_answer"].to_pylist() if "small_answer" in table.column_names else None
    recorded = Recorded(
        queries=vectors_of([key for key, is_kept in zip(keys, is_short_P, strict=True) if is_kept], embedder),
        small_P=table["small_right"].to_numpy(),
        large_P=table["large_right"].to_numpy(),
        answers=_answers(answers, embedder) if answers is not None else None,
        logprobs_P=table["small_logprob"].to_numpy() if "small_logprob" in table.column_names else None,
    )
    return recorded, int((~is_short_P).sum())


def _answers(texts: list[str], embedder: Embedder) -> Answers:
    """Equal answers are embedded once. What is empty or too long is like nothing."""
    distinct = [
        text for text in dict.fromkeys(texts) if text.strip() and embedder.count_tokens(text) <= embedder.max_tokens
    ]
    vectors_ND = np.vstack([embedded(distinct, embedder, "answers"), np.zeros((1, embedder.dim), dtype=np.float32)])
    row_of = {text: row for row, text in enumerate(distinct)}
    return Answers(texts, vectors_ND[[row_of.get(text, -1) for text in texts]])
