"""Ctrl-C that lands where Python swallows it."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

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


COMMAND = """
import os, signal, sys
import distill_ray.flywheel.cli as flywheel
from distill_ray.cli import main

def interrupted(*_):
    try:
        os.kill(os.getpid(), signal.{signal})
    except KeyboardInterrupt:
        {then}

flywheel.load_config = interrupted
sys.argv = ["distill-ray", "flywheel", "run", "config.yaml"]
main()
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("then", ["raise", 'raise ImportError("initialization failed")'])
def test_a_command_that_is_told_to_stop_says_one_line_whatever_comes_of_it(
    name: str, then: str, tmp_path: Path
) -> None:
    script = COMMAND.format(signal=name, then=then)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=900, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "stopped; the same command goes on\n")
    assert list(tmp_path.iterdir()) == []
