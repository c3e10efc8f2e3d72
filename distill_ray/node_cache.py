"""Folders on this node's disk that are made once and then used by all its processes.

    $DISTILL_RAY_CACHE or ~/.cache/distill-ray

A folder appears whole or not at all, made by one process while others wait for it. All of it may be deleted while
nothing runs; it is made again.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from distill_ray.errors import first_line
from distill_ray.object_store import reach

AT_ONCE = 4  # files: s3fs holds up to ten parts of 50 MB of each, and fsspec by itself fetches more than a hundred


def cache_root() -> Path:
    """Where all of it is."""
    return Path(os.environ.get("DISTILL_RAY_CACHE") or "~/.cache/distill-ray").expanduser()


def filled_once(folder: Path, make: Callable[[Path], object]) -> Path:
    """The folder, filled by `make` if no process of this node has done so yet.

    Raises:
        OSError: the cache cannot be written; and what `make` raises. Then there is no folder.
    """
    if folder.is_dir():  # then it is whole, perhaps on a disk that nobody may write to
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f"{folder.name}.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # let go of by the kernel, however this process ends
        if not folder.is_dir():
            unfinished = folder.with_name(f".tmp-{folder.name}")
            shutil.rmtree(unfinished, ignore_errors=True)  # what a killed process left
            unfinished.mkdir()
            try:
                make(unfinished)
                unfinished.rename(folder)
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def fetched(
    url: str,
    mark: str,
    *,
    wanted: Callable[[str], bool] = lambda name: True,
    check: Callable[[Path], object] = lambda folder: None,
) -> Path:
    """A folder of an object store as a folder here, fetched once per node. Nobody may change anything in it.

    Args:
        url: of the folder.
        mark: another one means that something else is there now, or other files of it are wanted.
        wanted: whether a file (by its path in the folder) is fetched.
        check: looks at the copy before anybody uses it, and raises what is wrong.

    Raises:
        OSError: there is no room, or whatever the store's client has for its errors; and what `check` raises.
    """

    def fetch(folder: Path) -> None:
        fs, base = reach(url)
        fs.invalidate_cache()
        names = [path.removeprefix(base.rstrip("/") + "/") for path in fs.find(base)]
        names = [name for name in names if wanted(name)]
        if outside := [name for name in names if ".." in name.split("/")]:
            raise ValueError(f"{url}: {outside[0]} is no name of a file in it")
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if names:
            files = [f"{base}/{name}" for name in names], [str(folder / name) for name in names]
            fs.get(*files, batch_size=AT_ONCE)
        check(folder)

    return filled_once(_place(url, mark), fetch)


def not_copied(place: str, error: Exception) -> str:
    """For people: why `fetched` failed, where it is the disk's fault or the store's, and what to do."""
    return (
        f"{place} cannot be copied to this node ({first_line(error)}); check the store, and the room in "
        f"{cache_root()} (DISTILL_RAY_CACHE names another place)"
    )


def is_fetched(url: str, mark: str) -> bool:
    """Whether `fetched` has it here already."""
    return _place(url, mark).is_dir()


def all_fetched() -> list[Path]:
    """Every folder that `fetched` keeps here, of whatever place. Its name begins with that of what it is a copy of."""
    return [path for path in (cache_root() / "fetched").glob("[!.]*") if path.is_dir()]


def forget(url: str, mark: str) -> None:
    """Drop what `fetched` keeps here, so that it is fetched again."""
    shutil.rmtree(_place(url, mark), ignore_errors=True)


def _place(url: str, mark: str) -> Path:
    digest = hashlib.blake2b(f"{url} {mark}".encode(), digest_size=10).hexdigest()
    return cache_root() / "fetched" / f"{url.rstrip('/').rsplit('/', 1)[-1]}-{digest}"
