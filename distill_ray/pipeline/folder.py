"""The run folder: every path of a run, atomic writes, the manifest, the lock. Local disk or object store (fsspec).

    config.yaml  manifest.json  metrics.jsonl  report.html  report.md
    queries/                what the teacher wrote to ask itself (data.type: synthesize)
    rows/00000.parquet      planned input, one file a partition
    calls/00000.parquet     ledger of finished teacher calls (calls/00000/*.arrow while a partition is open)
    examples/00000.parquet  rejects/00000.parquet  done/00000.json
    train/                  tokens, rejects of the training stage
    checkpoints/  student/  eval/  bundle/  logs/

A file appears whole or not at all: written under a temporary name and renamed on a local disk, one PUT on a store.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import io
import json
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from distill_ray.errors import DistillError, RunFolderError, cannot_write, first_line
from distill_ray.object_store import reach
from distill_ray.pipeline.lock import Taken, take
from distill_ray.records import to_json

FOOTERS_AT_ONCE = 16
RUN_FORMATS = range(1, 2)  # of run folders that this version reads; it writes the last one


class RunFolder:
    """A run's files by relative name. Cheap to construct and picklable, so actors build their own from `root`.

    Args:
        root: a local folder or a URL (s3://bucket/prefix).
    """

    def __init__(self, root: str | Path) -> None:
        self.root = str(root)
        try:
            fs, path = reach(self.root)
        except (ImportError, ValueError) as error:
            raise RunFolderError(f"{self.root}: cannot use this place as a run folder ({error})") from error
        self.fs: Any = fs
        self._base = path.rstrip("/")
        self.is_local = "file" in (fs.protocol if isinstance(fs.protocol, tuple) else (fs.protocol,))
        if self.is_local:
            self.root = self._base = os.path.abspath(self._base)

    def __reduce__(self) -> tuple[type[RunFolder], tuple[str]]:
        return RunFolder, (self.root,)

    def path(self, *parts: str) -> str:
        """Full path (local) or key (store) of a file."""
        return "/".join([self._base, *parts])

    def url(self, *parts: str) -> str:
        """Like `path`, with the scheme of a store in front: for libraries that open URLs themselves."""
        return self.path(*parts) if self.is_local else self.fs.unstrip_protocol(self.path(*parts))

    def local(self, *parts: str) -> Path:
        """Path of a file for a library that only writes to local disks.

        Raises:
            RunFolderError: the run folder is on an object store.
        """
        if not self.is_local:
            raise RunFolderError(f"{self.root}: {'/'.join(parts)} needs a local run folder")
        return Path(self.path(*parts))

    # -- files ---------------------------------------------------------------------------------------------------

    def exists(self, *parts: str) -> bool:
        """Whether a file or folder is there (asked anew each time, never from a listing cache)."""
        with self._reaching():
            self.fs.invalidate_cache()
            return bool(self.fs.exists(self.path(*parts)))

    def list(self, *parts: str, suffix: str = "") -> list[str]:
        """Sorted names (not paths) of the files in a folder; temporary files are left out."""
        try:
            with self._reaching():
                self.fs.invalidate_cache()
                found = self.fs.ls(self.path(*parts), detail=False)
        except FileNotFoundError:
            return []
        names = [str(path).rstrip("/").rsplit("/", 1)[-1] for path in found]
        return sorted(name for name in names if name.endswith(suffix) and not name.startswith(".tmp-"))

    def read_bytes(self, *parts: str) -> bytes:
        """Whole content of a file. Raises FileNotFoundError."""
        with self._reaching():
            return self.fs.cat_file(self.path(*parts))

    def write_bytes(self, data: bytes | memoryview, *parts: str) -> None:
        """Write a file so that it is either whole or not there.

        Raises:
            RunFolderError: the disk is full or the folder is not writable.
        """
        target = self.path(*parts)
        if not self.is_local:
            with self._reaching():
                self.fs.pipe_file(target, bytes(data))
            return
        try:
            parent, _, name = target.rpartition("/")
            os.makedirs(parent, exist_ok=True)
            temporary = f"{parent}/.tmp-{secrets.token_hex(6)}-{name}"
            try:
                with open(temporary, "wb") as file:
                    file.write(data)
                os.replace(temporary, target)
            except OSError:
                with contextlib.suppress(OSError):
                    os.unlink(temporary)
                raise
        except OSError as error:
            raise cannot_write(target, error) from error

    def delete(self, *parts: str) -> None:
        """Delete a file or folder; one that is not there is fine."""
        with contextlib.suppress(FileNotFoundError), self._reaching():
            self.fs.invalidate_cache()
            self.fs.rm(self.path(*parts), recursive=True)

    def remove(self, *parts: str) -> None:
        """Delete a file, with one request; one that is not there is fine."""
        with contextlib.suppress(FileNotFoundError), self._reaching():
            self.fs.rm_file(self.path(*parts))

    def put(self, source: Path, *parts: str) -> None:
        """Copy the files of a folder on this disk here, one by one. Raises as `write_bytes`."""
        files = [path.relative_to(source).as_posix() for path in sorted(source.rglob("*")) if path.is_file()]
        if files:
            with self._reaching():
                self.fs.put([str(source / file) for file in files], [self.path(*parts, file) for file in files])

    @contextlib.contextmanager
    def _reaching(self) -> Iterator[None]:
        """What a disk or a store's client raises as an error of ours, but for a file that is not there."""
        try:
            yield
        except (FileNotFoundError, DistillError):
            raise
        except Exception as error:  # each store's client has exceptions of its own
            if self.is_local and not isinstance(error, OSError):
                raise
            raise RunFolderError(
                f"{self.root}: cannot use this run folder: {first_line(error)}. What was finished there is kept: the "
                "same command goes on"
            ) from error

    def read_json(self, *parts: str) -> dict[str, Any]:
        """Read a JSON object. Raises FileNotFoundError; RunFolderError if it is none."""
        return self._json_object(self.read_bytes(*parts), *parts)

    def read_jsons(self, *parts: str, names: Sequence[str]) -> dict[str, dict[str, Any]]:
        """JSON objects of a folder by name; on a store many are asked for at once. Raises like `read_json`."""
        paths = {self.path(*parts, name): name for name in names}
        with self._reaching():
            read: dict[str, bytes] = self.fs.cat(list(paths)) if paths else {}
        return {paths[path]: self._json_object(data, *parts, paths[path]) for path, data in read.items()}

    def _json_object(self, data: bytes, *parts: str) -> dict[str, Any]:
        try:
            value = json.loads(data)
        except ValueError as error:
            raise RunFolderError(f"{self.path(*parts)}: not valid JSON ({error}); delete it and run again") from error
        if not isinstance(value, dict):
            raise RunFolderError(f"{self.path(*parts)}: damaged (not a JSON object); delete it and run again")
        return value

    def write_json(self, value: Any, *parts: str) -> None:
        """Write JSON, indented for people."""
        self.write_bytes((json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n").encode(), *parts)

    def read_table(self, *parts: str, columns: list[str] | None = None) -> pa.Table:
        """Read one Parquet file. Raises FileNotFoundError; RunFolderError if it is damaged or lacks a column."""
        data = pa.BufferReader(self.read_bytes(*parts))
        try:
            if missing := sorted({*(columns or [])} - {*pq.read_schema(data).names}):
                raise pa.ArrowInvalid(f"no column {', '.join(missing)}, as if another version of distill-ray wrote it")
            return pq.read_table(data, columns=columns)
        except (pa.ArrowInvalid, OSError) as error:
            raise self.damaged(error, *parts) from error

    def damaged(self, error: Exception, *parts: str) -> RunFolderError:
        """What to tell of a file that cannot be read as what it is."""
        why = first_line(error)
        again = " (its calls are then made again)" if parts[0] == "calls" else ""
        return RunFolderError(
            f"{self.path(*parts)}: damaged ({why}); delete it and run the command that wrote it again{again}"
        )

    def write_table(self, table: pa.Table, *parts: str) -> None:
        """Write one Parquet file (zstd), whole or not at all."""
        buffer = io.BytesIO()
        # A dictionary of values that hardly ever repeat is wasted; byte by byte, log-probabilities take half the room.
        leaves = [leaf for field in table.schema for leaf in _leaves(field.name, field.type)]
        floats = [path for path, kind in leaves if ".list" in path and pa.types.is_floating(kind)]
        others = [path for path, _ in leaves if path not in floats]
        encodings: dict[str, Any] = {"use_dictionary": others, "use_byte_stream_split": floats}
        pq.write_table(table, buffer, compression="zstd", **encodings)
        self.write_bytes(buffer.getbuffer(), *parts)

    def read_tables(self, name: str, columns: list[str] | None = None) -> Iterator[pa.Table]:
        """The Parquet files of a folder (`examples`, `rejects`, ...) one after the other, in partition order."""
        for file in self.list(name, suffix=".parquet"):
            yield self.read_table(name, file, columns=columns)

    def num_rows(self, name: str) -> int:
        """Rows of all the Parquet files of a folder, by their footers: little is read. Raises as `read_table`."""
        with ThreadPoolExecutor(FOOTERS_AT_ONCE) as pool:
            return sum(pool.map(lambda file: self._num_rows(name, file), self.list(name, suffix=".parquet")))

    def _num_rows(self, *parts: str) -> int:
        with self._reaching(), self.fs.open(self.path(*parts), "rb") as file:
            try:
                return pq.read_metadata(file).num_rows
            except pa.ArrowInvalid as error:
                raise self.damaged(error, *parts) from error

    # -- manifest and metrics ------------------------------------------------------------------------------------

    def manifest(self) -> dict[str, Any]:
        """`manifest.json`, or {} in a new folder.

        Raises:
            RunFolderError: it is damaged, or the folder of a version whose folders this one cannot read.
        """
        manifest = self.read_json("manifest.json") if self.exists("manifest.json") else {}
        format = manifest.get("format", 1)  # before it was noted
        if format not in RUN_FORMATS:
            is_newer = isinstance(format, int) and format > RUN_FORMATS[-1]
            by, way = ("a newer", "upgrade") if is_newer else ("another", "go on with that version")
            reads = ", ".join(map(str, RUN_FORMATS))
            raise RunFolderError(
                f"{self.root}: was written by {by} distill-ray (format {format}; this one reads {reads}): {way}, or "
                "take another --run-dir"
            )
        return manifest

    def update_manifest(self, changes: Mapping[str, Any]) -> None:
        """Merge into `manifest.json`, section by section. Only the driver writes it."""
        self.write_json(_merge(self.manifest(), changes), "manifest.json")

    def append_metrics(self, *records: Mapping[str, Any]) -> None:
        """Append lines to `metrics.jsonl` (on a store: rewrites the file, so many at a time and rarely).

        Raises as `write_bytes`; then none of these lines is there.
        """
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        lines = "".join(to_json({"time": now, **record}) + "\n" for record in records)
        if self.is_local:
            try:
                os.makedirs(self._base, exist_ok=True)
                _append(self.path("metrics.jsonl"), lines.encode())
            except OSError as error:
                raise cannot_write(self.path("metrics.jsonl"), error) from error
            return
        before = self.read_bytes("metrics.jsonl") if self.exists("metrics.jsonl") else b""
        self.write_bytes(before + lines.encode(), "metrics.jsonl")

    # -- one run at a time ---------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder for this process; the kernel lets go of the lock when the process ends, however it ends.

        Raises:
            RunFolderError: another process works on it (local folders; a store has no such lock).
        """
        if not self.is_local:
            yield
            return
        try:
            file = take(self.path(".lock"))
        except Taken as error:
            raise RunFolderError(
                f"{self.root}: another run is at work here ({error}); wait for it, end it, or take another --run-dir"
            ) from error
        except OSError as error:
            why = "it is a file" if os.path.isfile(self._base) else error.strerror
            raise RunFolderError(
                f"{self.root}: cannot use this run folder ({why}); give one that you may write to, with room in it"
            ) from error
        with file:
            yield


def in_jobs_copy(folder: str) -> bool:
    """Whether a local folder is in what `ray job submit` has copied to the cluster, and goes with the job."""
    return "/runtime_resources/working_dir_files/" in f"{folder}/"


def partition_name(index: int) -> str:
    """File stem of a partition: `00000`, so that names sort as numbers."""
    return f"{index:05d}"


def _append(path: str, data: bytes) -> None:
    """All of it or nothing: a full disk takes a part, to which the next line would be joined."""
    with open(path, "ab", buffering=0) as file:
        before = file.tell()
        if (written := file.write(data)) != len(data):
            file.truncate(before)
            raise OSError(errno.ENOSPC, f"only {written} of {len(data)} bytes")


def _leaves(path: str, kind: pa.DataType) -> Iterator[tuple[str, pa.DataType]]:
    """The columns that Parquet makes of one of ours: path and type."""
    if pa.types.is_list(kind):
        yield from _leaves(f"{path}.list.element", kind.value_type)
    elif pa.types.is_struct(kind):
        for field in kind:
            yield from _leaves(f"{path}.{field.name}", field.type)
    else:
        yield path, kind


def _merge(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(old)
    for key, value in new.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merge(merged[key], value) if both else value
    return merged
