"""The spool: pairs on this machine's disk until the store has them. Written before a response ends.

    append -> NAME.spool (a line each: checksum, JSON) -> take -> [the store] -> ack -> the file is deleted

A process has files of its own, so nobody waits for anybody. It holds each of them locked (flock), and the kernel lets
go of the lock when the process ends, however it ends: whoever gets the lock then has inherited the file. What was
appended is in the kernel when `append` returns, so kill -9 loses nothing; a power cut may lose the last seconds.
What was taken and not acked when a process died is taken again: the store adds a pair once.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import threading
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from distill_ray.errors import SpoolError, SpoolFull
from distill_ray.serving.collecting.pairs import Pair, pair_from_json, pair_to_json

SUFFIX = ".spool"
FILES_PER_SPOOL = 8  # disk space comes back a file at a time
BATCH_BYTES = 16 * 2**20  # of pairs taken together: they are sent as one message


@dataclass(eq=False)
class _File:
    """A file of this process; locked as long as `fd` is open."""

    path: Path
    fd: int
    size: int = 0
    acked: int = 0  # bytes from its beginning that the store has
    is_open: bool = True  # more may be appended


@dataclass(frozen=True)
class Batch:
    """Pairs that were taken. `ack` it when the store has them."""

    pairs: list[Pair]
    num_damaged: int  # lines among them that are dropped
    _ends: list[tuple[_File, int]] = field(repr=False)


class Spool:
    """The spool of one process. Any thread may append; one at a time takes and acks.

    Args:
        folder: of the spools of all processes on this machine.
        max_bytes: on disk, inherited files included.

    Raises:
        SpoolError: the folder cannot be used.
    """

    def __init__(self, folder: str | Path, max_bytes: int) -> None:
        self._folder = Path(folder)
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._files: list[_File] = []  # oldest first; the last one may be open
        self.num_damaged = 0
        """Lines dropped because they were torn or changed."""
        with _translated(self._folder, "use this folder as a spool"):
            self._folder.mkdir(parents=True, exist_ok=True)
        self.inherit()

    @property
    def num_bytes(self) -> int:
        """That wait for the store."""
        with self._lock:
            return sum(file.size - file.acked for file in self._files)

    def append(self, pair: Pair) -> None:
        """Keep a pair. When this returns it survives the process.

        Raises:
            SpoolFull: no room; the pair is not kept.
            SpoolError: it cannot be written.
        """
        line = _line(pair)
        with self._lock, _translated(self._folder, "write"):
            if sum(file.size for file in self._files) + len(line) > self._max_bytes:
                raise SpoolFull(
                    f"{self._folder}: {self._max_bytes} bytes wait already; is the store reachable? "
                    "serve.collect.spool_mb says how much may wait"
                )
            file = self._open_file(len(line))
            try:
                written = os.write(file.fd, line)
                if written < len(line):  # as much as went on the disk
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                file.is_open = False  # if its torn end cannot be cut off, it is dropped when it is read
                os.ftruncate(file.fd, file.size)
                file.is_open = True
                raise
            file.size += len(line)

    def _open_file(self, num_bytes: int) -> _File:
        """Where to append, with room for so many bytes or empty."""
        last = self._files[-1] if self._files else None
        if last is not None and last.is_open and (last.size + num_bytes <= self._max_bytes / FILES_PER_SPOOL):
            return last
        name = f"{time.time_ns()}-{secrets.token_hex(4)}"  # sorted by name, the oldest comes first
        temporary = self._folder / f".tmp-{name}"
        fd = os.open(temporary, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_EXCL, 0o600)
        path = self._folder / f"{name}{SUFFIX}"
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            os.rename(temporary, path)  # under its name only when it is locked: nobody inherits from the living
        except OSError:
            os.close(fd)
            temporary.unlink()
            raise
        if last is not None:
            last.is_open = False
        self._files.append(_File(path, fd))
        return self._files[-1]

    def inherit(self) -> int:
        """Take over the files of processes that have ended; returns how many."""
        with self._lock, _translated(self._folder, "read"):
            own = {file.path for file in self._files}
            found = [path for path in sorted(self._folder.glob(f"*{SUFFIX}")) if path not in own]
            files = [file for path in found if (file := _inherited(path)) is not None]
            self._files[:0] = files
            return len(files)

    def take(self, max_pairs: int) -> Batch:
        """The oldest pairs that wait; the same ones again until they are acked. An empty batch: nothing waits.

        Raises:
            SpoolError: a file cannot be read.
        """
        with self._lock, _translated(self._folder, "read"):
            files = [(file, file.acked, file.size) for file in self._files]
        pairs: list[Pair] = []
        ends: list[tuple[_File, int]] = []
        num_damaged = num_bytes = 0
        for file, start, size in files:
            ends.append((file, start))
            with _translated(file.path, "read"):
                for line, end in _lines(file.fd, start, size):
                    if len(pairs) == max_pairs or num_bytes >= BATCH_BYTES:
                        return Batch(pairs, num_damaged, ends)
                    pair = _pair(line)
                    if pair is None:
                        num_damaged += 1
                    else:
                        pairs.append(pair)
                    num_bytes += len(line)
                    ends[-1] = (file, end)
        batch = Batch(pairs, num_damaged, ends)
        if not pairs:
            self.ack(batch)  # nothing but damage, or nothing at all: nobody else will
        return batch

    def ack(self, batch: Batch) -> None:
        """The store has these: their room is free again."""
        with self._lock:
            self.num_damaged += batch.num_damaged
            for file, end in batch._ends:
                file.acked = max(file.acked, end)
                if file.acked == file.size and file in self._files:
                    self._drop(file)

    def _drop(self, file: _File) -> None:
        self._files.remove(file)
        with contextlib.suppress(OSError):  # still there, it is read again by who inherits it: once more, not lost
            file.path.unlink()
        os.close(file.fd)

    def close(self) -> None:
        """Let go of the files; what waits is inherited by another process or by the next one."""
        with self._lock:
            for file in self._files:
                os.close(file.fd)
            self._files = []


def _inherited(path: Path) -> _File | None:
    """The file, locked; None if its process lives, or somebody was faster."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_APPEND)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(fd).st_nlink:  # not deleted between open and lock
            return _File(path, fd, size=os.fstat(fd).st_size, is_open=False)
    except BlockingIOError:
        pass
    os.close(fd)
    return None


def _line(pair: Pair) -> bytes:
    data = pair_to_json(pair).encode()  # JSON has no raw line break
    return b"%08x %s\n" % (zlib.crc32(data), data)


def _pair(line: bytes) -> Pair | None:
    """None: torn or changed."""
    checksum, _, data = line.partition(b" ")
    if checksum != b"%08x" % zlib.crc32(data):
        return None
    try:
        return pair_from_json(data)
    except ValueError:
        return None


def _lines(fd: int, start: int, end: int) -> Iterator[tuple[bytes, int]]:
    """The lines between two places of a file, each with the place behind it. The last one may lack its line break."""
    rest = b""
    place = start
    while start < end:
        data = os.pread(fd, min(2**20, end - start), start)
        if not data:
            break
        start += len(data)
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            place += len(line) + 1
            yield line, place
    if rest:
        yield rest, start


@contextlib.contextmanager
def _translated(path: Path, what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        kind = SpoolFull if error.errno in (errno.ENOSPC, errno.EDQUOT) else SpoolError
        raise kind(
            f"{path}: cannot {what} ({error.strerror or error}); pairs are not collected until that is mended"
        ) from error
