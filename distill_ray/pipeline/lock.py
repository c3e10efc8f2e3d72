"""One process at a time works on a folder: a file that is locked as long as its process lives, however that ends."""

from __future__ import annotations

import datetime
import fcntl
import os
import socket
import time
from pathlib import Path
from typing import TextIO

_LOOK_S = 0.2


class Taken(Exception):
    """Another process has it; the message says which, where and since when."""


def take(path: str | Path, patience_s: float = 0.0) -> TextIO:
    """Lock a file, and say in it who did. Whoever closes the file, or dies, lets go.

    Args:
        path: of the file; its folder is made.
        patience_s: how long to wait for a holder who may be about to end.

    Raises:
        Taken: somebody else holds it.
        OSError: it cannot be written.
    """
    os.makedirs(os.path.dirname(path), exist_ok=True)
    file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 (held open on purpose)
    deadline = time.monotonic() + patience_s
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError as error:
            if time.monotonic() < deadline:
                time.sleep(_LOOK_S)
                continue
            file.seek(0)
            holder = file.read().strip() or "starting"
            file.close()
            raise Taken(holder) from error
    now = datetime.datetime.now().isoformat(timespec="seconds")
    file.truncate(0)
    file.write(f"pid {os.getpid()} on {socket.gethostname()}, started {now}")
    file.flush()
    return file
