"""Why vLLM's process died, out of its log."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from distill_ray.engines.last_words import died, last_error, last_words

HEAD = "(EngineCore pid=7124) ERROR 11-21 08:13:46 [core.py:1512]"
DIED = f"""(MainProcess pid=3994) INFO 11-21 08:13:40 [core.py:90] started
(Worker pid=7201) ERROR 11-21 08:13:46 [multiproc_executor.py:1063] RuntimeError: selected index k out of range
{HEAD}     raise RuntimeError(
{HEAD} RuntimeError: Worker failed with error '...', please check the stack trace above for the root cause
{HEAD} vllm.v1.engine.exceptions.EngineDeadError: EngineCore encountered an issue. See stack trace (above) for the root
(EngineCore pid=7124) INFO 11-21 08:13:46 [multiproc_executor.py:479] [shutdown] Executor: waiting for worker exit
"""


@pytest.mark.parametrize(
    ("log", "said"),
    [
        (DIED, "RuntimeError: selected index k out of range"),
        ("x\ntorch.OutOfMemoryError: CUDA out of memory. Tried\n", "torch.OutOfMemoryError: CUDA out of memory. Tried"),
        ("ValueError: first\nKeyError: 'second'\n", "KeyError: 'second'"),
        (f"RuntimeError: {'x' * 1000}\n", f"RuntimeError: {'x' * 283}..."),
        ("INFO all is well\n    raise RuntimeError(\n", None),
        ("", None),
    ],
)
def test_the_last_error_of_a_log_is_the_one_that_tells_something(log: str, said: str | None, tmp_path: Path) -> None:
    (tmp_path / "engine.log").write_text(log)
    assert last_error(tmp_path / "engine.log") == said


def test_only_the_end_of_a_log_is_read(tmp_path: Path) -> None:
    log = tmp_path / "engine.log"
    log.write_bytes(b"KeyError: 'long ago'\n" + b"\xff ordinary talk\n" * 100_000)
    assert last_error(log) is None


def test_the_closing_message_says_what_the_log_says_before_it_guesses(tmp_path: Path) -> None:
    log = tmp_path / "engine.log"
    log.write_text(DIED)
    message = died(6, log)
    assert message.startswith("vLLM's engine process died 6 times; the last error in its log: RuntimeError: selected")
    assert message.index(str(log)) < message.index("if the machine ran out of memory")
    log.write_text("torch.OutOfMemoryError: CUDA out of memory\n")
    assert "if the machine" not in died(6, log)
    assert "lower engine_kwargs.max_num_seqs" in died(6, log)
    assert "its own messages are in logs/" in died(6, tmp_path / "nowhere.log")


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="where a stream goes is asked of /proc")
def test_a_process_whose_error_stream_is_a_file_finds_its_last_words_there(tmp_path: Path) -> None:
    code = "import sys; print('ValueError: no such thing', file=sys.stderr, flush=True)\n"
    code += "from distill_ray.engines.last_words import last_words; print(last_words())"
    log = tmp_path / "engine.log"
    with log.open("wb") as stream:
        done = subprocess.run(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=stream, text=True, check=True
        )
    assert done.stdout == f"ValueError: no such thing ({log})\n"


def test_without_a_file_there_are_no_last_words() -> None:
    code = "from distill_ray.engines.last_words import last_words; print(last_words())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "None\n"
    assert last_words(Path("/nowhere/engine.log")) is None
