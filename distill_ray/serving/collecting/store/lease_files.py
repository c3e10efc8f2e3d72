"""The lease of a store that is a folder or in a bucket: numbered files that nobody changes; the last one counts.

    URL/pairs_lease/00000000000000000042.json

A swap makes the next file, which only one can: with a hard link in a folder, with a conditional PUT in a bucket (S3 and
what speaks like it; Lance asks for the same two). Files that are long out of date are removed, so somebody who slept
in the middle of a swap may make a number again that is gone. Nobody ever reads it, and he sees that when he looks.

A Lance dataset would not do, as tried with 14.0: of processes that create one at once two may be told that they did, a
late commit is checked against those versions only that no clean-up has removed (lance-format/lance#3718): six
processes that swapped and cleaned up left two rows, and two winners.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
from collections.abc import Iterator
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem
from pydantic import ValidationError

from distill_ray.errors import StoreError, first_line
from distill_ray.serving.collecting.store.base import LEASE, Lease

KEPT_FILES = 100


class LeaseFiles:
    """A lease in a folder of its own, which comes into being with the first swap.

    Args:
        url: of the folder.
    """

    def __init__(self, url: str) -> None:
        self._url = url

    def read(self) -> Lease:
        """See `PairStore.lease`."""
        with self._translated():
            return self._read(self._numbers())

    def swap(self, before: Lease, after: Lease) -> None:
        """See `PairStore.swap_lease`."""
        with self._translated():
            numbers = self._numbers()
            if self._read(numbers) != before:
                return
            with contextlib.suppress(FileExistsError):  # somebody else was faster
                self._make(numbers[-1] + 1 if numbers else 1, LEASE.dump_json(after))
            for number in numbers[:-KEPT_FILES]:
                with contextlib.suppress(FileNotFoundError):
                    self._fs.rm_file(self._path(number))

    @property
    def _fs(self) -> Any:
        return fsspec.core.url_to_fs(self._url)[0]

    @property
    def _folder(self) -> str:
        return fsspec.core.url_to_fs(self._url)[1]

    def _numbers(self) -> list[int]:
        self._fs.invalidate_cache()
        try:
            names = [os.path.basename(path) for path in self._fs.ls(self._folder, detail=False)]
        except FileNotFoundError:
            return []
        return sorted(int(name[:20]) for name in names if re.fullmatch(r"[0-9]{20}\.json", name))

    def _read(self, numbers: list[int]) -> Lease:
        if not numbers:
            return Lease()
        content = self._fs.cat_file(self._path(numbers[-1]))
        try:
            return LEASE.validate_json(content)
        except ValidationError as error:
            raise StoreError(
                f"{self._url}/{numbers[-1]:020d}.json: damaged, so nobody knows who is at work on the store of pairs; "
                "delete it while no flywheel runs"
            ) from error

    def _path(self, number: int) -> str:
        return f"{self._folder}/{number:020d}.json"

    def _make(self, number: int, content: bytes) -> None:
        """Write a file, whole or not at all. Raises FileExistsError: it is there."""
        if not isinstance(self._fs, LocalFileSystem):
            self._fs.pipe_file(self._path(number), content, mode="create")
            return
        os.makedirs(self._folder, exist_ok=True)
        scratch = f"{self._folder}/.{secrets.token_hex(8)}"
        try:
            with open(scratch, "xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.link(scratch, self._path(number))
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(scratch)

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except StoreError:
            raise
        except Exception as error:  # a file system's OSError, an object store's client its own
            why = first_line(error)
            raise StoreError(
                f"{self._url}: cannot use the lease of the store of pairs ({why}); check serve.collect.store, the "
                "folder's permissions and the disk's space"
            ) from error
