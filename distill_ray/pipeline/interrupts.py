"""Ctrl-C that is not lost.

Python raises KeyboardInterrupt wherever the main thread happens to be, and in a callback or a destructor of a library
it is swallowed. So it is remembered, and whoever watches a long wait from another thread asks again.
"""

from __future__ import annotations

import signal
import threading

_pressed = threading.Event()


def install() -> None:
    """Answer Ctrl-C and SIGTERM with a remembered KeyboardInterrupt. From the main thread."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)


def is_pressed() -> bool:
    """Whether this process was told to stop."""
    return _pressed.is_set()


def insist() -> None:
    """Interrupt the main thread again if it was told to stop. From a thread that runs while the work goes on.

    With a real signal, to that very thread: nothing less ends a sleep or a system call that it waits in.
    """
    if _pressed.is_set():
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)


def _interrupt(*_: object) -> None:
    _pressed.set()
    raise KeyboardInterrupt
