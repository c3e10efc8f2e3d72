"""Plan: the input is read once and written as `rows/NNNNN.parquet`, P partitions by hash of the query.

    sources -> readers -> planner -> scratch file on disk -> rows/00000.parquet ... rows/plan.json

- A bad row is data: it is in `rows/` with its reason, so rows in = rows planned, always.
- P is fixed when a run folder is first planned, so adding rows changes only the partitions that they fall
  into; each partition's `sha` says whether it did.
- One pass, bounded memory: what occurred before is looked up in a temporary SQLite file.
- Nothing is read again while neither the files nor the settings that matter here changed (a fingerprint in
  `plan.json`, which is written last).
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from distill_ray.config import FilesDataConfig, RunConfig
from distill_ray.config.data import Source
from distill_ray.errors import ConfigError, InputError, NoReadableRow, raise_all
from distill_ray.pipeline.folder import RunFolder, partition_name
from distill_ray.pipeline.planning.alongside import alongside_files, with_alongside
from distill_ray.pipeline.planning.layouts import with_layout
from distill_ray.pipeline.planning.planner import Planner
from distill_ray.pipeline.planning.readers import SourceRow, estimate_rows, read_rows, separator_hint
from distill_ray.pipeline.planning.scratch import Scratch
from distill_ray.pipeline.planning.sources import SourceFile, held_still, resolve
from distill_ray.plugins import Group, packages
from distill_ray.recipes.base import LessWhenHeldOut, Recipe
from distill_ray.records import ROW_SCHEMA, SCHEMA_VERSION, Split

WRITES_AT_ONCE = 16
MIN_PARTITIONS = 4
MAX_PARTITIONS_FOR_REPLICAS = 256
PARTITIONS_PER_REPLICA = 4  # so that the last ones to finish keep no engine waiting for long
MAX_FILES_ESTIMATED = 16  # of many, for the number of rows
HEAD_ROWS = 100  # in which a column must occur, else the config names one that does not exist


@dataclass(frozen=True, slots=True)
class PartitionInfo:
    """One file of `rows/`. `sha` is a hash of its rows (not of where they were read)."""

    index: int
    num_rows: int
    sha: str


@dataclass(frozen=True, slots=True)
class Plan:
    """What there is to do. `partitions[i].index == i`, with an empty file where a partition has no rows."""

    num_partitions: int
    rows_in: int
    partitions: list[PartitionInfo]


@dataclass(frozen=True, slots=True)
class _Source:
    key: str  # data.source | data.validation | data.test
    held_out: Split | None  # the split of all its rows; None: by hash
    files: list[SourceFile]


def plan_rows(
    config: RunConfig,
    recipe: Recipe,
    folder: RunFolder,
    limit: int | None = None,
    *,
    on_rows: Callable[[int], None] | None = None,
) -> Plan:
    """Read the input into `rows/`, unless that is done already.

    Args:
        config: data, query, reference.
        recipe: renders the query.
        folder: the run folder.
        limit: plan only the first so many rows of each source.
        on_rows: called now and then with the number of rows read so far.

    Raises:
        ConfigError: a column that no row has.
        DataError: a file that is bad as a whole, or changes while it is read.
        RunFolderError: the run folder cannot be written.
    """
    sources = _sources(config, folder)
    named = _named_files(config, sources)
    fingerprint = _fingerprint(config, recipe, named, limit)
    stored = folder.read_json("rows", "plan.json") if folder.exists("rows", "plan.json") else None
    if stored is not None and stored.get("fingerprint") == fingerprint:
        plan = _stored_plan(stored)
        if len(folder.list("rows", suffix=".parquet")) == plan.num_partitions:
            return plan
    # The first plan fixes it, whatever the limit: a try with ten rows must not decide the layout of millions.
    # Where plan.json is lost, the files say it: with another layout rows would be in two partitions.
    num_partitions = (stored or {}).get("num_partitions") or len(folder.list("rows", suffix=".parquet"))
    num_partitions = num_partitions or _num_partitions(config, sources)
    with Scratch.temporary(folder.local() if folder.is_local else None) as scratch:
        planner = Planner(config, recipe, scratch, num_partitions)
        with held_still([file for _, file in named]):
            for source, rows in zip(sources, _opened(sources, config, recipe, limit), strict=True):
                for row in rows:
                    planner.add(row, source.held_out)
                    if on_rows is not None and planner.num_rows % 1000 == 0:
                        on_rows(planner.num_rows)
        # From here until the end rows/ is a mixture, which no fingerprint may describe.
        folder.write_json({"fingerprint": None, "num_partitions": num_partitions}, "rows", "plan.json")
        partitions = list(_write_partitions(folder, scratch.rows_by_partition(num_partitions)))
    plan = Plan(num_partitions, planner.num_rows, partitions)
    folder.write_json({"fingerprint": fingerprint, **dataclasses.asdict(plan)}, "rows", "plan.json")
    return plan


def find_files(config: RunConfig) -> int:
    """How many files there are to read. Raises InputError: one that the config names is not there."""
    return sum(len(source.files) for source in _sources(config)) + sum(
        map(len, alongside_files(_files(config)).values())
    )


def _opened(sources: list[_Source], config: RunConfig, recipe: Recipe, limit: int | None) -> list[Iterator[SourceRow]]:
    """The rows of each source, once the first ones of all were looked at. Raises InputError: all that is wrong."""
    opened: list[Iterator[SourceRow]] = []
    wrong: list[InputError] = []
    for source in sources:
        try:
            opened.append(_rows_of(source, config, recipe, limit))
        except InputError as error:
            wrong.append(error)
    raise_all(wrong)
    return opened


def _sources(config: RunConfig, folder: RunFolder | None = None) -> list[_Source]:
    """Held-out sources first: their queries must not be trained on. Files of the run itself are none of them.

    Raises:
        InputError: all that is wrong.
    """
    data = config.data
    named: list[tuple[str, Split | None, Source | None]] = [
        ("data.test", "test", data.test),
        ("data.validation", "validation", data.validation),
        ("data.source", None, _files(config).source),
    ]
    found: list[_Source] = []
    wrong: list[InputError] = []
    for key, held_out, source in named:
        if source is None:
            continue
        try:
            files = resolve(source, format=data.format, key=key)
        except InputError as error:
            wrong.append(error)
            continue
        # A folder may hold the run by chance; where that leaves nothing, its own files are meant: the demo's input
        # lies there.
        own = folder.url("").rstrip("/") + "/" if folder is not None else None
        kept = [file for file in files if own is None or not file.url.startswith(own)]
        found.append(_Source(key, held_out, kept or files))
    raise_all(wrong)
    return found


def _files(config: RunConfig) -> FilesDataConfig:
    """`data:` as files. What the teacher writes itself is in files by now."""
    assert isinstance(config.data, FilesDataConfig)
    return config.data


def _rows_of(source: _Source, config: RunConfig, recipe: Recipe, limit: int | None) -> Iterator[SourceRow]:
    """The rows of a source, after a look at the first ones for the columns that the config names."""
    files = (read_rows(file, config.data.encoding) for file in source.files)
    rows = itertools.chain.from_iterable(files)
    if source.held_out is None and _files(config).alongside:
        rows = with_alongside(rows, _files(config), is_whole=limit is None)
    rows = with_layout(rows, config.data.layout, config.data.role)
    rows = itertools.islice(rows, limit)
    head = list(itertools.islice(rows, HEAD_ROWS))
    if not head:
        raise NoReadableRow(f"{source.key}: {source.files[0].url} has no rows; give a file with at least one")
    readable = [row for row in head if row.error is None]
    known = list(dict.fromkeys(name for row in readable for name in row.columns))
    needed = _needed_columns(source, config, recipe) if readable else {}
    unknown = {column: key for column, key in needed.items() if column not in known}
    if unknown:
        named = "; ".join(f"{key}: unknown column `{column}`" for column, key in unknown.items())
        hint = ""
        if source.files[0].format == "csv":
            hint = separator_hint(known) or " (does the CSV file lack a header line?)"
        if source.held_out is not None:
            hint += _hint_for_held_out(unknown, config)
        raise ConfigError(f"{named}; {source.key} has: {', '.join(known)}{hint}")
    return itertools.chain(head, rows)


def _hint_for_held_out(unknown: Mapping[str, str], config: RunConfig) -> str:
    """Why a source of its own for test or validation lacks columns that `data.source` has, and what to do."""
    if unknown.keys() & _files(config).alongside.keys():
        return ". data.alongside adds columns to data.source alone: put this one into the file itself"
    if any(key.startswith("recipe.chains.") for key in unknown.values()):
        return ". Its rows are compared with the chains, so they need the same columns as data.source"
    return ""


def _needed_columns(source: _Source, config: RunConfig, recipe: Recipe) -> dict[str, str]:
    """Columns that must be there -> the config key that says so."""
    columns = recipe.columns
    if source.held_out is not None and isinstance(recipe, LessWhenHeldOut):
        columns = recipe.columns_for(source.held_out)
    needed = dict(sorted(columns.items()))
    if config.data.id is not None:
        needed.setdefault(config.data.id, "data.id")
    is_tested = source.held_out == "test" or (source.held_out is None and config.data.test is None)
    if config.evaluate.reference is not None and is_tested:
        needed.setdefault(config.evaluate.reference, "evaluate.reference")
    return needed


def _num_partitions(config: RunConfig, sources: list[_Source]) -> int:
    files = [file for source in sources for file in source.files]
    sample = files[:: math.ceil(len(files) / MAX_FILES_ESTIMATED)]
    num_rows = sum(estimate_rows(file, config.data.encoding) for file in sample) * len(files) / len(sample)
    for_replicas = min(PARTITIONS_PER_REPLICA * config.teacher.replicas.max, MAX_PARTITIONS_FOR_REPLICAS)
    return max(MIN_PARTITIONS, for_replicas, math.ceil(num_rows / config.generate.rows_per_partition))


def _named_files(config: RunConfig, sources: list[_Source]) -> list[tuple[str, SourceFile]]:
    """All files that are read, each with the key that names it."""
    named = [(s.key, file) for s in sources for file in s.files]
    return named + [(key, file) for key, files in alongside_files(_files(config)).items() for file in files]


def _fingerprint(config: RunConfig, recipe: Recipe, named: list[tuple[str, SourceFile]], limit: int | None) -> str:
    """Hash of all that decides what `rows/` holds."""
    files = [[key, f.url, f.label, f.format, f.size, f.version] for key, f in named]
    state = {
        "schema": SCHEMA_VERSION,
        "files": files,
        "data": config.data.model_dump(mode="json"),
        "query": getattr(config.recipe, "query", None),
        "columns": sorted(recipe.columns),
        "reference": config.evaluate.reference,
        "limit": limit,
    }
    readers = packages((Group.READERS, file.format) for _, file in named)
    if readers or config.plugins:  # their code reads the rows, or renders the queries
        state["plugins"] = [readers, config.plugins, config.recipe.model_dump(mode="json")]
    return hashlib.blake2b(json.dumps(state, sort_keys=True).encode(), digest_size=16).hexdigest()


def _write_partitions(folder: RunFolder, records_of: Iterable[tuple[int, Sequence[str]]]) -> Iterator[PartitionInfo]:
    """In order; several at once, as a store answers each PUT slowly, and no more of them in memory than that."""
    with ThreadPoolExecutor(WRITES_AT_ONCE) as pool:
        waiting: deque[Future[PartitionInfo]] = deque()
        for index, records in records_of:
            waiting.append(pool.submit(_write_partition, folder, index, records))
            if len(waiting) == WRITES_AT_ONCE:
                yield waiting.popleft().result()
        for future in waiting:
            yield future.result()


def _write_partition(folder: RunFolder, index: int, texts: Sequence[str]) -> PartitionInfo:
    records = [json.loads(text) for text in texts]
    table = pa.Table.from_pylist(records, schema=ROW_SCHEMA)
    folder.write_table(table, "rows", f"{partition_name(index)}.parquet")
    sha = hashlib.blake2b(digest_size=16)
    for record in records:
        # Not where it was read: a line added above moves all line numbers and changes nothing.
        content = {name: value for name, value in record.items() if name not in ("source", "reject_detail")}
        sha.update(json.dumps(content, sort_keys=True, ensure_ascii=False).encode() + b"\n")
    return PartitionInfo(index, len(records), sha.hexdigest())


def _stored_plan(stored: dict[str, Any]) -> Plan:
    partitions = [PartitionInfo(**partition) for partition in stored["partitions"]]
    return Plan(stored["num_partitions"], stored["rows_in"], partitions)
