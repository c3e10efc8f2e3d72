"""A model that lies in an object store: which files of it count, what tells it from another, its copy on a node.

A folder in Hugging Face format, or one of adapters: its own files, none of its folders. Never fetched are weights in
formats that run code when they are read. Code of the model's own (`*.py`) is, and runs where `trust_remote_code` says
so.

A node fetches a model once, for all its processes (`node_cache.py`); a folder that changed is another model. A hub id
needs none of this: the hub's own cache and its locks are per node too.
"""

from __future__ import annotations

import functools
import hashlib
import posixpath
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from distill_ray.errors import ConfigError, first_line
from distill_ray.node_cache import fetched, not_copied
from distill_ray.object_store import reach

_WEIGHTS = ".safetensors"
_FETCHED = {".jinja", ".json", ".model", ".py", ".tiktoken", ".txt", _WEIGHTS}
_TELLING = {".jinja", ".json", ".model", _WEIGHTS}
_END_BYTES = 1 << 20  # of a file's head and of its tail


def in_store(place: str) -> bool:
    """Whether a model's name is the URL of a folder in a store."""
    return "://" in place


def sizes(url: str, *, key: str) -> dict[str, int]:
    """Names and bytes of the files that count. Raises ConfigError: none is there, or nobody can look."""
    return {name: size for name, size, _ in _listed(url, key)}


def fetched_model(url: str, *, key: str, with_weights: bool = True) -> Path:
    """Its folder on this node; the first who asks waits for the copy.

    Args:
        url: of the folder.
        key: the dotted config key, for messages.
        with_weights: False: configuration and tokenizer are enough.

    Raises:
        ConfigError: there is none, or it cannot be copied to this node.
    """
    mark = _mark(url, key)

    def unchanged(folder: Path) -> None:
        if _mark(url, key) != mark:
            raise ConfigError(f"{key}: {url} changed while it was fetched; run the same command again")

    try:
        return fetched(
            url,
            f"{mark}{'' if with_weights else ' without weights'}",
            wanted=lambda name: _suffix(name) in _FETCHED and (with_weights or _suffix(name) != _WEIGHTS),
            check=unchanged,
        )
    except ConfigError:
        raise
    except Exception as error:  # the disk's, or the store's client's own
        raise ConfigError(f"{key}: {not_copied(url, error)}") from error


def digest_in_store(url: str) -> str:
    """As `digest_on_disk`, and the same for the same files: the ends of each are read."""
    return _digest_in_store(url, _mark(url, "model"))


@functools.lru_cache(maxsize=64)
def _digest_in_store(url: str, mark: str) -> str:
    del mark  # another one: not the same files any more
    fs, base = reach(url.rstrip("/"))

    def reader(name: str) -> Callable[[int, int], bytes]:
        return lambda start, end: fs.cat_file(f"{base}/{name}", start=start, end=end)

    try:
        return _digest((name, size, reader(name)) for name, size, _ in _listed(url, "model"))
    except OSError as error:
        raise ConfigError(f"model: {url}: cannot be read ({first_line(error)}); check the address") from error


def digest_on_disk(folder: Path) -> str:
    """A hash of a model's small files and of the size, head and tail of its weights: cheap even at 100 GB."""

    def reader(file: Path) -> Callable[[int, int], bytes]:
        def read(start: int, end: int) -> bytes:
            with file.open("rb") as stream:
                stream.seek(start)
                return stream.read(end - start)

        return read

    files = [file for file in sorted(folder.iterdir()) if file.suffix in _TELLING]
    return _digest((file.name, file.stat().st_size, reader(file)) for file in files)


def _digest(files: Iterable[tuple[str, int, Callable[[int, int], bytes]]]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for name, size, read in files:
        if _suffix(name) not in _TELLING:
            continue
        digest.update(f"{name}:{size}".encode())
        if size:
            digest.update(read(0, min(size, _END_BYTES)))
        if size > 2 * _END_BYTES:
            digest.update(read(size - _END_BYTES, size))
    return digest.hexdigest()


def _mark(url: str, key: str) -> str:
    """Of what is there now."""
    return hashlib.blake2b(repr(_listed(url, key)).encode(), digest_size=16).hexdigest()


def _listed(url: str, key: str) -> list[tuple[str, int, str]]:
    """Name, bytes, and what changes with the content, by name."""
    try:
        fs, base = reach(url.rstrip("/"))
        fs.invalidate_cache()
        found: list[dict[str, Any]] = fs.ls(base, detail=True)
    except FileNotFoundError as error:
        raise ConfigError(f"{key}: no model at {url}: nothing is there; check the address") from error
    except Exception as error:  # each store's client has exceptions of its own
        raise ConfigError(f"{key}: {url}: cannot look there for a model: {first_line(error)}") from error
    files = [(posixpath.basename(entry["name"]), entry) for entry in found if entry["type"] == "file"]
    version = ("ETag", "etag", "md5Hash", "created", "mtime")
    return sorted(
        (name, int(entry["size"]), str(next((entry[v] for v in version if v in entry), "")))
        for name, entry in files
        if _suffix(name) in _FETCHED
    )


def _suffix(name: str) -> str:
    return posixpath.splitext(name)[1] if "/" not in name else ""
