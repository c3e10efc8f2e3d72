"""Columns from files of their own: element i belongs to row i of the source.

So come the published rationales of Distilling Step-by-Step: a JSON array of texts per part of the data.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator
from typing import Any

from distill_ray.config import FilesDataConfig
from distill_ray.errors import DataError
from distill_ray.pipeline.planning.readers import SourceRow
from distill_ray.pipeline.planning.sources import SourceFile, resolve
from distill_ray.pipeline.planning.textfile import array_elements, lines
from distill_ray.records import to_json

_END = object()


def alongside_files(config: FilesDataConfig) -> dict[str, list[SourceFile]]:
    """The files of each column by the config key that names them."""
    return {
        f"data.alongside.{column}": resolve(source, key=f"data.alongside.{column}")
        for column, source in config.alongside.items()
    }


def with_alongside(rows: Iterator[SourceRow], config: FilesDataConfig, *, is_whole: bool) -> Iterator[SourceRow]:
    """Rows with the columns of `data.alongside`.

    Args:
        rows: of `data.source`.
        config: `data:`.
        is_whole: whether all rows will be read, so that what is left over is an error.

    Raises:
        DataError: a column has fewer elements than the source has rows, or more, or the rows have it already.
    """
    columns = {
        key: itertools.chain.from_iterable(_elements(file, config.encoding) for file in files)
        for key, files in alongside_files(config).items()
    }
    number = 0
    for number, row in enumerate(rows, start=1):
        values = {key: next(elements, _END) for key, elements in columns.items()}
        for key, value in values.items():
            if value is _END:
                raise DataError(
                    f"{key}: ends after {number - 1} elements and data.source goes on ({row.label}); element i belongs "
                    "to row i, so give as many files as there are parts of the data, in their order"
                )
        if row.error is not None:
            yield row
            continue
        for key in columns:
            if key.rpartition(".")[2] in row.columns:
                raise DataError(
                    f"{key}: {row.label} has a column `{key.rpartition('.')[2]}` already; give the one alongside "
                    "another name"
                )
        joined = {**row.columns, **{key.rpartition(".")[2]: value for key, value in values.items()}}
        yield dataclasses.replace(row, columns=joined, json=to_json(joined))
    for key, elements in columns.items() if is_whole else ():
        if next(elements, _END) is not _END:
            raise DataError(
                f"{key}: has more than {number} elements, and data.source has {number} rows; they do not match"
            )


def _elements(file: SourceFile, encoding: str) -> Iterator[Any]:
    """The elements of a JSON array, or the lines of a JSON lines file."""
    if file.format == "json":
        yield from array_elements(file, encoding)
        return
    if file.format != "jsonl":
        raise DataError(f"{file.url}: a file alongside is a JSON array or JSON lines, not {file.format}")
    for number, line in enumerate(lines(file, encoding), start=1):
        if line.strip():
            try:
                yield json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{file.url}: line {number} is not JSON ({error}); mend it") from error
