"""Where files are reached, on a disk or in an object store: fsspec's file systems, S3 with a patience of ours.

All that distill-ray itself reads and writes at a URL goes through here. (Lance has a client of its own for its
datasets.)
"""

from __future__ import annotations

import secrets
from typing import Any

import fsspec


class ObjectStoreError(OSError):
    """What a store does not do, and what to do about it; whoever knows what was wanted says that in front."""


def refused(what: str, where: str) -> ObjectStoreError:
    """Nobody with these credentials may do that."""
    return ObjectStoreError(
        f"{what} is refused; these credentials need the rights to list, read, write and delete in {where}: give them "
        "those, or take others"
    )


def try_out(url: str) -> None:
    """Write, list, read and remove a small file at a place: what will be done there.

    Raises:
        Exception: of whatever kind the store's client has; ObjectStoreError of ours.
    """
    fs, folder = reach(url)
    name = f"{folder.rstrip('/')}/.tmp-{secrets.token_hex(8)}"
    fs.pipe_file(name, b"x")
    fs.invalidate_cache()
    fs.ls(folder, detail=False)
    fs.cat_file(name)
    fs.rm_file(name)


def reach(url: str) -> tuple[Any, str]:
    """The file system of a place, and the path in it.

    Args:
        url: a path, or a URL that fsspec knows.

    Raises:
        ImportError: the store's library is not installed.
        ValueError: no such kind of place, or no bucket in it.
    """
    if not url.startswith(("s3://", "s3a://")):
        return fsspec.core.url_to_fs(url)
    if not url.partition("://")[2].partition("/")[0]:
        raise ValueError(f"{url} names no bucket; an address is s3://BUCKET/FOLDER")
    from distill_ray.object_store.s3 import PatientS3  # half a second, for those who need it

    return PatientS3(), str(PatientS3._strip_protocol(url))
