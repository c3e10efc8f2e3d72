"""What stands where a file was looked for in vain: the end of the sentence "no such file"."""

from __future__ import annotations

import difflib
import posixpath
from collections.abc import Sequence
from typing import Any

MAX_NAMES_SHOWN = 5


def neighbours(fs: Any, path: str) -> str:
    """The name that was probably meant, or what the folder has (the nearest one that exists).

    Args:
        fs: an fsspec file system.
        path: inside it; nothing is there.
    """
    folder, name = posixpath.split(path)
    while folder and not fs.exists(folder) and posixpath.dirname(folder) != folder:
        folder, name = posixpath.split(folder)
    try:
        names = [posixpath.basename(str(entry).rstrip("/")) for entry in fs.ls(folder or "/", detail=False)]
    except OSError:
        names = []
    names = sorted(entry for entry in names if not entry.startswith("."))
    close = difflib.get_close_matches(name, names, n=1)
    if close:
        return f"; did you mean {posixpath.join(folder, close[0])}?"
    return f"; {folder} has: {some_names(names)}" if names else "; check the path"


def some_names(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - MAX_NAMES_SHOWN} more" if len(names) > MAX_NAMES_SHOWN else ""
    return ", ".join(names[:MAX_NAMES_SHOWN]) + more
