"""Ctrl-C that lands where Python swallows it."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import os, signal, threading, time
from distill_ray.pipeline import interrupts

class Swallows:
    def __del__(self):
        os.kill(os.getpid(), signal.{signal})
        time.sleep(0.05)

def watch():
    while True:
        time.sleep(0.2)
        interrupts.insist()

interrupts.install()
try:
    Swallows()
    print("swallowed", flush=True)
    threading.Thread(target=watch, daemon=True).start()
    time.sleep(20)
    print("lost")
except KeyboardInterrupt:
    print("came again")
"""


def test_an_interrupt_that_a_destructor_swallows_comes_again() -> None:
    for name in ("SIGINT", "SIGTERM"):
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT.format(signal=name)], capture_output=True, text=True, timeout=60, check=True
        )
        assert done.stdout.split("\n")[:2] == ["swallowed", "came again"]
