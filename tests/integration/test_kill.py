"""The driver is killed or interrupted as a user's would be: a process of its own against a server that outlives it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.waste import CountingServer, kill_driver, outcome, write_config


def test_kill_9_of_the_driver_costs_no_more_than_what_was_in_flight_or_unflushed() -> None:
    result = kill_driver(rows=400, kills=1, seed=1)
    assert result["kills"] == 1
    assert (result["lost"], result["doubled"], result["rejected"]) == (0, 0, 0)
    assert result["wasted"] <= result["at_risk"]


@pytest.mark.slow
def test_ctrl_c_leaves_a_resumable_folder_and_says_how_to_go_on(tmp_path: Path) -> None:
    server = CountingServer(latency_s=0.2)
    config = write_config(
        tmp_path,
        200,
        {
            "type": "openai",
            "model": "scripted",
            "base_url": f"http://127.0.0.1:{server.port}/v1",
            "api_key_env": None,
            "max_concurrency": 8,
        },
    )
    command = [sys.executable, "-m", "distill_ray", "generate", str(config), "--run-dir", str(tmp_path / "run")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 900
    while len(server.ended) < 20 and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    os.kill(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=600)
    assert process.returncode == 130
    assert "run the same command again" in stderr
    assert "Traceback" not in stderr
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    assert outcome(tmp_path / "run", 200) == {"lost": 0, "doubled": 0, "rejected": 0}
    assert len(server.began) - 200 <= 8 + 8 * 2  # in flight, and what 0.2 s answer at this latency
