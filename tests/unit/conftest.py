"""What several unit tests use."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest

from distill_ray.cli import main


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Runs the command with arguments, in this process; returns its exit status and what it said, in one line."""

    def command(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["distill-ray", *arguments])
        with pytest.raises(SystemExit) as caught:
            main()
        captured = capsys.readouterr()
        return int(caught.value.code or 0), " ".join((captured.out + captured.err).split())

    return command
