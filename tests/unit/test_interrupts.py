"""Ctrl-C that lands where Python swallows it."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

SCRIPT = """
import os, signal, threading, time
from distill_ray.pipeline import interrupts

class Swallows:
    def __del__(self):
        os.kill(os.getpid(), signal.{signal})
        time.sleep(0.05)

def watch():
    while True:
        time.sleep(0.1)
        interrupts.insist()

interrupts.install()
try:
    Swallows()
    print("swallowed", flush=True)
    threading.Thread(target=watch, daemon=True).start()
    time.sleep(600)
    print("lost")
except KeyboardInterrupt:
    print("came again")
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_an_interrupt_that_a_destructor_swallows_comes_again_and_ends_a_sleep(name: str) -> None:
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(signal=name)], capture_output=True, text=True, timeout=900, check=True
    )
    assert done.stdout.split("\n")[:2] == ["swallowed", "came again"]
    assert time.monotonic() - started < 300
