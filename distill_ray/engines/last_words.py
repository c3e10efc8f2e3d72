"""Why an engine's own process died: what it said last, in the log that this process's error stream goes to.

vLLM's `EngineDeadError` only says that its process is gone. The reason is in the lines before, which the stage has sent
to a file (`pipeline.cluster.redirect_output`).

    (Worker pid=7) ERROR 11-21 08:13:46 [executor.py:9] RuntimeError: no room    ->    "RuntimeError: no room"
"""

from __future__ import annotations

import os
import re
from pathlib import Path

READ_BYTES = 256 << 10  # from the end: the traces of several processes
SHOWN_CHARS = 300
_ERROR = re.compile(r"(?:^|[\s\]])((?:\w+\.)*\w*(?:Error|Exception): \S.*)$")
# They say that another error happened before them.
_EMPTY_WORDS = re.compile(r"EngineDeadError|EngineGenerateError|CancelledError|stack trace (\(above\)|above)")


def last_words(log: Path | None = None) -> str | None:
    """The last error of the log with the log's path: "RuntimeError: no room (RUN/logs/engine-7.log)"; None without one.

    Args:
        log: default: the file that this process's error stream goes to.
    """
    log = log or _error_stream()
    found = last_error(log) if log is not None else None
    return f"{found} ({log})" if found is not None else None


def died(times: int, log: Path | None = None) -> str:
    """The message where starting it again does not help: the reason it gave, and only then a guess."""
    said = last_words(log)
    why = f"the last error in its log: {said}" if said is not None else "its own messages are in logs/"
    guess = "" if said is not None and "memory" in said.lower() else "if the machine ran out of memory, "
    advice = f"{guess}lower engine_kwargs.max_num_seqs or max_model_len"
    return f"vLLM's engine process died {times} times; {why}; {advice}"


def last_error(log: Path) -> str | None:
    """The text of the last error in a log that is not only the echo of another."""
    try:
        with log.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - READ_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return None
    for line in reversed(lines):
        match = _ERROR.search(line)
        if match is not None and not _EMPTY_WORDS.search(line):
            text = match.group(1).strip()
            return text if len(text) <= SHOWN_CHARS else f"{text[: SHOWN_CHARS - 3]}..."
    return None


def _error_stream() -> Path | None:
    """The regular file behind file descriptor 2, where the system tells (Linux)."""
    try:
        path = Path(os.readlink("/proc/self/fd/2"))
    except OSError:
        return None
    return path if path.is_file() else None
