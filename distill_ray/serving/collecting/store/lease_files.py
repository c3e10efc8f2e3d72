"""The lease of a store that is a folder or in a bucket: numbered files that nobody changes; the last one counts.

    URL/pairs_lease/00000000000000000042.json

A swap makes the next file, which only one can (`numbered.py`). Files that are long out of date are removed, so somebody
who slept in the middle of a swap may make a number again that is gone. Nobody ever reads it, and he sees that when he
looks.

A Lance dataset would not do, as tried with 14.0: of processes that create one at once two may be told that they did, a
late commit is checked against those versions only that no clean-up has removed (lance-format/lance#3718): six
processes that swapped and cleaned up left two rows, and two winners.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from pydantic import ValidationError

from distill_ray.errors import StoreError, first_line
from distill_ray.object_store import ObjectStoreError
from distill_ray.serving.collecting.store.base import LEASE, Lease
from distill_ray.serving.numbered import NumberedFiles

KEPT_FILES = 100


class LeaseFiles:
    """A lease in a folder of its own, which comes into being with the first swap.

    Args:
        url: of the folder.
    """

    def __init__(self, url: str) -> None:
        self._url, self._files = url, NumberedFiles(url)

    def read(self) -> Lease:
        """See `PairStore.lease`."""
        with self._translated():
            return self._read(self._files.numbers())

    def swap(self, before: Lease, after: Lease) -> None:
        """See `PairStore.swap_lease`."""
        with self._translated():
            numbers = self._files.numbers()
            if self._read(numbers) != before:
                return
            self._files.make(numbers[-1] + 1 if numbers else 1, LEASE.dump_json(after))
            for number in numbers[:-KEPT_FILES]:
                self._files.remove(number)

    def _read(self, numbers: list[int]) -> Lease:
        if not numbers:
            return Lease()
        [content] = self._files.read_all(numbers[-1:])
        try:
            return LEASE.validate_json(content)
        except ValidationError as error:
            raise StoreError(
                f"{self._files.name(numbers[-1])}: damaged, so nobody knows who is at work on the store of pairs; "
                "delete it while no flywheel runs"
            ) from error

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except StoreError:
            raise
        except ObjectStoreError as error:
            raise StoreError(
                f"serve.collect.store: {self._url}: cannot use the lease of the store of pairs: {error}"
            ) from error
        except Exception as error:  # a file system's OSError, an object store's client its own
            why = first_line(error)
            raise StoreError(
                f"{self._url}: cannot use the lease of the store of pairs ({why}); check serve.collect.store, the "
                "folder's permissions and the disk's space"
            ) from error
