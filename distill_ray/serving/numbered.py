"""Numbered files that are made once and never changed: what several writers without a lock agree on. No Ray.

    URL/00000000000000000042.json

Only one can make a file of a number: with a hard link in a folder, with a conditional PUT in a bucket (S3 and what
speaks like it; Lance asks for the same two). A file is whole as soon as it is there.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
from collections.abc import Sequence
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from distill_ray.object_store import reach

_NAME = re.compile(r"([0-9]{20})\.json")
_ONE_REQUEST: dict[str, Any] = {"start": 0}  # s3fs asks for the size of a file first that it is to read as a whole


class NumberedFiles:
    """A folder of its own, which comes into being with the first file.

    Errors are those of the file system, an OSError or whatever an object store's client has: who knows what the files
    are for says what to do.

    Args:
        url: of the folder, local or in a bucket.
    """

    def __init__(self, url: str) -> None:
        self._url = url

    def name(self, number: int) -> str:
        """Where a file is, for people."""
        return f"{self._url}/{number:020d}.json"

    def numbers(self) -> list[int]:
        """Of the files there are, ascending. A listing, so not for every second."""
        self._fs.invalidate_cache()
        try:
            names = [os.path.basename(path) for path in self._fs.ls(self._folder, detail=False)]
        except FileNotFoundError:
            return []
        return sorted(int(found[1]) for found in map(_NAME.fullmatch, names) if found)

    def read(self, number: int) -> bytes | None:
        """A file; None: it is not there. One request."""
        try:
            return self._fs.cat_file(self._path(number), **_ONE_REQUEST)
        except FileNotFoundError:
            return None

    def read_all(self, numbers: Sequence[int]) -> list[bytes]:
        """Several files, from a bucket many at a time. Raises FileNotFoundError."""
        paths = [self._path(number) for number in numbers]
        found = self._fs.cat(paths, **_ONE_REQUEST) if paths else {}
        return [found[path] for path in paths]

    def make(self, number: int, content: bytes) -> bool:
        """Make a file, whole or not at all.

        Args:
            number: of it.
            content: that nobody else makes; so it is known for one's own although a request that seemed to fail, and
                was sent again, made it.

        Returns:
            Whether it is there with this content; False: somebody else was faster.
        """
        try:
            if isinstance(self._fs, LocalFileSystem):
                return self._link(number, content)
            self._fs.pipe_file(self._path(number), content, mode="create")
        except OSError as error:  # also what a bucket says where two do it at once
            found = self.read(number)
            if found is None and not isinstance(error, FileExistsError):
                raise
            return found == content
        return True

    def remove(self, number: int) -> None:
        """One that is gone is fine."""
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(self._path(number))

    def _link(self, number: int, content: bytes) -> bool:
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
        return True

    @property
    def _fs(self) -> Any:
        return reach(self._url)[0]

    @property
    def _folder(self) -> str:
        return reach(self._url)[1]

    def _path(self, number: int) -> str:
        return f"{self._folder}/{number:020d}.json"
