"""Text out of a file: in pieces, in lines, as the elements of a JSON array; never the whole file at once."""

from __future__ import annotations

import codecs
import contextlib
import gzip
import json
import re
from collections.abc import Iterator
from typing import Any

from distill_ray.errors import DataError
from distill_ray.pipeline.planning.sources import SourceFile

CHUNK_BYTES = 1 << 20


@contextlib.contextmanager
def opened(file: SourceFile) -> Iterator[Any]:
    """Open a file for its bytes, unpacked."""
    with file.fs.open(file.path, "rb") as raw:
        yield gzip.GzipFile(fileobj=raw) if file.is_compressed else raw


def chunks(file: SourceFile, encoding: str) -> Iterator[str]:
    """The text in pieces of about 1 MB.

    Raises:
        DataError: not text in this encoding; names the byte, counted from the file's start.
    """
    is_utf8 = encoding.lower().replace("_", "-") in ("utf-8", "utf8")
    decoder = codecs.getincrementaldecoder("utf-8-sig" if is_utf8 else encoding)()
    num_read = 0
    with opened(file) as raw:
        while True:
            data = raw.read(CHUNK_BYTES)
            num_read += len(data)
            try:
                yield decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                offset = num_read - len(error.object) + error.start
                raise DataError(
                    f"{file.url}: not {encoding} text (byte {offset} is 0x{error.object[error.start]:02x}); "
                    "save it as UTF-8, or name its encoding in data.encoding (latin-1, cp1252, utf-16, ...)"
                ) from error
            if not data:
                return


def lines(file: SourceFile, encoding: str) -> Iterator[str]:
    """Lines with their ends. Split at \\n only: JSON and CSV text may hold the other line ends of Unicode."""
    pending: list[str] = []
    for text in chunks(file, encoding):
        head, *tail = text.split("\n")
        pending.append(head)
        for piece in tail:
            yield "".join(pending) + "\n"
            pending = [piece]
    if last := "".join(pending):
        yield last


def array_elements(file: SourceFile, encoding: str) -> Iterator[Any]:
    """The elements of a file that is one JSON array.

    Raises:
        DataError: broken JSON. What follows cannot be told apart any more, so it is the file that is bad.
    """
    cursor = _Cursor(chunks(file, encoding))
    num_done = 0

    def broken(why: object) -> DataError:
        return DataError(
            f"{file.url}: broken JSON array after element {num_done} ({why}); mend it, or write one object per line"
        )

    if cursor.take() != "[":
        raise broken("it does not start with [")
    if cursor.peek() == "]":
        cursor.take()
    else:
        mark = ","
        while mark == ",":
            try:
                value = cursor.value()
            except (ValueError, RecursionError) as error:
                raise broken(error) from error
            yield value
            num_done += 1
            mark = cursor.take()
        if mark != "]":
            raise broken(f"expected , or ] but found {mark or 'the end of the file'}")
    if cursor.peek():
        raise broken(f"{cursor.peek()} behind the closing ]")


def objects(file: SourceFile, encoding: str) -> Iterator[Any]:
    """JSON values one after the other, pretty-printed or not, with nothing but white space between them.

    Raises:
        DataError: broken JSON. What follows cannot be told apart any more, so it is the file that is bad.
    """
    cursor = _Cursor(chunks(file, encoding))
    num_done = 0
    while cursor.peek():
        try:
            value = cursor.value()
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{file.url}: broken JSON after object {num_done} ({error}); mend it, or write one object per line"
            ) from error
        yield value
        num_done += 1


class _Cursor:
    """A position in JSON text that arrives in pieces."""

    def __init__(self, pieces: Iterator[str]) -> None:
        self._pieces = pieces
        self._text = ""
        self._position = 0

    def peek(self) -> str:
        """The next character that is not white space; "" at the end."""
        while True:
            match = _NOT_SPACE.search(self._text, self._position)
            self._position = match.start() if match else len(self._text)
            if self._position < len(self._text):
                return self._text[self._position]
            if not self._fill():
                return ""

    def take(self) -> str:
        """Like `peek`, and step over it."""
        character = self.peek()
        self._position += len(character)
        return character

    def value(self) -> Any:
        """Decode one JSON value. Raises ValueError or RecursionError where there is none."""
        self.peek()
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._position)
            except (ValueError, RecursionError):
                if not self._fill():
                    raise
                continue
            # "1" may be the start of "1.5e3" in the next piece ("" too is in the string below).
            if self._text[end : end + 1] not in "0123456789.eE+-" or not self._fill():
                self._position = end
                return value

    def _fill(self) -> bool:
        """Double the text at hand: a huge value is not decoded once per piece. False at the file's end."""
        kept = self._text[self._position :]
        parts, size = [kept], 0
        for piece in self._pieces:
            parts.append(piece)
            size += len(piece)
            if size >= max(1, len(kept)):
                break
        self._text, self._position = "".join(parts), 0
        return size > 0


_DECODER = json.JSONDecoder()
_NOT_SPACE = re.compile(r"\S")
