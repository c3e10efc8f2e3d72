"""Rows out of one file: JSON lines, a JSON array, CSV, Parquet, Lance, or a plugin's format. All of them stream.

A bad row is data: it comes as a SourceRow with `error` set and the raw text kept, and reading goes on. A file
that is bad as a whole (damaged, empty, another encoding) is a DataError that names it.
"""

from __future__ import annotations

import contextlib
import csv
import itertools
import json
import sys
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from distill_ray import plugins
from distill_ray.errors import DataError, NoReadableRow
from distill_ray.pipeline.planning.sources import TEXT_FORMATS, SourceFile, load_dataset
from distill_ray.pipeline.planning.textfile import array_elements, lines, objects, opened
from distill_ray.recipes.template import kind_of
from distill_ray.records import Message, to_json

BATCH_ROWS = 1024
ESTIMATE_ROWS = 1000
GZIP_RATIO = 4  # text shrinks about so much: only for an estimate


@dataclass(slots=True)
class SourceRow:
    """One row as it was read. With `error` it is unreadable, and `columns` is {"raw": text}."""

    label: str  # "queries.jsonl:17"
    columns: dict[str, Any]
    json: str  # the columns as JSON: what the run folder keeps
    error: str | None = None
    history: list[Message] = field(default_factory=list)  # turns before what is asked; set by `layouts`


def read_rows(file: SourceFile, encoding: str = "utf-8") -> Iterator[SourceRow]:
    """Yield the rows of a file in order.

    Args:
        file: from `sources.resolve`.
        encoding: of text files.

    Raises:
        DataError: the file is bad as a whole.
        NoReadableRow: at its end, if none of its rows was readable.
    """
    num_rows = num_readable = 0
    first_error = ""
    with _translated(file):
        for number, columns, error in _READERS.get(file.format, _read_with_plugin)(file, encoding):
            text, problem = _as_json(columns)
            if problem is not None:
                columns, error = {"raw": text}, problem
                text = to_json(columns)
            num_rows += 1
            num_readable += error is None
            first_error = first_error or error or ""
            yield SourceRow(f"{file.label}:{number}", columns, text, error)
    if num_rows and not num_readable:
        raise NoReadableRow(
            f"{file.url}: none of its {num_rows} rows is readable as {file.format} (first: {first_error}); "
            "check the file, or say what it is in data.format"
        )
    if not num_rows and file.format in TEXT_FORMATS:  # elsewhere a part without rows is ordinary
        raise NoReadableRow(f"{file.url}: no rows in this file; remove it from the source, or write it again")


def estimate_rows(file: SourceFile, encoding: str = "utf-8") -> int:
    """About how many rows a file has, from its metadata, else from its size and its first rows' length.

    Raises:
        DataError: the file is bad as a whole.
    """
    with _translated(file):
        if file.dataset is not None:
            return len(load_dataset(file.dataset))
        if file.format == "lance":
            return int(_lance_dataset(file).count_rows())
        if file.format == "parquet":
            with file.fs.open(file.path, "rb") as raw:
                return int(pq.ParquetFile(raw).metadata.num_rows)
    head = list(itertools.islice(read_rows(file, encoding), ESTIMATE_ROWS))
    if len(head) < ESTIMATE_ROWS:
        return len(head)
    mean_bytes = sum(len(row.json.encode()) for row in head) / len(head)
    return max(len(head), round(file.size * (GZIP_RATIO if file.is_compressed else 1) / mean_bytes))


# -- formats: each yields (line or row number, columns, why it is unreadable) -------------------------------

Item = tuple[int, dict[str, Any], str | None]


def _read_jsonl(file: SourceFile, encoding: str) -> Iterator[Item]:
    for number, line in enumerate(lines(file, encoding), start=1):
        text = line.strip()
        if not text:
            continue
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            yield number, {"raw": text}, f"line {number} is not JSON: {error}"
            continue
        if isinstance(value, dict):
            yield number, value, None
        else:
            yield number, {"raw": text}, f"line {number} is not a JSON object but {kind_of(value)}"


def _read_json(file: SourceFile, encoding: str) -> Iterator[Item]:
    """A JSON array, objects one after the other, or a file of JSON lines that is called .json."""
    first_line = next((line.strip() for line in lines(file, encoding) if line.strip()), "")
    if first_line != "{" and not first_line.startswith("["):
        yield from _read_jsonl(file, encoding)
        return
    elements = array_elements if first_line.startswith("[") else objects
    for number, value in enumerate(elements(file, encoding), start=1):
        if isinstance(value, dict):
            yield number, value, None
        else:
            yield number, {"raw": to_json(value)}, f"element {number} is not a JSON object but {kind_of(value)}"


def _read_csv(file: SourceFile, encoding: str) -> Iterator[Item]:
    csv.field_size_limit(sys.maxsize)  # the default refuses a field of more than 128 KiB
    source = _Lines(lines(file, encoding))
    header = _csv_header(file, csv.reader(source, strict=True))
    while True:
        source.consumed.clear()
        number = source.number + 1
        try:
            fields = next(csv.reader(source, strict=True))
        except StopIteration:
            return
        except csv.Error as error:
            why = f"line {number} is not CSV: {error}"
        else:
            if len(fields) == len(header):
                yield number, dict(zip(header, fields, strict=True)), None
                continue
            if not fields:
                continue
            why = f"line {number} has {len(fields)} fields, the header has {len(header)}{separator_hint(header)}"
        # A quote that is never closed runs on into the lines below, which are rows of their own.
        yield number, {"raw": source.consumed[0]}, why
        source.give_back(source.consumed[1:])


def separator_hint(names: Sequence[str]) -> str:
    """What to say of a CSV header that is one name with another separator in it; "" for any other."""
    found = [mark for mark in (";", "\t", "|") if len(names) == 1 and mark in names[0]]
    return f" (the file seems to separate its columns by {found[0]!r}: write it with commas)" if found else ""


class _Lines:
    """Lines that can be given back."""

    def __init__(self, lines: Iterator[str]) -> None:
        self._lines = lines
        self._again: deque[str] = deque()
        self.number = 0  # of the line that was read last
        self.consumed: list[str] = []  # raw lines of the row being read

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self._again.popleft() if self._again else next(self._lines)
        self.number += 1
        self.consumed.append(line)
        return line

    def give_back(self, lines: list[str]) -> None:
        """Read these again."""
        self._again.extendleft(reversed(lines))
        self.number -= len(lines)


def _csv_header(file: SourceFile, reader: Any) -> list[str]:
    try:
        header = next((fields for fields in reader if fields), [])
    except csv.Error as error:
        raise DataError(f"{file.url}: the first line is not a CSV header: {error}") from error
    names = [name.strip() or f"column_{index}" for index, name in enumerate(header, start=1)]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(
            f"{file.url}: the first line has {', '.join(map(repr, twice))} twice; it must name the columns, each once"
        )
    return names


def _read_parquet(file: SourceFile, encoding: str) -> Iterator[Item]:
    with file.fs.open(file.path, "rb") as raw:
        yield from _batch_rows(pq.ParquetFile(raw).iter_batches(batch_size=BATCH_ROWS))


def _read_lance(file: SourceFile, encoding: str) -> Iterator[Item]:
    yield from _batch_rows(_lance_dataset(file).to_batches(batch_size=BATCH_ROWS))


def _batch_rows(batches: Iterable[pa.RecordBatch]) -> Iterator[Item]:
    number = 0
    for batch in batches:
        try:
            records = batch.to_pylist()
        except UnicodeDecodeError:  # Arrow does not check text when it reads: find the rows that are to blame
            records = [_record_or_none(batch.slice(index, 1)) for index in range(batch.num_rows)]
        for record in records:
            number += 1
            if record is not None:
                yield number, record, None
            else:
                yield number, {"raw": ""}, f"row {number} has text that is not UTF-8"


def _record_or_none(row: pa.RecordBatch) -> dict[str, Any] | None:
    try:
        return row.to_pylist()[0]
    except UnicodeDecodeError:
        return None


def _read_dataset(file: SourceFile, encoding: str) -> Iterator[Item]:
    from datasets import ClassLabel

    assert file.dataset is not None
    dataset = load_dataset(file.dataset)
    names = {name: feature.names for name, feature in dataset.features.items() if isinstance(feature, ClassLabel)}
    number = 0
    for batch in dataset.iter(batch_size=BATCH_ROWS):
        for values in zip(*batch.values(), strict=True):
            number += 1
            record = dict(zip(batch, values, strict=True))
            for name, labels in names.items():  # -1 and None stand for "no label"
                label = record[name]
                record[name] = labels[label] if label is not None and label >= 0 else None
            yield number, record, None


def _lance_dataset(file: SourceFile) -> Any:
    import lance  # here, since it loads a large library that other formats do not need

    return lance.dataset(file.url)


def _read_with_plugin(file: SourceFile, encoding: str) -> Iterator[Item]:
    """The rows of a reader of another package (`distill_ray.plugins`), which gets the unpacked bytes."""
    read = plugins.load(plugins.Group.READERS, file.format)
    try:
        with opened(file) as raw:
            for number, row in enumerate(read(raw), start=1):
                if isinstance(row, dict):
                    yield number, row, None
                else:
                    yield number, {"raw": to_json(row)}, f"row {number} is not a dict but {kind_of(row)}"
    except Exception as error:  # whatever foreign code raises for a file that it cannot read
        reader = plugins.described(plugins.Group.READERS, file.format)
        raise DataError(f"{file.url}: {reader} cannot read it: {plugins.why(error)}") from error


_READERS: dict[str, Callable[[SourceFile, str], Iterator[Item]]] = {
    "jsonl": _read_jsonl,
    "json": _read_json,
    "csv": _read_csv,
    "parquet": _read_parquet,
    "lance": _read_lance,
    "dataset": _read_dataset,
}


def _as_json(columns: dict[str, Any]) -> tuple[str, str | None]:
    r"""The columns as JSON, and why that is impossible (then the text is only for people).

    JSON can spell half of a surrogate pair ("\ud800"), which is no text that a file can hold.
    """
    try:
        text = to_json(columns)
        text.encode()
    except UnicodeEncodeError:
        return ascii(columns), "holds half of a surrogate pair, which is not text"
    except (ValueError, TypeError, RecursionError) as error:
        return "", f"cannot be kept as JSON: {error}"
    return text, None


@contextlib.contextmanager
def _translated(file: SourceFile) -> Iterator[None]:
    """Turn what the libraries raise for a damaged file into a DataError, once."""
    try:
        yield
    except (pa.ArrowException, EOFError, zlib.error, OSError, ValueError) as error:
        why = " ".join(str(error).split())[:300]
        raise DataError(
            f"{file.url}: cannot be read as {file.format} ({why}); it may be cut off or of another format: "
            "write it again, or say what it is in data.format"
        ) from error
    except LookupError as error:
        raise DataError(f"{file.url}: {error}; data.encoding must name an encoding that Python knows") from error
