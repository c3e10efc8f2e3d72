"""Which files a source is: a file, glob or folder, or a list of them, local or on an object store (fsspec); or a data
set of the `datasets` library.

    resolve(config.source) -> [SourceFile, ...]     then `readers.read_rows` gives the rows of each

A folder means all data files below it, in the order of their names; hidden ones are left out. A folder whose
name ends in .lance is one data set.
"""

from __future__ import annotations

import contextlib
import functools
import os
import posixpath
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill_ray import plugins
from distill_ray.config.data import DatasetSource, Files, Format, Source
from distill_ray.errors import ConfigError, DataError, DistillError, InputError, first_line
from distill_ray.nearby import neighbours, some_names
from distill_ray.object_store import reach

FORMAT_BY_ENDING = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".parquet": "parquet",
    ".lance": "lance",
}
TEXT_FORMATS = frozenset({"jsonl", "json", "csv"})


@dataclass(frozen=True)
class SourceFile:
    """One file (or one data set) of a source.

    `label` is what people read in `row.source`; `size` is in bytes (0 for data sets); `version` changes with the
    content: the store's etag, else the modification time. With `dataset` there is no file: `datasets` has the rows.
    """

    fs: Any
    path: str
    label: str
    format: str
    size: int
    version: str
    dataset: DatasetSource | None = None

    @property
    def url(self) -> str:
        """Path or URL that a library can open by itself."""
        return self.path if self.fs is None or _is_local(self.fs) else self.fs.unstrip_protocol(self.path)

    @property
    def is_compressed(self) -> bool:
        """Whether it is gzip."""
        return self.path.endswith(".gz")


def resolve(source: Source | Files, *, format: Format = "auto", key: str = "data.source") -> list[SourceFile]:
    """Find the files of a source, each once, in a stable order.

    Args:
        source: file, glob or folder, or a list of them.
        format: what the files are, whatever their ending; `auto` goes by the ending.
        key: the dotted config key, for messages.

    Raises:
        DataError: nothing is there, or a file's ending is not known.
        ConfigError: the store's library is not installed.
    """
    found: dict[str, tuple[Any, str]] = {}
    datasets: list[SourceFile] = []
    for entry in source if isinstance(source, list) else [source]:
        if isinstance(entry, DatasetSource):
            datasets.append(_dataset_file(entry))
            continue
        try:
            fs, path = reach(entry)
            for file in _expand(fs, path.rstrip("/"), format, f"{key}: {entry}"):
                found.setdefault(f"{fs.protocol}{file}", (fs, file))
        except (ImportError, ValueError) as error:
            raise ConfigError(
                f"{key}: {entry}: cannot open this location ({_said(error)}); check the address"
            ) from error
        except OSError as error:
            raise DataError(
                f"{key}: {entry}: cannot read it ({error.strerror or error}); check path and rights"
            ) from error
        except DistillError:
            raise
        except Exception as error:  # each store's library has exceptions of its own
            raise DataError(
                f"{key}: {entry}: cannot read it ({_said(error)}); check address and credentials"
            ) from error
    if not found and not datasets:
        raise DataError(f"{key}: names no file; give a file, a glob or a folder")
    labels = _labels([path for _, path in found.values()])
    files = [
        _source_file(fs, path, label, format, key) for (fs, path), label in zip(found.values(), labels, strict=True)
    ]
    return files + datasets


@contextlib.contextmanager
def held_still(files: Sequence[SourceFile]) -> Iterator[None]:
    """Refuse files on a disk that change while the block reads them: half of the rows would be of another file.

    Raises:
        DataError: one did, whatever else is wrong with it by now.
    """
    try:
        yield
    except InputError:
        _require_unchanged(files)
        raise
    _require_unchanged(files)


def _require_unchanged(files: Sequence[SourceFile]) -> None:
    for file in files:
        if file.fs is None or not _is_local(file.fs):
            continue
        try:
            is_same = _source_file(file.fs, file.path, file.label, file.format, "") == file
        except (OSError, DataError):
            is_same = False
        if not is_same:
            raise DataError(f"{file.url}: changed while it was read; run the same command again when it is whole")


def _dataset_file(source: DatasetSource) -> SourceFile:
    label = f"{source.dataset}/{source.split}"
    return SourceFile(None, label, label, "dataset", 0, load_dataset(source)._fingerprint, source)


def load_dataset(source: DatasetSource) -> Any:
    """A split of a data set: downloaded where a network allows, or read from a folder.

    Raises:
        DataError: there is none with this name, configuration or split.
    """
    return _load_dataset(source.dataset, source.config, source.split, source.revision)


@functools.cache
def _load_dataset(name: str, config: str | None, split: str, revision: str | None) -> Any:
    import datasets  # heavy, and needed by nothing else

    datasets.disable_progress_bars()
    folder = Path(name)
    try:
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():  # from save_to_disk
            saved = datasets.load_from_disk(name)
            return saved[split] if isinstance(saved, datasets.DatasetDict) else saved
        return datasets.load_dataset(name, config, split=split, revision=revision)
    except Exception as error:  # the library, its reader of the format, and the network's have exceptions of their own
        raise DataError(
            f"dataset: {name}, split {split}: cannot load it ({_said(error)}); check the name, "
            "`config` and `split`, and that there is a network, or give a folder"
        ) from error


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"


def _expand(fs: Any, path: str, format: Format, where: str) -> list[str]:
    """The data files that one entry of a source names."""
    if fs.exists(path):  # before the glob: a file may be called "a[1].jsonl"
        if not fs.isdir(path) or path.endswith(".lance"):
            return [path]
        if _is_saved(fs, path):
            raise DataError(f"{where}: a saved data set (of datasets' save_to_disk); write {{dataset: {path}}}")
        files = _data_files(fs, sorted(fs.find(path)), path, format)
        if not files:
            raise DataError(f"{where}: no data file in this folder; known endings: {_known_endings()}")
        return files
    if any(character in path for character in "*?["):
        matches = sorted(fs.glob(path))
        folders = [match for match in matches if not match.endswith(".lance") and fs.isdir(match)]
        files = _data_files(fs, [match for match in matches if match not in folders], "", format)
        if files:
            return files
        problem = (
            f"the glob matches only {some_names(matches)}, no data file" if matches else "no file matches this glob"
        )
        raise DataError(f"{where}: {problem}{neighbours(fs, path)}")
    raise DataError(f"{where}: no such file{neighbours(fs, path)}")


def _is_saved(fs: Any, folder: str) -> bool:
    """Whether `datasets` has written this folder: its .json files are no rows, and the rows are in Arrow files."""
    names = {posixpath.basename(str(path)) for path in fs.ls(folder, detail=False)}
    return "dataset_dict.json" in names or {"state.json", "dataset_info.json"} <= names


def _data_files(fs: Any, paths: Sequence[str], root: str, format: Format) -> list[str]:
    """Those that are data by their ending; files inside a .lance folder stand for the folder."""
    kept: dict[str, None] = {}
    for path in paths:
        inside = path[len(root) :].strip("/")
        if any(part.startswith(".") for part in (inside if root else posixpath.basename(path)).split("/")):
            continue
        head, lance, _ = (path + "/").partition(".lance/")
        ending = _format_of(path)
        if lance:
            kept[head + ".lance"] = None
        elif ending == format or (ending is None) != (format == "auto"):
            kept[path] = None
    return list(kept)


def _source_file(fs: Any, path: str, label: str, format: Format, key: str) -> SourceFile:
    kind = _format_of(path) if format == "auto" else format
    if kind is None:
        raise DataError(
            f"{key}: {path}: unknown ending; known are {_known_endings()}; or say what it is in data.format"
        )
    if kind == "lance":
        return SourceFile(fs, path, label, kind, 0, _lance_version(fs, path))
    info = fs.info(path)
    version = next(
        (info[name] for name in ("ETag", "etag", "md5Hash", "mtime", "LastModified", "created") if name in info),
        "",
    )
    return SourceFile(fs, path, label, kind, int(info.get("size") or 0), str(version))


def _lance_version(fs: Any, path: str) -> str:
    """Lance writes a manifest per version; the newest one's name and time name the state."""
    try:
        found = fs.ls(posixpath.join(path, "_versions"), detail=True)
    except FileNotFoundError as error:
        raise DataError(f"{path}: not a Lance data set (it has no _versions folder); check the path") from error
    manifests = sorted((str(i.get("mtime") or i.get("LastModified") or ""), i["name"]) for i in found)
    return repr(manifests[-1]) if manifests else ""


def _format_of(path: str) -> str | None:
    """Format by ending; `.gz` counts only behind a text format, and that of a reader of another package."""
    name = path.removesuffix(".gz")
    ending = os.path.splitext(name)[1].lower()
    format = FORMAT_BY_ENDING.get(ending)
    if format is None and ending[1:] in plugins.names(plugins.Group.READERS):
        return ending[1:]
    return format if name == path or format in TEXT_FORMATS else None


def _labels(paths: Sequence[str]) -> list[str]:
    """Names that tell the files apart: relative to the folder that they share."""
    shared = posixpath.commonprefix([posixpath.dirname(path) + "/" for path in paths]).rpartition("/")[0]
    return [path[len(shared) :].lstrip("/") for path in paths]


def _known_endings() -> str:
    return ", ".join([*FORMAT_BY_ENDING, *(f".{name}" for name in plugins.names(plugins.Group.READERS))])


def _is_local(fs: Any) -> bool:
    return "file" in ((fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol)
